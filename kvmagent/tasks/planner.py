"""Says what resizes of a VM would mean: observes it once, then asks the commands' own planners for each target.

    plan(request)
      node.open_vm, observe              once, whatever the number of targets
      per target
        the command for each resource    the one that grows it, or where that refuses the one that shrinks it
        decide, as a task would          accepted: live, live-unconfirmed, live-rounded, live-partial
        refused, and a restart cures it  decide again on what would be so then: with the definition as it is,
                                         or prepared
                                         accepted: restart; refused: never

It knows no command by name: a command declares what it resizes, and one of them how it prepares. Nothing is changed
and nothing reserved, so that a plan is true of the moment alone. The operator's hooks are not asked.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from kvmagent.logs import Log
from kvmagent.model.command import Command, Ending, Goal, VmRequest, Wish
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.guestuse import AGENT_COMMANDS, find_cpu_warnings, find_memory_warnings, measure, tell_saved
from kvmagent.model.hostbudget import find_reserved, foresee_restart
from kvmagent.model.judge import judge
from kvmagent.model.plans import (
    Plan,
    PlannedCommand,
    PlanReply,
    PlanRequest,
    PlanTarget,
    Reason,
    Reserved,
    Took,
    Verdict,
)
from kvmagent.model.policy import explain_not_asked, may_online
from kvmagent.model.reply import Outcome, Problem
from kvmagent.model.steps import AnyStep, DefineShape, Shape
from kvmagent.model.units import format_size
from kvmagent.tasks.decision import decide
from kvmagent.tasks.plugincalls import call
from kvmagent.tasks.replies import make_error

log = Log(__name__)

Name = Literal["cpu", "memory"]
_FIELDS: dict[Name, str] = {"cpu": "cpu_num", "memory": "memory_size"}
# What one command refuses, and the one for the other direction is there for.
_OTHER_WAY = (Code.TARGET_BELOW_CURRENT, Code.TARGET_ABOVE_CURRENT)
# Said of every dry run, and of no target in particular.
_OF_ANY_PLAN = Code.PLAN_NOT_WHOLE

FindTook = Callable[[str, Sequence[AnyStep]], Took | None]


class PlannedVm(Protocol):
    """What is needed of hypervisor.node.OpenVm."""

    def observe(self, parts: frozenset[str]) -> Facts:
        """Return what is so now."""

    def foresee(self, step: DefineShape) -> tuple[str, Definition]:
        """Return the diff of a definition that is not made, and what it would be."""


class PlannedNode(Protocol):
    """What is needed of hypervisor.node.Node."""

    def open_vm(self, vm: str) -> AbstractContextManager[PlannedVm]:
        """Have a VM for a piece of work."""


class _Trial(NamedTuple):
    """One command, asked with one request: what it would do, or the error that it would be refused with."""

    command: Command
    request: VmRequest
    goal: Goal | None = None
    steps: tuple[AnyStep, ...] = ()
    told: Sequence[Problem] = ()
    size_bytes: int | None = None
    error: AgentError | None = None

    @property
    def direction(self) -> Literal["up", "down"]:
        assert self.command.resizes is not None
        return self.command.resizes.direction

    @property
    def resources(self) -> frozenset[Name]:
        assert self.command.resizes is not None
        return self.command.resizes.resources


class Planner:
    """Thread-safe. `find_took` says how long a command with such first steps took lately."""

    def __init__(self, node: PlannedNode, commands: Iterable[Command], *, find_took: FindTook) -> None:
        commands = tuple(commands)
        self._node = node
        self._find_took = find_took
        self._commands: dict[tuple[frozenset[Name], str], Command] = {}
        for command in commands:
            if command.resizes is not None:
                self._commands.setdefault((command.resizes.resources, command.resizes.direction), command)
        self.preparer = next((command for command in commands if command.prepares is not None), None)
        asked = [*self._commands.values(), *([self.preparer] if self.preparer else [])]
        self._parts = frozenset[str]().union(*(one.observe_guest | one.observe_first for one in asked))

    def plan(self, request: PlanRequest) -> PlanReply:
        """Return a plan for each target.

        Raises:
            AgentError: VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        with self._node.open_vm(request.vm_uuid) as vm:
            facts = vm.observe(self._parts)
            sketch = _Sketch(self, vm, _Look(self, request.vm_uuid, facts))
            return PlanReply(
                vm_uuid=facts.domain.uuid,
                name=facts.domain.name,
                state=facts.domain.state,
                plans=[sketch.plan(target) for target in request.targets],
            )

    def find_command(self, names: Iterable[Name], direction: str) -> Command | None:
        """Return the command that resizes these, all at once, in a direction."""
        return self._commands.get((frozenset(names), direction))

    def find_took(self, trials: Iterable[_Trial]) -> Took | None:
        """Return how long such steps took: of several commands, one after the other."""
        found = [self._find_took(one.command.name, one.steps) for one in trials if one.steps]
        known = [took for took in found if took is not None]
        if not known or len(known) < len(found):
            return None
        return Took(
            median_ms=sum(took.median_ms for took in known),
            worst_ms=sum(took.worst_ms for took in known),
            tasks=min(took.tasks for took in known),
        )


