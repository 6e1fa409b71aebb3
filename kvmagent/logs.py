"""The agent's log lines: key=value text or JSON, each with its task, VM, command and caller.

    log = Log(__name__)
    log.info("step", step="SetVcpus", ms=8.0)

    text   2026-03-01T03:12:45.129Z INFO step step=SetVcpus ms=8.0 task=9f1c vm=db-7 command=HotPlugCpu caller=anonymous
    JSON   {"time": "2026-03-01T03:12:45.129Z", "level": "info", "logger": "kvmagent.tasks.executor",
            "message": "step", "step": "SetVcpus", "ms": 8.0, "task": "9f1c", "vm": "db-7", ...}

A thread that works on a task says so with `log_context`; lines of libraries on that thread carry it too. A value that
could pass for two fields, or for the end of the line, is quoted as JSON is: nothing that comes from outside can make
a line that the agent did not write. A traceback is as many lines, each with the stamp and the fields of its first.
"""

import contextlib
import functools
import json
import logging
import logging.handlers
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context, ContextVar
from io import TextIOWrapper
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import msgspec

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.units import format_ids
from kvmagent.model.urls import shown_field, shown_line
from kvmagent.settings import LogSection

#: What no field may be called: the JSON line has these of its own.
RESERVED = frozenset({"time", "level", "logger", "message", "traceback"})
# What lines that tell of a request or a step have beside its own fields.
_TAKEN = RESERVED | {"task", "vm", "command", "caller", "client", "step", "ms", "cut_off", "problem", "error"}

_NO_CONTEXT: Mapping[str, str] = MappingProxyType({})
_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=_NO_CONTEXT)
# No field's value is longer: a client may have sent it.
_LONGEST_VALUE = 1000
# What needs no quotes; all that is not printable does.
_PLAIN = re.compile(r'[^\s"=]+')
# Source: sd-daemon(3), syslog(3): a line on standard error that begins with <3> is an error to the journal.
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class Event(NamedTuple):
    """The content of a log line: a state change by name, and its fields. A field that is None is left out."""

    name: str
    fields: Mapping[str, object]

    def __str__(self) -> str:
        return f"{self.name} {format_fields(**self.fields)}".rstrip()


