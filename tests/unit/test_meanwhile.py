"""What a VM becomes while its task goes on: its guest reboots, others plug and unplug, it is started anew.

The task goes on by what it finds then, or leaves it alone; a way back takes all that the task had given.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.hypervisor.domainxml import edit_requested, find_memory_xml, format_virtio_mem
from kvmagent.model.command import Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.steps import DetachMemory, ForgetMemory
from kvmagent.tasks.decision import plan
from kvmagent.tasks.journal import Task
from tests.fakes.agent import MIB, make_domain, make_node
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec
from tests.unit.test_leftovers import requests_mib
from tests.unit.test_recovery import Agent, Killed, make_virtio_mem, numbers_of, set_virtio_mem
from tests.unit.test_rogues import planning

BOTH = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
QUICK: dict[str, Any] = {"timeoutSec": 1, "guestOnline": False}
LIVE, CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG


def attach(domain: FakeDomain, alias: str, size_mib: int, flags: int = BOTH) -> None:
    target = f"<target><size unit='KiB'>{size_mib * 1024}</size><node>0</node></target>"
    domain.attachDeviceFlags(f"<memory model='dimm'>{target}<alias name='{alias}'/></memory>", flags)
    if flags & LIVE:
        domain.guest.blocks = dict.fromkeys(domain.guest.blocks, True)


def forget(domain: FakeDomain, alias: str, size_mib: int) -> None:
    device: dict[str, Any] = {"model": "dimm", "alias": alias, "node": 0, "size_bytes": size_mib * MIB}
    xml = find_memory_xml(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), **device)
    assert xml is not None
    domain.detachDeviceFlags(xml, CONFIG)


def attach_virtio_mem(domain: FakeDomain, alias: str, size_mib: int = 512, requested_mib: int = 512) -> None:
    sizes = {"size_bytes": size_mib * MIB, "block_bytes": 2 * MIB, "requested_bytes": requested_mib * MIB}
    domain.attachDeviceFlags(format_virtio_mem(alias=alias, node=0, **sizes), BOTH)
    domain.guest.blocks = dict.fromkeys(domain.guest.blocks, True)


def make_two() -> FakeDomain:
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    for alias in ("ua-a", "ua-b"):
        attach_virtio_mem(domain, alias)
    return domain


def reboot(domain: FakeDomain) -> None:
    """QEMU takes all of virtio-mem from a guest that starts again; what was requested stays."""
    for current in domain.live.iterfind("./devices/memory/target/current"):
        current.text = "0"


class Failures(logging.Handler):
    """Keeps the errors that nothing expected: one on a way back is in no reply."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AgentError) and error.code is Code.INTERNAL_ERROR:
            self.told.append(str(error))


@contextmanager
def failures() -> Iterator[list[str]]:
    handler, logger = Failures(), logging.getLogger("kvmagent.tasks.executor")
    logger.addHandler(handler)
    try:
        yield handler.told
    finally:
        logger.removeHandler(handler)


def interrupt(agent: Agent, point: str, command: str, **fields: Any) -> Task:
    """Carry a task out up to a point; what is done then, is done while it goes on."""
    task = agent.accept(command, vmUuid="vm1", **fields)
    agent.point = point
    with pytest.raises(Killed):
        agent.executor.run(task)
    return agent.journal.unfinished()[0]


def go_on(agent: Agent, task: Task) -> dict[str, Any]:
    with failures() as told:
        agent.executor.run(task)
    agent.journal.stop()
    assert told == []
    assert agent.reply()["errorCode"] != "INTERNAL_ERROR", agent.reply()
    return agent.reply()


def memory_mib(domain: FakeDomain) -> tuple[int, int]:
    has = numbers_of(domain)
    return has["memorySize"] // MIB, has["configMemorySize"] // MIB


def test_a_request_is_lowered_though_the_guest_has_rebooted(tmp_path: Path) -> None:
    agent = Agent(tmp_path, make_two())
    task = interrupt(agent, "step:done", "HotUnplugMemory", memorySize=512 * MIB)
    reboot(agent.domain)
    go_on(agent, task)
    assert requests_mib(agent.domain) == [[0, 256], [0, 256]]
    assert memory_mib(agent.domain) == (512, 512)


