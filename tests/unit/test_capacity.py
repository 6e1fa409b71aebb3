"""Ready is what a command would do: ReadyForHotplug and headroom, held against dry runs of the commands themselves."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.model.command import Affect, find_anew
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.hostbudget import foresee_restart
from kvmagent_plugins.vm import cpu, memory
from kvmagent_plugins.vm.capacity import ask_once, find_headroom, find_largest, is_ready
from kvmagent_plugins.vm.readiness import READY_FOR_HOTPLUG
from kvmagent_plugins.vm.requests import ReadyForHotplugRequest
from tests.fakes.agent import MIB, FakeAgent, carry_out, make_domain, make_guest, make_node
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.unit.test_planners_properties import BLOCK_MIB, Vm, vms

GIB = 1024 * MIB
FILES = tempfile.TemporaryDirectory(prefix="kvmagent-")
examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PASSED_THROUGH = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0' bus='1' slot='0' function='0'/>"
    "</source></hostdev>"
)
sizes = st.one_of(st.integers(1, 44).map(lambda n: n * BLOCK_MIB * MIB), st.integers(1 * MIB, 5600 * MIB))


def virtio_mem(size_mib: int, requested_mib: int) -> str:
    return (
        "<memory model='virtio-mem'><target>"
        f"<size unit='KiB'>{size_mib * 1024}</size><node>0</node><block unit='KiB'>2048</block>"
        f"<requested unit='KiB'>{requested_mib * 1024}</requested><current unit='KiB'>{requested_mib * 1024}</current>"
        "</target><alias name='ua-vm'/><address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>"
        "</memory>"
    )


def add_device(domain: FakeDomain, xml: str, size_mib: int) -> None:
    """Put a memory device into both definitions, counted as libvirt does."""
    for root in (domain.live, domain.config):
        root.find("devices").append(etree.fromstring(xml))
        for name in ("memory", "currentMemory"):
            element = root.find(name)
            if name == "memory" or "virtio-mem" not in xml:
                element.text = str(int(element.text) + size_mib * 1024)


@st.composite
def any_vms(draw: st.DrawFn) -> Vm:
    """VMs and hosts of all kinds: less in one definition, a virtio-mem device, encrypted, limited by their owner."""
    vm = draw(vms())
    if draw(st.booleans()):
        size_mib = BLOCK_MIB * draw(st.integers(1, 4))
        add_device(vm.domain, virtio_mem(size_mib, draw(st.integers(0, size_mib // 2)) * 2), size_mib)
    roots = draw(st.sampled_from([(vm.domain.live, vm.domain.config), (vm.domain.live,), (vm.domain.config,)]))
    kind = draw(
        st.sampled_from(["plain", "plain", "sev", "no maxMemory", "no cell", "policy", "off hotplug", "no acpi"])
    )
    for root in roots:
        if kind == "sev":
            root.append(etree.fromstring("<launchSecurity type='sev'/>"))
        elif kind == "no maxMemory":
            root.remove(root.find("maxMemory"))
        elif kind == "no cell":
            root.find("cpu").remove(root.find("cpu/numa"))
        elif kind == "no acpi":
            root.find("features").remove(root.find("features/acpi"))
        elif kind in ("policy", "off hotplug"):
            policy = etree.Element(f"{{{POLICY_NAMESPACE}}}policy")
            if kind == "off hotplug":
                policy.set("hotplug", "off")
            else:
                policy.set("maxCpuNum", str(draw(st.integers(0, 8))))
                policy.set("maxMemorySize", str(draw(st.integers(0, 4000)) * MIB))
            etree.SubElement(root, "metadata").append(policy)
    for root in draw_definitions(draw, vm):
        actual = root.find("currentMemory")
        actual.text = str(int(actual.text) - draw(st.integers(0, int(actual.text) // 16)) * 4)
    for root in draw_definitions(draw, vm):
        limit_mib = draw(st.integers(256, 6000))
        root.append(etree.fromstring(f"<memtune><hard_limit unit='MiB'>{limit_mib}</hard_limit></memtune>"))
    for xml, parent in (("<numatune><memory mode='strict' nodeset='0'/></numatune>", "."), (PASSED_THROUGH, "devices")):
        if draw(st.integers(0, 4)) == 0:
            for root in (vm.domain.live, vm.domain.config):
                root.find(parent).append(etree.fromstring(xml))
    vm.host["total_mib"] = draw(st.sampled_from([128 * 1024, 128 * 1024, 3 * 1024, 6 * 1024]))
    vm.host["node_free_mib"] = draw(st.sampled_from([64 * 1024, 900]))
    vm.__post_init__()
    vm.domain.paused = draw(st.sampled_from([False, False, False, True]))
    if draw(st.integers(0, 9)) == 0:
        vm.domain.live = None
    arrange_state(vm.domain, draw(st.just(None) | st.sampled_from(STATES)))
    return vm


JOBS = {
    "backup": libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP,
    "migration": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
    "unknown job": 99,
}
UNUSUAL = {"in shutdown": libvirt.VIR_DOMAIN_SHUTDOWN, "pmsuspended": libvirt.VIR_DOMAIN_PMSUSPENDED}
STATES = (*JOBS, *UNUSUAL, "saved", "frozen", "migrated", "transient", "shares", "other shares", "next start has more")


def arrange_state(domain: FakeDomain, state: str | None) -> None:
    """Bring a VM into a state that has little to do with what its definitions say of CPUs and memory."""
    if state in JOBS and domain.live is not None:
        domain.job = {"type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": JOBS[state]}
    elif state in UNUSUAL:
        domain.unusual_state = UNUSUAL[state]
    elif state == "saved":
        domain.saved = True
    elif state == "frozen":
        domain.guest.frozen = True
    elif state == "migrated":
        domain.reason = libvirt.VIR_DOMAIN_RUNNING_MIGRATED
    elif state == "transient" and domain.live is not None:
        domain.config = None
    elif state == "next start has more":
        config = domain.config
        config.find("vcpu").text = str(int(config.findtext("vcpu")) + 2)
        if config.find("maxMemory") is not None:
            config.find("maxMemory").text = str(int(config.findtext("maxMemory")) + 4 * 1024 * 1024)
    elif state in ("shares", "other shares"):
        for root, shares in ((domain.live, 1024), (domain.config, 1024 if state == "shares" else 3)):
            if root is not None:
                root.append(etree.fromstring(f"<cputune><shares>{shares}</shares></cputune>"))


def draw_definitions(draw: st.DrawFn, vm: Vm) -> tuple[Any, ...]:
    """None of the VM's two definitions mostly, else one or both."""
    live, config = vm.domain.live, vm.domain.config
    return draw(st.sampled_from([(), (), (), (live,), (config,), (live, config)]))


