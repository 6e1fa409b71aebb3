"""The agent's configuration: what it sets, and whether an agent would start with it."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from kvmagent.api.security import Security
from kvmagent.cli.ctl.terminal import BOLD, DIM, paint
from kvmagent.model.errors import AgentError, Code
from kvmagent.plugins import load_plugins
from kvmagent.settings import Settings, list_settings, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.hooks import Hooks


def render_settings(settings: Settings) -> list[str]:
    """Return the settings as a file has them; on a terminal those stand out that are not the default."""
    lines: list[str] = []
    last = ""
    for section, key, value, is_default in list_settings(settings):
        if section != last:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            last = section
        lines.append(paint(f"{key} = {value}".rstrip(), DIM if is_default else BOLD))
    return lines


def check_log(settings: Settings) -> None:
    """See whether the log file can be written, or made.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    if not settings.log.file:
        return
    path = Path(settings.log.file)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise _bad(f"log.file {path} is not a regular file", f"Move it away: mv {path} {path}.old")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise _bad(f"log.file {path} cannot be written by the agent's user", f"chown kvmagent: {path}")
    elif not path.parent.is_dir():
        make = f"install -d -o kvmagent -g kvmagent -m 0700 {path.parent}"
        raise _bad(f"log.file {path}: no directory {path.parent}", make)
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        raise _bad(f"log.file {path} cannot be created by the agent's user", f"chown kvmagent: {path.parent}")


def check_state_dir(settings: Settings) -> None:
    """See whether the state directory can be used, or made.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    path = Path(settings.agent.state_dir)
    make = f"install -d -o kvmagent -g kvmagent -m 0700 {path}"
    nearest = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    try:
        is_directory = stat.S_ISDIR(nearest.stat().st_mode)
    except OSError as error:
        raise _bad(f"agent.state_dir {path}: {nearest}: {error.strerror}", make) from error
    if not is_directory:
        raise _bad(f"agent.state_dir {path}: {nearest} is not a directory", f"Move it away, then: {make}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        can = "written" if nearest == path else "created"
        raise _bad(f"agent.state_dir {path} cannot be {can} by the agent's user", make)


def check_addresses(settings: Settings) -> None:
    """See whether the socket can be made, and whether http.host is this host's; the port may be the running agent's.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    path = Path(settings.http.socket)
    if settings.http.socket and os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
        raise _bad(f"http.socket {path} exists and is not a socket", f"Move it away: mv {path} {path}.old")
    if settings.security.opens_tcp:
        try:
            _bind_any(settings.http.host)
        except OSError as error:
            remedy = "Name an address of this host in http.host."
            raise _bad(f"http.host {settings.http.host}: {error.strerror}", remedy) from error


def _bind_any(host: str) -> None:
    """Bind one of the addresses of a name, as the agent does, at a port that is free.

    Raises:
        OSError: it has none, or none can be bound.
    """
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for n, (family, kind, protocol, _, address) in enumerate(found, 1):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
                return
            except OSError:
                if n == len(found):
                    raise


def _check_security(settings: Settings) -> None:
    Security(settings.security).load()


def _check_callbacks(settings: Settings) -> None:
    CallbackClient(map(parse_callback_rule, settings.security.allowed_callbacks), settings.callback).load()


#: Whatever stops a start, beside what stands in the file: each raises BAD_CONFIGURATION.
CHECKS: dict[str, Callable[[Settings], object]] = {
    "plugins": lambda settings: load_plugins(settings.agent.plugins),
    "log": check_log,
    "certificates": _check_security,
    "callbacks": _check_callbacks,
    "hooks": lambda settings: Hooks(settings.hooks.directory).check(),
    "state_dir": check_state_dir,
    "addresses": check_addresses,
}


def _bad(message: str, remedy: str) -> AgentError:
    return AgentError(Code.BAD_CONFIGURATION, message, remedy=remedy)
