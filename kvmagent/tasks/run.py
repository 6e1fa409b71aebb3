"""A running task: what its reply is made from, and how it is read back from the journal after an interruption.

A `Run` is a task's. The run of a VM, from its power-on to its power-off, is `Facts.run` and `Goal.run`.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvmagent.logs import Log
from kvmagent.model.command import Command, Ending, Goal, Once, StepReport, VmRequest, find_anew
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.reply import Problem, VmReply
from kvmagent.model.steps import AnyStep
from kvmagent.tasks.decision import plan
from kvmagent.tasks.journal import StepRecord

log = Log(__name__)

# Made here and once, for the reason that model.decoders gives.
_FACTS = msgspec.json.Decoder(Facts)
_STEP: msgspec.json.Decoder[AnyStep] = msgspec.json.Decoder(AnyStep)
_PROBLEM = msgspec.json.Decoder(Problem)


def _decide_nothing(request: Any, facts: Facts, task_uuid: str) -> Goal:
    return Goal()


def _advance_nowhere(goal: Any, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
    return ()


#: In place of a command whose plugin was removed, or cannot read its tasks any longer: the recorded goal is dropped.
#: It has nothing to do with the journal's state `gone`, which is a callback that was answered 404.
GONE = Command(
    name="",
    path="",
    summary="",
    request=VmRequest,
    reply=VmReply,
    goal=Goal,
    observe_guest=frozenset({"cpus", "memory"}),
    decide=_decide_nothing,
    next_steps=_advance_nowhere,
    refusals=(),
    role="admin",
)


@dataclass
class Run:
    """One task under way: what a reply is made from, as far as it has come.

    `interrupted`: a step may have taken effect without a report, as one that failed may. `recorded` is the number of
    the step that was written to disk with the goal. `hooked`: the operator's hooks have run for it, now or before a
    restart of the agent.
    """

    command: Command
    request: VmRequest
    recovered: bool
    interrupted: bool
    goal: Goal | None = None
    before: Facts | None = None
    after: Facts | None = None
    reports: list[StepReport] = field(default_factory=list)
    error: AgentError | None = None
    planned: tuple[AnyStep, ...] | None = None
    preview: str = ""
    late: bool = False
    started: float = 0.0
    recorded: int | None = None
    hooked: bool = False

    def plan(self, failed: frozenset[str] = frozenset()) -> tuple[AnyStep, ...]:
        """Return the steps that are left towards the goal, from the last facts."""
        assert self.goal is not None
        assert self.after is not None
        return plan(self.command, self.request, self.goal, self.after, failed, before=self.before, late=self.late)

    def end(self, once: Once = find_anew) -> Ending:
        """Return what the reply is made from; `once`: see Ending."""
        return Ending(
            request=self.request,
            goal=self.goal,
            before=self.before,
            after=self.after,
            reports=tuple(self.reports),
            error=self.error,
            planned=self.planned,
            preview=self.preview,
            recovered=self.recovered,
            late=self.late,
            once=once,
        )


def failed_by(report: StepReport) -> tuple[str, str]:
    """Return the key that a failed soft step gives up, and that key with the error code."""
    assert report.problem is not None
    return report.step.key, f"{report.step.key} {report.problem.code}"


def read_facts(recorded: bytes | None) -> Facts | None:
    """Return the facts from before the task; None (unknown) if another version of the agent wrote them differently."""
    try:
        return None if recorded is None else _FACTS.decode(recorded)
    except msgspec.ValidationError as error:
        log.warning("the state before the task cannot be read", error=str(error))
        return None


def read_report(record: StepRecord) -> StepReport:
    """Return a step's report from the journal, the same as whoever performed the step would have made."""
    return StepReport(
        step=_STEP.decode(record.step),
        elapsed_ms=record.elapsed_ms,
        problem=_PROBLEM.decode(record.problem) if record.problem else None,
    )
