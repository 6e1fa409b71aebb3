"""What a poll of the status page leaves in an agent of a thousand VMs."""

import time
from pathlib import Path

import pytest

from tests.fakes.agent import write_node
from tests.fleet.hosts import read_status
from tests.fleet.measure import PAGE, read_all
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec

VMS, POLLS = 1000, 2
# One answer of all VMs left 27 MiB.
MOST_MIB = 16


@pytest.mark.slow
def test_a_poll_by_pages_of_a_thousand_vms_leaves_little_memory(tmp_path: Path) -> None:
    specs = [GuestSpec(name=f"vm{n:04}", agent_channel=False) for n in range(VMS)]
    agent = AgentProcess(uri=write_node(tmp_path, *specs), settings={"host": {"memory_overcommit": "100"}})
    with agent:
        before, began = read_status(agent.pid, "VmRSS"), time.monotonic()
        sizes = [read_all(agent, limit=PAGE) for _ in range(POLLS)]
        left = (read_status(agent.pid, "VmRSS") - before) / 1024
        print(f"{VMS} VMs, {sizes[0]} bytes, {(time.monotonic() - began) / POLLS:.1f} s; {left:.1f} MiB are left")
        assert sizes[0] > VMS * 500
        assert left < MOST_MIB
