"""One task, from its POST to its reply.

    POST, again until it is answered  ->  GET /tasks/ID, at growing intervals, until the task has ended

It requests no callback: it reads the reply from the agent itself, over the same connection and credentials.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from kvmagent.cli.ctl.client import Agent
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.render import format_step
from kvmagent.cli.ctl.terminal import WARN, Terminal, paint, printable
from kvmagent.model.command import NO_CALLBACK

_UNFINISHED = ("accepted", "running")
# The task is looked at after the first pause, which grows to the longest: most tasks take a moment, some take minutes.
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.05, 0.4
# How long an agent that has the task may be away before we stop waiting for it: it may be starting again.
_AWAY_S = 120.0


class Submission:
    """Sends commands to one agent and waits for their replies. `terminal` shows notices and progress."""

    def __init__(self, agent: Agent, terminal: Terminal) -> None:
        self._agent = agent
        self._terminal = terminal
        self._shown = 0

    def run(self, path: str, body: Mapping[str, Any], *, wait_s: float | None) -> dict[str, Any]:
        """Return the reply, with the `taskUuid` in it. `wait_s` is how long to wait at most; None: as long as it takes.

        Raises:
            CtlError: refused at once; no answer; UNFINISHED or INTERRUPTED, while the task goes on.
        """
        task_uuid = uuid.uuid4().hex
        try:
            self._agent.post(path, body, task_uuid=task_uuid, callback_url=NO_CALLBACK, tell=self._tell)
        except KeyboardInterrupt:
            remedy = f"Run: kvmagentctl task {task_uuid}"
            message = "interrupted while the command was sent; the agent may or may not have received the task"
            raise CtlError(Exit.INTERRUPTED, "INTERRUPTED", message, remedy, task_uuid=task_uuid) from None
        try:
            return {"taskUuid": task_uuid, **self._wait(task_uuid, wait_s)}
        except KeyboardInterrupt:
            raise _left(Exit.INTERRUPTED, "interrupted", task_uuid) from None
        finally:
            self._terminal.clear()

    def _wait(self, task_uuid: str, wait_s: float | None) -> dict[str, Any]:
        """Return the reply of the task once it has ended."""
        began_at, away_at, pause_s = time.monotonic(), None, _FIRST_LOOK_S
        while True:
            left_s = None if wait_s is None else began_at + wait_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise _left(Exit.UNFINISHED, f"no outcome after {wait_s:g} s", task_uuid)
            time.sleep(pause_s if left_s is None else min(pause_s, left_s))
            pause_s = min(pause_s * 2, _LONGEST_LOOK_S)
            try:
                task = self._agent.get("tasks", task_uuid)
            except CtlError as error:
                if error.status is not Exit.UNREACHABLE:
                    raise
                if away_at is None:
                    away_at = time.monotonic()
                    self._tell(f"{error.message}; the task is on the agent's disk and continues when the agent is back")
                if time.monotonic() - away_at >= _AWAY_S:
                    raise _left(Exit.UNREACHABLE, error.message, task_uuid) from error
                continue
            away_at = None
            self._show(task, time.monotonic() - began_at)
            if task["state"] not in _UNFINISHED:
                return dict(task["reply"])

    def _show(self, task: dict[str, Any], seconds: float) -> None:
        """Show the steps that ended since the last look, and the one that is under way."""
        if not self._terminal.shows_progress:
            return
        steps = printable(task["steps"])
        done = [step for step in steps if step["elapsedMs"] is not None or step.get("cutOff")]
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
        f"{why}; the task continues in the agent as {task_uuid}",
        f"Run: kvmagentctl task {task_uuid}",
        task_uuid=task_uuid,
    )
