"""The executor over interruptions: it goes on from what it finds, and believes no error whose effect is there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, NamedTuple

import libvirt
import msgspec
import pytest
from lxml import etree

from kvmagent.hypervisor.domainxml import edit_requested, find_memory_xml, format_virtio_mem
from kvmagent.model.command import Command
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.faults import Fault
from kvmagent.tasks.journal import Journal, Task
from tests.fakes.agent import COMMANDS, MIB, carry_out, make_domain, make_node
from tests.fakes.libvirt import FakeDomain, libvirt_error, qemu_error
from tests.lab.domainxml import GuestSpec

LOST = libvirt_error(1, 7, "internal error: client socket is closed")


class Killed(BaseException):
    """The agent dies: nothing handles this."""


class Agent:
    """An executor that can be killed at a point ("step:done@2": the second) and followed by another on the journal."""

    def __init__(self, directory: Path, domain: FakeDomain | None = None) -> None:
        self.domain: FakeDomain = domain or make_domain(GuestSpec(name="vm1"))
        self.point = ""
        self.passed: dict[str, int] = {}
        self.finished: list[str] = []
        self.journal = Journal(directory / "journal.sqlite", on_accepted=lambda task: None)
        self.journal.start()
        self.node = make_node(directory, self.domain)
        self.executor = self.make_executor()

    def make_executor(self, commands: dict[str, Command] = COMMANDS, **options: Any) -> Executor:
        """An executor on this journal and node, as after a start of the agent."""
        usual: dict[str, Any] = {
            "on_finished": lambda owed: self.finished.append(owed.task_uuid),
            "on_pending": lambda task_uuid: None,
            "libvirt_wait_s": 5.0,
            "fault": self._fault,
        }
        return Executor(self.node, self.journal, commands, **usual | options)

    def _fault(self, name: str) -> None:
        self.passed[name] = self.passed.get(name, 0) + 1
        if self.point in (name, f"{name}@{self.passed[name]}"):
            self.point = ""
            raise Killed

    def accept(self, command: str, **fields: Any) -> Task:
        request = msgspec.json.encode(fields)
        url = "http://127.0.0.1:9/"
        task = Task(task_uuid="t1", command=command, lane="vm1", request=request, callback_url=url, client="127.0.0.1")
        return self.journal.accept(task)[0]

    def kill(self, task: Task, *, at: str) -> Task:
        """Run a task until the agent is killed at a point; return it as the next agent finds it."""
        self.point = at
        with pytest.raises(Killed):
            self.executor.run(task)
        (left,) = self.journal.unfinished()
        return left

    def reply(self) -> dict[str, Any]:
        task = self.journal.find("t1")
        assert task is not None
        assert task.reply is not None
        return dict(msgspec.json.decode(task.reply))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    made.journal.stop()


def test_what_an_earlier_run_did_is_told_as_done_and_not_as_unchanged(agent: Agent) -> None:
    left = agent.kill(
        agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2, affect="live", guestOnline=False), at="step:done"
    )
    agent.executor.run(left)
    reply = agent.reply()
    assert (reply["recovered"], reply["before"]["cpuNum"], reply["after"]["cpuNum"]) == (True, 1, 2)
    assert reply["outcome"] == "plugged"
    assert reply["steps"][0]["step"] == "SetVcpus"


def test_a_task_that_has_its_goal_goes_on_though_the_owner_opts_out_meanwhile(agent: Agent) -> None:
    left = agent.kill(agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2), at="step:done")
    for root in (agent.domain.live, agent.domain.config):
        xml = f"<metadata><policy xmlns='{POLICY_NAMESPACE}' hotplug='off'/></metadata>"
        root.append(etree.fromstring(xml))
    agent.executor.run(left)
    reply = agent.reply()
    assert (reply["outcome"], reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == ("online", 2, 2)
    again = carry_out(agent.node, "HotPlugCpu", vmUuid="vm1", cpuNum=3)
    assert (again["outcome"], again["errorCode"]) == ("refused", "VM_OPTED_OUT")


def test_a_task_is_not_refused_by_its_own_effect(agent: Agent) -> None:
    fields = {
        "vmUuid": "vm1",
        "cpuNum": 2,
        "memorySize": 384 * MIB,
        "expectedCpuNum": 1,
        "expectedMemorySize": 256 * MIB,
    }
    left = agent.kill(agent.accept("HotPlugCpuMemory", **fields), at="step:done")
    agent.executor.run(left)
    reply = agent.reply()
    assert (reply["outcome"], reply["cpuNum"], reply["memorySize"]) == ("online", 2, 384 * MIB)


def test_facts_that_another_version_recorded_are_unknown_and_stop_nothing(agent: Agent) -> None:
    left = agent.kill(agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2), at="step:begun")
    agent.executor.run(msgspec.structs.replace(left, before=b'{"of": "long ago"}'))
    reply = agent.reply()
    assert (reply["outcome"], reply["before"]["cpuNum"], reply["after"]["cpuNum"]) == ("online", None, 2)


@pytest.mark.parametrize("call", ["setVcpusFlags", "XMLDesc"])
def test_a_connection_lost_in_any_call_is_survived(agent: Agent, call: str) -> None:
    task = agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=2)
    agent.domain.fail_next[call] = LOST
    agent.executor.run(task)
    reply = agent.reply()
    assert (reply["outcome"], reply["after"]["cpuNum"], reply["after"]["configCpuNum"]) == ("online", 2, 2)
    assert "LIBVIRT_UNAVAILABLE" not in [warning["code"] for warning in reply["warnings"]]


def test_an_attach_that_took_effect_after_its_connection_was_lost_is_no_failure(agent: Agent) -> None:
    """libvirtd carries out a call whose client is gone: seen too late, its repetition is refused by the alias."""
    attach, calls = agent.domain.attachDeviceFlags, []

    def lose_then_refuse(xml: str, flags: int) -> None:
        calls.append(xml)
        if len(calls) == 1:
            raise LOST
        attach(xml, flags)
        raise qemu_error(67, "unsupported configuration: non unique alias detected: ua-kvmagent-t1-0")

    agent.domain.attachDeviceFlags = lose_then_refuse  # type: ignore[method-assign]
    agent.executor.run(agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB))
    reply = agent.reply()
    assert (reply["outcome"], reply["memorySize"]) == ("online", 384 * MIB)
    assert len(calls) == 2


def test_an_error_after_an_interruption_is_told_where_its_effect_is_not_there(agent: Agent) -> None:
    errors = [LOST, qemu_error(1, "internal error: unable to execute QEMU command 'object-add'")]

    def fail(xml: str, flags: int) -> None:
        raise errors.pop(0)

    agent.domain.attachDeviceFlags = fail  # type: ignore[method-assign]
    agent.executor.run(agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB))
    reply = agent.reply()
    assert (reply["success"], reply["errorCode"], reply["outcome"]) == (False, "LIBVIRT_REFUSED", "refused")


def reserved(agent: Agent) -> int:
    return agent.node.view_budget().host.reserved


def test_memory_is_reserved_before_the_first_step_and_over_a_restart_and_free_with_the_end(agent: Agent) -> None:
    task = agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=1280 * MIB, dimmSize=256 * MIB, guestOnline=False)
    left = agent.kill(task, at="step:begun")
    agent.node.release(task.task_uuid)  # as the death of an agent does
    assert reserved(agent) == 0
    agent.executor.recall(left)
    assert reserved(agent) == 1024 * MIB * 513 // 512
    agent.executor.run(left)
    assert agent.reply()["after"]["memorySize"] == 1280 * MIB
    assert reserved(agent) == 0


@pytest.mark.parametrize("raised", [LOST, qemu_error(1, "no"), RuntimeError("nobody foresaw it")])
def test_no_reservation_outlives_its_task_whatever_is_raised(agent: Agent, raised: Exception) -> None:
    task = agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=512 * MIB)
    agent.domain.fail_next["attachDeviceFlags"] = raised
    agent.executor.run(task)
    assert agent.reply()["outcome"] in ("online", "refused")
    assert reserved(agent) == 0


@pytest.mark.parametrize("call", ["attachDeviceFlags", "XMLDesc"])
@pytest.mark.parametrize("starts_again", [False, True])
def test_a_vm_that_ends_in_the_middle_of_its_task_leaves_no_reservation(
    agent: Agent, call: str, starts_again: bool
) -> None:
    """Off, or off and on again: what the task had reserved is free with its end, and counts for nobody before."""
    called, calls = getattr(agent.domain, call), []

    def end_then_call(*arguments: Any) -> Any:
        setattr(agent.domain, call, called)
        calls.append(reserved(agent))
        agent.domain.power_cycle(start=starts_again)
        return called(*arguments)

    task = agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=512 * MIB, guestOnline=False)
    left = agent.kill(task, at="step:begun")
    setattr(agent.domain, call, end_then_call)
    agent.executor.run(left)
    reply = agent.reply()
    assert calls
    assert reserved(agent) == 0
    host = agent.node.view_budget().host
    if starts_again:
        assert reply["outcome"] in ("plugged", "partial", "online"), reply
        assert reply["memorySize"] in (256 * MIB, 512 * MIB)
    else:
        assert not reply["success"]
        assert host.promised == 0, "a VM that is off is promised nothing"


class Unforeseen(Exception):
    """What no code of the agent raises on purpose."""


#: Every point that a task passes from its lane to its end; see the next test but one.
POINTS = [
    "step:begun",
    "step:done",
    *(
        f"journal.{name}:{when}"
        for name in ("start_task", "note_vm", "keep_left", "record_goal", "start_step", "finish_step", "finish")
        for when in ("written", "committed")
    ),
]


#: Those of a way on which each try waits for its guest.
STEPS = ["step:begun", "step:done"]


class Way(NamedTuple):
    """A task, what its VM does that sends it back, and where on its way something is raised."""

    command: str
    fields: dict[str, Any]
    meet: Callable[[FakeDomain], Any] = lambda domain: None
    points: list[str] = POINTS


def shrink_virtio_mem(domain: FakeDomain) -> None:
    domain.guest.virtio_mem_limit = 0


def lose_balloon_driver(domain: FakeDomain) -> None:
    domain.guest.balloon_driver = False


def refuse_dimms(domain: FakeDomain) -> None:
    domain.fail_next["attachDeviceFlags"] = qemu_error(1, "no")


def refuse_unplugs(domain: FakeDomain) -> None:
    domain.guest.unplugs = "refuses"


WAYS = {
    "HotPlugCpu": Way("HotPlugCpu", {"cpuNum": 3}),
    "HotPlugMemory": Way("HotPlugMemory", {"memorySize": 512 * MIB}),
    "HotPlugCpuMemory": Way("HotPlugCpuMemory", {"cpuNum": 3, "memorySize": 512 * MIB}),
    "HotUnplugCpu": Way("HotUnplugCpu", {"cpuNum": 1}),
    "HotUnplugMemory": Way("HotUnplugMemory", {"memorySize": 256 * MIB}),
    "ReadyForHotplug": Way(
        "ReadyForHotplug", {"prepare": True, "maxCpuNum": 16, "maxMemorySize": 8192 * MIB, "affect": "config"}
    ),
    "the way back of both": Way("HotPlugCpuMemory", {"cpuNum": 3, "memorySize": 512 * MIB}, meet=refuse_dimms),
    "the way back of vCPUs": Way("HotUnplugCpu", {"cpuNum": 1}, meet=refuse_unplugs),
    "a virtio-mem request taken back": Way(
        "HotPlugMemory",
        {"memorySize": 512 * MIB, "method": "virtio-mem", "timeoutSec": 1},
        meet=shrink_virtio_mem,
        points=STEPS,
    ),
    "a balloon target taken back": Way(
        "HotUnplugMemory",
        {"memorySize": 200 * MIB, "timeoutSec": 1},
        meet=lose_balloon_driver,
        points=STEPS,
    ),
}


def meet(way: Way) -> FakeDomain:
    """The VM of a way: what a task is to take away was plugged before."""
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    with TemporaryDirectory() as place:
        node = make_node(Path(place), domain)
        if way.command == "HotUnplugCpu":
            assert carry_out(node, "HotPlugCpu", vmUuid="vm1", cpuNum=3)["success"]
        if way.command == "HotUnplugMemory" and way.fields["memorySize"] == 256 * MIB:
            assert carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=512 * MIB)["success"]
    way.meet(domain)
    return domain


def go(directory: Path, way: Way, fault: Fault) -> Agent:
    """Carry a way's task out with faults in the executor and the journal; `fault` has none before its turn."""
    agent = Agent(directory, meet(way))
    agent.journal.stop()
    began = Event()
    agent.journal = Journal(
        directory / "journal.sqlite",
        on_accepted=lambda task: None,
        fault=lambda name: fault(name) if began.is_set() else None,
    )
    agent.journal.start()
    task = agent.accept(way.command, vmUuid="vm1", **way.fields)
    began.set()
    agent.make_executor(fault=fault).run(task)
    return agent


