"""What a plugin declares: commands, each with a request, a reply, a goal and pure functions.

    decide(request, facts, task_uuid)        -> goal      absolute, recorded before anything is touched; or AgentError
    next_steps(goal, facts, failed)          -> steps     what is left to do towards the goal; none = done
    rollback_goal(goal, seen, facts, error)  -> goal      after a failure on the way, where to go instead; None = stop
    resumed_goal(goal)                       -> goal      after an interruption, what of the goal may still be pursued
    reply_fields(Ending)                     -> fields    what the command has to add to the reply

The executor judges what came of it (model.judge): outcome, numbers and stages are no command's to say. It asks the
VM's owner (model.ownerpolicy) before anything is touched. It observes before every call of `next_steps`, so that a step
which needs to know the effect of an earlier one is simply planned in the next round, and a task that was cut off goes
on from its recorded goal.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec

from kvmagent.model.decoders import prepare_decoder
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts, Part
from kvmagent.model.host import ManagementServer, Progress, Query, Report, VmEvent
from kvmagent.model.reply import Judgement, Problem, VmReply
from kvmagent.model.roles import Role, check_role
from kvmagent.model.steps import AnyStep, Resource

Affect = Literal["both", "live", "config"]
#: The Content-Type of all JSON that the agent sends: some receivers take a body without a charset for ISO-8859-1.
JSON_TYPE = "application/json; charset=utf-8"
#: What the callbackurl header says where no callback is wanted: the reply is read from GET /tasks/ID.
NO_CALLBACK = "none"
#: What any task may end in, whatever its command declares.
ANY_TASK = (
    Code.CANCELLED,
    Code.INTERNAL_ERROR,
    Code.LIBVIRT_BUSY,
    Code.LIBVIRT_REFUSED,
    Code.LIBVIRT_UNAVAILABLE,
    Code.NOT_SUPPORTED,
    Code.NOT_VERIFIED,
    Code.REFUSED_BY_HOOK,
    Code.TASK_UNREADABLE,
    Code.VM_CRASHED,
    Code.VM_NOT_FOUND,
    Code.VM_REPLACED,
    Code.VM_RESTARTED,
)

VmName = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=255,
        pattern=r"^[^/\x00-\x1f\x7f]+\Z",
        description="The domain's name or UUID, with or without dashes",
    ),
]


class VmRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Fields that every command on a VM takes."""

    vm_uuid: VmName
    affect: Annotated[
        Affect, msgspec.Meta(description="Which definition to change; a VM that is off has only config")
    ] = "both"
    guest_online: Annotated[
        bool, msgspec.Meta(description="Bring plugged vCPUs and memory online through the guest agent")
    ] = True
    timeout_sec: Annotated[
        int, msgspec.Meta(ge=1, le=3600, description="Seconds that each step waits for the guest")
    ] = 60
    dry_run: Annotated[
        bool, msgspec.Meta(description="Change nothing and reply with the plan, as far as it can be known")
    ] = False


class Total(msgspec.Struct, frozen=True, rename="camel"):
    """What a task brings one resource to, in all: vCPUs or bytes; None for a definition that it leaves alone.

    "memory" is boot memory and what the devices give, "balloon" what the balloon leaves of boot memory and dimms.
    `gains` are the bytes by which the running VM's guest NUMA nodes grow: they may be backed differently.
    """

    resource: Resource
    live: int | None
    config: int | None
    direction: Literal["up", "down"] = "up"
    gains: dict[int, int] = {}


class Reservation(msgspec.Struct, frozen=True, rename="camel"):
    """What a task may bring a running VM to: bytes by guest NUMA node, what its balloon holds of them, vCPUs."""

    node_bytes: dict[int, int]
    ballooned_bytes: int
    vcpus: int


