"""Cancels tasks: one that has changed nothing yet ends as refused, with a callback like any other.

    withdraw -> journal.cancel      one transaction: no goal yet -> finished, with the reply, callback undelivered
                   too late          TASK_NOT_CANCELLABLE, and what it is doing: a change is never stopped halfway
             -> lanes.withdraw       its place in the queue is free
             -> on_finished(owed)    delivery

The journal alone decides who was first. A worker that has taken the task meanwhile learns it when it records its goal
or its result, and has touched nothing by then.
"""

from collections.abc import Callable, Mapping

import msgspec

from kvmagent.logs import log_context
from kvmagent.model.command import Command, Ending
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.recorder import Recorder
from kvmagent.tasks.endings import Ended, Endings
from kvmagent.tasks.journal import UNFINISHED, Journal, Task, Undelivered
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.replies import bare_reply, make_failed_answer, make_reply

OUTCOME = "refused"


class Withdrawal:
    """Thread-safe. `declared` are the commands and host queries by name."""

    def __init__(
        self,
        journal: Journal,
        lanes: Lanes,
        declared: Mapping[str, Command | Query],
        *,
        on_finished: Callable[[Undelivered], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._journal = journal
        self._lanes = lanes
        self._declared = declared
        self._endings = Endings(journal, on_finished=on_finished, recorder=recorder or Recorder())

    def withdraw(self, task_uuid: str) -> Task:
        """Cancel a task and return it as it was; one that was cancelled before stays so, and gets no second callback.

        Raises:
            AgentError: UNKNOWN_TASK; TASK_NOT_CANCELLABLE; JOURNAL_UNAVAILABLE.
        """
        task = self._journal.find(task_uuid)
        if task is None:
            raise AgentError(Code.UNKNOWN_TASK, f"there is no task with the id {task_uuid!r}")
        error = AgentError(Code.CANCELLED, "the task was cancelled before it changed anything")
        ended = Ended(self._make_reply(task, error), OUTCOME, error)
        if _was_withdrawn(task, ended.reply):
            return task

        def tell(owed: Undelivered) -> None:
            self._lanes.withdraw(task)
            with log_context(**task.log_fields):
                self._endings.tell(task, ended, owed)

        self._journal.cancel(task_uuid, ended.reply, OUTCOME, then=tell)
        return task

    def _make_reply(self, task: Task, error: AgentError) -> bytes:
        declared = self._declared.get(task.command)
        try:
            if isinstance(declared, Query):
                return make_failed_answer(declared, error)
            if declared is not None:
                request = msgspec.json.decode(task.request, type=declared.request)
                ending = Ending(request, goal=None, before=None, after=None, reports=(), error=error)
                return make_reply(declared, ending)[0]
        except msgspec.MsgspecError:
            pass  # of another version: the bare reply says it as well
        return bare_reply(task, error)[0]


def _was_withdrawn(task: Task, reply: bytes) -> bool:
    """Whether a task ended with `reply`, or with its code; the answer to a host query may have no code."""
    if task.state in UNFINISHED or task.reply is None:
        return False
    return task.reply == reply or msgspec.json.decode(task.reply).get("errorCode") == Code.CANCELLED
