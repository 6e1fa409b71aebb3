"""An upgrade in waves by the Ansible role, as `make fleet` plays it: two machines, one playbook."""

from pathlib import Path

from tests.fleet.scenes import Table
from tests.fleet.waves import roll_out
from tests.lab.tree import FreshDebian


def test_two_machines_are_rolled_out_and_upgraded_by_one_playbook(deb: Path, debian: FreshDebian) -> None:
    table = Table()
    roll_out(table, 2, deb, debian)
    assert not table.faults, "\n".join(table.faults)
    healthy = [value for _, name, value in table.rows if name.startswith("machines on that version")]
    assert healthy == ["2", "2"]
