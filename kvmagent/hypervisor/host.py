"""The free resources of the compute node, read from the kernel.

Source: proc(5), /proc/meminfo: MemAvailable is what can be had without swapping; Linux
Documentation/admin-guide/mm/hugetlbpage.rst; Documentation/admin-guide/cgroup-v2.rst, memory.max.
"""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import (
    list_certain,
    parse_sizes,
    read_certain,
    read_fields,
    read_sizes,
    read_text,
)
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Host, HostNode
from kvmagent.model.host import HostLoad
from kvmagent.model.hostbudget import HostCapacity, NodeCapacity
from kvmagent.model.units import KIB

_NODE, _HUGEPAGES = re.compile(r"node\d+"), re.compile(r"hugepages-(\d+)kB")
_CGROUPS = "sys/fs/cgroup"
# systemd's slice for VMs: all of libvirt's system VMs are below it.
_SLICE = f"{_CGROUPS}/machine.slice"
# A VM's cgroup, by libvirt's number of it: systemd's scope, or without systemd libvirt's own; and between the top and
# it the partitions (<resource><partition>). Source: libvirt cgroups.html.
_TOPS = ("machine.slice", "machine")
_VM_CGROUP = re.compile(r"(?:machine-qemu\\x2d(\d+)\\x2d.*\.scope|qemu-(\d+)-.*\.libvirt-qemu)")
_PARTITIONS = (".slice", ".partition")


def read_host(vcpu_limit: int | None, root: Path) -> Host:
    """Return the host's facts, the kernel's files being below `root`; a part that cannot be read is None.

    Raises:
        AgentError: its NUMA nodes cannot be read now.
    """
    meminfo = read_sizes(f"{root}/proc/meminfo")
    available = meminfo.get("MemAvailable")
    room = _slice_room(f"{root}/{_SLICE}")
    return Host(
        memory_available_bytes=available if room is None or available is None else min(available, room),
        vcpu_limit=vcpu_limit,
        phys_bits=_read_phys_bits(root / "proc/cpuinfo"),
        nodes=tuple(_read_node(node, directory) for node, directory in _find_nodes(root)),
        hugepage_bytes=meminfo.get("Hugepagesize"),
        boot_id=read_boot_id(root),
    )


def read_capacity(root: Path, reserve_bytes: int, overcommit: float) -> HostCapacity:
    """Return what of the host's memory may be promised to VMs.

    Raises:
        AgentError: it cannot be read: for that neither nothing nor too much may be promised.
    """
    meminfo = parse_sizes(read_certain(f"{root}/proc/meminfo"))
    if "MemTotal" not in meminfo:
        raise AgentError(Code.INTERNAL_ERROR, f"{root}/proc/meminfo has no MemTotal", expected=False)
    nodes = [
        NodeCapacity(
            id=node,
            memory_bytes=parse_sizes(read_certain(f"{directory}/meminfo")).get("MemTotal", 0),
            hugepages=_measure_hugepages(_count_hugepages(f"{directory}/hugepages", "nr_hugepages")),
        )
        for node, directory in _find_nodes(root)
    ]
    pages = f"{root}/sys/kernel/mm/hugepages"
    counts = _count_hugepages(pages, "nr_hugepages")
    return HostCapacity(
        physical_bytes=meminfo["MemTotal"],
        reserve_bytes=reserve_bytes,
        overcommit=overcommit,
        default_page_bytes=meminfo.get("Hugepagesize"),
        hugepages=_measure_hugepages(counts),
        taken=_measure_taken(pages, counts),
        nodes=tuple(nodes),
        limit_bytes=read_limits(root, _TOPS[:1]).get(_TOPS[0]),
    )


def _find_nodes(root: Path) -> list[tuple[int, str]]:
    """Return the host's NUMA nodes, each with its directory."""
    nodes = f"{root}/sys/devices/system/node"
    return [(int(name[4:]), f"{nodes}/{name}") for name in sorted(list_certain(nodes)) if _NODE.fullmatch(name)]


def _measure_hugepages(counts: dict[int, int]) -> dict[int, int]:
    """Return the bytes in hugepages by their size."""
    return {size: count * size for size, count in counts.items()}


def _measure_taken(directory: str, counts: dict[int, int]) -> dict[int, int]:
    """Return the bytes in hugepages that are used or reserved, by size; without those of which it is not known.

    Source: Linux hugetlbpage.rst: reserved ones are promised to a mapping and still count as free.
    """
    free, reserved = _count_hugepages(directory, "free_hugepages"), _count_hugepages(directory, "resv_hugepages")
    return {size: (count - free[size] + reserved.get(size, 0)) * size for size, count in counts.items() if size in free}


def read_cgroups(root: Path) -> dict[int, tuple[str, ...]]:
    """Return the cgroups that each VM is in, by libvirt's number of it: paths, from its partition down to its own.

    Raises:
        AgentError: they cannot be read now.
    """
    found: dict[int, tuple[str, ...]] = {}
    left = [(root / _CGROUPS / top, tuple[str, ...]()) for top in _TOPS]
    while left:
        directory, above = left.pop()
        for path in (directory / name for name in list_certain(directory)):
            name = str(path.relative_to(root / _CGROUPS))
            if vm := _VM_CGROUP.fullmatch(path.name):
                # libvirt puts a VM's limits on a cgroup of its own below the scope. Source: virCgroupV2.
                found[int(vm[1] or vm[2])] = (*above, name, f"{name}/libvirt")
            elif path.name.endswith(_PARTITIONS):
                left.append((path, (*above, name)))
    return found


def read_limits(root: Path, cgroups: Iterable[str]) -> dict[str, int]:
    """Return what each of these cgroups may take of memory, where it is limited.

    Raises:
        AgentError: it cannot be read now.
    """
    limits = {cgroup: read_certain(f"{root}/{_CGROUPS}/{cgroup}/memory.max") or "" for cgroup in cgroups}
    return {cgroup: int(limit) for cgroup, limit in limits.items() if limit.isdigit()}


def _count_hugepages(directory: str, file: str) -> dict[int, int]:
    """Return the number of hugepages by their size: `nr_hugepages` counts all, `free_hugepages` the free ones.

    A size whose number cannot be read is left out.
    """
    found = {}
    for name in list_certain(directory):
        if (size := _HUGEPAGES.fullmatch(name)) and (count := read_certain(f"{directory}/{name}/{file}")):
            found[int(size[1]) * KIB] = int(count)
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


def _read_node(node: int, directory: str) -> HostNode:
    free = _count_hugepages(f"{directory}/hugepages", "free_hugepages")
    meminfo = read_sizes(f"{directory}/meminfo")
    # Page cache that can be dropped is free for a VM. Source: Linux mm/vmscan.c; the node has no MemAvailable.
    free_bytes = sum(meminfo.get(name, 0) for name in ("MemFree", "Inactive(file)", "SReclaimable"))
    return HostNode(id=node, free_bytes=free_bytes, free_hugepages=free)


@functools.cache  # of the processor: it stays, and the file is long on a large host
def _read_phys_bits(path: Path) -> int | None:
    found = re.match(r"(\d+) bits physical", read_fields(path).get("address sizes", ""))
    return int(found.group(1)) if found else None


def _slice_room(path: str) -> int | None:
    """Return what the VMs' cgroup may still take; None without a limit."""
    limit, current = read_text(f"{path}/memory.max") or "", read_text(f"{path}/memory.current") or ""
    return int(limit) - int(current) if limit.isdigit() and current.isdigit() else None
