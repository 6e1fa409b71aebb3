"""Runs the operator's own executables around a task: those of before.d may refuse it, those of after.d see its reply.

    DIRECTORY/before.d/NAME     after the decision, before anything is touched or recorded
    DIRECTORY/after.d/NAME      after the reply is on disk: whatever they do, it stands

In the order of their names; a name is of A-Za-z0-9_- (as with run-parts: no copy of an editor or a package manager is
run). Each gets the task as JSON on its standard input, a fixed environment and a session of its own, no shell and no
open file of the agent's. What it leaves behind in its process group is killed when it ends, runs out of time, or the
agent stops.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from kvmagent.logs import Log
from kvmagent.model.command import Goal
from kvmagent.model.errors import AgentError, Code
from kvmagent.recorder import phase
from kvmagent.secretfiles import OpenToOthers, check_trusted, owners_of
from kvmagent.tasks.journal import Task

log = Log(__name__)

Event = Literal["before", "after"]
_EVENTS: tuple[Event, ...] = ("before", "after")

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# What is kept of a hook's output, and what of that a log line and a refusal's message hold.
_KEPT_BYTES = 4096
_LOGGED_CHARS = 500
_TOLD_CHARS = 200
# A full pipe is read in one go. Source: pipe(7), the default capacity.
_PIPE_BYTES = 65536
# A process that was killed is gone at once, unless the kernel holds it: nobody waits for that.
_KILLED_S = 1.0


class _Result(NamedTuple):
    """How a hook ended: `failure` is its description, None if the hook agreed."""

    failure: str | None
    seconds: float
    output: str


class Hooks:
    """Thread-safe. The hooks in a directory; empty: there are none.

    `timeout_s` is what all hooks of one event may take together for one task.
    `user_id` is the agent's user, this process's where none is given: who beside root may own what is run.
    """

    def __init__(
        self,
        directory: str = "",
        *,
        timeout_s: float = 10.0,
        user_id: int | None = None,
    ) -> None:
        self._directory = directory
        self._owners = owners_of(user_id)
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def check(self) -> dict[Event, str]:
        """Look whether nobody but root and the agent's user can change what is run; return its names, none where off.

        Raises:
            AgentError: BAD_CONFIGURATION.
        """
        if not self._directory:
            return {}
        if not os.path.isabs(self._directory):
            raise AgentError(Code.BAD_CONFIGURATION, f"hooks.directory {self._directory} is not an absolute path")
        try:
            return {event: ",".join(hook.name for hook in self._find(event)) for event in _EVENTS}
        except OSError as error:
            remedy = error.remedy if isinstance(error, OpenToOthers) else None
            raise AgentError(Code.BAD_CONFIGURATION, f"hooks.directory: {error}", remedy=remedy) from error

    def stop(self) -> None:
        """Kill what runs, and at once what is still started."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                _kill(process)

    def run_before(self, task: Task, goal: Goal) -> bool:
        """Ask the hooks whether a task may go on to its goal; return whether there were any.

        Raises:
            AgentError: REFUSED_BY_HOOK, also when they cannot be run; STOPPING, when they were killed by `stop`.
        """
        if not self._directory:
            return False
        with phase("hook"):
            try:
                hooks = self._find("before")
            except OSError as error:
                raise AgentError(Code.REFUSED_BY_HOOK, f"hooks.directory: {error}") from error
            document, until = _describe("before", task, goal=goal), time.monotonic() + self.timeout_s
            for hook in hooks:
                result = self._run(hook, document, until)
                if self._stopping:
                    raise AgentError(Code.STOPPING, f"the agent stopped while {hook.name} ran")
                _log_end(hook, result)
                if result.failure is not None:
                    raise AgentError(Code.REFUSED_BY_HOOK, f"before.d/{hook.name}: {result.failure}")
        return bool(hooks)

    def run_after(self, task: Task, reply: bytes) -> None:
        """Show the hooks a task with its reply; a failure is a line in the log and nothing else."""
        if not self._directory:
            return
        with phase("hook"):
            try:
                hooks = self._find("after")
            except OSError as error:
                log.warning("hooks cannot be run", error=str(error))
                return
            document, until = _describe("after", task, reply=msgspec.Raw(reply)), time.monotonic() + self.timeout_s
            for hook in hooks:
                _log_end(hook, self._run(hook, document, until))

    def _find(self, event: Event) -> list[Path]:
        """Return an event's hooks in their order; a file that is not executable is none.

        Raises:
            OSError: one is not there, or can be changed by others.
        """
        directory = Path(self._directory) / f"{event}.d"
        check_trusted(directory.parent, self._owners)
        if not directory.exists():
            return []
        check_trusted(directory, self._owners)
        named = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and not path.is_dir())
        for path in named:
            check_trusted(path, self._owners)
        return [path for path in named if os.access(path, os.X_OK)]

    def _run(self, hook: Path, document: bytes, until: float) -> _Result:
        """Run one hook. `until` is on the monotonic clock, seconds."""
        started, output = time.monotonic(), b""
        try:
            # Once more, at the moment that it is run: those before it took their time.
            check_trusted(hook.parent, self._owners)
            check_trusted(hook, self._owners)
            status, output = self._execute(hook, document, until)
        except OSError as error:
            failure: str | None = str(error)
        else:
            failure = self._judge(status, output)
        text = output.decode(errors="replace").strip()[-_LOGGED_CHARS:]
        return _Result(failure, round(time.monotonic() - started, 3), text)

    def _judge(self, status: int | None, output: bytes) -> str | None:
        """Return how a hook failed, in words; None: it succeeded."""
        if status == 0:
            return None
        if status is None:
            return f"the hooks took longer than {self.timeout_s:g} s"
        return _last_line(output) or (f"exit status {status}" if status > 0 else f"ended by signal {-status}")

    def _execute(self, hook: Path, document: bytes, until: float) -> tuple[int | None, bytes]:
        """Return the exit status, None when the time ran out, and the end of what was written.

        Raises:
            OSError: it cannot be executed.
        """
        # A file in memory, not a pipe: a hook that does not read its input holds nobody up.
        with os.fdopen(os.memfd_create("task"), "w+b", buffering=0) as stdin:
            stdin.write(document)
            stdin.seek(0)
            # No preexec_fn, no other user: Python starts it by vfork, which copies nothing of a process with threads.
            process = subprocess.Popen(
                [hook],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        with self._lock:
            self._running.add(process)
            if self._stopping:
                _kill(process)
        in_time, output = False, b""
        try:
            in_time, output = _follow(process, until)
        finally:
            with self._lock:
                # Before it is waited for: until then its number is nobody else's.
                _kill(process)
                self._running.discard(process)
            assert process.stdout is not None
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
        return process.returncode if in_time else None, output


def _follow(process: subprocess.Popen[bytes], until: float) -> tuple[bool, bytes]:
    """Return whether a process ends in time, and the end of what it writes: that it may write without end."""
    assert process.stdout is not None
    output, pipe, pidfd = b"", process.stdout.fileno(), os.pidfd_open(process.pid)
    try:
        os.set_blocking(pipe, False)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while (left_s := until - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _event in poll.poll(left_s * 1000)}
            if pipe in ready:
                chunk = process.stdout.read(_PIPE_BYTES)
                output = (output + (chunk or b""))[-_KEPT_BYTES:]
                if chunk == b"":
                    poll.unregister(pipe)
            # Its end, not that of its output: a process that it has left behind may hold that open.
            if pidfd in ready:
                return True, output
        return False, output
    finally:
        os.close(pidfd)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that nobody has waited for yet, and all that is left in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _describe(event: Event, task: Task, **more: Any) -> bytes:
    """Return what a hook reads: one JSON object."""
    fields = {
        "event": event,
        "taskUuid": task.task_uuid,
        "command": task.command,
        "vm": task.vm,
        "caller": task.caller,
        "request": msgspec.Raw(task.request),
    }
    return msgspec.json.encode({**fields, **more})


def _log_end(hook: Path, result: _Result) -> None:
    """A refusal is as it should be; that a hook of after.d fails, somebody may have to look after."""
    name = f"{hook.parent.name}/{hook.name}"
    told = {"hook": name, "seconds": result.seconds, "output": result.output or None}
    if result.failure is None:
        log.info("hook ran", **told)
    elif hook.parent.name == "before.d":
        log.info("hook refused", **told, error=result.failure)
    else:
        log.warning("hook failed", **told, error=result.failure)


def _last_line(output: bytes) -> str:
    """Return the last line that says something, printable and not too long."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return "".join(char if char.isprintable() else "?" for char in lines[-1])[:_TOLD_CHARS] if lines else ""