def numbers_of(domain: FakeDomain) -> dict[str, int]:
    """What libvirt says of a VM, as a reply calls it."""
    told = dict[str, int]()
    for root, cpu, memory in (
        (domain.live, "cpuNum", "memorySize"),
        (domain.config, "configCpuNum", "configMemorySize"),
    ):
        vcpu = root.find("vcpu")
        told[cpu] = int(vcpu.get("current") or vcpu.text)
        cells = root.findall("./cpu/numa/cell")
        told[memory] = sum(size_of(cell.get("memory"), cell.get("unit")) for cell in cells)
        for target in root.findall("./devices/memory/target"):
            size = next(one for one in map(target.find, ("current", "requested", "size")) if one is not None)
            told[memory] += size_of(size.text, size.get("unit"))
    return told


def size_of(amount: str, unit: str) -> int:
    return int(amount) * {"KiB": 1024, "MiB": MIB, "bytes": 1}[unit]


def definitions_of(domain: FakeDomain) -> tuple[bytes, bytes]:
    return etree.tostring(domain.live, method="c14n"), etree.tostring(domain.config, method="c14n")


def shape_of(domain: FakeDomain) -> dict[str, int]:
    """What a task may change: the numbers, and what the next start allows for."""
    config = domain.config
    room = {"maximum": int(config.findtext("vcpu")), "slots": int(config.find("maxMemory").get("slots"))}
    return numbers_of(domain) | room | {"current": int(config.findtext("currentMemory"))}