class Log:
    """Writes lines: what happened in a few fixed words, and what differs from line to line in fields.

    `always`: whatever level is set, for what nobody may turn off or has just asked for.
    """

    def __init__(self, name: str, *, always: bool = False) -> None:
        self._logger = logging.getLogger(name)
        if always:
            self._logger.setLevel(logging.INFO)

    def debug(self, event: str, /, **fields: object) -> None:
        """What only who looks for a fault in the agent wants to see."""
        self.write(logging.DEBUG, event, **fields)

    def info(self, event: str, /, **fields: object) -> None:
        """A state change as it should be, an expected refusal among them."""
        self.write(logging.INFO, event, **fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Something that somebody may have to look after; the agent goes on by itself."""
        self.write(logging.WARNING, event, **fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Something that somebody has to look after."""
        self.write(logging.ERROR, event, **fields)

    def failure(self, event: str, cause: BaseException, /, **fields: object) -> None:
        """Log an unexpected error with its traceback, once: where it is caught for good."""
        self.write(logging.ERROR, event, cause, **fields)

    def write(self, level: int, event: str, cause: BaseException | None = None, /, **fields: object) -> None:
        """Write a line of any level."""
        logger = self._logger
        if logger.isEnabledFor(level):
            exc_info = None if cause is None else (type(cause), cause, cause.__traceback__)
            logger.handle(logger.makeRecord(logger.name, level, "", 0, Event(event, fields), (), exc_info))


def error_fields(error: AgentError) -> dict[str, object]:
    """Return an error's fields for a log line: code, message and remedy."""
    return {"error_code": error.code, "error": error.message, "remedy": error.remedy}


def struct_fields(struct: msgspec.Struct, *, omit: frozenset[str] = frozenset()) -> dict[str, object]:
    """Return the fields of a request or step for a log line, by their names on the wire, without defaults.

    Lists of numbers are told as ranges, what is no single value as JSON. A name that the line has itself is put apart.
    """
    told = dict[str, object]()
    for field in _fields(type(struct)):
        value = getattr(struct, field.name)
        if field.name in omit or value is None or value is msgspec.UNSET or value == field.default:
            continue
        if isinstance(value, tuple | frozenset) and value and all(type(one) is int for one in value):
            value = format_ids(value)
        elif not isinstance(value, bool | int | float | str):
            value = msgspec.json.encode(value).decode()
        told[f"own_{field.encode_name}" if field.encode_name in _TAKEN else field.encode_name] = value
    return told


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Return a struct's fields, for which msgspec evaluates all its annotations: 20 us each time."""
    return msgspec.structs.fields(kind)


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Put fields (task=, vm=, command=, caller=) on every line that this thread logs inside the block."""
    outer = {name: value for name, value in _context.get().items() if name not in fields}
    token = _context.set({**outer, **fields})
    try:
        yield
    finally:
        _context.reset(token)


def add_context(**fields: str) -> None:
    """Put fields on every line that follows inside the block of the `log_context` that this thread is in."""
    _context.set({**_context.get(), **fields})


def cut(text: str, longest: int) -> str:
    """Return a text that may come from outside, and no more of it than this; what is left out is counted."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text) - longest} more)"


def format_fields(**fields: object) -> str:
    """Return `name=value` pairs, each value so quoted that none can pass for two."""
    return " ".join([f"{name}={_format(value)}" for name, value in fields.items() if value is not None])


class LogOutput:
    """Where log lines go, and what a signal dumps: standard error, or a file that may be moved away (logrotate).

    `dump_fd` is a descriptor of the present output, for writers that know no log: it stays the same when the output
    changes. One for each process, as logging itself is.
    """

    def __init__(self) -> None:
        self.dump_fd = os.dup(2)
        self._file: _LogFile | None = None
        self._outlet = Outlet(2)

    def open(self, section: LogSection) -> None:
        """Send all lines there, in this form and from this level on; again to change it while others log.

        Raises:
            AgentError: BAD_CONFIGURATION, when the file cannot be opened; what was in force stays.
        """
        file, standard_error = None, _StandardError(self._outlet)
        if section.file:
            try:
                file = _LogFile(section.file, self.dump_fd, standard_error)
            except OSError as error:
                raise AgentError(Code.BAD_CONFIGURATION, f"log.file: {error}") from error
        else:
            os.dup2(2, self.dump_fd, inheritable=False)
        handler = file or standard_error
        to_journal = file is None and _is_journal(2, os.environ.get("JOURNAL_STREAM", ""))
        for one in (handler, standard_error):
            one.setFormatter(_JsonFormatter(to_journal) if section.format == "json" else _TextFormatter(to_journal))
        root = logging.getLogger()
        # Both at once: a line that is written meanwhile goes to the one or to the other.
        former, root.handlers = root.handlers, [handler]
        for old in former:
            old.close()
        self._file = file
        root.setLevel(section.level.upper())
        # No line has them. Source: Python's logging HOWTO, "Optimization".
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
        # A line for each HTTP request and connection says nothing that the task's own lines do not say.
        quiet = logging.DEBUG if section.level == "debug" else logging.WARNING
        for noisy in ("urllib3", "cherrypy", "cherrypy.error"):
            logging.getLogger(noisy).setLevel(quiet)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread

    def tell(self, *lines: str) -> None:
        """Write lines to standard error, whether or not a log is open; as errors, where that is systemd's journal."""
        priority = "<3>" if _is_journal(2, os.environ.get("JOURNAL_STREAM", "")) else ""
        for line in lines:
            sys.stderr.write(f"{priority}{_printable(line)}\n")

    @property
    def is_file(self) -> bool:
        """Whether lines go to a file."""
        return self._file is not None

    def follow(self) -> None:
        """Go on in a new file where the present one was moved away; lines do so themselves, a dump does not."""
        if self._file is not None:
            self._file.follow()


_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Outlet:
    """A descriptor for whole lines. Thread-safe. Its reader may be stuck: then lines are left out, and counted.

    systemd's journal may hang, the reader of a pipe may be stopped: no caller waits for its log. A terminal that nobody
    reads still holds its caller up: it says that it takes what it does not take at once.
    The first line that finds it full waits a moment, the following ones do not.
    """

    def __init__(self, descriptor: int, *, patience_s: float = 1.0) -> None:
        self._descriptor = descriptor
        self._patience_s = patience_s
        # A finalizer may log while its thread is in here.
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        # What is left of a text that has begun.
        self._rest = b""
        #: How many lines were left out since the last one that passed.
        self.lost = 0

    def write(self, text: str, tell_lost: Callable[[int], str]) -> None:
        """Write a text of whole lines; before it what `tell_lost` says of how many were left out."""
        with self._lock:
            told = tell_lost(self.lost) if self.lost else ""
            until = time.monotonic() + (0.0 if self.lost else self._patience_s)
            whole = (told + text).encode("utf-8", "backslashreplace")
            try:
                if self._drain(until):
                    self._rest = whole
                    self._drain(until)
                    if len(self._rest) < len(whole):
                        self.lost = 0
                        return
                    self._rest = b""
            except OSError:  # nobody reads it any more
                self._rest = b""
            self.lost += 1

    def _drain(self, until: float) -> bool:
        """Write what has begun; return whether that is all. What is writable takes PIPE_BUF bytes at once: pipe(7)."""
        while self._rest:
            if not self._poll.poll(max(0.0, until - time.monotonic()) * 1000):
                return False
            self._rest = self._rest[os.write(self._descriptor, self._rest[: select.PIPE_BUF]) :]
        return True


class _StandardError(logging.Handler):
    def __init__(self, outlet: Outlet) -> None:
        super().__init__()
        self._outlet = outlet

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(f"{self.format(record)}\n")
        except Exception:
            self.handleError(record)

    def write(self, text: str) -> None:
        """Write lines that are formatted already."""
        self._outlet.write(text, self._tell_lost)

    def _tell_lost(self, count: int) -> str:
        event = Event("log lines were lost", {"count": count})
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, event, (), None)
        # They were not all of the task that this thread works on.
        return Context().run(self.format, record) + "\n"


