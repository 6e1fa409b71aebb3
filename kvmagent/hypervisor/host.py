"""What the compute node has left, read from the kernel.

Source: proc(5), /proc/meminfo: MemAvailable is what can be had without swapping; Linux
Documentation/admin-guide/mm/hugetlbpage.rst; Documentation/admin-guide/cgroup-v2.rst, memory.max.
"""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import read_fields, read_sizes, read_text
from kvmagent.model.facts import Host, HostNode
from kvmagent.model.host import HostLoad
from kvmagent.model.hostbudget import HostCapacity, NodeCapacity
from kvmagent.model.units import KIB

_CGROUPS = "sys/fs/cgroup"
# systemd's slice for VMs: all of libvirt's system VMs are below it.
_SLICE = f"{_CGROUPS}/machine.slice"
# A VM's cgroup, by libvirt's number of it: systemd's scope, or without systemd libvirt's own; and between the top and
# it the partitions (<resource><partition>). Source: libvirt cgroups.html.
_TOPS = ("machine.slice", "machine")
_VM_CGROUP = re.compile(r"(?:machine-qemu\\x2d(\d+)\\x2d.*\.scope|qemu-(\d+)-.*\.libvirt-qemu)")
_PARTITIONS = (".slice", ".partition")


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
    return HostCapacity(
        physical_bytes=meminfo.get("MemTotal", 0),
        reserve_bytes=reserve_bytes,
        overcommit=overcommit,
        default_page_bytes=meminfo.get("Hugepagesize"),
        hugepages=_measure_hugepages(root / "sys/kernel/mm/hugepages"),
        taken=_measure_taken(root / "sys/kernel/mm/hugepages"),
        nodes=tuple(nodes),
        limit_bytes=read_limits(root, _TOPS[:1]).get(_TOPS[0]),
    )


def _measure_hugepages(directory: Path) -> dict[int, int]:
    """Return the bytes in all hugepages by their size."""
    return {size: count * size for size, count in _count_hugepages(directory, "nr_hugepages").items()}


def _measure_taken(directory: Path) -> dict[int, int]:
    """Return the bytes in hugepages that are used or reserved, by size; empty if that is not known.

    Source: Linux hugetlbpage.rst: reserved ones are promised to a mapping and still count as free.
    """
    if not any(directory.glob("hugepages-*kB/free_hugepages")):
        return {}
    free, reserved = _count_hugepages(directory, "free_hugepages"), _count_hugepages(directory, "resv_hugepages")
    return {
        size: (count - free[size] + reserved[size]) * size
        for size, count in _count_hugepages(directory, "nr_hugepages").items()
    }


def read_cgroups(root: Path) -> dict[int, tuple[str, ...]]:
    """Return the cgroups that each VM is in, by libvirt's number of it: paths, from its partition down to its own."""
    found: dict[int, tuple[str, ...]] = {}
    left = [(root / _CGROUPS / top, tuple[str, ...]()) for top in _TOPS]
    while left:
        directory, above = left.pop()
        for path in _list_directories(directory):
            name = str(path.relative_to(root / _CGROUPS))
            if vm := _VM_CGROUP.fullmatch(path.name):
                # libvirt puts a VM's limits on a cgroup of its own below the scope. Source: virCgroupV2.
                found[int(vm[1] or vm[2])] = (*above, name, f"{name}/libvirt")
            elif path.name.endswith(_PARTITIONS):
                left.append((path, (*above, name)))
    return found


def _list_directories(directory: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def read_limits(root: Path, cgroups: Iterable[str]) -> dict[str, int]:
    """Return what each of these cgroups may take of memory, where it is limited."""
    limits = {cgroup: read_text(root / _CGROUPS / cgroup / "memory.max") or "" for cgroup in cgroups}
    return {cgroup: int(limit) for cgroup, limit in limits.items() if limit.isdigit()}


def _count_hugepages(directory: Path, file: str) -> dict[int, int]:
    """Return the number of hugepages by their size: `nr_hugepages` counts all, `free_hugepages` the free ones."""
    found = {}
    for pages in directory.glob("hugepages-*kB"):
        size_kib = int(pages.name.removeprefix("hugepages-").removesuffix("kB"))
        found[size_kib * KIB] = int(read_text(pages / file) or 0)
    return found


@functools.cache
def read_boot_id(root: Path) -> str | None:
    """Return what identifies this start of the host. Source: random(4)."""
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