@pytest.mark.parametrize(("name", "point"), [(name, point) for name, way in WAYS.items() for point in way.points])
def test_whatever_is_raised_wherever_the_task_is_answered_once_and_truly(tmp_path: Path, name: str, point: str) -> None:
    """At each time that the task passes the point, until it passes it no more."""
    way = WAYS[name]
    for nth in range(1, 20):
        passed = 0

        def fault(name: str, nth: int = nth) -> None:
            nonlocal passed
            passed += name == point
            if name == point and passed == nth:
                raise Unforeseen(point)

        directory = tmp_path / str(nth)
        directory.mkdir()
        untouched = shape_of(meet(way))
        agent = go(directory, way, fault)
        try:
            task = agent.journal.find("t1")
            assert task is not None
            assert (task.state, agent.finished) == ("finished", ["t1"])
            assert reserved(agent) == 0
        finally:
            agent.journal.stop()
        check_truth(agent.domain, msgspec.json.decode(task.reply), untouched)
        if passed < nth:
            return
    raise AssertionError(f"{point} is passed without end")


def check_truth(domain: FakeDomain, reply: dict[str, Any], untouched: dict[str, int]) -> None:
    """What a reply says of the VM is so, and nothing that it is silent of was done."""
    is_same = shape_of(domain) == untouched
    if reply["outcome"] in ("refused", "unchanged"):
        assert is_same, reply
    elif reply["outcome"] == "partial":
        assert not reply["success"]
    else:
        assert reply["outcome"] in ("online", "configured"), reply
        assert reply["success"]
        assert not is_same
    has = numbers_of(domain)
    for name, amount in reply.get("after", {}).items():
        assert amount is None or has.get(name, amount) == amount, (name, has, reply)
    asked = [one.find("requested") for one in domain.live.findall("./devices/memory/target")]
    left_over = [one for one in asked if one is not None and one.text != one.getparent().find("current").text]
    told = {warning["code"] for warning in reply.get("warnings", ())}
    assert not left_over or not reply["success"] or "GUEST_STILL_ASKED" in told, reply


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_no_point_of_a_task_s_way_is_left_out(tmp_path: Path, way: Way) -> None:
    passed = set[str]()
    go(tmp_path, way, passed.add).journal.stop()
    assert passed - {"journal.cut_steps:written", "journal.cut_steps:committed"} <= set(POINTS)


