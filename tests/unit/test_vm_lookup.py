"""Which VM a request means, where one is named like another's UUID."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmagent.hypervisor.vmnames import VmNames
from tests.fakes.agent import carry_out, make_domain, make_node
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec

MEANT = "aaaaaaaa-0000-0000-0000-000000000001"
OTHER = "bbbbbbbb-0000-0000-0000-000000000002"


def count_cpus(vm: FakeDomain) -> str | None:
    assert vm.live is not None
    return vm.live.find("vcpu").get("current")


def make_vm(name: str, uuid: str) -> FakeDomain:
    vm = make_domain(GuestSpec(name=name, max_vcpus=4))
    vm._uuid = uuid
    return vm


@pytest.mark.parametrize("name", [MEANT, MEANT.replace("-", "")])
@pytest.mark.parametrize("asked", [MEANT, MEANT.replace("-", ""), MEANT.upper()])
def test_a_uuid_means_its_own_vm_whatever_another_is_called(tmp_path: Path, name: str, asked: str) -> None:
    """Else whoever may name VMs gets what somebody may do to that one alone."""
    meant, other = make_vm("db-1", MEANT), make_vm(name, OTHER)
    node, names = make_node(tmp_path, other, meant), VmNames()
    carry_out(node, "HotPlugCpu", vmUuid=asked, cpuNum=2, affect="live")
    assert (count_cpus(meant), count_cpus(other)) == ("2", "1")
    for vm in (meant, other):
        names.note(vm.UUIDString(), vm.name())
    found = names.find(asked)
    assert found is not None
    assert found.name == "db-1"
    carry_out(node, "HotPlugCpu", vmUuid=OTHER, cpuNum=3, affect="live")
    assert (count_cpus(meant), count_cpus(other)) == ("2", "3")


def test_a_name_that_looks_like_a_uuid_of_nobody_is_a_name(tmp_path: Path) -> None:
    bare = MEANT.replace("-", "")
    node = make_node(tmp_path, vm := make_vm(bare, OTHER))
    for count, asked in enumerate((bare, MEANT), 2):
        carry_out(node, "HotPlugCpu", vmUuid=asked, cpuNum=count, affect="live")
        assert count_cpus(vm) == str(count)
