"""`support-bundle`: what support needs to find a fault, in one file, without secrets.

    the agent        health, VMs, tasks, histories, metrics; its state is dumped to the log first, where we may
    the host         the doctor's findings, versions, the log
    libvirt          the definitions of VMs, as a read-only connection shows them, and less

What cannot be had is told in the bundle itself: a bundle is of most use when something is broken.
"""

import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import msgspec

from kvmagent import __version__
from kvmagent.cli.configfile import read_settings
from kvmagent.cli.ctl.agentuser import find_agent_pid
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.session import Session, session_of, shared_options
from kvmagent.hypervisor.shown import shown_definition, shown_log
from kvmagent.model.errors import AgentError
from kvmagent.model.urls import shown_json
from kvmagent.settings import DEFAULT_PATH, Settings

_TASKS, _LOG_LINES, _LOG_BYTES = 1000, 20000, 2**24
_TIMEOUT_S, _VMS_S = 30.0, 120.0
_LIBRARIES = ("cheroot", "cherrypy", "click", "libvirt-python", "lxml", "msgspec", "prometheus_client", "urllib3")
_UNIT = "kvmagent.service"
# How long the agent may take to write its state to the log.
_DUMP_S = 2.0


@click.command(name="support-bundle")
@click.option("--file", metavar="FILE", help="File to write. [default: kvmagent-support-HOST-TIME.tar.gz]")
@click.option("--config", metavar="FILE", default=DEFAULT_PATH, show_default=True, help="The agent's configuration.")
@click.pass_context
def support_bundle(context: click.Context, file: str | None, config: str) -> None:
    """Collect what support needs in one file, without secrets.

    The file has the log, the agent's state, versions, VM definitions and metrics. Run this as root on the host itself.
    The names of VMs, hosts and callers are in the file: read it before you pass it on.
    """
    session = session_of(context)
    host = socket.gethostname().partition(".")[0]
    path = Path(file or f"kvmagent-support-{host}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz")
    parts = collect(session, Path(config))
    try:
        _write(path, parts)
    except OSError as error:
        words = f"{path}: {error.strerror}"
        raise CtlError(Exit.FAILED, "NOT_WRITTEN", words, "Name another file with --file.") from error
    missing = [line for line in parts["missing.txt"].splitlines() if line]
    if session.as_json:
        session.terminal.print_json({"file": str(path), "parts": list(parts), "missing": missing})
        return
    session.terminal.print(f"{path}: {len(parts)} files", *(f"  without {line}" for line in missing))


def _write(path: Path, parts: dict[str, str]) -> None:
    """Write the bundle: whole or not at all, never over another file, and for nobody else to read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, text in parts.items():
                content = text.encode(errors="replace")
                entry = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
                entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(content))
    except BaseException:
        path.unlink()
        raise


def collect(session: Session, config: Path) -> dict[str, str]:
    """Return the bundle's files by their names; missing.txt lists what could not be collected, and why."""
    parts: dict[str, str] = {}
    missing: list[str] = []
    settings = Settings()

    def add(name: str, make: Callable[[], str]) -> None:
        try:
            parts[name] = make()
        except (AgentError, CtlError) as error:
            missing.append(f"{name}: {error.message}")
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            missing.append(f"{name}: {error}")

    try:
        settings = read_settings(config)
    except AgentError as error:
        missing.append(f"settings.json: {error.message}")
    else:
        add("settings.json", lambda: _json(shown_json(msgspec.to_builtins(settings))))
    try:
        _dump_state()
    except (OSError, CtlError) as error:
        missing.append(f"the agent's state in the log: {error}")
    add("versions.txt", _versions)
    add("health.json", lambda: _json(session.agent.get("healthz")))
    add("vms.json", lambda: _json(session.agent.get("vms", timeout_s=_VMS_S)))
    add("tasks.json", lambda: _json(session.agent.get("tasks", query=f"limit={_TASKS}")))
    add("metrics.txt", lambda: session.agent.get_text("metrics"))
    add("doctor.json", lambda: _doctor(session, config))
    add("log.txt", lambda: _log(settings))
    journal = ("journalctl", "--unit=libvirtd", "--unit=virtqemud", "--lines=2000")
    add("log-of-libvirt.txt", lambda: shown_log(_run(*journal)))
    for name, make in _definitions(settings.libvirt.uri, missing):
        add(name, make)
    parts["missing.txt"] = "".join(f"{line}\n" for line in missing)
    return parts


def _definitions(uri: str, missing: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Give each VM's definition, running and persistent, by virsh: it may hang, and is ended then."""

    def virsh(*arguments: str) -> str:
        return _run("virsh", "--readonly", "--connect", uri, *arguments)

    def dump(*arguments: str) -> str:
        return shown_definition(virsh("dumpxml", *arguments))

    try:
        # Not by their names, which may be another's number, or look like an option.
        uuids = virsh("list", "--all", "--uuid").split()
    except (OSError, subprocess.SubprocessError) as error:
        missing.append(f"definitions: {error}")
        return
    for uuid in uuids:
        yield f"definitions/{uuid}.xml", partial(dump, uuid)
        yield f"definitions/{uuid}-next-start.xml", partial(dump, "--inactive", uuid)


def _dump_state() -> None:
    """Have the agent of this host write what runs, waits and is owed to its log, with the stacks of its threads."""
    pid = find_agent_pid()
    if pid is None:
        raise ProcessLookupError("no agent runs as kvmagent.service")
    os.kill(pid, signal.SIGUSR1)
    time.sleep(_DUMP_S)


def _versions() -> str:
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    lines = [
        f"kvmagent {__version__}",
        f"python {sys.version.split()[0]}",
        f"kernel {platform.release()} {platform.machine()}",
        f"system {system}",
    ]
    for name in _LIBRARIES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    try:
        lines.append(_run("virsh", "--version=long"))
    except (OSError, subprocess.SubprocessError) as error:
        lines.append(f"virsh: {error}")
    return "\n".join(lines) + "\n"


def _doctor(session: Session, config: Path) -> str:
    from kvmagent.cli.ctl.doctor import examine

    return _json(msgspec.to_builtins(examine(config, session.asked_for)))


def _log(settings: Settings) -> str:
    """Return the end of the agent's log, from its file or from the journal."""
    if not settings.log.file:
        return _run("journalctl", f"--unit={_UNIT}", f"--lines={_LOG_LINES}", "--output=short-iso-precise")
    with open(settings.log.file, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")


def _run(*command: str) -> str:
    """Return what a command says.

    Raises:
        OSError, SubprocessError: it is not there, failed, or took too long.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {' '.join(done.stderr.split())[:300] or f'status {done.returncode}'}")
    return done.stdout


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


BUNDLE = shared_options(support_bundle)
