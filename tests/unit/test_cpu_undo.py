"""The way back of a plug of vCPUs that failed: what the task added leaves again, what was there before never does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Task
from kvmagent_plugins.vm.cpu import HOT_PLUG_CPU
from kvmagent_plugins.vm.cpushares import PlannedShares
from kvmagent_plugins.vm.requests import HotPlugCpuRequest
from kvmagent_plugins.vm.vcpus import enabled_ids
from tests.fakes.agent import MIB, FakeAgent, make_domain, make_guest, make_node
from tests.fakes.libvirt import LIVE, FakeDomain, libvirt_error, qemu_error
from tests.lab.domainxml import GuestSpec
from tests.unit.test_recovery import LOST, Agent, Killed

REFUSED = qemu_error(1, "internal error: unable to execute QEMU command 'device_add': Duplicate device ID 'vcpu4'")
NO_SPACE = libvirt_error(38, libvirt.VIR_FROM_NONE, "Failed to create file 'vm1.xml.new': No space left on device")
#: Two vCPUs, the second of them plugged by somebody; three more are asked for, and the last of them is refused.
ASKED = {"vmUuid": "vm1", "cpuNum": 5, "timeoutSec": 1}


class Always(dict[str, Exception]):
    """Calls that fail each time."""

    def pop(self, key: str, *default: Any) -> Exception:
        return self[key]


def make(*, virt_type: str = "kvm", **guest: Any) -> FakeDomain:
    spec = GuestSpec(name="vm1", max_vcpus=8)
    domain = make_domain(spec, make_guest(spec, **guest), virt_type=virt_type)
    domain.setVcpusFlags(2, 3 | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
    domain.guest.online_cpus[1] = True
    domain.calls.clear()
    domain.fail_next["vcpu4"] = REFUSED
    return domain


def ids(domain: FakeDomain) -> list[tuple[int, ...]]:
    """The vCPUs of the running VM and of its persistent definition."""
    return [enabled_ids(parse_definition(domain.XMLDesc(flags))) for flags in (0, 2)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    agents = []

    def run_on(domain: FakeDomain, command: str = "HotPlugCpu", **fields: Any) -> Any:
        if not agents:
            agents.append(FakeAgent(tmp_path, domain))
        return agents[0].run(command, f"task-{len(domain.calls)}", **{**ASKED, **fields}).reply

    yield run_on
    agents[0].stop()


def meanwhile(domain: FakeDomain, change: Callable[[], None]) -> None:
    """Have somebody change the VM in the moment in which the plug of the vCPUs fails."""
    plug = domain.setVcpusFlags

    def plug_and_change(count: int, flags: int) -> None:
        try:
            plug(count, flags)
        except libvirt.libvirtError:
            domain.setVcpusFlags = plug  # type: ignore[method-assign]
            change()
            raise

    domain.setVcpusFlags = plug_and_change  # type: ignore[method-assign]


def check_left_alone(reply: Any, domain: FakeDomain, live: tuple[int, ...], config: tuple[int, ...] = (0, 1)) -> None:
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "partial", "LIBVIRT_REFUSED"), reply
    assert (reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == (len(live), len(config))
    assert ids(domain) == [live, config]


def test_what_was_plugged_leaves_and_nothing_is_left_of_the_task(run: Callable[..., Any]) -> None:
    domain = make(auto_online=True)
    reply = run(domain)
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "LIBVIRT_REFUSED")
    assert reply["error"].endswith("Duplicate device ID 'vcpu4'; what was done before was undone")
    assert reply["details"] == {"undone": True}
    assert reply["before"] == reply["after"]
    assert ids(domain) == [(0, 1), (0, 1)]
    assert domain.guest.online_cpus == {0: True, 1: True}


def test_a_definition_that_still_cannot_be_saved_is_put_right_in_libvirt_s_memory(run: Callable[..., Any]) -> None:
    domain = make()
    domain.fail_next = Always(save=NO_SPACE)
    reply = run(domain)
    assert (reply["outcome"], reply["details"]) == ("refused", {"undone": True})
    assert [step["step"] for step in reply["steps"]] == ["SetVcpus", "UnplugVcpus", "SetVcpus"]
    assert ids(domain) == [(0, 1), (0, 1)]


def test_the_memory_leaves_too_though_the_definition_s_vcpus_still_cannot_be_saved(run: Callable[..., Any]) -> None:
    domain = make()
    domain.fail_next = Always(save=NO_SPACE)
    reply = run(domain, "HotPlugCpuMemory", memorySize=512 * MIB)
    assert (reply["outcome"], reply["memorySize"], ids(domain)) == ("refused", 256 * MIB, [(0, 1), (0, 1)])


def test_a_definition_that_cannot_be_put_right_is_tried_once(run: Callable[..., Any]) -> None:
    domain = make(sees_nothing=True)
    domain.fail_next = Always({"save": NO_SPACE, "setVcpusFlags(2, 18)": REFUSED})
    check_left_alone(run(domain), domain, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    assert domain.calls == ["setVcpusFlags(5, 19)", "setVcpusFlags(2, 18)"]


def test_where_the_running_vm_keeps_them_the_same_target_goes_on(run: Callable[..., Any]) -> None:
    """libvirt's memory says that the definition was changed, its file does not: left so, nobody would save it."""
    domain = make(virt_type="qemu")
    domain.fail_next = Always(save=NO_SPACE)
    check_left_alone(run(domain), domain, (0, 1, 2, 3, 4))
    domain.fail_next = {}
    reply = run(domain)
    assert (reply["success"], reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == (True, 5, 5)
    assert (reply["steps"][0]["step"], reply["steps"][0]["target"]) == ("SetVcpus", "config")
    # What the first one has left offline comes online, too.
    assert ([step["step"] for step in reply["steps"][1:]], reply["outcome"]) == (["OnlineGuestVcpus"], "online")


@pytest.mark.parametrize(
    "guest",
    [
        {"agent": "stopped"},
        {"agent": "hung"},
        {"sees_nothing": True},
        {"auto_online": True, "broken_cpus": True},
        {"auto_online": True, "fixed_cpus": frozenset({0, 3})},
        {"auto_online": True, "refuses": frozenset({"guest-set-vcpus"})},
        {"refuses": frozenset({"guest-get-vcpus"})},
        {"auto_online": True, "late_cpus": 99},
        {"unplugs": "not answering"},
    ],
    ids=str,
)
def test_what_the_guest_does_not_give_up_stays(run: Callable[..., Any], guest: dict[str, Any]) -> None:
    domain = make(**guest)
    check_left_alone(run(domain), domain, (0, 1, 2, 3))
    assert {0: True, 1: True}.items() <= domain.guest.online_cpus.items()
    if "unplugs" not in guest:
        assert domain.calls == ["setVcpusFlags(5, 19)"]


def test_the_guest_s_new_cpus_are_told_by_what_it_listed_before_whatever_their_numbers(run: Callable[..., Any]) -> None:
    domain = make(auto_online=True)
    domain.guest.online_cpus = {0: True, 2: True}
    domain.guest.numbers = {1: 2}
    reply = run(domain)
    assert [step["ids"] for step in reply["steps"] if step["step"] == "OfflineGuestVcpus"] == [[1, 3]]
    assert (reply["outcome"], domain.guest.online_cpus) == ("refused", {0: True, 2: True})


def test_a_guest_that_did_not_list_all_of_its_cpus_before_keeps_the_new_ones(run: Callable[..., Any]) -> None:
    """The one that it lists now may be the one that was there."""
    domain = make(auto_online=True)
    del domain.guest.online_cpus[1]
    check_left_alone(run(domain), domain, (0, 1, 2, 3))
    assert domain.calls == ["setVcpusFlags(5, 19)"]


def test_a_guest_that_numbers_its_cpus_anew_meanwhile_keeps_them_all(run: Callable[..., Any]) -> None:
    domain = make(auto_online=True)
    meanwhile(domain, lambda: setattr(domain.guest, "online_cpus", {0: True, 5: True, 6: True, 7: True}))
    reply = run(domain)
    assert (reply["outcome"], domain.guest.online_cpus) == ("partial", {0: True, 5: True, 6: True, 7: True})
    assert domain.calls == ["setVcpusFlags(5, 19)"]


def test_vcpus_that_libvirt_would_not_choose_stay(run: Callable[..., Any]) -> None:
    domain = make()
    domain.setVcpu("3", 1, LIVE)
    check_left_alone(run(domain), domain, (0, 1, 2, 3))
    assert domain.calls == ["setVcpu(3, 1, 1)", "setVcpusFlags(5, 19)"]


def test_a_persistent_definition_that_would_lose_another_vcpu_stays(run: Callable[..., Any]) -> None:
    domain = make()
    domain.setVcpu("3", 1, 2)
    domain.fail_next = {"save": NO_SPACE}
    check_left_alone(run(domain, affect="config"), domain, (0, 1), (0, 1, 2, 3, 4))


def test_a_plug_takes_no_vcpu_from_a_persistent_definition_that_has_more(run: Callable[..., Any]) -> None:
    domain = make()
    domain.setVcpusFlags(7, 2 | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
    domain.fail_next = {"save": NO_SPACE}
    assert run(domain)["success"]
    assert ids(domain)[1] == (0, 1, 2, 3, 4, 5, 6)


def test_vcpus_that_somebody_plugs_meanwhile_stay(run: Callable[..., Any]) -> None:
    domain = make()
    meanwhile(domain, lambda: domain.setVcpu("6", 1, LIVE))
    check_left_alone(run(domain), domain, (0, 1, 2, 3, 6))


def test_a_definition_that_somebody_changes_meanwhile_stays(run: Callable[..., Any]) -> None:
    domain = make(virt_type="qemu")
    meanwhile(domain, lambda: domain.setVcpusFlags(3, 2))
    check_left_alone(run(domain), domain, (0, 1, 2, 3), (0, 1, 2))


def test_another_run_of_the_vm_keeps_its_vcpus(run: Callable[..., Any]) -> None:
    domain = make()

    def power_cycle() -> None:
        domain.setVcpusFlags(4, 2 | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
        domain.power_cycle()

    meanwhile(domain, power_cycle)
    reply = run(domain, affect="live")
    assert (reply["outcome"], reply["sameRun"], ids(domain)[0]) == ("partial", False, (0, 1, 2, 3))


def test_nothing_is_undone_of_a_vm_that_cannot_be_read(run: Callable[..., Any]) -> None:
    domain = make()
    meanwhile(domain, lambda: domain.fail_next.update(XMLDesc=qemu_error(1, "internal error: cannot read")))
    check_left_alone(run(domain), domain, (0, 1, 2, 3))
    assert domain.calls == ["setVcpusFlags(5, 19)"]


def test_what_libvirt_confirmed_and_the_vm_does_not_show_is_not_undone(run: Callable[..., Any]) -> None:
    domain = make()
    plug, domain.fail_next = domain.setVcpusFlags, {}

    def plug_and_lose(count: int, flags: int) -> None:
        plug(count, flags)
        domain.setVcpu("4", 0, LIVE)

    domain.setVcpusFlags = plug_and_lose  # type: ignore[method-assign]
    reply = run(domain)
    assert (reply["outcome"], reply["errorCode"], ids(domain)) == (
        "partial",
        "NOT_VERIFIED",
        [(0, 1, 2, 3), (0, 1, 2, 3, 4)],
    )


def test_a_change_that_was_whole_is_not_undone(tmp_path: Path) -> None:
    """Shares follow the vCPUs: where they have, what failed afterwards is no half-done plug."""
    domain = make()
    node = make_node(tmp_path, domain)
    facts = node.observe("vm1", frozenset({"cpus"}))
    goal = HOT_PLUG_CPU.decide(HotPlugCpuRequest(vm_uuid="vm1", cpu_num=5), facts, "t1")
    goal = msgspec.structs.replace(goal, shares=(PlannedShares(shares=2048, target="live"),))
    error = AgentError(Code.LIBVIRT_REFUSED, "setting 5 vCPUs")
    domain.setVcpusFlags(4, LIVE)
    half = node.observe("vm1", frozenset({"cpus"}))
    assert HOT_PLUG_CPU.rollback_goal(goal, facts, half, error) is not None
    domain.setSchedulerParametersFlags({"cpu_shares": 2048}, LIVE)
    whole = node.observe("vm1", frozenset({"cpus"}))
    assert HOT_PLUG_CPU.rollback_goal(goal, facts, whole, error) is None


# Interruptions


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path, make(auto_online=True))
    yield agent
    agent.journal.stop()


def kill_at(agent: Agent, point: str, task: Task) -> Task:
    """Have the agent die at a point, the nth of its name; the task as the next start finds it."""
    agent.point = point
    with pytest.raises(Killed):
        agent.executor.run(task)
    (left,) = agent.journal.unfinished()
    return left


# The plug, (the guest's part,) the removal.
@pytest.mark.parametrize(
    ("auto_online", "point"),
    [
        (False, "step:begun@2"),
        (False, "step:done@2"),
        (True, "step:done@2"),
        (True, "step:begun@3"),
        (True, "step:done@3"),
    ],
)
@pytest.mark.parametrize("command", ["HotPlugCpu", "HotPlugCpuMemory"])
def test_an_agent_that_dies_on_the_way_back_goes_on_with_it(
    mortal: Agent, command: str, auto_online: bool, point: str
) -> None:
    mortal.domain.guest.auto_online = auto_online
    fields = {"memorySize": 256 * MIB} if command == "HotPlugCpuMemory" else {}
    left = kill_at(mortal, point, mortal.accept(command, **ASKED, **fields))
    mortal.executor.run(left)
    reply = mortal.reply()
    assert (reply["recovered"], reply["outcome"], reply["errorCode"]) == (True, "refused", "LIBVIRT_REFUSED"), reply
    assert reply["details"] == {"undone": True}
    assert ids(mortal.domain) == [(0, 1), (0, 1)]
    assert mortal.domain.guest.online_cpus == {0: True, 1: True}


@pytest.mark.parametrize("command", ["HotPlugCpu", "HotPlugCpuMemory"])
def test_after_an_interruption_the_guest_keeps_what_it_uses(mortal: Agent, command: str) -> None:
    """The agent was away, for however long: somebody may have made the vCPUs his own."""
    fields = {"memorySize": 256 * MIB} if command == "HotPlugCpuMemory" else {}
    left = kill_at(mortal, "step:begun@2", mortal.accept(command, **ASKED, **fields))
    mortal.executor.run(left)
    check_left_alone(mortal.reply(), mortal.domain, (0, 1, 2, 3))
    assert mortal.domain.guest.online_cpus == dict.fromkeys(range(4), True)


def test_what_was_there_already_when_the_plug_began_again_is_not_undone(mortal: Agent) -> None:
    """Plugged by the call that was cut off, or by somebody since: nobody knows."""
    left = kill_at(mortal, "step:begun@1", mortal.accept("HotPlugCpu", **ASKED))
    mortal.domain.setVcpusFlags(3, LIVE)
    mortal.domain.fail_next["vcpu4"] = REFUSED
    mortal.executor.run(left)
    check_left_alone(mortal.reply(), mortal.domain, (0, 1, 2, 3))


def test_vcpus_that_somebody_plugs_while_the_memory_comes_are_not_undone(run: Callable[..., Any]) -> None:
    domain = make(auto_online=True)
    attach = domain.attachDeviceFlags

    def attach_and_plug(xml: str, flags: int) -> None:
        attach(xml, flags)
        domain.setVcpusFlags(3, LIVE)

    domain.attachDeviceFlags = attach_and_plug  # type: ignore[method-assign]
    check_left_alone(run(domain, "HotPlugCpuMemory", memorySize=512 * MIB), domain, (0, 1, 2, 3))


def test_a_connection_lost_on_the_way_back_is_survived(mortal: Agent) -> None:
    meanwhile(mortal.domain, lambda: mortal.domain.fail_next.update(setVcpusFlags=LOST))
    mortal.executor.run(mortal.accept("HotPlugCpu", **ASKED))
    reply = mortal.reply()
    assert (reply["outcome"], reply["errorCode"], ids(mortal.domain)) == (
        "refused",
        "LIBVIRT_REFUSED",
        [(0, 1), (0, 1)],
    )


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("command", ["HotPlugCpu", "HotPlugCpuMemory"])
def test_a_goal_that_an_older_agent_recorded_is_read_and_has_no_way_back(
    mortal: Agent, command: str, readable: bool
) -> None:
    """What it saw before may be unreadable: then nobody can say that the VM is as it was."""
    fields = {"memorySize": 256 * MIB} if command == "HotPlugCpuMemory" else {}
    left = kill_at(mortal, "step:begun@1", mortal.accept(command, **ASKED, **fields))
    assert left.goal is not None
    goal = msgspec.json.decode(left.goal)
    for name in ("former", "failure"):
        goal.get("cpu", goal).pop(name)
    if "cpu" in goal:
        goal |= {"formerCpuNum": 2, "formerConfigCpuNum": 2, "undoCpus": []}
    before = left.before if readable else b"{}"
    mortal.executor.run(msgspec.structs.replace(left, goal=msgspec.json.encode(goal), before=before))
    check_left_alone(mortal.reply(), mortal.domain, (0, 1, 2, 3))
