"""Commands of plugins that misbehave: nothing is done that their goal does not say, and each task is answered truly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.model.command import Affect, Command, Goal, Total, no_rollback
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.reply import Problem
from kvmagent.model.steps import (
    AnyStep,
    AttachMemory,
    AttachVirtioMem,
    DefineShape,
    DetachMemory,
    ForgetMemory,
    OfflineGuestVcpus,
    OnlineGuestVcpus,
    ResizeVirtioMem,
    SetBalloon,
    SetCpuShares,
    SetVcpus,
    Shape,
    UnplugVcpus,
)
from tests.fakes.agent import COMMANDS, MIB
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.unit.test_hostqueries import Unforeseen, raising, returning
from tests.unit.test_recovery import (
    WAYS,
    Agent,
    Killed,
    Way,
    check_truth,
    make_virtio_mem,
    meet,
    numbers_of,
    reserved,
    set_virtio_mem,
    shape_of,
)
from tests.unit.test_told import Counted

SHAPE = Shape(vcpu_maximum=16, topology=None, max_memory_bytes=8192 * MIB, slots=16, cells=())
DIMM: dict[str, Any] = {"alias": "ua-x", "size_bytes": 128 * MIB, "node": 0}
STEPS: list[AnyStep] = [
    *(SetVcpus(count=3, target=target) for target in ("live", "config", "both")),
    *(AttachMemory(**DIMM, live=live, config=config) for live, config in ((True, False), (False, True), (True, True))),
    *(
        AttachVirtioMem(**DIMM, block_bytes=2 * MIB, requested_bytes=0, live=live, config=config)
        for live, config in ((True, False), (False, True), (True, True))
    ),
    *(SetBalloon(size_bytes=200 * MIB, target=target) for target in ("live", "config")),
    *(SetCpuShares(shares=512, target=target) for target in ("live", "config")),
    *(ResizeVirtioMem(**DIMM, requested_bytes=0, target=target) for target in ("live", "config")),
    ForgetMemory(**DIMM, slot=0),
    DetachMemory(alias="ua-x", timeout_sec=1),
    UnplugVcpus(count=1, timeout_sec=1),
    OnlineGuestVcpus(ids=(0,)),
    OfflineGuestVcpus(ids=(0,)),
    DefineShape(shape=SHAPE),
]
AMOUNTS = {"cpu": 3, "memory": 384 * MIB, "balloon": 384 * MIB}


def carry_out(directory: Path, command: Command, domain: FakeDomain | None = None, /, **fields: Any) -> Agent:
    """Carry a command out that a plugin declares; the agent has what came of it."""
    agent = Agent(directory, domain)
    recorder = Counted()
    agent.executor = agent.make_executor({command.name: command}, libvirt_wait_s=0.0, recorder=recorder)
    agent.executor.run(agent.accept(command.name, vmUuid="vm1", **fields))
    agent.journal.stop()
    task = agent.journal.find("t1")
    assert task is not None
    assert (task.state, agent.finished, len(recorder.endings)) == ("finished", ["t1"], 1)
    return agent


def planning(totals: tuple[Total, ...], *steps: AnyStep) -> Command:
    return replace(
        COMMANDS["HotPlugCpu"],
        goal=Goal,
        decide=lambda request, facts, task_uuid: Goal(totals=totals),
        next_steps=lambda goal, facts, failed: tuple(
            step for step in steps if step.key not in failed and not is_attached(step, facts)
        ),
        rollback_goal=no_rollback,
    )


def is_attached(step: AnyStep, facts: Facts) -> bool:
    definitions = (facts.domain.live, facts.domain.config)
    return isinstance(step, AttachMemory | AttachVirtioMem) and any(
        definition is not None and definition.find_device(step.alias) is not None for definition in definitions
    )


def is_declared(step: AnyStep, totals: tuple[Total, ...], affect: Affect) -> bool:
    """An oracle of its own: whether each definition that a step changes was asked for, and has a total."""
    for target in step.changes:
        if affect not in ("both", target):
            return False
        amounts = {"live": [t.live for t in totals if t.resource == step.resource and t.live is not None]}
        amounts["config"] = [t.config for t in totals if t.resource == step.resource and t.config is not None]
        if step.resource is not None and not amounts[target]:
            return False
    return True


@st.composite
def goals(draw: st.DrawFn) -> tuple[Total, ...]:
    chosen = draw(st.lists(st.sampled_from(sorted(AMOUNTS)), unique=True))
    return tuple(
        Total(one, draw(st.sampled_from([None, AMOUNTS[one]])), draw(st.sampled_from([None, AMOUNTS[one]])))  # type: ignore[arg-type]
        for one in chosen
    )


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from(STEPS),
    totals=goals(),
    affect=st.sampled_from(["both", "live", "config"]),
    dry_run=st.booleans(),
)
def test_no_definition_is_changed_that_the_goal_or_the_caller_leaves_alone(
    tmp_path_factory: pytest.TempPathFactory, step: AnyStep, totals: tuple[Total, ...], affect: Affect, dry_run: bool
) -> None:
    command = planning(totals, step)
    agent = carry_out(tmp_path_factory.mktemp("rogue"), command, cpuNum=3, affect=affect, dryRun=dry_run)
    reply = agent.reply()
    takes = isinstance(step, ForgetMemory | SetBalloon)  # the VM has 256 MiB, and the goals only add
    if is_declared(step, totals, affect) and not takes:
        assert reply["errorCode"] != "INTERNAL_ERROR", reply
        return
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "INTERNAL_ERROR")
    assert type(step).__name__ in reply["error"]
    assert (agent.domain.calls, reply["steps"]) == ([], [])


def test_each_step_that_a_plan_can_name_says_what_it_changes() -> None:
    assert {type(step) for step in STEPS} >= {
        kind for kind in AnyStep.__args__ if not kind.__name__.startswith(("Await", "Online", "Offline"))
    }


def test_a_plan_that_has_no_effect_and_no_end_is_ended(tmp_path: Path) -> None:
    command = replace(
        planning((Total("cpu", 3, None),)), next_steps=lambda goal, facts, failed: (OnlineGuestVcpus(ids=(0,)),)
    )
    reply = carry_out(tmp_path, command, cpuNum=3).reply()
    assert (reply["outcome"], reply["errorCode"], len(reply["steps"])) == ("refused", "INTERNAL_ERROR", 1)


def test_what_a_later_round_plans_is_held_to_the_goal_as_well(tmp_path: Path) -> None:
    """The definition alone was asked for; once it is changed the plugin goes on with the running VM."""

    def next_steps(goal: Goal, facts: Any, failed: frozenset[str]) -> tuple[AnyStep, ...]:
        saved = facts.get_config().vcpu_current == 3
        return (SetVcpus(count=3, target="live" if saved else "config"),)

    command = replace(planning((Total("cpu", None, 3),)), next_steps=next_steps)
    agent = carry_out(tmp_path, command, cpuNum=3)
    reply = agent.reply()
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "INTERNAL_ERROR")
    assert (reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == (1, 3)


def later(error: BaseException) -> Callable[..., Any]:
    """A generator, which begins only where its items are asked for."""

    def function(*arguments: Any) -> Any:
        yield from ()
        raise error

    return function


#: What a function of a plugin's does instead of its work.
MISDEEDS: dict[str, Callable[..., Any]] = {
    "has a bug": raising(Unforeseen("a bug")),
    "ends its thread": raising(SystemExit("bye")),
    "ends its thread later": later(SystemExit("bye")),
    "loses libvirt later": later(AgentError(Code.LIBVIRT_UNAVAILABLE, "made up")),
    "says in the end that it was cancelled": later(AgentError(Code.CANCELLED, "made up")),
    "tells warnings that end its thread": lambda *arguments: {"warnings": later(SystemExit("bye"))()},
    **{f"raises {code}": raising(AgentError(code, "made up")) for code in Code if code.startswith((
        "CANCELLED", "JOURNAL_UN", "LIBVIRT_UN", "STOPPING", "CPU_REMOVAL_P", "MEMORY_REMOVAL_P", "VM_NOT_F", "VM_REPL"
    ))},
    "returns None": returning(None),
    "returns a number": returning(7),
    "returns text": returning("no"),
    "returns numbers": returning((1, 2)),
    "returns a goal of its own": returning(Goal(totals=(Total("cpu", 1, 1),), vm="x", run="y")),
    "returns a step": returning((SetVcpus(count=1, target="both"),)),
    "returns the judge's fields": returning({"outcome": "online", "success": True}),
    "returns fields that there are not": returning({"no_such_field": 1}),
    "returns warnings that are none": returning({"warnings": [object()]}),
}  # fmt: skip
CALLS = ("decide", "next_steps", "rollback_goal", "resumed_goal", "reply_fields", "find_progress_context")


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(WAYS)),
    wrong=st.dictionaries(
        st.sampled_from(CALLS), st.tuples(st.integers(1, 4), st.sampled_from(sorted(MISDEEDS))), min_size=1, max_size=2
    ),
)
def test_whatever_a_plugin_s_functions_do_its_task_is_answered_once_and_truly(
    tmp_path_factory: pytest.TempPathFactory, name: str, wrong: dict[str, tuple[int, str]]
) -> None:
    way = WAYS[name]
    check_way(tmp_path_factory.mktemp("rogue"), way, wrong)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    ("function", "misdeed"),
    [("next_steps", one) for one in MISDEEDS if one.endswith(("later", "cancelled"))]
    + [("reply_fields", "tells warnings that end its thread")],
)
def test_what_a_plugin_raises_while_its_items_are_taken_ends_in_a_reply(
    tmp_path: Path, function: str, misdeed: str, nth: int
) -> None:
    check_way(tmp_path, WAYS["HotPlugCpu"], {function: (nth, misdeed)})


def check_way(directory: Path, way: Way, wrong: dict[str, tuple[int, str]]) -> None:
    good = COMMANDS[way.command]

    def spoil(name: str, nth: int, misdeed: str) -> Callable[..., Any]:
        called, function = 0, getattr(good, name)

        def spoilt(*arguments: Any) -> Any:
            nonlocal called
            called += 1
            return (MISDEEDS[misdeed] if called == nth else function)(*arguments)

        return spoilt

    command = replace(good, **{call: spoil(call, nth, misdeed) for call, (nth, misdeed) in wrong.items()})
    untouched, domain = shape_of(meet(way)), meet(way)
    agent = carry_out(directory, command, domain, **way.fields)
    reply = agent.reply()
    assert reserved(agent) == 0
    assert reply["outcome"] != "pending"
    check_truth(domain, reply, untouched)


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from(STEPS).flatmap(
        lambda step: st.integers(1, 4).map(
            lambda factor: msgspec.structs.replace(
                step,
                **{
                    name: getattr(step, name) * factor
                    for name in ("count", "size_bytes", "requested_bytes")
                    if hasattr(step, name)
                },
            )
        )
    ),
    cpus=st.integers(1, 4),
    blocks=st.integers(0, 4),
    times=st.integers(1, 3),
)
def test_no_plan_brings_a_vm_above_its_goal_of_which_alone_its_owner_was_asked(
    tmp_path_factory: pytest.TempPathFactory, step: AnyStep, cpus: int, blocks: int, times: int
) -> None:
    size = (256 + 128 * blocks) * MIB
    totals = (Total("cpu", cpus, cpus), Total("memory", size, size), Total("balloon", size, size))
    steps = [step]
    if "alias" in step.__struct_fields__:
        steps = [msgspec.structs.replace(step, alias=f"ua-{n}") for n in range(times)]  # type: ignore[call-arg]
    agent = carry_out(tmp_path_factory.mktemp("rogue"), planning(totals, *steps), cpuNum=3)
    has = numbers_of(agent.domain)
    assert max(has["cpuNum"], has["configCpuNum"]) <= cpus
    assert max(has["memorySize"], has["configMemorySize"]) <= size


@pytest.mark.parametrize("other", ["99999999-2222-3333-4444-555555555555", ""])
def test_a_way_back_is_one_of_the_same_vm_and_goes_no_further_than_the_way(tmp_path: Path, other: str) -> None:
    """Its owner allowed what the goal has; of what a plugin wants to go back to nobody asked."""
    further = Goal(totals=(Total("cpu", 4, 4),), vm=other, run="another")
    command = replace(
        planning((Total("cpu", 3, 3),)),
        next_steps=lambda goal, facts, failed: (SetVcpus(count=goal.totals[0].live, target="both"),),
        rollback_goal=lambda goal, seen, facts, error: further,
    )
    domain = meet(WAYS["HotPlugCpu"])
    domain.fail_next["setVcpusFlags"] = qemu_error(1, "no")
    agent = carry_out(tmp_path, command, domain, cpuNum=3)
    assert agent.reply()["outcome"] == "refused"
    assert (numbers_of(domain)["cpuNum"], numbers_of(domain)["configCpuNum"]) == (1, 1)
    recorded = agent.journal.find("t1")
    assert recorded is not None
    assert msgspec.json.decode(recorded.goal or b"")["vm"] == domain.UUIDString()


def test_what_of_a_goal_is_the_agent_s_own_no_plugin_sets(tmp_path: Path) -> None:
    claimed = Goal(
        totals=(Total("cpu", 3, 3),), vm="x", run="y", failure=Problem(code=Code.VM_PAUSED, message="no", remedy="")
    )
    command = replace(
        planning(()),
        decide=lambda request, facts, task_uuid: claimed,
        next_steps=lambda goal, facts, failed: (
            () if facts.get_live().vcpu_current == 3 else (SetVcpus(count=3, target="both"),)
        ),
    )
    reply = carry_out(tmp_path, command, cpuNum=3).reply()
    assert (reply["success"], reply["error"], reply["cpuNum"]) == (True, "", 3)


#: What takes something away from `make_full`: of each kind of step that can.
TAKING: list[AnyStep] = [
    *(SetVcpus(count=1, target=target) for target in ("live", "config", "both")),
    UnplugVcpus(count=1, timeout_sec=1),
    *(SetBalloon(size_bytes=300 * MIB, target=target) for target in ("live", "config")),
    *(
        ResizeVirtioMem(alias="ua-vm", node=0, size_bytes=2048 * MIB, requested_bytes=100 * MIB, target=target)
        for target in ("live", "config")
    ),
    DetachMemory(alias="ua-dimm", timeout_sec=1),
    ForgetMemory(alias="ua-dimm", slot=0, node=0, size_bytes=128 * MIB),
]


def make_full() -> FakeDomain:
    domain = make_virtio_mem()
    domain.attachDeviceFlags(
        "<memory model='dimm'><target><size unit='KiB'>131072</size><node>0</node></target>"
        "<alias name='ua-dimm'/></memory>",
        3,
    )
    domain.setVcpusFlags(2, 3)
    return domain


def everything_of(domain: FakeDomain) -> dict[str, int]:
    balloons = {
        name: int(root.findtext("currentMemory")) for name, root in (("live", domain.live), ("config", domain.config))
    }
    return numbers_of(domain) | balloons


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(TAKING).flatmap(
            lambda step: st.integers(0, 30).map(
                lambda tenths: msgspec.structs.replace(
                    step,
                    **{
                        name: getattr(step, name) * tenths // 10
                        for name in ("requested_bytes", *(("size_bytes",) if isinstance(step, SetBalloon) else ()))
                        if hasattr(step, name)
                    },
                )
            )
        ),
        min_size=1,
        max_size=3,
    ),
    interrupted=st.booleans(),
    starts_anew=st.booleans(),
)
def test_no_plan_that_adds_takes_from_a_vm_what_it_has_by_then(
    tmp_path_factory: pytest.TempPathFactory, steps: list[AnyStep], interrupted: bool, starts_anew: bool
) -> None:
    """Nor when it goes on after a kill, and the VM was given more meanwhile, or was started anew."""
    totals = tuple(
        Total(one, amount, amount) for one, amount in (("cpu", 3), ("memory", 9 << 30), ("balloon", 9 << 30))
    )  # type: ignore[arg-type]

    def next_steps(goal: Goal, facts: Facts, failed: frozenset[str]) -> tuple[AnyStep, ...]:
        if facts.get_live().vcpu_current < 3:
            return (SetVcpus(count=3, target="both"),)
        return tuple(step for step in steps if step.key not in failed)

    command = replace(planning(totals), next_steps=next_steps)
    agent = Agent(tmp_path_factory.mktemp("rogue"), make_full())
    agent.executor = agent.make_executor({command.name: command}, libvirt_wait_s=0.0)
    task = agent.accept(command.name, vmUuid="vm1", cpuNum=3)
    before = everything_of(agent.domain)
    if interrupted:
        agent.point = "step:done"
        with pytest.raises(Killed):
            agent.executor.run(task)
        set_virtio_mem(agent.domain, 900)
        if starts_anew:
            agent.domain.power_cycle()
        before = everything_of(agent.domain)
        (task,) = agent.journal.unfinished()
    agent.executor.run(task)
    agent.journal.stop()
    after = everything_of(agent.domain)
    assert {name: (then, after[name]) for name, then in before.items() if after[name] < then} == {}, agent.reply()
    assert agent.finished == ["t1"]


def test_each_step_that_can_take_something_away_is_tried() -> None:
    """Offline* leave the VM what it has: its guest gives it back when asked."""
    taking = {
        kind for kind in AnyStep.__args__ if kind.__name__.startswith(("Set", "Unplug", "Resize", "Detach", "Forget"))
    }
    assert {type(step) for step in TAKING} == taking - {SetCpuShares}


@pytest.mark.parametrize("target", ["live", "config"])
def test_no_removal_gives_what_it_was_to_take(tmp_path: Path, target: Any) -> None:
    """What has less than the total by now keeps that: somebody has taken more meanwhile."""
    command = planning((Total("cpu", 3, 3, direction="down"),), SetVcpus(count=2, target=target))
    agent = carry_out(tmp_path, command, cpuNum=3)
    assert (agent.reply()["outcome"], agent.reply()["errorCode"]) == ("refused", "INTERNAL_ERROR")
    assert agent.domain.calls == []


@pytest.mark.parametrize("step", [step for step in TAKING if not isinstance(step, SetVcpus) or step.target != "both"])
def test_no_removal_takes_more_than_its_goal_says(tmp_path: Path, step: AnyStep) -> None:
    domain = make_full()
    has = everything_of(domain)
    balloon = Total("balloon", has["live"] * 1024, has["config"] * 1024, direction="down")
    memory = Total("memory", has["memorySize"], has["configMemorySize"], direction="down")
    command = planning((Total("cpu", 2, 2, direction="down"), memory, balloon), step)
    reply = carry_out(tmp_path, command, domain, cpuNum=3).reply()
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "INTERNAL_ERROR")
    assert everything_of(domain) == has
