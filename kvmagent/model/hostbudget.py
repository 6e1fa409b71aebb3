"""The host's memory as a budget: what it has, what each running VM may have of it, and what is left. Pure.

    capacity    normal memory: (physical - hugepages - reserve) x overcommit, and no more than the VMs' cgroup may take
                hugepages of a size: all that the host has of them
                host NUMA nodes: the same of these nodes, for VMs that are bound to them
    promised    of each running VM: boot memory, dimms, virtio-mem requested, less what its balloon holds, and what QEMU
                itself needs; or what an accepted task is about to bring it to, whichever is more

What is free at the moment is no measure: memory that was plugged and not touched yet still counts as available there.
"""

from collections.abc import Iterable

import msgspec

from kvmagent.model.command import Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts, MemoryPool
from kvmagent.model.units import MIB, format_ids, format_size

# What QEMU needs beside the guest's memory: its own code and buffers, for each vCPU a thread with its stack and KVM's
# structures, and page tables of 8 bytes for each 4 KiB page.
# Source: KubeVirt's estimate of a virt-launcher's overhead, GetMemoryOverhead: 8 MiB a vCPU, memory / 512; the fixed
# part is Observed: QEMU 7.2, q35, virtio devices, no display, not begun: 52 MiB resident, 57 with 16 vCPUs.
_QEMU_BYTES = 64 * MIB
_VCPU_BYTES = 8 * MIB
_PAGE_TABLES = 512
#: How many of the VMs that have most are named in a refusal.
_NAMED = 3

#: Where a size of hugepages could stand.
NORMAL_PAGES = 0


class Claim(msgspec.Struct, frozen=True):
    """A part of what a VM may have: from which host NUMA nodes (empty: any), in pages of which size (0: normal)."""

    page_bytes: int
    nodes: frozenset[int]
    size_bytes: int