def test_a_device_stays_as_it_is_where_another_has_less_since_a_reboot(tmp_path: Path) -> None:
    domain = make_two()
    attach_virtio_mem(domain, "ua-c")
    agent = Agent(tmp_path, domain)
    task = interrupt(agent, "step:done", "HotUnplugMemory", memorySize=(256 + 256 + 512) * MIB)
    current = domain.live.findall("./devices/memory/target/current")
    current[2].text = "0"
    assert current[1].text == str(512 * 1024)
    go_on(agent, task)
    assert requests_mib(domain)[0] == [0, 512, 512]
    assert memory_mib(domain)[1] == 1024


def test_a_device_stays_as_it_is_where_others_have_taken_a_dimm(tmp_path: Path) -> None:
    domain = make_two()
    attach(domain, "ua-x", 256)
    agent = Agent(tmp_path, domain)
    task = interrupt(agent, "step:done", "HotUnplugMemory", memorySize=768 * MIB)
    domain.let_go("ua-x")
    forget(domain, "ua-x", 256)
    reply = go_on(agent, task)
    assert reply["success"], reply
    assert (memory_mib(domain)[0], requests_mib(domain)[0]) == (768, [0, 512])


def refuse_vcpus(domain: FakeDomain) -> None:
    domain.fail_next["setVcpusFlags"] = qemu_error(1, "no")


def ask_in_vain(domain: FakeDomain) -> None:
    """More was requested than the guest has plugged; it would plug it now."""
    domain.guest.virtio_mem_limit = 256 * MIB
    set_virtio_mem(domain, 768)
    domain.guest.virtio_mem_limit = 1 << 60


@pytest.mark.parametrize("limit_mib", [None, 512])
def test_the_way_back_takes_a_leftover_that_the_way_had_used(tmp_path: Path, limit_mib: int | None) -> None:
    """The vCPUs fail, or the guest takes the half only."""
    domain = make_virtio_mem(size_mib=0)
    ask_in_vain(domain)
    if limit_mib is not None:
        domain.guest.virtio_mem_limit = limit_mib * MIB
    refuse_vcpus(domain)
    agent = Agent(tmp_path, domain)
    task = agent.accept("HotPlugCpuMemory", vmUuid="vm1", cpuNum=3, memorySize=1280 * MIB, timeoutSec=1)
    reply = go_on(agent, task)
    assert not reply["success"]
    assert requests_mib(domain) == [[256], [256]]
    assert memory_mib(domain) == (512, 512)


@pytest.mark.parametrize("others_mib", [[], [896]])
@pytest.mark.parametrize("limit_mib", [0, 256])
def test_the_way_back_empties_a_virtio_mem_device_that_the_way_had_attached(
    tmp_path: Path, limit_mib: int, others_mib: list[int]
) -> None:
    """The guest takes less than all; another device of that size may be there.

    QEMU lets no empty device leave before 8.1, so it stays, as after every removal.
    """
    spec = GuestSpec(name="vm1", arch="aarch64", machine="virt-7.2", max_memory_mib=256 + 2 * 896)
    domain = make_domain(spec, virt_type="kvm")
    for size_mib in others_mib:
        attach_virtio_mem(domain, "ua-other", size_mib, size_mib)
    former = memory_mib(domain)
    domain.guest.virtio_mem_limit = limit_mib * MIB
    agent = Agent(tmp_path, domain)
    size_bytes = (former[0] + 512) * MIB
    task = agent.accept("HotPlugCpuMemory", vmUuid="vm1", cpuNum=1, memorySize=size_bytes, timeoutSec=1)
    reply = go_on(agent, task)
    assert (reply["outcome"], reply["errorCode"], reply["details"]) == (
        "partial",
        "VIRTIO_MEM_STALLED",
        {"undone": False},
    )
    assert memory_mib(domain) == former
    assert requests_mib(domain) == [[*others_mib, 0]] * 2


def take_dimm(domain: FakeDomain) -> None:
    domain.let_go("ua-x")
    forget(domain, "ua-x", 128)


def take_definition(domain: FakeDomain) -> None:
    forget(domain, "ua-x", 128)


