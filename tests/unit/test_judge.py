"""The judge alone: what it says of facts, totals and reports; and that nothing is online without the guest's word."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.model.command import Ending, Goal, StepReport, Total, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import (
    Definition,
    Domain,
    Facts,
    Guest,
    GuestBlock,
    GuestVcpu,
    Host,
    MemoryDevice,
    NumaCell,
    Vcpu,
)
from kvmagent.model.judge import judge
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AttachMemory, AwaitBalloon, OnlineGuestMemory, SetBalloon, SetVcpus

MIB = 1024 * 1024
BLOCK = 128 * MIB
REQUEST = VmRequest(vm_uuid="vm1")
CPUS = SetVcpus(count=3, target="both")


def definition(cpus: int = 1, dimms: int = 0, **changes: Any) -> Definition:
    devices = tuple(
        MemoryDevice("dimm", BLOCK, 0, alias=f"ua-{n}", slot=n, base=(32 + n) * BLOCK) for n in range(dimms)
    )
    size = 256 * MIB + dimms * BLOCK
    values: dict[str, Any] = {
        "vcpu_current": cpus,
        "vcpu_maximum": 8,
        "vcpus": tuple(Vcpu(n, enabled=n < cpus, hotpluggable=n > 0) for n in range(8)),
        "topology": None,
        "total_bytes": size,
        "current_bytes": size,
        "max_memory_bytes": 4096 * MIB,
        "slots": 16,
        "cells": (NumaCell(0, frozenset(range(8)), 256 * MIB),),
        "devices": devices,
        "acpi": True,
        "balloon": True,
        "agent_channel": True,
        "machine": "q35",
        "arch": "x86_64",
        "hypervisor": "kvm",
        "domain_id": 1,
    }
    return Definition(**values | changes)


def guest(cpus: int = 1, blocks: dict[int, bool] | None = None, **changes: Any) -> Guest:
    listed = {0: True, 1: True} if blocks is None else blocks
    values: dict[str, Any] = {
        "vcpus": tuple(GuestVcpu(n, online=True, can_offline=n > 0) for n in range(cpus)),
        "blocks": tuple(GuestBlock(n, online=on, can_offline=True) for n, on in listed.items()),
        "block_bytes": BLOCK,
        "mem_total_bytes": 200 * MIB,
    }
    return Guest(**values | changes)


def facts(
    live: Definition | None, says: Guest, config: Definition | None = None, balloon: int | None = 256 * MIB
) -> Facts:
    state: Any = "running" if live else "shutoff"
    domain = Domain("vm1", "u-1", state, live=live, config=config, balloon_bytes=balloon if live else None)
    return Facts(domain=domain, guest=says, host=Host(boot_id="b"))


def end(
    before: Facts | None, after: Facts | None, *totals: Total, reports: tuple[StepReport, ...] = (), **more: Any
) -> Ending:
    return Ending(
        **{"request": REQUEST, "goal": Goal(totals=totals), "before": before, "after": after, "error": None}
        | {"reports": reports}
        | more
    )


def report(step: Any, code: Code | None = None) -> StepReport:
    return StepReport(step, 1.0, None if code is None else Problem(code=code, message="m", remedy="r"), 1.0)


START = facts(definition(), guest(), definition())
THREE = Total("cpu", live=3, config=3)
MORE = Total("memory", live=384 * MIB, config=None)
PLUGGED = definition(3)
ATTACH = AttachMemory(alias="ua-0", size_bytes=BLOCK, node=0, live=True, config=False)
SILENT = Guest(silence=Code.GUEST_AGENT_DISCONNECTED, silence_words="no guest agent is connected")
FULL = Total("balloon", live=256 * MIB, config=256 * MIB)
SMALL = facts(definition(), guest(), definition(current_bytes=200 * MIB), balloon=200 * MIB)

CASES: dict[str, tuple[Ending, str, set[Code]]] = {
    "the guest runs on all": (
        end(START, facts(PLUGGED, guest(3), PLUGGED), THREE, reports=(report(CPUS),)), "online", set(),
    ),
    "the guest runs on some": (
        end(START, facts(PLUGGED, guest(2), PLUGGED), THREE, reports=(report(CPUS),)),
        "plugged", {Code.GUEST_CPU_NOT_SEEN},
    ),
    "the guest says nothing": (
        end(START, facts(PLUGGED, SILENT, PLUGGED), THREE, reports=(report(CPUS),)),
        "plugged", {Code.GUEST_AGENT_DISCONNECTED},
    ),
    "the guest tells of more CPUs than the VM has": (
        end(START, facts(PLUGGED, guest(7), PLUGGED), THREE, reports=(report(CPUS),)),
        "plugged", {Code.GUEST_AGENT_INVALID},
    ),
    "only the definition": (
        end(START, facts(definition(), guest(), PLUGGED), Total("cpu", live=None, config=3), reports=(report(CPUS),)),
        "configured", set(),
    ),
    "nothing": (end(START, START, Total("cpu", live=1, config=1)), "unchanged", set()),
    "a dry run": (end(START, START, THREE, planned=(CPUS,)), "planned", {Code.PLAN_NOT_WHOLE}),
    "half of it": (
        end(START, facts(PLUGGED, guest(3), definition()), THREE, reports=(report(CPUS),)), "partial", set(),
    ),
    "a step failed and nothing is there": (
        end(START, START, THREE, reports=(report(CPUS, Code.LIBVIRT_REFUSED),),
            error=AgentError(Code.LIBVIRT_REFUSED, "no")), "refused", set(),
    ),
    "after a failure it cannot be read": (
        end(START, None, THREE, reports=(report(CPUS),), error=AgentError(Code.LIBVIRT_UNAVAILABLE, "gone")),
        "partial", set(),
    ),
    "what it was before is unknown": (
        end(None, START, THREE, error=AgentError(Code.LIBVIRT_REFUSED, "no")), "partial", set(),
    ),
    "a dimm in use": (
        end(START, facts(definition(dimms=1), guest(blocks={0: True, 1: True, 32: True})), MORE,
            reports=(report(ATTACH),)), "online", set(),
    ),
    "a dimm that the guest lists and does not use": (
        end(START, facts(definition(dimms=1), guest(blocks={0: True, 1: True, 32: False})), MORE,
            reports=(report(ATTACH),)), "plugged", {Code.GUEST_MEMORY_OFFLINE},
    ),
    "a dimm that the guest does not list yet": (
        end(START, facts(definition(dimms=1), guest()), MORE, reports=(report(ATTACH),)),
        "plugged", {Code.GUEST_MEMORY_NOT_SEEN},
    ),
    "a balloon that the driver gave back": (
        end(SMALL, START, FULL, reports=(report(SetBalloon(256 * MIB, "live")),)), "online", set(),
    ),
    "a balloon without a guest: the definition alone has changed": (
        end(facts(definition(), SILENT, definition(current_bytes=200 * MIB)), facts(definition(), SILENT, definition()),
            FULL, reports=(report(SetBalloon(256 * MIB, "config")),)), "configured", {Code.GUEST_AGENT_DISCONNECTED},
    ),
    "a balloon that nobody moves": (
        end(SMALL, SMALL, FULL,
            reports=(report(SetBalloon(256 * MIB, "live")),
                     report(AwaitBalloon(256 * MIB, 1), Code.BALLOON_NOT_ANSWERING))),
        "partial", {Code.BALLOON_NOT_ANSWERING, Code.GUEST_STILL_ASKED},
    ),
    "a balloon that nobody moves and nobody can look at again": (
        end(SMALL, None, FULL, error=AgentError(Code.LIBVIRT_UNAVAILABLE, "gone"),
            reports=(report(SetBalloon(256 * MIB, "live")),)), "partial", {Code.GUEST_STILL_ASKED},
    ),
    "a balloon that was followed before nobody could look again": (
        end(SMALL, None, FULL, error=AgentError(Code.LIBVIRT_UNAVAILABLE, "gone"),
            reports=(report(SetBalloon(256 * MIB, "live")), report(AwaitBalloon(256 * MIB, 1)))), "partial", set(),
    ),
    "gone back after a failure": (
        end(START, START, THREE, reports=(report(CPUS),),
            goal=Goal(totals=(THREE,), failure=Problem(code=Code.LIBVIRT_REFUSED, message="m", remedy="r"))),
        "refused", set(),
    ),
    "could not go back": (
        end(START, facts(PLUGGED, guest(3), definition()), THREE, reports=(report(CPUS),),
            goal=Goal(totals=(THREE,), failure=Problem(code=Code.LIBVIRT_REFUSED, message="m", remedy="r"))),
        "partial", set(),
    ),
    "started anew meanwhile": (
        end(START, facts(definition(3, domain_id=2), guest(3), PLUGGED), THREE, reports=(report(CPUS),)),
        "online", {Code.VM_RESTARTED},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_what_was_proven(case: str) -> None:
    ending, outcome, warned = CASES[case]
    said = judge(ending)
    assert (said.outcome, {warning.code for warning in said.warnings}) == (outcome, warned)
    assert (said.error is None) == (outcome not in ("partial", "refused"))


@pytest.mark.parametrize("total", [-1, 0, 4096 * MIB, None])
def test_a_mem_total_that_cannot_be_is_none(total: int | None) -> None:
    said = judge(end(START, facts(definition(), guest(mem_total_bytes=total))))
    assert said.after.guest_memory_size is None


def test_a_block_of_virtio_mem_is_not_hidden_by_boot_memory_that_ends_inside_one() -> None:
    """257 MiB of boot memory are three blocks, which are 384 MiB: a device's 64 MiB more would be covered by them."""
    boot = {"cells": (NumaCell(0, frozenset(range(8)), 257 * MIB),), "total_bytes": 257 * MIB}
    device = MemoryDevice("virtio-mem", 1024 * MIB, 0, alias="ua-v", requested_bytes=64 * MIB, current_bytes=64 * MIB)
    grown = definition(**boot | {"total_bytes": 1281 * MIB, "devices": (device,)})
    three = {0: True, 1: True, 2: True}
    before = facts(definition(**boot), guest(blocks=three))
    total = Total("memory", live=321 * MIB, config=None)
    for blocks, outcome in ((three, "plugged"), (three | {40: False}, "plugged"), (three | {40: True}, "online")):
        said = judge(end(before, facts(grown, guest(blocks=blocks)), total, reports=(report(ATTACH),)))
        assert said.outcome == outcome, blocks
        assert bool(said.warnings) == (outcome == "plugged")