class _Look:
    """What the commands say of a VM as it is, or would be, at one moment. What several targets ask alike is decided
    once."""

    def __init__(self, planner: Planner, vm: str, facts: Facts) -> None:
        self.planner = planner
        self.vm = vm
        self.facts = facts
        self._decided: dict[tuple[str, bytes], _Trial] = {}

    def foresee(self, definition: Definition | None = None) -> "_Look":
        """Return what would be so after a restart, with the persistent definition or with another.

        A job of libvirt's that has the VM now is nothing that a restart is to end.
        """
        later = foresee_restart(self.facts, definition)
        domain = msgspec.structs.replace(later.domain, job=self.facts.domain.job)
        return _Look(self.planner, self.vm, msgspec.structs.replace(later, domain=domain))

    def try_target(self, target: PlanTarget) -> list[_Trial]:
        """Return what the commands say that bring a VM to a target: one for all of it, or one for each resource."""
        return [_tell(trial, self.facts) for trial in self._decide_target(target)]

    def try_one(self, name: Name, target: PlanTarget) -> _Trial:
        """Return what the command says that brings one resource of a VM to a target."""
        return _tell(self._decide_one(name, target), self.facts)

    def prepare_for(self, target: PlanTarget) -> _Trial | None:
        """Return what the command says that prepares the definition for a target; None where there is none."""
        preparer = self.planner.preparer
        if preparer is None or preparer.prepares is None:
            return None
        wish = Wish(self.vm, cpu_num=target.cpu_num, memory_size=target.memory_size)
        return self.decide(preparer, call(preparer.prepares, wish))

    def decide(self, command: Command, request: VmRequest) -> _Trial:
        """Ask a command what a task with such a request would do; what it would be refused with is an answer too."""
        asked = command.name, msgspec.json.encode(request)
        if asked not in self._decided:
            try:
                self._decided[asked] = _Trial(command, request, *decide(command, request, self.facts, ""))
            except Exception as error:
                self._decided[asked] = _refused(command, request, error)
        return self._decided[asked]

    def _decide_target(self, target: PlanTarget) -> list[_Trial]:
        names: list[Name] = [name for name, field in _FIELDS.items() if getattr(target, field) is not None]
        trials = [self._decide_one(name, target) for name in names]
        directions = {trial.direction for trial in trials}
        if len(trials) < 2 or len(directions) > 1 or _find_error(trials) is not None:
            return trials
        # All of it at once, where a command does that and takes the target's fields.
        whole = self.planner.find_command(names, directions.pop())
        if whole is None or not _given(target) <= set(whole.request.__struct_fields__):
            return trials
        return [self.decide(whole, _make_request(whole, target, self.vm))]

    def _decide_one(self, name: Name, target: PlanTarget) -> _Trial:
        """Ask the command that grows a resource, and where that refuses the one that shrinks it.

        Each takes the VM's present total as its end of the scale: no more than one of them has anything to do.
        """
        tried = []
        for direction in ("up", "down"):
            command = self.planner.find_command((name,), direction)
            if command is None:
                continue
            trial = self.decide(command, _make_request(command, target, self.vm))
            if trial.error is None:
                return trial
            tried.append(trial)
        if not tried:
            raise AgentError(Code.UNKNOWN_PATH, f"no plugin resizes {name}")
        return next((one for one in tried if one.error is not None and one.error.code not in _OTHER_WAY), tried[0])