def accepts(vm: Vm, command: str, **fields: Any) -> bool:
    reply = vm.send(command, dryRun=True, **fields)
    assert reply["outcome"] in ("planned", "refused"), reply
    return bool(reply["outcome"] == "planned")


@examples
@given(
    vm=any_vms(),
    cpu_num=st.none() | st.integers(1, 12),
    size=st.none() | sizes,
    affect=st.sampled_from(["both", "both", "live", "config"]),
)
def test_ready_for_totals_is_what_a_dry_run_of_them_says(
    vm: Vm, cpu_num: int | None, size: int | None, affect: str
) -> None:
    asked = {name: value for name, value in (("cpuNum", cpu_num), ("memorySize", size)) if value is not None}
    if not asked:
        return
    told = vm.send("ReadyForHotplug", affect=affect, **asked)
    command = "HotPlugCpuMemory" if len(asked) == 2 else "HotPlugCpu" if cpu_num is not None else "HotPlugMemory"
    assert told["ready"] is accepts(vm, command, affect=affect, **asked), told
    assert told["ready"] is (not told["blockers"])


@examples
@given(vm=any_vms(), affect=st.sampled_from(["both", "both", "live", "config"]))
def test_headroom_is_accepted_and_one_more_is_not(vm: Vm, affect: str) -> None:
    told = vm.send("ReadyForHotplug", affect=affect)
    room, after = told["headroom"], told["after"]
    if room is None:
        return
    config = affect == "config"
    cpus, memory = (
        (after["configCpuNum"], after["configMemorySize"]) if config else (after["cpuNum"], after["memorySize"])
    )
    if cpus is None:
        assert (room["cpuNum"], room["memorySize"], room["memoryMethods"]) == (0, 0, [])
        return
    for command, field, has, grows, quantum in (
        ("HotPlugCpu", "cpuNum", cpus, room["cpuNum"], 1),
        ("HotPlugMemory", "memorySize", memory, room["memorySize"], room["memoryGranularity"]),
    ):
        if grows:
            assert accepts(vm, command, affect=affect, **{field: has + grows}), told
        assert not accepts(vm, command, affect=affect, **{field: has + grows + quantum}), told
    balloon = vm.domain.config if config else vm.domain.live
    actual = int(balloon.findtext("currentMemory")) * 1024
    finest = {"balloon": actual + 4096, "dimm": memory + room["memoryGranularity"], "virtio-mem": memory + 2 * MIB}
    for method, total in finest.items():
        can = accepts(vm, "HotPlugMemory", affect=affect, method=method, memorySize=total)
        assert (method in room["memoryMethods"]) is can, (method, told)


