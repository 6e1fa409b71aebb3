"""What the compute node has left, read from the kernel.

Source: proc(5), /proc/meminfo: MemAvailable is what can be had without swapping; Linux
Documentation/admin-guide/mm/hugetlbpage.rst; Documentation/admin-guide/cgroup-v2.rst, memory.max.
"""

import functools
import os
import re
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import read_fields, read_sizes, read_text
from kvmagent.model.facts import Host, HostNode
from kvmagent.model.host import HostLoad
from kvmagent.model.hostbudget import HostCapacity, NodeCapacity
from kvmagent.model.units import KIB

# systemd's slice for VMs: all of libvirt's system VMs are below it.
_SLICE = "sys/fs/cgroup/machine.slice"


def read_host(vcpu_limit: int | None, root: Path) -> Host:
    """Return the host's facts, the kernel's files being below `root`; a part that cannot be read is None."""
    meminfo = read_sizes(root / "proc/meminfo")
    available = meminfo.get("MemAvailable")
    room = _slice_room(root / _SLICE)
    return Host(
        memory_available_bytes=available if room is None or available is None else min(available, room),
        vcpu_limit=vcpu_limit,
        phys_bits=_read_phys_bits(root / "proc/cpuinfo"),
        nodes=tuple(_read_node(path) for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*"))),
        hugepage_bytes=meminfo.get("Hugepagesize"),
        boot_id=read_boot_id(root),
    )


def read_capacity(root: Path, reserve_bytes: int, overcommit: float) -> HostCapacity:
    """Return what of the host's memory may be promised to VMs."""
    meminfo = read_sizes(root / "proc/meminfo")
    nodes = [
        NodeCapacity(
            id=int(path.name.removeprefix("node")),
            memory_bytes=read_sizes(path / "meminfo").get("MemTotal", 0),
            hugepages=_measure_hugepages(path / "hugepages"),
        )
        for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    ]
    limit = read_text(root / _SLICE / "memory.max") or ""
    return HostCapacity(
        physical_bytes=meminfo.get("MemTotal", 0),
        reserve_bytes=reserve_bytes,
        overcommit=overcommit,
        default_page_bytes=meminfo.get("Hugepagesize"),
        hugepages=_measure_hugepages(root / "sys/kernel/mm/hugepages"),
        nodes=tuple(nodes),
        limit_bytes=int(limit) if limit.isdigit() else None,
    )


def _measure_hugepages(directory: Path) -> dict[int, int]:
    """Return the bytes in all hugepages by their size."""
    return {size: count * size for size, count in _count_hugepages(directory, "nr_hugepages").items()}


def _count_hugepages(directory: Path, file: str) -> dict[int, int]:
    """Return the number of hugepages by their size: `nr_hugepages` counts all, `free_hugepages` the free ones."""
    found = {}
    for pages in directory.glob("hugepages-*kB"):
        size_kib = int(pages.name.removeprefix("hugepages-").removesuffix("kB"))
        found[size_kib * KIB] = int(read_text(pages / file) or 0)
    return found


@functools.cache
def read_boot_id(root: Path) -> str | None:
    """Return what tells this start of the host from others. Source: random(4)."""
    return read_text(root / "proc/sys/kernel/random/boot_id")


def read_host_load(root: Path) -> HostLoad:
    """Return what the host has left; a part that cannot be read is None."""
    meminfo = read_sizes(root / "proc/meminfo")
    load = (read_text(root / "proc/loadavg") or "").split()
    return HostLoad(
        name=os.uname().nodename,
        cpus=os.cpu_count(),
        load=float(load[0]) if load else None,
        memory_total=meminfo.get("MemTotal"),
        memory_available=meminfo.get("MemAvailable"),
    )


def _read_node(path: Path) -> HostNode:
    free = _count_hugepages(path / "hugepages", "free_hugepages")
    meminfo = read_sizes(path / "meminfo")
    # Page cache that can be dropped is free for a VM. Source: Linux mm/vmscan.c; the node has no MemAvailable.
    free_bytes = sum(meminfo.get(name, 0) for name in ("MemFree", "Inactive(file)", "SReclaimable"))
    return HostNode(id=int(path.name.removeprefix("node")), free_bytes=free_bytes, free_hugepages=free)


@functools.cache  # of the processor: it stays, and the file is long on a large host
def _read_phys_bits(path: Path) -> int | None:
    found = re.match(r"(\d+) bits physical", read_fields(path).get("address sizes", ""))
    return int(found.group(1)) if found else None


def _slice_room(path: Path) -> int | None:
    """Return what the VMs' cgroup may still take; None without a limit."""
    limit, current = read_text(path / "memory.max") or "", read_text(path / "memory.current") or ""
    return int(limit) - int(current) if limit.isdigit() and current.isdigit() else None