class _Sketch:
    """The plans of one VM, from one look at it. What several targets would prepare alike is made once."""

    def __init__(self, planner: Planner, vm: PlannedVm, now: _Look) -> None:
        self._planner = planner
        self._vm = vm
        self._now = now
        self._facts = now.facts
        self._foreseen: dict[Shape, tuple[str, _Look] | AgentError] = {}

    @cached_property
    def _restarted(self) -> _Look:
        return self._now.foresee()

    def plan(self, target: PlanTarget) -> Plan:
        """Return what one target would mean."""
        trials = self._now.try_target(target)
        refused = [trial for trial in trials if trial.error is not None]
        if not refused:
            return self._tell_live(target, trials)
        return self._tell_refused(target, trials, refused)

    def _tell_live(self, target: PlanTarget, trials: list[_Trial]) -> Plan:
        facts = self._facts
        doubts = [doubt for trial in trials for doubt in _find_doubts(trial, facts)]
        rounded = [one for trial in trials for one in _find_rounding(trial, target)]
        falls_short = any(trial.direction == "down" and _is_rounded(trial, target) for trial in trials)
        verdict: Verdict = (
            "live-partial" if falls_short else "live-rounded" if rounded else "live-unconfirmed" if doubts else "live"
        )
        told = [problem for trial in trials for problem in trial.told if problem.code is not _OF_ANY_PLAN]
        return Plan(
            target=target,
            verdict=verdict,
            outcome=_find_outcome(trials, doubts),
            cpu_num=_find_cpu_num(trials),
            memory_size=_find_memory_size(trials),
            reasons=_make_reasons([*rounded, *doubts, *told]),
            commands=[_tell_command(trial) for trial in trials],
            prepare=[],
            reserved=Reserved(
                slots=sum(trial.goal.slots for trial in trials if trial.goal is not None),
                host_memory=sum(find_reserved(trial.goal.totals, facts) for trial in trials if trial.goal is not None),
            ),
            took=self._planner.find_took(trials),
        )

    def _tell_refused(self, target: PlanTarget, trials: list[_Trial], refused: list[_Trial]) -> Plan:
        """Return restart where a restart, and what may be prepared before it, is all that it needs; else never."""
        errors = [trial.error for trial in refused if trial.error is not None]
        ahead = self._look_ahead(target, trials, refused)
        if ahead.error is not None and ahead.error.code not in [error.code for error in errors]:
            errors.append(ahead.error)
        is_cured = ahead.error is None
        return Plan(
            target=target,
            verdict="restart" if is_cured else "never",
            outcome=None,
            cpu_num=_find_cpu_num(ahead.totals) if is_cured else None,
            memory_size=_find_memory_size(ahead.totals) if is_cured else None,
            reasons=_make_reasons([_reason_of(error) for error in errors]),
            commands=[_tell_command(trial) for trial in ahead.commands] if is_cured else [],
            prepare=ahead.prepare if is_cured else [],
            reserved=Reserved(slots=0, host_memory=0),
            took=None,
        )

    def _look_ahead(self, target: PlanTarget, trials: list[_Trial], refused: list[_Trial]) -> "_Ahead":
        facts, error = self._facts, refused[0].error
        if facts.domain.config is None:
            return _Ahead(error=error)
        if facts.domain.saved:
            return _Ahead(error=AgentError(Code.VM_SAVED, tell_saved(facts.domain)))
        if all(trial.direction == "down" for trial in refused):
            return self._shrink_definition(target, trials)
        if not all(trial.error is not None and _is_cured_by_start(trial.error) for trial in refused):
            return _Ahead(error=error)
        later = self._restarted.try_target(target)
        if any(_takes_by_balloon(trial) for trial in later):
            return _Ahead(error=error)
        if _find_error(later) is None:
            return _Ahead(totals=later, commands=later)
        preparation = self._now.prepare_for(target)
        if preparation is None or preparation.error is not None:
            return _Ahead(error=error if preparation is None else preparation.error)
        shape = next((step for step in preparation.steps if isinstance(step, DefineShape)), None)
        if shape is None:
            return _Ahead(error=_find_error(later))
        foreseen = self._foresee(shape)
        if isinstance(foreseen, AgentError):
            return _Ahead(error=foreseen)
        diff, restarted = foreseen
        later = restarted.try_target(target)
        return _Ahead([_tell_command(preparation, diff)], later, later, _find_error(later))

    def _shrink_definition(self, target: PlanTarget, trials: list[_Trial]) -> "_Ahead":
        """What the running VM does not give up, its definition may: the next start has less then."""
        prepared, accepted = [], []
        for trial in trials:
            if trial.error is None:
                # The definition may have less than the running VM, and then it is to be sent after the restart.
                later = [self._restarted.try_one(name, target) for name in sorted(trial.resources)]
                if (error := _find_error(later)) is not None:
                    return _Ahead(error=error)
                accepted += later
                continue
            if trial.request.affect != "both":
                return _Ahead(error=trial.error)
            request = msgspec.structs.replace(trial.request, affect="config")
            smaller = _tell(self._now.decide(trial.command, request), self._facts)
            if smaller.error is not None:
                return _Ahead(error=smaller.error)
            if (
                trial.error.code is Code.GUEST_MEMORY_SHORT
                or _takes_by_balloon(smaller)
                or _is_rounded(smaller, target)
            ):
                return _Ahead(error=trial.error)
            prepared.append(smaller)
        return _Ahead([_tell_command(one) for one in prepared], [*accepted, *prepared], accepted)

    def _foresee(self, step: DefineShape) -> tuple[str, _Look] | AgentError:
        """Return the diff of a preparation, and what would be so after a start with it; or why it cannot be made."""
        if step.shape not in self._foreseen:
            try:
                diff, definition = self._vm.foresee(step)
                self._foreseen[step.shape] = diff, self._now.foresee(definition)
            except AgentError as error:
                if error.code is Code.LIBVIRT_UNAVAILABLE:
                    raise
                self._foreseen[step.shape] = error
        return self._foreseen[step.shape]


