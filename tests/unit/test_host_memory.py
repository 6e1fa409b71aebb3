"""What is read of the compute node, from files as its kernel writes them."""

from pathlib import Path

from kvmagent.hypervisor.host import read_host
from tests.fakes.agent import MIB, make_host


def test_reads_memory_nodes_hugepages_and_address_bits(tmp_path: Path) -> None:
    host = read_host(288, make_host(tmp_path, available_mib=1000, node_free_mib=600, free_hugepages=7))
    assert (host.memory_available_bytes, host.vcpu_limit, host.phys_bits) == (1000 * MIB, 288, 46)
    (node,) = host.nodes
    assert (node.id, node.free_bytes, node.free_hugepages) == (0, 600 * MIB, {2 * MIB: 7})
    assert host.hugepage_bytes == 2 * MIB


def test_the_limit_of_the_vms_cgroup_counts(tmp_path: Path) -> None:
    make_host(tmp_path, available_mib=1000)
    slice_dir = tmp_path / "sys/fs/cgroup/machine.slice"
    slice_dir.mkdir(parents=True)
    (slice_dir / "memory.max").write_text("max\n")
    (slice_dir / "memory.current").write_text(f"{100 * MIB}\n")
    assert read_host(None, tmp_path).memory_available_bytes == 1000 * MIB
    (slice_dir / "memory.max").write_text(f"{300 * MIB}\n")
    assert read_host(None, tmp_path).memory_available_bytes == 200 * MIB


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    host = read_host(None, tmp_path)
    assert (host.memory_available_bytes, host.vcpu_limit, host.phys_bits, host.nodes) == (None, None, None, ())
