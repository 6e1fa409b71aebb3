"""A plan is what the commands would do: held against dry runs of them, over VMs of all kinds, and after restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.api.wire import decode_request, encode
from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.plans import PlanRequest, PlanTarget
from kvmagent.model.steps import AwaitGuestVcpus, SetVcpus
from kvmagent.tasks.planner import Planner
from kvmagent.tasks.steptimes import StepTimes
from kvmagent_plugins.vm.requests import HotPlugCpuRequest
from tests.fakes.agent import COMMANDS, MIB, FakeAgent, make_domain, make_guest, make_node, plan
from tests.lab.domainxml import GuestSpec
from tests.unit.test_capacity import any_vms, sizes
from tests.unit.test_planners_properties import Vm

GIB = 1024 * MIB
SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4, memory_mib=512, max_memory_mib=4096, slots=4)
examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

targets = st.fixed_dictionaries(
    {},
    optional={
        # 0: what the VM has.
        "cpuNum": st.integers(0, 12),
        "memorySize": st.just(0) | sizes,
        "affect": st.sampled_from(["both", "live", "config"]),
        "guestOnline": st.booleans(),
        "method": st.sampled_from(["auto", "dimm", "virtio-mem", "balloon"]),
        "node": st.integers(0, 2),
        "strict": st.booleans(),
        "dimmSize": st.sampled_from([128 * MIB, 256 * MIB]),
        "scaleShares": st.booleans(),
    },
).filter(lambda one: "cpuNum" in one or "memorySize" in one)


def fit(vm: Vm, target: dict[str, Any]) -> dict[str, Any]:
    """Without what is of a resource that is not asked for, and with what the VM has in place of 0."""
    live, config = vm.domain.live, vm.domain.config
    root = config if live is None or (target.get("affect") == "config" and config is not None) else live
    has = parse_definition(etree.tostring(root, encoding="unicode"))
    present = {"cpuNum": has.vcpu_current, "memorySize": has.memory_bytes}
    unasked = {own for name in present if name not in target for own in OWN[name]}
    fitting = {name: value for name, value in target.items() if name not in unasked}
    return fitting | {name: value for name, value in present.items() if fitting.get(name) == 0}


def commands_for(target: dict[str, Any], names: dict[str, tuple[str, str]]) -> list[list[tuple[str, dict[str, Any]]]]:
    """Every way to send a target: of each resource the command that grows it or the one that shrinks it."""
    common = {name: target[name] for name in ("affect", "guestOnline") if name in target}
    ways: list[list[tuple[str, dict[str, Any]]]] = [[]]
    for field, (more, less) in names.items():
        if field not in target:
            continue
        own = {name: target[name] for name in OWN[field] if name in target}
        fields = {field: target[field], **common}
        fewer = own if field == "cpuNum" else {}
        ways = [[*way, one] for way in ways for one in ((more, fields | own), (less, fields | fewer))]
    return ways


def send(vm: Vm, planned: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Send a command that a plan names."""
    assert planned["request"]["vmUuid"] == "vm1"
    return vm.send(
        planned["command"], **{name: one for name, one in planned["request"].items() if name != "vmUuid"}, **fields
    )


# What is of one resource alone; a removal of memory takes none of it.
OWN = {"cpuNum": {"scaleShares"}, "memorySize": {"method", "node", "strict", "dimmSize"}}
NAMES = {"cpuNum": ("HotPlugCpu", "HotUnplugCpu"), "memorySize": ("HotPlugMemory", "HotUnplugMemory")}


def is_accepted(vm: Vm, target: dict[str, Any]) -> bool:
    for way in commands_for(target, NAMES):
        replies = [vm.send(command, dryRun=True, **fields) for command, fields in way]
        if all(reply["outcome"] == "planned" for reply in replies):
            return True
    return False


@examples
@given(vm=any_vms(), asked=st.lists(targets, min_size=1, max_size=4))
def test_a_plan_says_live_if_and_only_if_the_command_is_accepted_then(vm: Vm, asked: list[dict[str, Any]]) -> None:
    asked = [fit(vm, target) for target in asked]
    before = vm.xml() if vm.domain.live is not None and vm.domain.config is not None else None
    plans = plan(vm.node, *asked)
    assert [one["target"] for one in plans] == asked
    for target, told in zip(asked, plans, strict=True):
        accepted = is_accepted(vm, target)
        assert told["verdict"].startswith("live") is accepted, told
        if accepted:
            # And the commands that it names are those.
            for one in told["commands"]:
                reply = send(vm, one, dryRun=True)
                assert reply["outcome"] == "planned"
                named = [step["step"] for step in reply["steps"]]
                assert named == [step["step"] for step in one["steps"]]
        else:
            assert told["reasons"], told
            assert told["outcome"] is None
    if before is not None:
        assert vm.xml() == before