@pytest.mark.parametrize("meanwhile", [take_dimm, take_definition, FakeDomain.power_cycle])
@pytest.mark.parametrize("flags", [LIVE, BOTH])
@pytest.mark.parametrize("forgotten", [False, True])
def test_the_way_back_takes_the_task_s_own_dimms_whatever_others_have_taken(
    tmp_path: Path, meanwhile: Callable[[FakeDomain], Any], flags: int, forgotten: bool
) -> None:
    """Also where nobody knows any longer what was there before: an earlier version wrote it differently."""
    if flags == LIVE and meanwhile is not FakeDomain.power_cycle:
        return
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    attach(domain, "ua-x", 128, flags)
    agent = Agent(tmp_path, domain)
    task = interrupt(agent, "step:done", "HotPlugCpuMemory", cpuNum=3, memorySize=640 * MIB, **QUICK)
    if forgotten:
        task = msgspec.structs.replace(task, before=b'{"of": "long ago"}')
    meanwhile(domain)
    refuse_vcpus(domain)
    reply = go_on(agent, task)
    assert not reply["success"]
    left = {one.get("name") for root in (domain.live, domain.config) for one in root.iterfind("./devices/memory/alias")}
    assert left <= {"ua-x"}, reply


def set_request(domain: FakeDomain, alias: str, size_mib: int, flags: int, *, most_mib: int = 512) -> None:
    device: dict[str, Any] = {"model": "virtio-mem", "alias": alias, "node": 0, "size_bytes": most_mib * MIB}
    xml = find_memory_xml(domain.XMLDesc(0 if flags == LIVE else libvirt.VIR_DOMAIN_XML_INACTIVE), **device)
    assert xml is not None
    domain.updateDeviceFlags(edit_requested(xml, size_mib * MIB), flags)


def interrupt_over_leftover(agent: Agent) -> Task:
    """A plug by dimm has taken back in the running VM what was requested in vain, and not yet in the definition."""
    ask_in_vain(agent.domain)
    agent.domain.guest.virtio_mem_limit = 256 * MIB
    return interrupt(agent, "step:done", "HotPlugMemory", memorySize=640 * MIB, method="dimm")


def test_a_request_that_somebody_has_changed_meanwhile_is_theirs(tmp_path: Path) -> None:
    agent = Agent(tmp_path, make_virtio_mem(size_mib=0))
    task = interrupt_over_leftover(agent)
    set_request(agent.domain, "ua-vm", 512, CONFIG, most_mib=2048)
    assert go_on(agent, task)["success"]
    assert requests_mib(agent.domain) == [[256], [512]]


def test_a_leftover_is_taken_back_though_nobody_knows_what_was_before(tmp_path: Path) -> None:
    agent = Agent(tmp_path, make_virtio_mem(size_mib=0))
    task = interrupt_over_leftover(agent)
    assert go_on(agent, msgspec.structs.replace(task, before=b'{"of": "long ago"}'))["success"]
    assert requests_mib(agent.domain) == [[256], [256]]


def test_the_definition_does_not_follow_what_others_request_of_the_running_vm(tmp_path: Path) -> None:
    agent = Agent(tmp_path, make_virtio_mem(size_mib=0))
    task = interrupt_over_leftover(agent)
    agent.domain.guest.virtio_mem_limit = 1 << 60
    set_request(agent.domain, "ua-vm", 1500, LIVE, most_mib=2048)
    assert go_on(agent, task)["success"]
    assert requests_mib(agent.domain) == [[1500], [768]]


def test_what_leaves_the_definition_for_it_has_left_the_vm_takes_nothing_from_what_else_may_leave(
    tmp_path: Path,
) -> None:
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    for alias, size_mib in (("ua-x", 256), ("ua-a", 128), ("ua-b", 256)):
        attach(domain, alias, size_mib)
    agent = Agent(tmp_path, domain)
    task = interrupt(agent, "step:done@2", "HotUnplugMemory", memorySize=512 * MIB)
    removals = [one["alias"] for one in msgspec.json.decode(task.goal or b"")["removals"]]
    assert removals == ["ua-b", "ua-a"]
    assert domain.live.find("./devices/memory/alias[@name='ua-b']") is None
    forget(domain, "ua-x", 256)
    go_on(agent, task)
    assert memory_mib(domain)[0] == 512


def test_a_definition_that_others_lowered_ends_as_if_they_had_come_first(tmp_path: Path) -> None:
    """They took a dimm from the definition alone, and what leaves the running VM leaves the definition, too.

    So it ends below the total of the running VM, and the reply says so.
    """
    ends = []
    for place in ("first", "meanwhile"):
        domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
        attach(domain, "ua-x", 128)
        attach(domain, "ua-y", 256)
        if place == "first":
            forget(domain, "ua-x", 128)
        (tmp_path / place).mkdir()
        agent = Agent(tmp_path / place, domain)
        task = interrupt(agent, "step:done", "HotUnplugMemory", memorySize=384 * MIB)
        if place == "meanwhile":
            forget(domain, "ua-x", 128)
        reply = go_on(agent, task)
        assert (reply["outcome"], memory_mib(domain)) == ("online", (384, 256)), reply
        ends.append((reply["memorySize"], reply["after"], reply["drift"]))
    assert ends[0] == ends[1]
    assert {"field": "memorySize", "live": 384 * MIB, "config": 256 * MIB} in ends[0][2]


