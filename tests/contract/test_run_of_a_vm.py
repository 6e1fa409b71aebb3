"""What tells one run of a VM from another, and its process from others: on the real libvirt and QEMU."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from kvmagent.hypervisor.qemuprocess import find_pid, read_memlock_bytes
from tests.fakes.agent import open_node
from tests.lab.domainxml import GuestSpec

ROOT = Path("/")


def test_the_limit_of_locked_memory_is_the_one_that_the_kernel_holds_to() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert read_memlock_bytes(ROOT, os.getpid()) == (2**63 - 1 if hard == resource.RLIM_INFINITY else hard)


@pytest.mark.guest
def test_a_run_ends_with_its_process_and_a_process_is_found_by_its_vm(lab: Any, define: Any, tmp_path: Path) -> None:
    guest = define(GuestSpec(name="runs"))
    with open_node(lab.uri, tmp_path) as node:
        first = node.observe("runs", frozenset())
        assert first.run is not None
        assert first.domain.migrated is False
        assert node.observe("runs", frozenset()).run == first.run

        pid = find_pid(ROOT, first.domain.uuid)
        assert pid is not None
        assert "qemu" in (ROOT / "proc" / str(pid) / "cmdline").read_text()
        assert read_memlock_bytes(ROOT, pid) is not None

        with guest.domain() as domain:
            domain.destroy()
        assert node.observe("runs", frozenset()).run is None
        assert find_pid(ROOT, first.domain.uuid) is None
        guest.start_paused()
        assert node.observe("runs", frozenset()).run not in (None, first.run)