class Promise(msgspec.Struct, frozen=True):
    """What one running VM may have: `guest_bytes` for its guest, and in `claims` that and what QEMU needs, by kind.

    `backing` is where more memory of the guest comes from: the size of its pages and the host NUMA nodes; normal pages
    from anywhere where its guest nodes differ in that. `resident_bytes` is what its QEMU has now; None: not told.
    """

    uuid: str
    name: str
    guest_bytes: int
    claims: tuple[Claim, ...]
    backing: tuple[int, frozenset[int]] = (NORMAL_PAGES, frozenset())
    resident_bytes: int | None = None

    @property
    def size_bytes(self) -> int:
        """All that the VM may have, of whatever kind."""
        return sum(claim.size_bytes for claim in self.claims)

    def grown_to(self, guest_bytes: int) -> "Promise":
        """Return the promise of a VM whose guest may have so much; no less than it may have already."""
        added = guest_bytes - self.guest_bytes
        if added <= 0:
            return self
        page_bytes, nodes = self.backing
        more = (Claim(page_bytes, nodes, added), Claim(NORMAL_PAGES, frozenset(), added // _PAGE_TABLES))
        return msgspec.structs.replace(self, guest_bytes=guest_bytes, claims=(*self.claims, *more))


class NodeCapacity(msgspec.Struct, frozen=True):
    """One NUMA node of the host: its memory, and all its hugepages as bytes by their size."""

    id: int
    memory_bytes: int
    hugepages: dict[int, int] = {}


class HostCapacity(msgspec.Struct, frozen=True):
    """What the host has. `limit_bytes` is what the cgroup of all VMs may take at most; None: no limit."""

    physical_bytes: int
    reserve_bytes: int
    overcommit: float
    default_page_bytes: int | None = None
    hugepages: dict[int, int] = {}
    nodes: tuple[NodeCapacity, ...] = ()
    limit_bytes: int | None = None

    def measure(self, page_bytes: int, nodes: frozenset[int]) -> int:
        """Return the bytes that may be promised of one kind of pages, in all or from these NUMA nodes."""
        chosen = [node for node in self.nodes if node.id in nodes]
        if page_bytes != NORMAL_PAGES:
            return sum(part.hugepages.get(page_bytes, 0) for part in (chosen if nodes else [self]))
        if nodes:
            free = sum(node.memory_bytes - sum(node.hugepages.values()) for node in chosen)
            return int(free * self.overcommit)
        free = self.physical_bytes - sum(self.hugepages.values()) - self.reserve_bytes
        budget = int(max(0, free) * self.overcommit)
        return budget if self.limit_bytes is None else min(budget, self.limit_bytes)


def make_promise(
    uuid: str, name: str, live: Definition, *, default_page_bytes: int | None, resident_bytes: int | None = None
) -> Promise:
    """Return what a running VM may have: of each guest NUMA node what its memory is backed with."""
    parts = [(cell.id, cell.memory_bytes) for cell in live.cells] or [(0, live.boot_bytes)]
    backings = {(find_page_bytes(live, node, default_page_bytes), live.find_host_nodes(node)) for node, _ in parts}
    parts += [(device.node or 0, device.promised_bytes) for device in live.devices]
    total = sum(size for _, size in parts)
    ballooned = max(0, live.memory_bytes - live.current_bytes) if live.balloon else 0
    claims, left = [], ballooned
    for node, size in parts:
        # Which pages the balloon holds is not told: they are taken off the first part that has them.
        held = min(size, left)
        left -= held
        claims.append(Claim(find_page_bytes(live, node, default_page_bytes), live.find_host_nodes(node), size - held))
    claims.append(Claim(NORMAL_PAGES, frozenset(), estimate_overhead(total, live.vcpu_current)))
    return Promise(
        uuid=uuid,
        name=name,
        guest_bytes=total - ballooned,
        claims=tuple(claims),
        backing=backings.pop() if len(backings) == 1 else (NORMAL_PAGES, frozenset()),
        resident_bytes=resident_bytes,
    )


def find_target(totals: Iterable[Total], facts: Facts) -> int | None:
    """Return what the guest of a running VM may have once a goal is reached; None where it grows by nothing."""
    live = facts.domain.live
    if live is None:
        return None
    grown = 0
    for total in totals:
        if total.live is None or total.direction == "down":
            continue
        if total.resource == "memory":
            grown += max(0, total.live - live.memory_bytes)
        elif total.resource == "balloon":
            actual = live.current_bytes if facts.domain.balloon_bytes is None else facts.domain.balloon_bytes
            grown += max(0, total.live - actual)
    own = make_promise(facts.domain.uuid, facts.domain.name, live, default_page_bytes=None)
    return own.guest_bytes + grown if grown else None


def find_reserved(totals: Iterable[Total], facts: Facts) -> int:
    """Return what would be reserved of the host's memory for a goal: for the guest, and for QEMU's tables of it."""
    live, guest_bytes = facts.domain.live, find_target(totals, facts)
    if live is None or guest_bytes is None:
        return 0
    own = make_promise(facts.domain.uuid, facts.domain.name, live, default_page_bytes=facts.host.hugepage_bytes)
    return own.grown_to(guest_bytes).size_bytes - own.size_bytes


def find_page_bytes(live: Definition, node: int, default_page_bytes: int | None) -> int:
    """Return the size of the pages behind a guest NUMA node; 0 for normal ones."""
    size = live.find_hugepage_bytes(node)
    return NORMAL_PAGES if size is None else size or default_page_bytes or NORMAL_PAGES


def estimate_overhead(memory_bytes: int, vcpus: int) -> int:
    """Return what a QEMU needs beside its guest's memory; see the constants."""
    return _QEMU_BYTES + vcpus * _VCPU_BYTES + memory_bytes // _PAGE_TABLES


def measure_pool(
    capacity: HostCapacity, promises: Iterable[Promise], page_bytes: int, nodes: frozenset[int]
) -> MemoryPool:
    """Return how one kind of memory is promised. Of NUMA nodes only what VMs must have from there is counted."""
    shares = {}
    for promise in promises:
        size = sum(
            claim.size_bytes
            for claim in promise.claims
            if claim.page_bytes == page_bytes and (not nodes or (claim.nodes and claim.nodes <= nodes))
        )
        if size:
            shares[promise.uuid] = (size, promise.name)
    most = sorted(shares.values(), reverse=True)[:_NAMED]
    return MemoryPool(
        page_bytes=page_bytes,
        nodes=nodes,
        capacity_bytes=capacity.measure(page_bytes, nodes),
        promised_bytes=sum(size for size, _ in shares.values()),
        most=tuple((name, size) for size, name in most),
    )


def find_pools(capacity: HostCapacity, promises: Iterable[Promise], own: Promise) -> tuple[MemoryPool, ...]:
    """Return the pools that a VM's memory comes from: each kind of pages in all, and from the nodes it is bound to."""
    promises = tuple(promises)
    kinds = {(NORMAL_PAGES, frozenset[int]())}
    for claim in own.claims:
        kinds |= {(claim.page_bytes, frozenset[int]()), (claim.page_bytes, claim.nodes)}
    return tuple(
        measure_pool(capacity, promises, page_bytes, nodes)
        for page_bytes, nodes in sorted(kinds, key=lambda kind: (kind[0], sorted(kind[1])))
    )


def check_pool(pool: MemoryPool, added_bytes: int) -> AgentError | None:
    """Return why a pool cannot give so much more; None where it can."""
    if not added_bytes or pool.promised_bytes + added_bytes <= pool.capacity_bytes:
        return None
    kind = "normal memory" if pool.page_bytes == NORMAL_PAGES else f"hugepages of {format_size(pool.page_bytes)}"
    where = f" of host NUMA nodes {format_ids(pool.nodes)}" if pool.nodes else ""
    most = ", ".join(f"{name} {format_size(size)}" for name, size in pool.most)
    return AgentError(
        Code.HOST_MEMORY_PROMISED,
        f"{format_size(added_bytes)} more of {kind}{where} is requested; {format_size(pool.promised_bytes)} of "
        f"{format_size(pool.capacity_bytes)} is promised to running VMs and tasks"
        + (f", most to {most}" if most else ""),
        details={
            "capacity": pool.capacity_bytes,
            "promised": pool.promised_bytes,
            "requested": added_bytes,
            "most": [{"vm": name, "promised": size} for name, size in pool.most],
        },
    )
