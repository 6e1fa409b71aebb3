"""The three functions are pure: the tests call them with facts and need no libvirt."""

import pytest
from give_all_cpus import GiveAllCpusGoal, GiveAllCpusRequest, decide, next_steps

from kvmagent.model.command import Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, GuestVcpu, Host, Policy
from kvmagent.model.ownerpolicy import check_owner_policy
from kvmagent.model.steps import OnlineGuestVcpus, SetVcpus

FREE = Policy()
GOAL = GiveAllCpusGoal(cpu_num=4, live=True, config=False, guest_online=True)


def facts(cpus: int, *, online: int, policy: Policy = FREE) -> Facts:
    """A running VM that can have 4 vCPUs, and what its guest reports."""
    live = Definition(
        vcpu_current=cpus, vcpu_maximum=4, vcpus=(), topology=None, total_bytes=2**30, current_bytes=2**30,
        max_memory_bytes=None, slots=0, cells=(), devices=(), acpi=True, balloon=True, agent_channel=True,
        machine="q35", arch="x86_64", hypervisor="kvm", policy=policy,
    )  # fmt: skip
    guest = Guest(vcpus=tuple(GuestVcpu(id=n, online=n < online, can_offline=n > 0) for n in range(cpus)))
    return Facts(domain=Domain("vm1", "", "running", live=live, config=None), guest=guest, host=Host())


def test_the_goal_is_a_total() -> None:
    request = GiveAllCpusRequest(vm_uuid="vm1", leave_out=1)
    assert decide(request, facts(1, online=1), "task-1").cpu_num == 3


def test_plugs_first_and_then_brings_online_what_the_guest_has_not_by_itself() -> None:
    assert next_steps(GOAL, facts(1, online=1), frozenset()) == (SetVcpus(count=4, target="live"),)
    assert next_steps(GOAL, facts(4, online=1), frozenset()) == (OnlineGuestVcpus(ids=(1, 2, 3)),)
    assert next_steps(GOAL, facts(4, online=4), frozenset()) == ()


def test_a_guest_that_would_not_is_not_asked_again() -> None:
    assert next_steps(GOAL, facts(4, online=1), frozenset({"OnlineGuestVcpus"})) == ()


def test_its_goal_says_what_the_vm_is_to_have_in_all() -> None:
    """The agent checks the owner's policy and judges the outcome by these totals."""
    goal = decide(GiveAllCpusRequest(vm_uuid="vm1", affect="live"), facts(1, online=1), "task-1")
    assert goal.totals == (Total("cpu", live=4, config=None),)


def test_its_owner_may_forbid_it_or_set_a_limit() -> None:
    """The agent checks the goal's totals before anything is touched: no plugin has to remember it."""
    request = GiveAllCpusRequest(vm_uuid="vm1", affect="live")
    for policy, code in ((Policy(hotplug=False), Code.VM_OPTED_OUT), (Policy(max_cpu_num=2), Code.ABOVE_POLICY)):
        seen = facts(1, online=1, policy=policy)
        with pytest.raises(AgentError) as refused:
            check_owner_policy(seen, "live", decide(request, seen, "task-1"))
        assert refused.value.code is code
    seen = facts(1, online=1, policy=Policy(max_cpu_num=4))
    check_owner_policy(seen, "live", decide(request, seen, "task-1"))