@pytest.mark.parametrize("boots_with_mib", [256, 640, 2048])
def test_on_another_boot_only_what_lacks_to_the_total_is_plugged(agent: Agent, boots_with_mib: int) -> None:
    fields = {"memorySize": 1280 * MIB, "dimmSize": 128 * MIB, "method": "dimm", "guestOnline": False}
    left = agent.kill(agent.accept("HotPlugMemory", vmUuid="vm1", **fields), at="step:done@3")
    for root in (agent.domain.live, agent.domain.config):
        for device in root.findall("./devices/memory"):
            device.getparent().remove(device)
        for name in ("memory", "currentMemory"):
            root.find(name).set("unit", "KiB")
            root.find(name).text = str(boots_with_mib * 1024)
        cell = root.find("./cpu/numa/cell")
        cell.set("memory", str(boots_with_mib * 1024))
        cell.set("unit", "KiB")
    agent.domain.power_cycle()
    agent.executor.run(left)
    after = agent.reply()["after"]
    expected = max(1280, boots_with_mib) * MIB
    assert (after["memorySize"], after["configMemorySize"]) == (expected, expected)


@pytest.mark.parametrize("size_mib", [128, 256])
@pytest.mark.parametrize("method", ["dimm", "virtio-mem"])
@pytest.mark.parametrize("definitions", [1, 2, 3])
@pytest.mark.parametrize("command", ["HotPlugMemory", "HotPlugCpuMemory"])
def test_a_total_that_somebody_helps_to_reach_meanwhile_is_reached(
    agent: Agent, command: str, definitions: int, method: str, size_mib: int
) -> None:
    """Of what a task was to attach it attaches what still lacks: a smaller dimm, or none."""
    fields = {"cpuNum": 2} if command == "HotPlugCpuMemory" else {"method": method}
    left = agent.kill(agent.accept(command, vmUuid="vm1", memorySize=512 * MIB, **fields), at="step:begun")
    target = f"<target><size unit='MiB'>{size_mib}</size><node>0</node></target>"
    agent.domain.attachDeviceFlags(f"<memory model='dimm'>{target}<alias name='ua-x'/></memory>", definitions)
    agent.executor.run(left)
    reply, has = agent.reply(), numbers_of(agent.domain)
    assert (reply["success"], reply["errorCode"]) == (True, None), reply
    assert (has["memorySize"], has["configMemorySize"]) == (512 * MIB, 512 * MIB)
    idle = not all(agent.domain.guest.blocks.values())  # what others attach is theirs to bring online
    assert reply["outcome"] == ("plugged" if idle else "online"), reply


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, {"cpuNum": 1}], ids=["HotPlugMemory", "HotPlugCpuMemory"])
def test_a_virtio_mem_device_grows_by_what_lacks_where_somebody_plugged_meanwhile(
    agent: Agent, more: dict[str, int], nth: int
) -> None:
    device = (
        "<memory model='virtio-mem'><target><size unit='KiB'>262144</size><node>0</node><block unit='KiB'>2048</block>"
        "<requested unit='KiB'>0</requested></target><alias name='ua-room'/></memory>"
    )
    agent.domain.attachDeviceFlags(device, 3)
    left = agent.kill(
        agent.accept("HotPlugCpuMemory" if more else "HotPlugMemory", vmUuid="vm1", memorySize=512 * MIB, **more),
        at=f"step:begun@{nth}",
    )
    target = "<target><size unit='KiB'>131072</size><node>0</node></target>"
    dimm = f"<memory model='dimm'>{target}<alias name='ua-x'/></memory>"
    agent.domain.attachDeviceFlags(dimm, 3)
    had = numbers_of(agent.domain)
    agent.executor.run(left)
    reply, has = agent.reply(), numbers_of(agent.domain)
    assert reply["success"], reply
    assert has["configMemorySize"] == 512 * MIB
    assert has["memorySize"] == max(512 * MIB, had["memorySize"])


