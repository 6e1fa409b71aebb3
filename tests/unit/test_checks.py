"""Blockers that no libvirt of today lets a domain have, judged on facts alone."""

from pathlib import Path
from typing import Any

import msgspec

from kvmagent.model.checks import check_cpu, check_device_support, check_state
from kvmagent.model.facts import Definition, Domain, Facts, Guest, Host
from tests.fakes.agent import make_domain, make_node
from tests.lab.domainxml import GuestSpec


def facts_with(tmp_path: Path, **changes: Any) -> Facts:
    live: Definition = make_node(tmp_path, make_domain(GuestSpec(name="vm1"))).observe("vm1", frozenset()).get_live()
    live = msgspec.structs.replace(live, **changes)
    return Facts(domain=Domain("vm1", "u", "running", live=live, config=None), guest=Guest(), host=Host())


def test_a_topology_that_is_not_the_maximum_is_a_blocker(tmp_path: Path) -> None:
    (blocker,) = check_cpu(facts_with(tmp_path, topology=(2, 1, 1, 1)), "live", 2)
    assert (blocker.code, blocker.needs_restart) == ("CPU_TOPOLOGY_MISMATCH", True)
    assert "makes 2 vCPUs, but the maximum is 4" in blocker.message


def test_cells_that_leave_out_a_vcpu_are_a_blocker(tmp_path: Path) -> None:
    cell = facts_with(tmp_path).get_live().cells[0]
    (blocker,) = check_device_support(
        facts_with(tmp_path, cells=(msgspec.structs.replace(cell, cpus=frozenset({0, 1})),)), "live", "plug dimms"
    )
    assert blocker.code == "NUMA_CELLS_INCOMPLETE"
    assert "vCPUs 2-3 of 4" in blocker.message


def test_a_job_in_progress_is_a_blocker(tmp_path: Path) -> None:
    domain = msgspec.structs.replace(facts_with(tmp_path).domain, job="outgoing migration")
    (blocker,) = check_state(domain, "live")
    assert blocker.code == "LIBVIRT_BUSY"
    assert "outgoing migration" in blocker.message
