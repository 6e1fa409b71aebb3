"""One task, from its POST to its reply.

    connect: which address does the agent see?  ->  a receiver on it  ->  POST, again until it is answered
    wait:  the callback wakes us; meanwhile GET /tasks/ID shows the steps, and gives the reply if no callback comes
    where the agent may post no callback to us, or nobody waits for one, none is asked for

A callback is plain HTTP. Where the agent speaks TLS it is no more than the wake-up: the reply is then read from the
agent itself, whose certificate was verified.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from kvmagent.cli.ctl.agent import Agent
from kvmagent.cli.ctl.callbacks import Receiver
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.terminal import WARN, Terminal, paint, printable
from kvmagent.cli.ctl.views import format_step
from kvmagent.model.command import NO_CALLBACK
from kvmagent.model.errors import Code

_UNFINISHED = ("accepted", "running")
# How often the task is looked at: on a terminal to show its steps, else only in case that no callback can come.
_LOOK_S, _LOOK_UNSEEN_S = 0.4, 2.0
# How long a callback may come after the task's end before its reply is read without it.
_GRACE_S = 3.0
# How long an agent that has the task may be away before nobody waits for it any more: it may be starting again.
_AWAY_S = 120.0


class Errand:
    """Sends commands to one agent and waits for their replies. `terminal` shows notices and progress."""

    def __init__(self, agent: Agent, terminal: Terminal) -> None:
        self._agent = agent
        self._terminal = terminal
        self._shown = 0

    def run(self, path: str, body: Mapping[str, Any], *, wait_s: float | None) -> dict[str, Any]:
        """Return the reply, with the `taskUuid` in it; `wait_s` is how long to wait at most.

        Raises:
            CtlError: refused at once; no answer; UNFINISHED or INTERRUPTED, while the task goes on.
        """
        task_uuid = uuid.uuid4().hex
        with Receiver(self._agent.local_address(), task_uuid) as receiver:
            try:
                self._send(path, body, task_uuid, NO_CALLBACK if wait_s == 0 else receiver.url)
                reply = self._wait(receiver, task_uuid, wait_s)
            except KeyboardInterrupt:
                raise _left(Exit.INTERRUPTED, "interrupted", task_uuid) from None
            finally:
                self._terminal.clear()
        return {"taskUuid": task_uuid, **reply}

    def _send(self, path: str, body: Mapping[str, Any], task_uuid: str, callback_url: str) -> None:
        """Send the command; without a callback where the agent may not send one to us."""
        try:
            self._agent.post(path, body, task_uuid=task_uuid, callback_url=callback_url, tell=self._tell)
        except CtlError as error:
            if error.code != Code.CALLBACK_NOT_ALLOWED:
                raise
            self._tell(f"{error.message} (security.allowed_callbacks of the agent): the reply is read from the agent")
            self._agent.post(path, body, task_uuid=task_uuid, callback_url=NO_CALLBACK, tell=self._tell)

    def _wait(self, receiver: Receiver, task_uuid: str, wait_s: float | None) -> dict[str, Any]:
        end_at = None if wait_s is None else time.monotonic() + wait_s
        pause_s, away_at = _LOOK_S if self._terminal.shows_progress else _LOOK_UNSEEN_S, None
        began_at = time.monotonic()
        while not receiver.wait(pause_s if end_at is None else max(0.0, min(pause_s, end_at - time.monotonic()))):
            if end_at is not None and time.monotonic() >= end_at:
                raise _left(Exit.UNFINISHED, f"no outcome after {wait_s:g} s", task_uuid)
            try:
                task = self._agent.get("tasks", task_uuid)
            except CtlError as error:
                if error.status is not Exit.UNREACHABLE:
                    raise
                if away_at is None:
                    away_at = time.monotonic()
                    self._tell(f"{error.message}; the task is on its disk and goes on when it is back")
                if time.monotonic() - away_at >= _AWAY_S:
                    raise _left(Exit.UNREACHABLE, error.message, task_uuid) from error
                continue
            away_at = None
            self._show(task, time.monotonic() - began_at)
            if task["state"] not in _UNFINISHED:
                return self._reply_without_callback(receiver, task)
        return self._reply_after_callback(receiver, task_uuid)

    def _reply_after_callback(self, receiver: Receiver, task_uuid: str) -> dict[str, Any]:
        if self._terminal.shows_progress or self._agent.is_tls:
            task = self._agent.get("tasks", task_uuid)
            self._show(task, 0.0)
            if self._agent.is_tls:
                return dict(task["reply"])
        return dict(receiver.reply)

    def _reply_without_callback(self, receiver: Receiver, task: dict[str, Any]) -> dict[str, Any]:
        if task["delivery"]["url"] == NO_CALLBACK:
            return dict(task["reply"])
        if not task["delivery"]["error"] and receiver.wait(_GRACE_S):
            return self._reply_after_callback(receiver, task["taskUuid"])
        why = task["delivery"]["error"] or "it has not come"
        self._tell(f"the agent's callback does not reach {receiver.url} ({why}): the reply is read from the agent")
        return dict(task["reply"])

    def _show(self, task: dict[str, Any], seconds: float) -> None:
        """Show the steps that ended since the last look, and the one that is under way."""
        if not self._terminal.shows_progress:
            return
        steps = printable(task["steps"])
        done = [step for step in steps if step["elapsedMs"] is not None]
        for step in done[self._shown :]:
            self._terminal.tell(f"  {format_step(step)}")
        self._shown = len(done)
        if task["state"] in _UNFINISHED:
            doing = format_step(steps[-1]) if len(steps) > len(done) else task["state"]
            self._terminal.show(f"  {doing} ... {seconds:.0f} s")

    def _tell(self, text: str) -> None:
        self._terminal.tell(paint(f"kvmagentctl: {text}", WARN))


def _left(status: Exit, why: str, task_uuid: str) -> CtlError:
    return CtlError(
        status,
        status.name,
        f"{why}; the task goes on in the agent as {task_uuid}",
        f"Look at it with: kvmagentctl task {task_uuid}",
        task_uuid=task_uuid,
    )