@pytest.mark.parametrize("point", ["step:begun", "step:done"])
def test_another_vm_of_the_same_name_keeps_the_vcpus_of_its_definition(agent: Agent, point: str) -> None:
    left = agent.kill(agent.accept("HotPlugCpu", vmUuid="vm1", cpuNum=3), at=point)
    agent.domain._uuid = "99999999-2222-3333-4444-555555555555"
    agent.domain.config.find("vcpu").set("current", "4")
    before = definitions_of(agent.domain)
    agent.executor.run(left)
    assert agent.reply()["errorCode"] == "VM_REPLACED"
    assert definitions_of(agent.domain) == before
    # Nor does a plug that is meant for this one lower them.
    agent.executor.run(
        agent.journal.accept(msgspec.structs.replace(left, task_uuid="t2", goal=None, state="accepted"))[0]
    )
    assert (numbers_of(agent.domain)["cpuNum"], numbers_of(agent.domain)["configCpuNum"]) == (3, 4)


def test_another_vm_of_the_same_name_is_not_touched(agent: Agent) -> None:
    left = agent.kill(
        agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=1280 * MIB, dimmSize=128 * MIB, guestOnline=False),
        at="step:done@3",
    )
    agent.domain._uuid = "99999999-2222-3333-4444-555555555555"
    for device in agent.domain.live.findall("./devices/memory"):
        device.getparent().remove(device)
    calls = list(agent.domain.calls)
    agent.executor.run(left)
    reply = agent.reply()
    assert (reply["outcome"], reply["errorCode"], reply["success"]) == ("partial", "VM_REPLACED", False)
    assert agent.domain.calls == calls