@examples
@given(vm=any_vms(), target=targets)
def test_what_is_done_is_what_was_planned(vm: Vm, target: dict[str, Any]) -> None:
    target = fit(vm, target)
    (told,) = plan(vm.node, target)
    if not told["verdict"].startswith("live"):
        return
    for one in told["commands"]:
        reply = send(vm, one)
        if not reply["success"]:
            return  # planned is not done: what fails on the way is the guest's
        if told["outcome"] in ("unchanged", "configured") and len(told["commands"]) == 1:
            assert reply["outcome"] == told["outcome"], (told, reply)
        if told["verdict"] in ("live-unconfirmed", "live-rounded", "live-partial") and told["outcome"] == "plugged":
            assert reply["outcome"] in ("plugged", "online", "unchanged", "configured"), (told, reply)
        if "aligned" in reply and one["command"] != "HotPlugCpu":
            assert reply["aligned"] == told["memorySize"], (told, reply)
    if told["cpuNum"] is not None and target.get("affect") != "config":
        assert vm.send("ReadyForHotplug")["after"]["cpuNum"] == told["cpuNum"]


@examples
@given(vm=any_vms(), target=targets)
def test_restart_is_kept_by_what_it_says_to_prepare_and_a_restart(vm: Vm, target: dict[str, Any]) -> None:
    (told,) = plan(vm.node, fit(vm, target))
    if told["verdict"] != "restart":
        assert told["prepare"] == []
        return
    for one in told["prepare"]:
        reply = send(vm, one)
        assert reply["outcome"] in ("configured", "unchanged"), (told, reply)
        if one["diff"] is not None:
            assert reply["diff"] == one["diff"]
    vm.domain.power_cycle()
    (then,) = plan(vm.node, told["target"])
    if [reason["code"] for reason in then["reasons"]] == ["GUEST_MEMORY_SHORT"]:
        return  # what a guest has to spare once it is started, nobody can say before
    assert then["verdict"].startswith("live"), "\n".join(map(str, (told, then)))


# One of each verdict, and what it tells.