@examples
@given(vm=any_vms(), affect=st.sampled_from(["both", "live", "config"]))
def test_a_vm_is_in_one_of_three_states_and_every_blocker_is_told_once(vm: Vm, affect: str) -> None:
    told = vm.send("ReadyForHotplug", affect=affect)
    assert [told["ready"], told["atMaximum"], bool(told["blockers"])].count(True) == 1, told
    codes = [blocker["code"] for blocker in told["blockers"]]
    assert len(set(codes)) == len(codes)
    if told["ready"]:
        assert told["headroom"]["cpuNum"] or told["headroom"]["memorySize"]
    if told["atMaximum"]:
        assert (told["headroom"]["cpuNum"], told["headroom"]["memorySize"]) == (0, 0)
    for blocker in told["blockers"]:
        assert blocker["message"]
        assert blocker["remedy"]


@examples
@given(vm=any_vms(), affect=st.sampled_from(["both", "live", "config"]))
def test_what_is_said_of_vms_that_are_alike_is_what_would_be_said_of_each_alone(vm: Vm, affect: Affect) -> None:
    facts = vm.node.observe("vm1", READY_FOR_HOTPLUG.observe_guest)
    request = ReadyForHotplugRequest(vm_uuid="vm1", affect=affect)
    for find in (find_headroom, is_ready):
        for seen in (facts, facts if facts.domain.config is None else foresee_restart(facts)):
            assert ask_once(find_anew, find, request, seen) == find(request, seen)


def count_decisions(act: Callable[[], object]) -> int:
    """How often a planner of plugs is asked."""
    planners, count = {cpu.decide.__code__, memory.decide.__code__}, 0

    def note(frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code in planners

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def test_the_planners_are_asked_once_for_all_vms_of_a_kind(tmp_path: Path) -> None:
    """For a list of VMs they cost more than all the rest together."""
    domains = []
    for n, vcpus in enumerate([2, 2, 2, 3, 2, 3]):
        spec = GuestSpec(name=f"vm{n}", vcpus=vcpus, max_vcpus=7, memory_mib=640, max_memory_mib=4096, slots=4)
        domain = make_domain(spec, make_guest(spec), virt_type="kvm")
        domain._uuid, domain.number = f"00000000-0000-0000-0000-{n:012}", n + 1
        domains.append(domain)
    agent = FakeAgent(tmp_path, *domains)
    asks = [partial(agent.run, "ReadyForHotplug", f"t{n}", vmUuid=f"vm{n}") for n in range(len(domains))]
    counts = [count_decisions(ask_one) for ask_one in asks]
    agent.stop()
    assert [count > 0 for count in counts] == [True, False, False, True, False, False]


@given(limit=st.integers(0, 5000), most=st.integers(0, 5000))
def test_bisection_finds_the_last_that_is_accepted_in_few_questions(limit: int, most: int) -> None:
    asked = []

    def accepts_up_to(n: int) -> bool:
        asked.append(n)
        return n <= limit

    assert find_largest(accepts_up_to, most) == min(limit, most)
    assert len(asked) <= 16


# What was seen in the field.

SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4, memory_mib=512, max_memory_mib=4096, slots=4)


def ask(directory: Path, arrange: Callable[[FakeDomain], None], spec: GuestSpec = SPEC, **guest: Any) -> dict[str, Any]:
    domain = make_domain(spec, make_guest(spec, **guest), virt_type="kvm")
    arrange(domain)
    return carry_out(make_node(directory, domain), "ReadyForHotplug", vmUuid="vm1")


def test_a_guest_without_memory_for_the_page_map_is_not_ready(tmp_path: Path) -> None:
    told = ask(tmp_path, lambda domain: None, available_bytes=34 * MIB)
    assert (told["ready"], told["headroom"]["memorySize"]) == (True, 3584 * MIB)
    told = ask(tmp_path, lambda domain: None, available_bytes=33 * MIB)
    assert told["ready"] is False
    assert [blocker["code"] for blocker in told["blockers"]] == ["GUEST_MEMORY_SHORT"]
    assert told["headroom"]["memorySize"] == 0


