"""How kvmagentctl ends: its exit statuses, and its one kind of error."""

from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """The exit statuses, which scripts may rely on: never given another meaning."""

    REACHED = 0
    FAILED = 1
    USAGE = 2
    PLUGGED = 3
    UNREACHABLE = 4
    PARTIAL = 5
    PENDING = 6
    NOT_READY = 7
    UNFINISHED = 8
    INTERRUPTED = 130


MEANINGS = {
    Exit.REACHED: "done and confirmed by the guest; or nothing to do; or only a plan was requested",
    Exit.FAILED: "refused or failed: the VM is unchanged",
    Exit.USAGE: "the command line is wrong: nothing was sent",
    Exit.PLUGGED: "plugged: the hypervisor provides it, but the guest does not confirm that it uses it",
    Exit.UNREACHABLE: "no agent answers, or its identity cannot be verified",
    Exit.PARTIAL: "partial: failed after some of the change was made; the numbers say how much",
    Exit.PENDING: "pending: the guest has neither completed nor refused a removal",
    Exit.NOT_READY: "ready: the VM is not ready; status: the agent is not ready; doctor: found a problem",
    Exit.UNFINISHED: "--wait timed out: the task continues",
    Exit.INTERRUPTED: "interrupted (Ctrl-C): a task that was sent continues",
}

_BY_OUTCOME = {
    "online": Exit.REACHED,
    "configured": Exit.REACHED,
    "unchanged": Exit.REACHED,
    "planned": Exit.REACHED,
    "plugged": Exit.PLUGGED,
    "partial": Exit.PARTIAL,
    "pending": Exit.PENDING,
}


def exit_of(reply: dict[str, Any]) -> Exit:
    """Return the exit status of a task's reply; one without a known outcome is judged by its `success`."""
    return _BY_OUTCOME.get(reply.get("outcome", ""), Exit.REACHED if reply.get("success") else Exit.FAILED)


class CtlError(Exception):
    """What kvmagentctl ends with, told in one line; `code` is the agent's, or a word of kvmagentctl's own.

    `task_uuid` is there where a task may go on without us.
    """

    def __init__(self, status: Exit, code: str, message: str, remedy: str, *, task_uuid: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.remedy = remedy
        self.task_uuid = task_uuid

    def body(self) -> dict[str, Any]:
        """Return it as the agent's own refusals are."""
        task = {"taskUuid": self.task_uuid} if self.task_uuid else {}
        return {"success": False, "error": self.message, "errorCode": self.code, "remedy": self.remedy, **task}