def test_each_verdict_has_its_reason_and_says_what_the_vm_would_have(tmp_path: Path) -> None:
    node = make_node(tmp_path, make_domain(SPEC, make_guest(SPEC), virt_type="kvm"))
    live, rounded, restart, never = plan(
        node, {"cpuNum": 3}, {"memorySize": 700 * MIB}, {"cpuNum": 8, "memorySize": 8 * GIB}, {"memorySize": 900 * GIB}
    )
    assert (live["verdict"], live["outcome"], live["cpuNum"], live["reasons"]) == ("live", "online", 3, [])
    assert [step["step"] for step in live["commands"][0]["steps"]] == ["SetVcpus", "AwaitGuestVcpus"]
    assert (rounded["verdict"], rounded["memorySize"]) == ("live-rounded", 768 * MIB)
    assert [reason["code"] for reason in rounded["reasons"]] == ["MEMORY_NOT_ALIGNED"]
    assert rounded["reserved"] == {"slots": 1, "hostMemory": 256 * MIB + 256 * MIB // 512}
    assert (restart["verdict"], restart["cpuNum"], restart["memorySize"]) == ("restart", 8, 8 * GIB)
    (prepare,) = restart["prepare"]
    assert (prepare["command"], prepare["request"]["prepare"]) == ("ReadyForHotplug", True)
    assert any(line.startswith("+") and "maxMemory" in line for line in prepare["diff"].splitlines())
    assert [one["command"] for one in restart["commands"]] == ["HotPlugCpuMemory"]
    assert restart["reasons"][0]["needsRestart"] is True
    assert never["verdict"] == "never"
    assert never["reasons"][-1]["code"] == "HOST_MEMORY_SHORT"


def test_a_guest_that_takes_more_in_pieces_than_there_are_slots_is_sent_to_no_restart(tmp_path: Path) -> None:
    """Its next start has as many slots: what it lacks is memory to take the dimm in whole."""
    spec = GuestSpec(name="vm1", vcpus=1, max_vcpus=4, memory_mib=512, max_memory_mib=4096, slots=1)
    node = make_node(tmp_path, make_domain(spec, make_guest(spec, available_bytes=35 * MIB), virt_type="kvm"))
    piece, whole = plan(node, {"memorySize": 640 * MIB, "method": "dimm"}, {"memorySize": 1024 * MIB, "method": "dimm"})
    assert piece["verdict"] == "live"
    assert (whole["verdict"], [one["code"] for one in whole["reasons"]]) != ("restart", ["SLOTS_EXHAUSTED"])
    assert whole["reasons"][0]["code"] == "GUEST_MEMORY_SHORT"
    assert "pieces, but 1 memory slots are free" in whole["reasons"][0]["message"]


def test_a_silent_guest_is_unconfirmed_with_why(tmp_path: Path) -> None:
    node = make_node(tmp_path, make_domain(SPEC, make_guest(SPEC, agent="stopped"), virt_type="kvm"))
    (told,) = plan(node, {"cpuNum": 2})
    assert (told["verdict"], told["outcome"]) == ("live-unconfirmed", "plugged")
    assert [reason["code"] for reason in told["reasons"]] == ["GUEST_AGENT_DISCONNECTED"]


def test_a_removal_that_stops_above_its_target_is_partial_and_one_that_the_vm_refuses_waits_for_a_restart(
    tmp_path: Path,
) -> None:
    with_dimm = Vm(make_domain(SPEC, make_guest(SPEC), virt_type="kvm"), {})
    assert with_dimm.send("HotPlugMemory", memorySize=1536 * MIB, dimmSize=512 * MIB)["success"]
    assert with_dimm.send("HotPlugCpu", cpuNum=3, affect="config")["success"]
    partial, refused = plan(with_dimm.node, {"memorySize": 900 * MIB}, {"cpuNum": 1})
    assert (partial["verdict"], partial["memorySize"]) == ("live-partial", 1024 * MIB)
    assert [reason["code"] for reason in partial["reasons"]] == ["MEMORY_SIZE_NOT_REACHABLE"]
    assert refused["verdict"] == "live"
    emulated = Vm(make_domain(SPEC, make_guest(SPEC), virt_type="qemu"), {})
    assert emulated.send("HotPlugCpu", cpuNum=3)["success"]
    (told,) = plan(emulated.node, {"cpuNum": 2})
    assert (told["verdict"], told["cpuNum"], told["commands"]) == ("restart", 2, [])
    assert [reason["code"] for reason in told["reasons"]] == ["CPU_REMOVAL_UNSAFE"]
    assert told["prepare"][0]["request"] == {"vmUuid": "vm1", "cpuNum": 2, "affect": "config"}


def test_what_a_removal_after_a_restart_would_lose_is_asked_for_then(tmp_path: Path) -> None:
    """Found by the property above: the definition has less memory than the running VM, and takes no more."""
    vm = Vm(make_domain(SPEC, make_guest(SPEC), virt_type="qemu"), {})
    assert vm.send("HotPlugCpu", cpuNum=2)["success"]
    assert vm.send("HotPlugMemory", memorySize=1536 * MIB, affect="live", method="dimm")["success"]
    target = {"cpuNum": 1, "memorySize": 1536 * MIB}
    (told,) = plan(vm.node, target)
    assert told["verdict"] == "restart"
    (after,) = told["commands"]
    assert (after["command"], [step["step"] for step in after["steps"]][:1]) == ("HotPlugMemory", ["AttachMemory"])
    vm.domain.config.append(etree.fromstring("<memtune><hard_limit unit='MiB'>600</hard_limit></memtune>"))
    (told,) = plan(vm.node, target)
    assert (told["verdict"], told["reasons"][-1]["code"]) == ("never", "MEMORY_HARD_LIMIT")


def test_a_vm_that_is_off_needs_its_start_and_one_with_a_job_no_restart(tmp_path: Path) -> None:
    off = make_domain(SPEC, make_guest(SPEC), virt_type="kvm", running=False)
    (told,) = plan(make_node(tmp_path, off), {"cpuNum": 2})
    assert (told["verdict"], told["prepare"]) == ("restart", [])
    assert [reason["code"] for reason in told["reasons"]] == ["VM_NOT_RUNNING"]


def test_a_restart_cures_nothing_where_the_host_has_promised_all_it_has(tmp_path: Path) -> None:
    """What was found by the property above: of a VM that is off, the host's memory was not looked at."""
    full = {"total_mib": 1024, "available_mib": 64 * 1024}
    off = make_domain(SPEC, make_guest(SPEC), virt_type="kvm", running=False)
    (told,) = plan(make_node(tmp_path, off, **full), {"memorySize": 2 * GIB})
    assert told["verdict"] == "never"
    assert [reason["code"] for reason in told["reasons"]] == ["VM_NOT_RUNNING", "HOST_MEMORY_PROMISED"]
    # The definition has had memory added that the running VM lacks: the next start takes it.
    running = Vm(make_domain(SPEC, make_guest(SPEC), virt_type="kvm"), {"total_mib": 2048})
    assert running.send("HotPlugMemory", memorySize=1536 * MIB, affect="config", method="dimm")["success"]
    (now, later) = plan(running.node, {"cpuNum": 3}, {"cpuNum": 8, "memorySize": 2048 * MIB})
    assert now["verdict"] == "live", now
    assert later["verdict"] == "never", later
    assert later["reasons"][-1]["code"] == "HOST_MEMORY_PROMISED"


def test_one_look_at_the_vm_is_enough_for_all_targets(tmp_path: Path) -> None:
    domain = make_domain(SPEC, make_guest(SPEC), virt_type="kvm")
    node, looks = make_node(tmp_path, domain), []
    described = domain.XMLDesc
    domain.XMLDesc = lambda flags: looks.append(flags) or described(flags)  # type: ignore[method-assign,func-returns-value]
    plan(node, {"cpuNum": 2})
    looks.clear()
    plan(node, {"cpuNum": 2})
    one = len(looks)
    plan(node, *({"cpuNum": 1 + n % 4, "memorySize": (4 + n % 20) * 128 * MIB} for n in range(64)))
    assert len(looks) == 2 * one
    plan(node, *({"cpuNum": cpus} for cpus in (5, 5, 5, 5)))
    assert len(looks) <= 3 * one + 1, "what several targets would prepare alike is prepared once"


class Tagged(HotPlugCpuRequest, frozen=True, kw_only=True, rename="camel"):
    """A request of somebody's plugin, with a list in it."""

    tags: list[str] = []


def test_a_request_of_any_shape_is_planned(tmp_path: Path) -> None:
    node = make_node(tmp_path, make_domain(SPEC, make_guest(SPEC), virt_type="kvm"))
    planner = Planner(node, [replace(COMMANDS["HotPlugCpu"], request=Tagged)], find_took=lambda *_: None)
    request = PlanRequest(vm_uuid="vm1", targets=(PlanTarget(cpu_num=2), PlanTarget(cpu_num=2)))
    assert [one.verdict for one in planner.plan(request).plans] == ["live", "live"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"vmUuid": "vm1", "targets": []}, Code.OUT_OF_RANGE),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": 1}] * 65}, Code.OUT_OF_RANGE),
        ({"vmUuid": "vm1", "targets": [{}]}, Code.MISSING_FIELD),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": 0}]}, Code.OUT_OF_RANGE),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": "2"}]}, Code.WRONG_TYPE),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": 2, "cpus": 3}]}, Code.UNKNOWN_FIELD),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": 2, "method": "dimm"}]}, Code.WRONG_TYPE),
        ({"vmUuid": "vm1", "targets": [{"cpuNum": 2}], "dryRun": True}, Code.UNKNOWN_FIELD),
        ({"targets": [{"cpuNum": 2}]}, Code.MISSING_FIELD),
    ],
)
def test_bad_input_is_refused(body: dict[str, Any], code: Code) -> None:
    with pytest.raises(AgentError) as refused:
        decode_request(encode(body), PlanRequest)
    assert refused.value.code is code