def test_a_virtio_mem_device_with_room_is_headroom_where_slots_and_maximum_are_used_up(tmp_path: Path) -> None:
    def arrange(domain: FakeDomain) -> None:
        add_device(domain, virtio_mem(1024, 128), 1024)

    full = GuestSpec(name="vm1", vcpus=1, max_vcpus=4, memory_mib=512, max_memory_mib=1536, slots=1)
    told = ask(tmp_path, arrange, full)
    assert (told["ready"], told["blockers"]) == (True, [])
    assert told["headroom"]["memorySize"] == 896 * MIB
    assert told["headroom"]["memoryMethods"] == ["virtio-mem"]


@pytest.mark.parametrize("kind", ["sev", "sev-snp", "tdx"])
def test_an_encrypted_vm_has_no_headroom_of_memory(kind: str, tmp_path: Path) -> None:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            root.append(etree.fromstring(f"<launchSecurity type='{kind}'/>"))

    told = ask(tmp_path, arrange)
    (blocker,) = told["blockers"]
    assert (blocker["code"], blocker["definitions"]) == ("MEMORY_ENCRYPTED", ["running", "persistent"])
    assert blocker["message"] == f"each definition has launchSecurity {kind}"
    assert (told["headroom"]["memorySize"], told["headroom"]["memoryMethods"]) == (0, [])
    assert told["headroom"]["cpuNum"] == 3


def test_a_vm_that_has_all_it_can_have_is_at_its_maximum_and_nothing_is_wrong(tmp_path: Path) -> None:
    full = GuestSpec(name="vm1", vcpus=4, max_vcpus=4, memory_mib=512, max_memory_mib=512, slots=4)
    told = ask(tmp_path, lambda domain: None, full)
    assert (told["ready"], told["atMaximum"], told["blockers"], told["warnings"]) == (False, True, [], [])


def test_a_transient_vm_is_asked_about_the_definition_that_it_has_not(tmp_path: Path) -> None:
    """Found by the properties above: the question failed, in place of saying that there is none."""
    transient = make_domain(SPEC, make_guest(SPEC), virt_type="kvm", persistent=False)
    told = carry_out(make_node(tmp_path, transient), "ReadyForHotplug", vmUuid="vm1", affect="config")
    assert (told["outcome"], told["ready"]) == ("unchanged", False)
    assert [blocker["code"] for blocker in told["blockers"]] == ["VM_TRANSIENT"]


def test_a_guest_without_an_agent_is_ready_and_cannot_confirm(tmp_path: Path) -> None:
    told = ask(tmp_path, lambda domain: None, agent="stopped")
    assert (told["ready"], told["confirmable"], told["blockers"]) == (True, False, [])
    assert [warning["code"] for warning in told["warnings"]] == ["GUEST_AGENT_DISCONNECTED"]


def test_what_the_definition_has_and_the_running_vm_lacks_wants_a_power_cycle_and_is_no_drift(tmp_path: Path) -> None:
    def arrange(domain: FakeDomain) -> None:
        domain.config.find("maxMemory").text = str(8192 * 1024)

    told = ask(tmp_path, arrange)
    assert (told["ready"], told["restartRequired"], told["blockers"]) == (True, True, [])
    (warning,) = told["warnings"]
    assert warning["code"] == "RESTART_REQUIRED"
    assert "Power the VM off" in warning["remedy"]


def test_what_the_next_start_would_lose_is_drift(tmp_path: Path) -> None:
    def arrange(domain: FakeDomain) -> None:
        domain.config.find("vcpu").text = "3"

    told = ask(tmp_path, arrange)
    assert told["restartRequired"] is False
    assert [warning["code"] for warning in told["warnings"]] == ["DRIFT"]
    assert "maxCpuNum is 4 in the running VM, 3 in its definition" in told["warnings"][0]["message"]


def test_devices_are_told_with_how_much_of_each_is_online(tmp_path: Path) -> None:
    domain = make_domain(SPEC, make_guest(SPEC), virt_type="kvm")
    add_device(domain, virtio_mem(1024, 256), 1024)
    node = make_node(tmp_path, domain)
    carry_out(node, "HotPlugMemory", vmUuid="vm1", method="dimm", memorySize=1024 * MIB)
    domain.guest.blocks[33] = False
    told = carry_out(node, "ReadyForHotplug", "t2", vmUuid="vm1")["devices"]
    unknown = {"slot": None, "base": None, "online": None}
    assert told == [
        {"alias": "ua-vm", "model": "virtio-mem", "node": 0, "size": 1024 * MIB, "block": 2 * MIB}
        | {"requested": 256 * MIB, "current": 256 * MIB}
        | unknown,
        {"alias": "ua-kvmagent-task-1-0", "model": "dimm", "slot": 0, "node": 0, "size": 256 * MIB, "block": None}
        | {"requested": None, "current": None, "base": 4 * GIB, "online": 128 * MIB},
    ]