class _LogFile(logging.handlers.WatchedFileHandler):
    """Appends to a file, which is the agent's alone (0600) and no link to another's.

    What the file does not take goes to standard error: no caller fails because of its log.
    """

    def __init__(self, path: str, dump_fd: int, standard_error: _StandardError) -> None:
        self._dump_fd = dump_fd
        self._standard_error = standard_error
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        file = os.open(self.baseFilename, _APPEND, 0o600)
        stream = TextIOWrapper(os.fdopen(file, "ab"), encoding=self.encoding, errors=self.errors)
        os.dup2(stream.fileno(), self._dump_fd, inheritable=False)
        return stream

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk
            super().close()

    def follow(self) -> None:
        self.acquire()
        try:
            self.reopenIfNeeded()
        except OSError as error:
            self._standard_error.write(f"kvmagent: log.file: {error}\n")
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            self._standard_error.emit(record)
        else:
            super().handleError(record)


class _TextFormatter(logging.Formatter):
    def __init__(self, to_journal: bool) -> None:
        super().__init__()
        self._to_journal = to_journal

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{_priority(record, self._to_journal)}{_timestamp(record)} {record.levelname}"
        name, fields = _event(record)
        context = {name: value for name, value in _context.get().items() if name not in fields}
        line = f"{prefix} {name} {format_fields(**fields, **context)}".rstrip()
        if not record.exc_info:
            return line
        told = format_fields(**context)
        traceback = shown_line(self.formatException(record.exc_info)).splitlines()
        return "\n".join([line, *(f"{prefix} | {_printable(part)} {told}".rstrip() for part in traceback)])


class _JsonFormatter(logging.Formatter):
    def __init__(self, to_journal: bool) -> None:
        super().__init__()
        self._to_journal = to_journal

    def format(self, record: logging.LogRecord) -> str:
        name, fields = _event(record)
        line = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": name,
            **_context.get(),
            **{name: _bounded(value) for name, value in fields.items() if value is not None},
        }
        if record.exc_info:
            line["traceback"] = shown_line(self.formatException(record.exc_info))
        return _priority(record, self._to_journal) + json.dumps(line, default=str)


def _event(record: logging.LogRecord) -> tuple[str, Mapping[str, object]]:
    """Return a line's event and fields; of a library's line its text is a field, for who knows what is in it."""
    if isinstance(record.msg, Event):
        fields = record.msg.fields.items()
        return record.msg.name, {name: shown_field(name, one) if isinstance(one, str) else one for name, one in fields}
    return record.name, {"message": shown_line(record.getMessage())}


def _timestamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _priority(record: logging.LogRecord, to_journal: bool) -> str:
    return f"<{_PRIORITIES.get(record.levelno, 6)}>" if to_journal else ""


def _is_journal(descriptor: int, journal_stream: str) -> bool:
    """Whether systemd connected a descriptor to its journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    found = os.fstat(descriptor)
    return journal_stream == f"{found.st_dev}:{found.st_ino}"


def _text(value: object) -> str:
    """Return a value in words: a collection as JSON, and of an object that has no words its type's name, no repr."""
    if isinstance(value, str | int | float):  # almost every value
        return str(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    text = str(value)
    return type(value).__name__ if text == object.__repr__(value) else text


def _plain(value: object) -> object:
    return list(value) if isinstance(value, set | frozenset) else _text(value)


def _format(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = cut(_text(value), _LONGEST_VALUE)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _bounded(value: object) -> object:
    return value if isinstance(value, bool | int | float) else cut(_text(value), _LONGEST_VALUE)


def _printable(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        Log(__name__).failure("ended with an unexpected error", error)


def _log_uncaught_in_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_value is not None:
        name = uncaught.thread.name if uncaught.thread else None
        Log(__name__).failure("thread ended with an unexpected error", uncaught.exc_value, thread=name)