def test_a_bad_target_is_named(tmp_path: Path) -> None:
    for third, words in (
        ({"cpuNum": 0}, "targets[2].cpuNum: Expected int >= 1"),
        ({"cpuNum": 2, "cpus": 3}, "targets[2]: Object contains unknown field cpus"),
        ({}, "targets[2]: a target needs cpuNum, memorySize or both"),
        (None, "targets[2]: Expected object, got null"),
    ):
        with pytest.raises(AgentError) as refused:
            decode_request(encode({"vmUuid": "vm1", "targets": [{"cpuNum": 1}] * 2 + [third]}), PlanRequest)
        assert refused.value.message == words


def test_times_are_those_of_the_journal_and_null_with_fewer_than_three(tmp_path: Path) -> None:
    domain = make_domain(GuestSpec(name="vm1", vcpus=1, max_vcpus=8, memory_mib=512, max_memory_mib=4096, slots=4))
    agent = FakeAgent(tmp_path, domain)
    times = StepTimes(agent.journal)
    steps = [SetVcpus(count=3, target="both"), AwaitGuestVcpus(known=(0,), added=1, timeout_sec=1)]
    try:
        for n in (2, 3, 4):
            assert times.find("HotPlugCpu", steps) is None
            agent.run("HotPlugCpu", f"t{n}", vmUuid="vm1", cpuNum=n)
        took = times.find("HotPlugCpu", steps)
        assert took is not None
        assert (took.tasks, 0 <= took.median_ms <= took.worst_ms) == (3, True)
        assert times.find("HotPlugCpuMemory", steps) is None
        assert times.find("HotPlugCpu", [AwaitGuestVcpus(known=(0,), added=1, timeout_sec=1)]) is None
    finally:
        agent.stop()
