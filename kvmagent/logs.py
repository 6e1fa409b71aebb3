"""The agent's log lines: key=value text or JSON, with the task, VM and command that a line belongs to on each.

A thread that works on a task says so with `log_context`; lines of libraries on that thread carry it too.
"""

import json
import logging
import logging.handlers
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from kvmagent.settings import LogSection

_NO_CONTEXT: Mapping[str, str] = MappingProxyType({})
_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=_NO_CONTEXT)


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Put fields (task=, vm=, command=) on every line that this thread logs inside the block."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def start_logging(settings: LogSection) -> None:
    """Send all log lines to standard error, or to a file that may be moved away under the agent (logrotate)."""
    handler: logging.Handler
    handler = logging.handlers.WatchedFileHandler(settings.file) if settings.file else logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if settings.format == "json" else _TextFormatter())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    # A line for each HTTP request and connection says nothing that the task's own lines do not say.
    for noisy in ("urllib3", "cherrypy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def format_fields(**fields: object) -> str:
    """Return `name=value` pairs, each value so quoted that none can pass for two."""
    return " ".join(f"{name}={_quote(str(value))}" for name, value in fields.items())


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        context = format_fields(**_context.get())
        text = f"{_timestamp(record)} {record.levelname} {record.getMessage()}{' ' if context else ''}{context}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context.get(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _quote(value: str) -> str:
    plain = value.isprintable() and not any(character in value for character in ' "=')
    return value if plain else json.dumps(value)