class _Ahead(NamedTuple):
    """What is to be prepared, what the VM would have then, what is to be sent after the restart; or why not."""

    prepare: list[PlannedCommand] = []
    totals: list[_Trial] = []
    commands: list[_Trial] = []
    error: AgentError | None = None


def _tell(trial: _Trial, facts: Facts) -> _Trial:
    """Return a trial with what the reply to such a task would say."""
    if trial.goal is None:
        return trial
    try:
        ending = Ending(
            trial.request, trial.goal, before=facts, after=facts, reports=(), error=None, planned=trial.steps
        )
        judgement = judge(ending)
        own = call(trial.command.reply_fields, replace(ending, judgement=judgement))
        told = [*judgement.warnings, *call(list, own.get("warnings", ()))]
    except Exception as error:
        return _refused(trial.command, trial.request, error)
    return trial._replace(told=told, size_bytes=own.get("aligned"))


def _refused(command: Command, request: VmRequest, error: Exception) -> _Trial:
    failure = make_error(error)
    if not failure.expected:
        log.failure("a command cannot be planned", failure, command=command.name)
    return _Trial(command, request, error=failure)


def _given(target: PlanTarget) -> set[str]:
    return {name for name in target.__struct_fields__ if getattr(target, name) is not None}


def _make_request(command: Command, target: PlanTarget, vm: str) -> VmRequest:
    """Return the command's request: the fields of the target that it has."""
    fields = _given(target) & set(command.request.__struct_fields__)
    return command.request(vm_uuid=vm, **{name: getattr(target, name) for name in sorted(fields)})


def _tell_command(trial: _Trial, diff: str | None = None) -> PlannedCommand:
    defaults = _find_defaults(trial.command.request)
    request = msgspec.to_builtins(trial.request)
    return PlannedCommand(
        command=trial.command.name,
        path=trial.command.path,
        request={name: value for name, value in request.items() if value != defaults[name]},
        steps=[msgspec.to_builtins(step) for step in trial.steps],
        diff=diff,
    )