def test_a_late_look_is_held_to_what_it_performs(tmp_path: Path) -> None:
    """It does not touch the running VM, whatever a plan has for it."""
    domain = make_domain(GuestSpec(name="vm1"), virt_type="kvm")
    attach(domain, "ua-x", 128)
    attach(domain, "ua-y", 128, CONFIG)
    steps = DetachMemory(alias="ua-x", timeout_sec=1), ForgetMemory("ua-y", slot=None, node=0, size_bytes=128 * MIB)
    command = planning((Total("memory", 384 * MIB, 384 * MIB, direction="down"),), *steps)
    facts = make_node(tmp_path, domain).observe("vm1", frozenset({"memory"}))
    request = command.request(vm_uuid="vm1", cpu_num=3)  # type: ignore[call-arg]
    goal = command.decide(request, facts, "t1")
    with pytest.raises(AgentError, match="than its goal allows"):
        plan(command, request, goal, facts, before=facts)
    assert plan(command, request, goal, facts, before=facts, late=True) == steps[1:]


def test_what_is_less_than_a_dimm_can_have_is_told(tmp_path: Path) -> None:
    agent = Agent(tmp_path, make_domain(GuestSpec(name="vm1"), virt_type="kvm"))
    task = interrupt(agent, "step:begun", "HotPlugCpuMemory", cpuNum=3, memorySize=512 * MIB)
    attach_virtio_mem(agent.domain, "ua-v", requested_mib=130)
    reply = go_on(agent, task)
    assert not reply["success"]
    assert (
        "was not attached: no device of its kind can give the 126 MiB that the running VM still lacks" in reply["error"]
    )
    assert memory_mib(agent.domain) == (386, 386)


@pytest.mark.parametrize("agent_is", ["running", "stopped"])
def test_a_smaller_dimm_is_one_that_the_guest_can_take_though_it_is_silent_by_then(
    tmp_path: Path, agent_is: str
) -> None:
    domain = make_domain(GuestSpec(name="vm1", memory_mib=512), virt_type="kvm")
    domain.guest.block_bytes = 256 * MIB
    domain.guest.blocks = {0: True, 1: True}
    agent = Agent(tmp_path, domain)
    task = interrupt(agent, "step:begun", "HotPlugMemory", memorySize=1024 * MIB, method="dimm")
    attach(domain, "ua-x", 128)
    domain.guest.agent = agent_is
    go_on(agent, task)
    assert memory_mib(domain) == (512 + 128 + 256, 512 + 128 + 256)


def set_requests(domain: FakeDomain, size_mib: int, flags: int) -> None:
    for alias in ("ua-a", "ua-b"):
        set_request(domain, alias, size_mib, flags)


def let_go(domain: FakeDomain) -> None:
    if domain.live.find("./devices/memory/alias[@name='ua-x']") is not None:
        domain.let_go("ua-x")


def leave_definition(domain: FakeDomain) -> None:
    if domain.config.find("./devices/memory/alias[@name='ua-x']") is not None:
        forget(domain, "ua-x", 128)


def give(domain: FakeDomain) -> None:
    if domain.live.find("./devices/memory/alias[@name='ua-y']") is None:
        attach(domain, "ua-y", 128, LIVE)


def set_balloon(domain: FakeDomain, size_mib: int | None, flags: int) -> None:
    """To that size, or empty."""
    most = int((domain.live if flags == LIVE else domain.config).findtext("memory"))
    domain.setMemoryFlags(most if size_mib is None else min(most, size_mib * 1024), flags)


def limit(domain: FakeDomain, size_mib: int) -> None:
    domain.guest.virtio_mem_limit = size_mib * MIB


def set_vcpus(domain: FakeDomain, count: int, flags: int) -> None:
    with suppress(libvirt.libvirtError):  # some were there at the start
        domain.setVcpusFlags(count, flags | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)


def refuse_removal(domain: FakeDomain) -> None:
    domain.guest.unplugs = "refuses"


def load_driver(domain: FakeDomain) -> None:
    domain.load_balloon_driver()


