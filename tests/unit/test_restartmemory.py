"""Since when a VM waits for a restart: from the first look that shows it, over the agent's own restarts."""

from pathlib import Path

import msgspec

from kvmagent.hypervisor.restartmemory import RestartMemory
from kvmagent.model.facts import Facts
from tests.fakes.agent import make_domain, make_node
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


def test_a_file_that_cannot_be_read_or_written_costs_the_moment_alone(tmp_path: Path) -> None:
    file = tmp_path / "restarts.json"
    file.write_text("no JSON")
    memory = RestartMemory(file, clock=lambda: 5.0)
    memory.load()
    assert memory.note(look(tmp_path, prepared=True)) == 5.0
    nowhere = RestartMemory(tmp_path / "missing" / "restarts.json", clock=lambda: 6.0)
    assert nowhere.note(look(tmp_path, prepared=True)) == 6.0
