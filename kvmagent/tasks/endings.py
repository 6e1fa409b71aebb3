"""Ends tasks: whatever is raised, each has one reply, and log, audit trail and metrics agree with it.

    end(task, carry_out)
      journal.start_task
      carry_out(task)       -> Ended
      journal.finish        the reply and the undelivered callback; if anything was raised before, a reply that says so
      free                  what the task had reserved
      tell                  delivery, metrics, log, audit trail

A task stays in the journal, for the next start, only where the journal was closed or the agent stops.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from kvmagent.audit import audit
from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.recorder import Recorder
from kvmagent.tasks.journal import UNFINISHED, Change, Journal, Task, Undelivered
from kvmagent.tasks.replies import bare_reply, make_error
from kvmagent.tasks.vmturns import NotYet

log = Log(__name__)


class Ended(NamedTuple):
    """The result of a task: its reply as JSON, and the error in it.

    `hooked`: the operator's hooks have run. `totals` are the VM's, before and after;
    `made` is what goes to its history. `facts` are the last observation of the VM, if there was one.
    """

    reply: bytes
    outcome: str
    error: AgentError | None
    hooked: bool = False
    totals: Mapping[str, int] = MappingProxyType({})
    made: Change | None = None
    facts: Facts | None = None


class Endings:
    """Thread-safe. `on_finished` takes the undelivered callback, `free` releases what a task has reserved."""

    def __init__(
        self,
        journal: Journal,
        *,
        on_finished: Callable[[Undelivered], None],
        recorder: Recorder,
        free: Callable[[str], None] = lambda _task_uuid: None,
    ) -> None:
        self._journal = journal
        self._on_finished = on_finished
        self._recorder = recorder
        self._free = free

    def end(
        self, task: Task, carry_out: Callable[[Task], Ended], *, seconds: Callable[[], float] | None = None
    ) -> Ended | None:
        """Carry a task out and record its reply; None where it was cancelled, or is left to the next start.

        Raises:
            NotYet: another task goes first; nothing was done.
        """
        try:
            ended, owed = self._finish(task, carry_out)
        except AgentError as failure:
            if failure.code is Code.CANCELLED:
                log.info("task was cancelled, nothing was changed")
                self._free(task.task_uuid)
            else:
                # Until the next start carries it out it has not ended, and what it has reserved stays so.
                (log.warning if failure.expected else log.error)("task stays in the journal", **error_fields(failure))
            return None
        self._free(task.task_uuid)
        self.tell(task, ended, owed, seconds=None if seconds is None else round(seconds(), 3))
        return ended

    def tell(self, task: Task, ended: Ended, owed: Undelivered, *, seconds: float | None = None) -> None:
        """Tell everybody how a task has ended that is on disk."""
        self._on_finished(owed)
        self._recorder.ended(task.command, ended.outcome, ended.error.code if ended.error else None)
        _write(task, ended, seconds=seconds)

    def tell_late(self, task: Task, ended: Ended, owed: Undelivered | None) -> None:
        """Report the result of what was pending when the task ended; with a callback if the client wants one."""
        self._recorder.ended_late(task.command, ended.error.code if ended.error else None)
        _write(task, ended, late=True)
        if owed is not None:
            self._on_finished(owed)

    def _finish(self, task: Task, carry_out: Callable[[Task], Ended]) -> tuple[Ended, Undelivered]:
        """Raises AgentError and NotYet of `carry_out` and the journal: the task stays there, or was cancelled."""
        ended: Ended | None = None
        try:
            self._journal.start_task(task.task_uuid)
            ended = carry_out(task)
            return ended, self._journal.finish(task.task_uuid, ended.reply, ended.outcome, ended.made)
        except (AgentError, NotYet):
            raise
        except Exception as error:
            failure = make_error(error)
            log.failure("task failed", failure, error_code=failure.code)
            known = self._journal.find(task.task_uuid, wait=True) or task
            if ended is not None and known.state not in UNFINISHED:
                return ended, self._journal.owe_again(task.task_uuid)
            bare = Ended(*bare_reply(known, failure))
            return bare, self._journal.finish(task.task_uuid, bare.reply, bare.outcome)


def named(task: Task, facts: Facts | None) -> Task:
    """Return the task with its VM's name and UUID, if the VM was observed."""
    if facts is None:
        return task
    return msgspec.structs.replace(task, vm_uuid=facts.domain.uuid, vm_name=facts.domain.name)


def _write(task: Task, ended: Ended, *, seconds: float | None = None, late: bool = False) -> None:
    task, error = named(task, ended.facts), ended.error
    audit(
        "finished",
        caller=task.caller,
        client=task.client,
        what=task.command,
        vm=task.vm,
        uuid=task.vm_uuid,
        task=task.task_uuid,
        outcome=ended.outcome,
        error_code=error.code if error else "",
        error=error.message if error else "",
        totals=ended.totals,
    )
    (log.warning if ended.outcome == "partial" else log.info)(
        "task finished",
        outcome=ended.outcome,
        seconds=seconds,
        late=late or None,
        **(error_fields(error) if error else {}),
        **ended.totals,
    )