class Goal(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where a task is going, in absolute terms. Commands extend it; it is journaled before the first step.

    `totals` say what is to be reached: what is not in them is not touched, and what came of the task is held against
    them. The executor fills in the rest: `vm` is the VM's UUID, `run` the run that it was decided in, `reservation`
    what of the host's memory is reserved until the task's end; with a `failure` the goal is the way back from what
    failed.
    """

    totals: tuple[Total, ...] = ()
    vm: str = ""
    run: str | None = None
    reservation: Reservation | None = None
    failure: Problem | None = None

    @property
    def slots(self) -> int:
        """How many memory slots of the running VM it takes."""
        return 0

    def find_total(self, resource: Resource) -> Total | None:
        """Return the total of a resource."""
        return next((total for total in self.totals if total.resource == resource), None)


@dataclass(frozen=True)
class Resize:
    """What a command resizes, all of it at once, and in which direction."""

    resources: frozenset[Literal["cpu", "memory"]]
    direction: Literal["up", "down"]


@dataclass(frozen=True)
class Wish:
    """What a VM's next start is to allow for: totals, or maxima; None leaves it to the command that prepares."""

    vm: str
    cpu_num: int | None = None
    memory_size: int | None = None
    max_cpu_num: int | None = None
    max_memory_size: int | None = None


class StepReport(msgspec.Struct, frozen=True, rename="camel"):
    """One performed step: how long it took (None: it was cut off, and may have had its effect), what went wrong.

    `ended_ms` counts from the start of the run (0: in an earlier one); `told` is the text of a step that has one:
    DefineShape's diff.
    """

    step: AnyStep
    elapsed_ms: float | None
    problem: Problem | None = None
    ended_ms: float = 0.0
    told: str = ""


def find_unreached(goal: Goal, reports: Iterable[StepReport], facts: Facts) -> tuple[AnyStep, ...]:
    """Return what takes back that which a task asked of the guest and did not see reached; what ended with the run of
    the VM is gone."""
    if goal.run is not None and facts.run is not None and goal.run != facts.run:
        return ()
    return tuple(step for one in find_asked(reports) for step in one.take_back(facts))


def find_asked(reports: Iterable[StepReport]) -> tuple[AnyStep, ...]:
    """Return the steps that asked the guest for an amount and were not seen to be followed: of each device the last."""
    asked: dict[str, AnyStep] = {}
    for report in reports:
        if report.problem is None and report.step.asks is not None:
            asked[report.step.asks] = report.step
        if report.problem is None and report.elapsed_ms is not None and report.step.awaits is not None:
            asked.pop(report.step.awaits, None)
    return tuple(asked.values())


Once = Callable[[object, Callable[[], Any]], Any]


def find_anew(about: object, find: Callable[[], Any]) -> Any:
    """What is done where nobody remembers answers."""
    return find()


@dataclass(frozen=True)
class Ending:
    """Everything that a reply can be made from.

    `goal` is None when the command was refused before it had one, `before` when the VM could not even be read;
    `after` when it could not be read again. `planned` holds the steps of a dry run, `preview` what they would tell.
    `judgement` is what came of it, made before `reply_fields`; `error` is then the judgement's.
    `recovered`: an earlier agent left the task unfinished; `reports` then begin with that agent's. `late`: what was
    pending when the task answered has come to an end since. `once(about, find)` returns what `find` returns, or what it
    returned for an equal `about` before: for what costs much, and is the same for many VMs.
    """

    request: Any
    goal: Any
    before: Facts | None
    after: Facts | None
    reports: tuple[StepReport, ...]
    error: AgentError | None
    planned: tuple[AnyStep, ...] | None = None
    preview: str = ""
    recovered: bool = False
    late: bool = False
    judgement: Judgement | None = None
    once: Once = find_anew

    @property
    def is_done(self) -> bool:
        """Whether anything was done, so that there is something to be said of it."""
        return self.judgement is not None and self.judgement.outcome not in ("refused", "planned")


def no_reply_fields(ending: Ending) -> Mapping[str, Any]:
    """What a command has to say beside what every reply says, if nothing."""
    return {}


def no_rollback(goal: Any, seen: Facts, facts: Facts, error: AgentError) -> None:
    """What most commands do after a failed step: stop, and report how far the task came."""


def need_no_more(request: Any) -> None:
    """What most commands need beside their role."""


def resume_goal(goal: Any) -> Any:
    """What most commands do after an interruption: go on, from what is found then."""
    return goal


@dataclass(frozen=True)
class Command:
    """One command, declared once: route, validation, OpenAPI, lane and planning all come from here.

    `observe_guest` names what has to be asked of the guest: "cpus", "memory", "agent", "os"; with "memory" the host's
    memory is looked at too, with "budget" what of it is promised to all VMs, with "balloon target" what was asked of
    the balloon; `observe_first` what is asked besides at the first look, before the decision. `failed` (of next_steps)
    holds the keys of the soft steps that failed since the task was started or resumed and are not to be tried again,
    each also followed by its error code. A failed soft step ends its round: what follows it in the plan may count on
    its success. `seen` (of rollback_goal) are the facts when the failed step was planned, `facts` those of now.
    `find_progress_context` returns what a request carries for the management server to recognise reports of its
    progress by; None: it is told of no step. `subcommand` is what kvmagentctl calls it; empty: kvmagentctl does not
    offer it. `role` is what its caller needs, `needs_also` what it needs beside that for such a request. `reply_fields`
    returns fields of `reply` that are not VmReply's, and `warnings` to be told beside the judge's. With
    `remedies_in_error` the reply's `error` says what to do as well, for a caller that shows nothing else: of
    some codes in words of its own. `resizes` is what plans are made with: the first command that resizes something in
    a direction is the one for it. `prepares` makes a request that prepares the persistent definition for a wish.
    """

    name: str
    path: str
    summary: str
    request: type[VmRequest]
    reply: type[VmReply]
    goal: type[Goal]
    observe_guest: frozenset[Part]
    decide: Callable[[Any, Facts, str], Goal]
    next_steps: Callable[[Any, Facts, frozenset[str]], tuple[AnyStep, ...]]
    refusals: tuple[Code, ...]
    role: Role
    needs_also: Callable[[Any], Role | None] = need_no_more
    reply_fields: Callable[[Ending], Mapping[str, Any]] = no_reply_fields
    rollback_goal: Callable[[Any, Facts, Facts, AgentError], Goal | None] = no_rollback
    resumed_goal: Callable[[Any], Goal] = resume_goal
    observe_first: frozenset[Part] = frozenset()
    find_progress_context: Callable[[Any], dict[str, Any] | None] = lambda _request: None
    subcommand: str = ""
    remedies_in_error: Mapping[Code, str] | None = None
    resizes: Resize | None = None
    prepares: Callable[[Wish], VmRequest] | None = None

    def __post_init__(self) -> None:
        check_role(self.name, self.role)
        if not issubclass(self.reply, VmReply):
            raise TypeError(f"the reply of {self.name} is a {self.reply.__name__}: it must extend VmReply")
        if unknown := (self.observe_guest | self.observe_first) - frozenset(get_args(Part)):
            parts = ", ".join(map(repr, get_args(Part)))
            raise ValueError(f"{self.name} observes {sorted(unknown)}; what can be observed: {parts}")
        prepare_decoder(self.request, self.goal)


@dataclass(frozen=True)
class Plugin:
    """What an entry point of the group kvmagent.plugins resolves to.

    `report_event` says what the management server is told of something that happened to a VM, `report_gap` what it is
    told, with a reason, when events may have been missed, `report_progress` how far a task has come.
    """

    name: str
    commands: tuple[Command, ...]
    queries: tuple[Query, ...] = ()
    report_event: Callable[[VmEvent, ManagementServer], tuple[Report, ...]] | None = None
    report_gap: Callable[[str, ManagementServer], tuple[Report, ...]] | None = None
    report_progress: Callable[[Progress, ManagementServer], tuple[Report, ...]] | None = None
