"""What a caller leaves alone stays as it was, whatever the VM, the command and what earlier tasks left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.fakes.agent import MIB, carry_out, make_domain, make_node
from tests.lab.domainxml import GuestSpec
from tests.unit.test_capacity import any_vms
from tests.unit.test_planners_properties import Vm, commands


def leave_over(vm: Vm, kind: str) -> None:
    """What somebody asked of the guest and did not see reached."""
    live = vm.domain.live
    if live is None:
        return
    if kind == "balloon":
        vm.domain.guest.balloon_driver = False
        vm.domain.setMemoryFlags(int(live.findtext("currentMemory")) // 2, 1)
    for target in live.findall("./devices/memory[@model='virtio-mem']/target") if kind == "virtio-mem" else []:
        target.find("requested").text = target.findtext("size")
        vm.domain.guest.virtio_mem_limit = 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    vm=any_vms(),
    sequence=st.lists(commands, min_size=1, max_size=3),
    affect=st.sampled_from(["live", "config"]),
    left=st.sampled_from(["", "", "balloon", "virtio-mem"]),
    others=st.fixed_dictionaries({}, optional={"guestOnline": st.booleans(), "dryRun": st.booleans()}),
)
def test_a_definition_that_is_left_alone_stays_as_it_was(
    vm: Vm, sequence: list[tuple[str, dict[str, Any]]], affect: str, left: str, others: dict[str, Any]
) -> None:
    config = vm.domain.config
    for target in () if config is None else config.findall("./devices/memory/target"):
        for current in target.findall("current"):  # of a running VM alone
            target.remove(current)
    leave_over(vm, left)
    for command, fields in sequence:
        before = definitions(vm)
        reply = vm.send(command, **fields, **others, affect=affect)
        assert reply["errorCode"] not in ("INTERNAL_ERROR", "NOT_VERIFIED"), reply
        after = definitions(vm)
        alone = "config" if affect == "live" else "live"
        assert after[alone] == before[alone], reply
        if reply["outcome"] in ("refused", "planned") or others.get("dryRun"):
            assert after == before, reply
        if reply["outcome"] == "configured":
            assert after["config"] != before["config"], reply
        if affect == "config":
            assert reply["outcome"] not in ("online", "plugged"), reply
            assert reply["stages"] == []


def definitions(vm: Vm) -> dict[str, bytes | None]:
    live, config = (
        None if root is None else etree.tostring(root, method="c14n") for root in (vm.domain.live, vm.domain.config)
    )
    return {"live": live, "config": config}


@pytest.mark.parametrize("method", ["auto", "balloon"])
@pytest.mark.parametrize("saved_mib", [256, 512, 768])
def test_a_definition_with_less_than_the_balloon_is_to_leave_is_refused_with_a_remedy_that_works(
    tmp_path: Path, method: str, saved_mib: int
) -> None:
    """The balloon holds the half of the running VM."""
    domain, saved = (
        make_domain(GuestSpec(name="vm1", memory_mib=size_mib), virt_type="kvm") for size_mib in (1024, saved_mib)
    )
    domain.setMemoryFlags(512 * 1024, 1)
    domain.config = saved.config
    node = make_node(tmp_path, domain)
    request: dict[str, Any] = {"vmUuid": "vm1", "memorySize": 800 * MIB, "method": method, "timeoutSec": 1}
    reply = carry_out(node, "HotPlugMemory", "t1", **request)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "BALLOON_ABOVE_TOTAL"), reply
    assert '"affect": "live"' in reply["remedy"]
    assert carry_out(node, "HotPlugMemory", "t2", affect="live", **request)["after"]["balloonSize"] == 800 * MIB