@cache
def _find_defaults(request: type[VmRequest]) -> dict[str, Any]:
    return {field.encode_name: field.default for field in msgspec.structs.fields(request)}


def _is_cured_by_start(error: AgentError) -> bool:
    return error.code is Code.VM_NOT_RUNNING or bool(error.details.get("needsRestart"))


def _takes_by_balloon(trial: _Trial) -> bool:
    """Whether it depends on what a guest can spare that has not been started yet: nobody can promise that."""
    return trial.direction == "down" and trial.goal is not None and trial.goal.find_total("balloon") is not None


def _find_error(trials: Iterable[_Trial]) -> AgentError | None:
    return next((trial.error for trial in trials if trial.error is not None), None)


def _find_doubts(trial: _Trial, facts: Facts) -> list[Problem]:
    """Return why the guest would not confirm that it uses what a trial changes; nothing where it could."""
    if trial.goal is None or not trial.steps:
        return []
    asked_online = trial.request.guest_online and may_online(facts)
    found: list[Problem] = []
    for total in trial.goal.totals:
        if total.live is None:
            continue
        name: Name = "cpu" if total.resource == "cpu" else "memory"
        if measure(facts, total.resource).online is None:
            told = (
                find_cpu_warnings(facts, None, asked_online=asked_online)
                if name == "cpu"
                else find_memory_warnings(facts, asked_online=asked_online)
            )
            found += told[:1]
        elif total.direction == "up" and not asked_online:
            found.append(explain_not_asked(facts))
        else:
            found += _find_disabled(name, facts)
    return found


def _find_disabled(name: Name, facts: Facts) -> list[Problem]:
    commands = sorted(AGENT_COMMANDS[name] & facts.guest.disabled)
    words = f"{', '.join(commands)} is disabled in the guest agent's configuration"
    return [_problem(Code.GUEST_AGENT_REFUSED, words)] if commands else []


def _is_rounded(trial: _Trial, target: PlanTarget) -> bool:
    return trial.size_bytes is not None and trial.size_bytes > (target.memory_size or 0)


def _find_rounding(trial: _Trial, target: PlanTarget) -> list[Problem]:
    """Return that more memory would come than was asked for; what a removal leaves over its command tells itself."""
    if trial.direction == "down" or not _is_rounded(trial, target) or target.memory_size is None:
        return []
    size = trial.size_bytes or 0
    words = f"{format_size(target.memory_size)} ({target.memory_size} bytes) would be rounded up to {format_size(size)}"
    return [_problem(Code.MEMORY_NOT_ALIGNED, f"{words} ({size} bytes), whole blocks of memory")]


def _find_outcome(trials: list[_Trial], doubts: list[Problem]) -> Outcome:
    """Return what the commands would answer if all goes well."""
    if not any(trial.steps for trial in trials):
        return "unchanged"
    totals = [total for trial in trials if trial.goal is not None and trial.steps for total in trial.goal.totals]
    if all(total.live is None for total in totals):
        return "configured"
    return "plugged" if doubts else "online"


def _find_cpu_num(trials: Iterable[_Trial]) -> int | None:
    totals = [trial.goal.find_total("cpu") for trial in trials if trial.goal is not None]
    return next((one.config if one.live is None else one.live for one in totals if one is not None), None)


def _find_memory_size(trials: Iterable[_Trial]) -> int | None:
    """Return what a reply would tell as `aligned`, of commands that tell it; else the total."""
    for trial in trials:
        if trial.size_bytes is not None:
            return trial.size_bytes
        if trial.goal is not None and (total := trial.goal.find_total("memory")) is not None:
            return total.config if total.live is None else total.live
    return None


def _problem(code: Code, words: str) -> Problem:
    return Problem(code=code, message=words, remedy=CODES[code].remedy)


def _reason_of(error: AgentError) -> Reason:
    return Reason(error.code, error.message, error.remedy, needs_restart=bool(error.details.get("needsRestart")))


def _make_reasons(problems: Iterable[Problem]) -> list[Reason]:
    """Return each code once, in order."""
    found: dict[Code, Reason] = {}
    for one in problems:
        reason = one if isinstance(one, Reason) else Reason(one.code, one.message, one.remedy)
        found.setdefault(one.code, reason)
    return list(found.values())