#: What befalls a VM while its task goes on.
EVENTS: list[Callable[[FakeDomain], Any]] = [
    reboot,
    let_go,
    leave_definition,
    give,
    load_driver,
    refuse_removal,
    FakeDomain.power_cycle,
    *(partial(set_requests, size_mib=size_mib, flags=flags) for size_mib in (64, 300, 512) for flags in (LIVE, CONFIG)),
    *(
        partial(set_balloon, size_mib=size_mib, flags=flags)
        for size_mib in (128, 200, None)
        for flags in (LIVE, CONFIG)
    ),
    *(partial(set_vcpus, count=count, flags=flags) for count in (1, 2, 4) for flags in (LIVE, CONFIG)),
    *(partial(limit, size_mib=size_mib) for size_mib in (0, 200, 4096)),
]
events = st.lists(st.sampled_from(EVENTS), max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    arch=st.sampled_from(["x86_64", "x86_64", "aarch64"]),
    command=st.sampled_from(["HotPlugMemory", "HotPlugCpuMemory", "HotUnplugMemory", "HotPlugCpu", "HotUnplugCpu"]),
    cpu_num=st.integers(1, 4),
    affect=st.sampled_from(["both", "both", "live", "config"]),
    method=st.sampled_from(["auto", "auto", "dimm", "virtio-mem", "balloon"]),
    change_mib=st.integers(0, 8).map(lambda n: n * 128),
    parts_of=st.tuples(*[st.integers(0, 4)] * 2),
    saved_mib=st.sampled_from([256, 256, 128, 384]),
    balloon_driver=st.booleans(),
    point=st.sampled_from([f"step:{what}@{n}" for what in ("begun", "done") for n in (1, 2, 3, 4)]),
    first=events,
    then=events,
    fails=st.booleans(),
    forgotten=st.booleans(),
)
def test_nothing_that_befalls_a_vm_makes_a_plan_of_ours_one_that_may_not_be_performed(
    tmp_path_factory: pytest.TempPathFactory,
    arch: str,
    command: str,
    cpu_num: int,
    affect: str,
    method: str,
    change_mib: int,
    parts_of: tuple[int, int],
    saved_mib: int,
    balloon_driver: bool,
    point: str,
    first: list[Callable[[FakeDomain], Any]],
    then: list[Callable[[FakeDomain], Any]],
    fails: bool,
    forgotten: bool,
) -> None:
    """Whatever the VM is, whatever is requested, and wherever the agent dies."""
    machine = "virt-7.2" if arch == "aarch64" else "q35"
    domain, saved = (
        make_domain(GuestSpec(name="vm1", arch=arch, machine=machine, memory_mib=size_mib), virt_type="kvm")
        for size_mib in (256, saved_mib)
    )
    domain.config = saved.config
    domain.guest.balloon_driver = balloon_driver
    for alias, parts in zip(("ua-a", "ua-b"), parts_of, strict=True):
        attach_virtio_mem(domain, alias, requested_mib=parts * 128)
    attach(domain, "ua-x", 128)
    for event in first:
        event(domain)
    agent = Agent(tmp_path_factory.mktemp("meanwhile"), domain)
    has_mib = memory_mib(domain)[affect == "config"]
    if method == "balloon":
        has_mib = int((domain.config if affect == "config" else domain.live).findtext("currentMemory")) // 1024
    size_mib = has_mib - change_mib if command == "HotUnplugMemory" else has_mib + change_mib
    fields: dict[str, Any] = {"affect": affect}
    fields |= {"memorySize": max(1, size_mib) * MIB} if command.endswith("Memory") else {}
    fields |= {"cpuNum": 1 if arch == "aarch64" else cpu_num} if "Cpu" in command else {}
    fields |= {"method": method} if command == "HotPlugMemory" else {}
    task = agent.accept(command, vmUuid="vm1", **fields, **QUICK)
    agent.point = point
    with failures() as told:
        try:
            agent.executor.run(task)
        except Killed:
            (task,) = agent.journal.unfinished()
            for event in then:
                event(domain)
            if fails:
                refuse_vcpus(domain)
            if forgotten:
                task = msgspec.structs.replace(task, before=b'{"of": "long ago"}')
            agent.executor.run(task)
    agent.journal.stop()
    reply = agent.reply()
    assert reply["errorCode"] != "INTERNAL_ERROR", reply
    assert then or reply["errorCode"] != "NOT_VERIFIED", reply
    assert told == []
