"""Since when a VM waits for a restart: from the first look that shows it, over the agent's own restarts."""

import copy
from pathlib import Path

import libvirt
import msgspec

from kvmagent.hypervisor.domainxml import format_virtio_mem
from kvmagent.hypervisor.restartmemory import RestartMemory
from kvmagent.model.facts import Facts
from kvmagent.model.units import GIB
from tests.fakes.agent import MIB, carry_out, make_domain, make_node
from tests.lab.domainxml import GuestSpec

SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4)


def look(directory: Path, *, prepared: bool, domain_id: int = 7) -> Facts:
    domain = make_domain(SPEC)
    if prepared:
        domain.config.find("vcpu").text = "8"
    facts = make_node(directory, domain).observe("vm1", frozenset())
    assert facts.domain.live is not None
    live = msgspec.structs.replace(facts.domain.live, domain_id=domain_id)
    return msgspec.structs.replace(facts, domain=msgspec.structs.replace(facts.domain, live=live))


def test_it_counts_from_the_first_look_over_a_restart_of_the_agent_and_ends_with_the_vm_s(tmp_path: Path) -> None:
    now = [100.0]
    file = tmp_path / "restarts.json"
    memory = RestartMemory(file, clock=lambda: now[0])
    memory.load()
    waiting = look(tmp_path, prepared=True)
    assert memory.note(look(tmp_path, prepared=False)) is None
    assert not file.exists(), "nothing to keep"
    assert memory.note(waiting) == 100.0
    now[0] = 200.0
    assert memory.note(waiting) == 100.0
    again = RestartMemory(file, clock=lambda: now[0])
    again.load()
    assert again.note(waiting) == 100.0, "the agent was started again"
    assert again.note(look(tmp_path, prepared=True, domain_id=8)) == 200.0, "prepared once more after the VM's start"
    assert again.note(look(tmp_path, prepared=False, domain_id=8)) is None
    assert again.note(waiting) == 200.0
    again.forget(again.known())
    last = RestartMemory(file, clock=lambda: 300.0)
    last.load()
    assert last.note(waiting) == 300.0, "the VM was gone meanwhile"


def test_a_virtio_mem_device_that_the_next_start_has_waits_for_it_as_well(tmp_path: Path) -> None:
    """Newer libvirt counts no slot for it, and then it is all that the preparation changes."""
    domain = make_domain(GuestSpec(name="vm1", numa_cells=2, vcpus=2))
    node = make_node(tmp_path, domain)
    assert node.observe("vm1", frozenset()).restart_required is False
    told = carry_out(node, "ReadyForHotplug", vmUuid="vm1", prepare=True, memoryDevice="virtio-mem", dryRun=True)
    assert [change["field"] for change in told["changes"]] == ["slots", "virtioMem"]
    for cell in (0, 1):
        sizes = {"size_bytes": GIB, "block_bytes": 2 * MIB, "requested_bytes": 0}
        device = format_virtio_mem(alias=f"ua-{cell}", node=cell, **sizes)
        domain.attachDeviceFlags(device, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    told = carry_out(node, "ReadyForHotplug", vmUuid="vm1")
    assert told["restartRequired"] is True
    assert [warning["code"] for warning in told["warnings"]] == ["RESTART_REQUIRED"]
    domain.live = copy.deepcopy(domain.config)
    assert node.observe("vm1", frozenset()).restart_required is False


def test_a_file_that_cannot_be_read_or_written_costs_the_moment_alone(tmp_path: Path) -> None:
    file = tmp_path / "restarts.json"
    file.write_text("no JSON")
    memory = RestartMemory(file, clock=lambda: 5.0)
    memory.load()
    assert memory.note(look(tmp_path, prepared=True)) == 5.0
    nowhere = RestartMemory(tmp_path / "missing" / "restarts.json", clock=lambda: 6.0)
    assert nowhere.note(look(tmp_path, prepared=True)) == 6.0