def set_virtio_mem(domain: FakeDomain, size_mib: int) -> None:
    """Ask for another size in both definitions, as `virsh update-memory-device` does."""
    for target in (libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG):
        device = {"model": "virtio-mem", "alias": "ua-vm", "node": 0, "size_bytes": 2048 * MIB}
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if target == libvirt.VIR_DOMAIN_AFFECT_CONFIG else 0
        xml = find_memory_xml(domain.XMLDesc(flags), **device)
        assert xml is not None
        domain.updateDeviceFlags(edit_requested(xml, size_mib * MIB), target)


def set_full_balloon(domain: FakeDomain) -> None:
    domain.setMemoryFlags(int(domain.live.findtext("memory")), libvirt.VIR_DOMAIN_AFFECT_LIVE)


def has_memory(agent: Agent) -> list[int]:
    """What the guest may use, and what each definition gives."""
    domain = agent.node.observe("vm1", frozenset({"memory"})).domain
    assert domain.live is not None
    assert domain.config is not None
    assert domain.balloon_bytes is not None
    return [domain.balloon_bytes, domain.live.memory_bytes, domain.config.memory_bytes]


def make_ballooned(*, asked_mib: int | None = None) -> FakeDomain:
    """A VM of 1024 MiB of which the balloon holds the half; it was asked for more than its guest gave."""
    domain = make_domain(GuestSpec(name="vm1", memory_mib=1024), virt_type="kvm")
    domain.setMemoryFlags(512 * 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    if asked_mib is not None:
        domain.guest.balloon_driver = False
        domain.setMemoryFlags(asked_mib * 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        domain.guest.balloon_driver = True
    return domain


def make_virtio_mem(*, size_mib: int = 512) -> FakeDomain:
    domain = make_domain(GuestSpec(name="vm1", memory_mib=256), virt_type="kvm")
    sizes = {"size_bytes": 2048 * MIB, "block_bytes": 2 * MIB, "requested_bytes": size_mib * MIB}
    domain.attachDeviceFlags(format_virtio_mem(alias="ua-vm", node=0, **sizes), 3)
    return domain


PLUGS: dict[str, tuple[Callable[[], FakeDomain], dict[str, Any], Callable[[FakeDomain], None]]] = {
    "balloon": (make_ballooned, {"memorySize": 800 * MIB}, set_full_balloon),
    "a balloon that is to stay": (
        lambda: make_ballooned(asked_mib=400),
        {"memorySize": 1280 * MIB, "method": "dimm"},
        set_full_balloon,
    ),
    "virtio-mem": (make_virtio_mem, {"memorySize": 1024 * MIB}, lambda domain: set_virtio_mem(domain, 1500)),
}


@pytest.mark.parametrize("starts_anew", [False, True])
@pytest.mark.parametrize("point", ["step:begun", "step:done"])
@pytest.mark.parametrize("name", PLUGS)
def test_a_plug_that_goes_on_lowers_nothing_that_the_vm_has_by_then(
    tmp_path: Path, name: str, point: str, starts_anew: bool
) -> None:
    """Somebody gave it more meanwhile, or it was started anew, with a balloon that holds nothing."""
    make, fields, give_more = PLUGS[name]
    agent = Agent(tmp_path, make())
    left = agent.kill(agent.accept("HotPlugMemory", vmUuid="vm1", **fields), at=point)
    give_more(agent.domain)
    if starts_anew:
        agent.domain.power_cycle()
    before = has_memory(agent)
    agent.executor.run(left)
    agent.journal.stop()
    reply = agent.reply()
    assert reply["success"], reply
    assert all(now >= then for now, then in zip(has_memory(agent), before, strict=True)), reply["steps"]


@pytest.mark.parametrize("starts_anew", [False, True])
@pytest.mark.parametrize("point", ["step:begun", "step:done"])
def test_a_removal_that_goes_on_gives_back_nothing_that_has_left_by_then(
    tmp_path: Path, point: str, starts_anew: bool
) -> None:
    agent = Agent(tmp_path, make_virtio_mem())
    left = agent.kill(agent.accept("HotUnplugMemory", vmUuid="vm1", memorySize=700 * MIB), at=point)
    set_virtio_mem(agent.domain, 100)
    if starts_anew:
        agent.domain.power_cycle()
    agent.executor.run(left)
    agent.journal.stop()
    assert agent.reply()["success"]
    assert has_memory(agent) == [256 * MIB, 356 * MIB, 356 * MIB]


@pytest.mark.parametrize("point", ["step:begun", "step:done"])
def test_a_removal_that_goes_on_takes_nothing_more_once_others_have_taken_as_much(tmp_path: Path, point: str) -> None:
    agent = Agent(tmp_path)
    assert carry_out(agent.node, "HotPlugMemory", vmUuid="vm1", memorySize=512 * MIB, dimmSize=128 * MIB)["success"]
    left = agent.kill(agent.accept("HotUnplugMemory", vmUuid="vm1", memorySize=384 * MIB), at=point)
    aliases = [one.get("name") for one in agent.domain.live.findall("./devices/memory/alias")]
    kept = next(one for one in aliases if one.encode() not in (left.goal or b""))
    agent.domain.detachDeviceAlias(kept, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    device = {"model": "dimm", "alias": kept, "node": 0, "size_bytes": 128 * MIB}
    xml = find_memory_xml(agent.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), **device)
    assert xml is not None
    agent.domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    agent.executor.run(left)
    agent.journal.stop()
    assert agent.reply()["success"], agent.reply()
    assert has_memory(agent)[1:] == [384 * MIB, 384 * MIB]
    assert all(agent.domain.guest.blocks.values())


def test_a_task_for_the_definition_that_goes_on_leaves_new_blocks_of_the_guest_alone(tmp_path: Path) -> None:
    """The VM was started anew meanwhile, with what the task gave it, and its guest has not brought that online."""
    agent = Agent(tmp_path, make_virtio_mem())
    left = agent.kill(
        agent.accept("HotPlugMemory", vmUuid="vm1", memorySize=1280 * MIB, affect="config"), at="step:done"
    )
    agent.domain.power_cycle()
    agent.executor.run(left)
    agent.journal.stop()
    reply = agent.reply()
    assert (reply["success"], reply["errorCode"]) == (True, None), reply
    assert [step["step"] for step in reply["steps"]] == ["ResizeVirtioMem"]


@pytest.mark.parametrize("starts_anew", [False, True])
def test_the_way_back_of_both_takes_no_more_than_the_way_had_given(tmp_path: Path, starts_anew: bool) -> None:
    agent = Agent(tmp_path, make_ballooned())
    left = agent.kill(agent.accept("HotPlugCpuMemory", vmUuid="vm1", cpuNum=3, memorySize=800 * MIB), at="step:done")
    if starts_anew:
        agent.domain.power_cycle()
    agent.domain.fail_next["setVcpusFlags"] = qemu_error(1, "no")
    agent.executor.run(left)
    agent.journal.stop()
    assert not agent.reply()["success"]
    assert has_memory(agent)[0] == (1024 if starts_anew else 512) * MIB
