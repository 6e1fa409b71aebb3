"""A VM of 2 GiB whose balloon holds 1 GiB: what the guest is asked for, and what is refused."""

import msgspec
import pytest
from return_balloon import ReturnBalloonRequest, decide, next_steps, resumed_goal

from kvmagent.model.command import Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host
from kvmagent.model.steps import AwaitBalloon, SetBalloon

GIB = 2**30
LIVE = Definition(
    vcpu_current=1, vcpu_maximum=1, vcpus=(), topology=None, total_bytes=2 * GIB, current_bytes=GIB,
    max_memory_bytes=None, slots=0, cells=(), devices=(), acpi=True, balloon=True, agent_channel=True,
    machine="q35", arch="x86_64", hypervisor="kvm",
)  # fmt: skip


def facts(balloon_bytes: int | None = GIB, *, live: Definition = LIVE, host: Host | None = None) -> Facts:
    """A running VM without a persistent definition."""
    domain = Domain("vm1", "", "running", live=live, config=None, balloon_bytes=balloon_bytes)
    return Facts(domain=domain, guest=Guest(), host=host or Host())


def request(keep_size: int = 0) -> ReturnBalloonRequest:
    """The request that the tests send."""
    return ReturnBalloonRequest(vm_uuid="vm1", affect="live", timeout_sec=90, keep_size=keep_size)


def test_asks_the_guest_waits_for_it_and_is_done() -> None:
    goal = decide(request(), facts(), "task-1")
    assert goal.totals == (Total("balloon", live=2 * GIB, config=None),)
    expected = (SetBalloon(size_bytes=2 * GIB, target="live"), AwaitBalloon(size_bytes=2 * GIB, timeout_sec=90))
    assert next_steps(goal, facts(), frozenset()) == expected
    assert next_steps(goal, facts(2 * GIB), frozenset()) == ()


def test_what_the_balloon_is_to_keep_takes_nothing_from_the_vm() -> None:
    assert decide(request(GIB // 2), facts(), "task-1").live_bytes == GIB + GIB // 2
    assert decide(request(2 * GIB), facts(), "task-1").live_bytes == GIB


def test_a_guest_that_did_not_follow_is_not_asked_again() -> None:
    goal = decide(request(), facts(), "task-1")
    assert next_steps(goal, facts(), frozenset({"AwaitBalloon"})) == ()
    assert resumed_goal(goal).timeout_sec == 60


def test_is_refused_as_the_shipped_commands_are() -> None:
    without = msgspec.structs.replace(LIVE, balloon=False)
    for seen, code in (
        (facts(live=without), Code.NO_BALLOON),
        (facts(None), Code.BALLOON_NOT_ANSWERING),
        (facts(host=Host(memory_available_bytes=GIB)), Code.HOST_MEMORY_SHORT),
    ):
        with pytest.raises(AgentError) as refused:
            decide(request(), seen, "task-1")
        assert refused.value.code is code