says = st.one_of(
    st.just(SILENT),
    st.just(Guest()),
    st.builds(
        guest,
        st.integers(0, 20),
        st.dictionaries(st.integers(0, 40), st.booleans(), max_size=40),
        mem_total_bytes=st.none() | st.integers(-MIB, 2048 * MIB),
        block_bytes=st.none() | st.sampled_from([1, MIB, BLOCK, 2**40]),
        vcpus=st.none() | st.integers(0, 20).map(lambda n: guest(n).vcpus),
    ),
)
amounts = st.tuples(st.integers(1, 8), st.integers(0, 3))


@given(
    was=amounts, has=amounts, first=says, then=says, cpus=st.none() | st.integers(1, 8),
    blocks=st.none() | st.integers(0, 5), balloon=st.none() | st.integers(1, 5), actual=st.none() | st.integers(1, 5),
    direction=st.sampled_from(["up", "down"]), failed=st.none() | st.sampled_from(list(Code)),
)  # fmt: skip
def test_nothing_is_online_without_the_guest_s_numbers(
    was: tuple[int, int], has: tuple[int, int], first: Guest, then: Guest, cpus: int | None, blocks: int | None,
    balloon: int | None, actual: int | None, direction: Any, failed: Code | None,
) -> None:  # fmt: skip
    totals = [Total("cpu", live=cpus, config=None, direction=direction)]
    totals.append(Total("memory", live=blocks and blocks * BLOCK, config=None, direction=direction))
    totals.append(Total("balloon", live=balloon and balloon * BLOCK, config=None, direction=direction))
    after = facts(definition(*has), then, balloon=actual and actual * BLOCK)
    reports = (report(CPUS), report(ATTACH), report(OnlineGuestMemory((1,)), failed))
    said = judge(end(facts(definition(*was), first), after, *totals, reports=reports))
    if said.outcome == "online":
        assert then.silence is None
        if cpus is not None:
            assert said.after.guest_cpu_num is not None
            assert said.after.guest_cpu_num <= after.get_live().vcpu_current
            assert said.after.guest_cpu_num >= cpus if direction == "up" else said.after.guest_cpu_num <= cpus
        if blocks:
            assert then.blocks is not None
            assert then.block_bytes is not None
    if said.outcome == "plugged":
        assert said.warnings, "a change that is not proven says why"
    for stage in said.stages:
        assert stage.amount >= 0
        if stage.resource == "cpu" and stage.stage == "online":
            assert stage.amount == said.after.guest_cpu_num
        if stage.resource == "cpu" and stage.stage == "plugged":
            assert stage.amount == said.after.cpu_num


def test_a_judgement_is_made_of_the_ending_alone() -> None:
    ending = CASES["the guest runs on all"][0]
    assert msgspec.to_builtins(judge(ending).after) == msgspec.to_builtins(judge(ending).after)
