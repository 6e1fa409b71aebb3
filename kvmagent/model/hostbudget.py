"""The host's memory as a budget: its size, how much each running VM may use, and what is left. Pure.

    capacity    normal memory: (physical - hugepages - reserve) x overcommit, and no more than machine.slice may take
                hugepages of a size: all that the host has of them, but for those that others than VMs use
                host NUMA nodes: the same of these nodes, for VMs that are bound to them
                a cgroup with a limit: that, for the VMs below it
    promised    of each running VM: boot memory, dimms, virtio-mem requested, less what its balloon holds, and what QEMU
                itself needs; or what an accepted task is about to bring it to, whichever is more

What is free at the moment is no measure: memory that was plugged and not touched yet still counts as available there.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property

import msgspec

from kvmagent.model.command import Reservation, Total
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts, MemoryPool
from kvmagent.model.reclaim import Removable, find_removable, find_spare, find_ways
from kvmagent.model.units import MIB, format_ids, format_size

# What QEMU needs beside the guest's memory: its own code and buffers, for each vCPU a thread with its stack and KVM's
# structures, and page tables of 8 bytes for each 4 KiB page.
# Source: KubeVirt's estimate of a virt-launcher's overhead, GetMemoryOverhead: 8 MiB a vCPU, memory / 512; the fixed
# part is Observed: QEMU 7.2, q35, virtio devices, no display, not begun: 52 MiB resident, 57 with 16 vCPUs.
_QEMU_BYTES = 64 * MIB
_VCPU_BYTES = 8 * MIB
_PAGE_TABLES = 512
# How the cgroups of a VM end that libvirt itself puts limits on (virsh memtune).
_OF_LIBVIRT = ("/libvirt", ".libvirt-qemu")

#: Where a size of hugepages could stand.
NORMAL_PAGES = 0
ANYWHERE = frozenset[int]()
#: Why the VMs may have no more, where it is not what the host has that ends it.
SLICE_LIMIT = "the limit of machine.slice"


# A host of many VMs has thousands of these, and they refer to nothing that refers back: with gc=False the garbage
# collector does not go through them again and again.
class Claim(msgspec.Struct, frozen=True, gc=False):
    """A part of what a VM may have: from which host NUMA nodes (empty: any), in pages of which size (0: normal)."""

    page_bytes: int
    nodes: frozenset[int]
    size_bytes: int


class Part(msgspec.Struct, frozen=True, gc=False):
    """Memory of one guest NUMA node, what the balloon holds of it included, and what backs it."""

    node: int
    page_bytes: int
    host_nodes: frozenset[int]
    size_bytes: int


class Promise(msgspec.Struct, frozen=True, dict=True):
    """What one running VM may have: its guest's memory by node, what its balloon holds of that, its vCPUs.

    `cgroups` are those that it is in, by path below the host's, from the outermost. `resident_bytes` is what its QEMU
    has now, `spare_bytes` what its guest could do without of what it does not use, of what could leave (`removable`);
    None: not told.
    """

    uuid: str
    name: str
    parts: tuple[Part, ...]
    ballooned_bytes: int = 0
    vcpus: int = 0
    removable: Removable = Removable()
    cgroups: tuple[str, ...] = ()
    resident_bytes: int | None = None
    spare_bytes: int | None = None

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """What it may take of the host, by kind, its balloon left out; QEMU's own is normal memory from anywhere."""
        claims = (Claim(part.page_bytes, part.host_nodes, part.size_bytes) for part in self.parts)
        return (*claims, Claim(NORMAL_PAGES, ANYWHERE, estimate_overhead(self._parts_bytes, self.vcpus)))

    @cached_property
    def _parts_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    def measure(self, page_bytes: int, nodes: frozenset[int]) -> int:
        """Return what may come from pages of a size, of these host NUMA nodes and from nowhere else (empty: any).

        Which pages the balloon holds is not told: what may be of other kinds is none of these.
        """
        inside = sum(
            claim.size_bytes
            for claim in self.claims
            if claim.page_bytes == page_bytes and (not nodes or (claim.nodes and claim.nodes <= nodes))
        )
        if not self.ballooned_bytes:
            return inside
        own = self.claims[-1].size_bytes if page_bytes == NORMAL_PAGES and not nodes else 0
        outside = self._parts_bytes - (inside - own)
        return inside - min(inside - own, max(0, self.ballooned_bytes - outside))

    @property
    def size_bytes(self) -> int:
        """All that the VM may have, of whatever kind."""
        return sum(claim.size_bytes for claim in self.claims) - min(self.ballooned_bytes, self._parts_bytes)

    @property
    def node_bytes(self) -> dict[int, int]:
        """The memory of each guest NUMA node."""
        sizes: dict[int, int] = {}
        for part in self.parts:
            sizes[part.node] = sizes.get(part.node, 0) + part.size_bytes
        return sizes

    @cached_property
    def idle_bytes(self) -> int:
        """What of it could come back, by the one means that gives most; 0 where nothing is known."""
        spare = self.spare_bytes
        if spare is None and self.resident_bytes is not None and not any(part.page_bytes for part in self.parts):
            # Its guest tells nothing: what its QEMU never touched, nobody uses. Hugepages are not counted as resident.
            has = self._parts_bytes - self.ballooned_bytes
            spare = find_spare(has, has - self.resident_bytes)
        return max((way.size for way in find_ways(self.removable, spare or 0)), default=0)

    def grown_to(self, reservation: Reservation) -> "Promise":
        """Return the promise of a VM that a task brings there; no less than it may have already."""
        sizes = self.node_bytes
        # What is added is backed as its guest node is, not as a device that has pages of its own.
        backings = {part.node: part for part in reversed(self.parts)}
        added = tuple(
            msgspec.structs.replace(
                backings.get(node, Part(node, NORMAL_PAGES, ANYWHERE, 0)), size_bytes=size - sizes.get(node, 0)
            )
            for node, size in sorted(reservation.node_bytes.items())
            if size > sizes.get(node, 0)
        )
        return msgspec.structs.replace(
            self,
            parts=self.parts + added,
            ballooned_bytes=min(self.ballooned_bytes, reservation.ballooned_bytes),
            vcpus=max(self.vcpus, reservation.vcpus),
        )


class NodeCapacity(msgspec.Struct, frozen=True):
    """One NUMA node of the host: its memory, and all its hugepages as bytes by their size."""

    id: int
    memory_bytes: int
    hugepages: dict[int, int] = {}


class HostCapacity(msgspec.Struct, frozen=True):
    """What the host has. `limit_bytes` is what machine.slice, the cgroup of all VMs, may take; None: no limit.

    Of `hugepages`, all of a size as bytes, `taken` are in use or reserved by whoever it is, `foreign` by others than
    VMs.
    """

    physical_bytes: int
    reserve_bytes: int
    overcommit: float
    default_page_bytes: int | None = None
    hugepages: dict[int, int] = {}
    taken: dict[int, int] = {}
    foreign: dict[int, int] = {}
    nodes: tuple[NodeCapacity, ...] = ()
    limit_bytes: int | None = None

    def measure(self, page_bytes: int, nodes: frozenset[int]) -> tuple[int, str]:
        """Return the bytes that may be promised of one kind of pages, in all or from these NUMA nodes, and why."""
        chosen = [node for node in self.nodes if node.id in nodes]
        if page_bytes != NORMAL_PAGES:
            size = sum(part.hugepages.get(page_bytes, 0) for part in (chosen if nodes else [self]))
            foreign = 0 if nodes else self.foreign.get(page_bytes, 0)
            others = f" - {format_size(foreign)} that others use" if foreign else ""
            return max(0, size - foreign), f"{format_size(size)} of such pages{others}"
        if nodes:
            memory, pages = (
                sum(node.memory_bytes for node in chosen),
                sum(sum(node.hugepages.values()) for node in chosen),
            )
            return int(max(0, memory - pages) * self.overcommit), self._explain(memory, pages, 0)
        pages = sum(self.hugepages.values())
        budget = int(max(0, self.physical_bytes - pages - self.reserve_bytes) * self.overcommit)
        if self.limit_bytes is not None and self.limit_bytes < budget:
            return self.limit_bytes, SLICE_LIMIT
        return budget, self._explain(self.physical_bytes, pages, self.reserve_bytes)

    def _explain(self, memory_bytes: int, pages_bytes: int, reserve_bytes: int) -> str:
        words = f"{format_size(memory_bytes)} physical"
        words += f" - {format_size(pages_bytes)} in hugepages" if pages_bytes else ""
        words += f" - {format_size(reserve_bytes)} reserve" if reserve_bytes else ""
        return f"({words}) x {self.overcommit}"

    def without_others(self, of_vms: Callable[[int], int]) -> "HostCapacity":
        """Return it with the hugepages that others than VMs use, which have so many bytes in pages of a size."""
        foreign = {size: max(0, taken - of_vms(size)) for size, taken in self.taken.items()}
        return msgspec.structs.replace(self, foreign=foreign)


def make_promise(uuid: str, name: str, live: Definition, *, default_page_bytes: int | None) -> Promise:
    """Return what a running VM may have: of each guest NUMA node what its memory is backed with."""
    boot = [(cell.id, cell.memory_bytes) for cell in live.cells] or [(0, live.boot_bytes)]
    nodes = {node for node, _ in boot} | {device.node or 0 for device in live.devices}
    backings = {node: (find_page_bytes(live, node, default_page_bytes), live.find_host_nodes(node)) for node in nodes}
    # One part for all that is backed alike: a VM may have hundreds of dimms, and each look at the host counts parts.
    sizes = Counter[tuple[int, int, frozenset[int]]]()
    for node, size_bytes in boot:
        sizes[node, *backings[node]] += size_bytes
    for device in live.devices:
        node = device.node or 0
        page_bytes, host_nodes = backings[node]
        page_bytes = page_bytes if device.page_bytes is None else device.page_bytes
        sizes[node, page_bytes, device.host_nodes or host_nodes] += device.promised_bytes
    return Promise(
        uuid=uuid,
        name=name,
        parts=tuple(Part(*kind, size_bytes) for kind, size_bytes in sizes.items()),
        ballooned_bytes=max(0, live.memory_bytes - live.current_bytes) if live.balloon_gives_back else 0,
        vcpus=live.vcpu_current,
        removable=find_removable(live),
    )


def find_reservation(totals: Iterable[Total], facts: Facts) -> Reservation | None:
    """Return what of the host's memory a goal may bring a running VM to; None where it grows by nothing."""
    live = facts.domain.live
    if live is None:
        return None
    own = make_promise(facts.domain.uuid, facts.domain.name, live, default_page_bytes=None)
    sizes, ballooned, vcpus = own.node_bytes, own.ballooned_bytes, own.vcpus
    # Requested of virtio-mem devices and not given by their guests: promised already, and no part of the total.
    pending = sum(device.promised_bytes - device.plugged_bytes for device in live.devices)
    for total in totals:
        if total.live is None or total.direction == "down":
            continue
        if total.resource == "cpu":
            vcpus = max(vcpus, total.live)
        elif total.resource == "memory":
            for node, size in total.gains.items():
                sizes[node] = sizes.get(node, 0) + size
            # What a plugin does not say the place of goes to the first node.
            unplaced = total.live - live.memory_bytes - pending - sum(total.gains.values())
            sizes[min(sizes)] += max(0, unplaced)
        else:
            # The balloon's total has the dimms of the same task in it: where it has, less is held.
            ballooned = min(ballooned, max(0, live.balloon_total_bytes - total.live))
    found = Reservation(node_bytes=sizes, ballooned_bytes=ballooned, vcpus=vcpus)
    return None if own.grown_to(found) == own else found


def find_reserved(totals: Iterable[Total], facts: Facts) -> int:
    """Return what would be reserved of the host's memory for a goal, QEMU's own needs included."""
    live, reservation = facts.domain.live, find_reservation(totals, facts)
    if live is None or reservation is None:
        return 0
    own = make_promise(facts.domain.uuid, facts.domain.name, live, default_page_bytes=facts.host.hugepage_bytes)
    return own.grown_to(reservation).size_bytes - own.size_bytes


def find_page_bytes(live: Definition, node: int, default_page_bytes: int | None) -> int:
    """Return the size of the pages behind a guest NUMA node; 0 for normal ones."""
    size = live.find_hugepage_bytes(node)
    return NORMAL_PAGES if size is None else size or default_page_bytes or NORMAL_PAGES


def estimate_overhead(memory_bytes: int, vcpus: int) -> int:
    """Return what a QEMU needs beside its guest's memory; see the constants."""
    return _QEMU_BYTES + vcpus * _VCPU_BYTES + memory_bytes // _PAGE_TABLES


def refuse_growth(totals: Iterable[Total], facts: Facts) -> None:
    """Refuse what a goal would promise a running VM above what the observed host has left.

    Raises:
        AgentError: HOST_MEMORY_PROMISED; MEMORY_HARD_LIMIT of a cgroup's limit.
    """
    live, reservation = facts.domain.live, find_reservation(totals, facts)
    if live is not None and reservation is not None and facts.host.pools:
        page_bytes = facts.host.hugepage_bytes
        own = make_promise(facts.domain.uuid, facts.domain.name, live, default_page_bytes=page_bytes)
        check_growth(facts.host.pools, own, own.grown_to(reservation))


def foresee_restart(facts: Facts, config: Definition | None = None) -> Facts:
    """Return what would be so after a power cycle, the host's memory included: the VM then has what it is started with.

    `config` is what the persistent definition would be by then; None: what it is.
    """
    then, now = facts.after_restart(config), facts.domain.live or facts.domain.config
    if now is None or then.domain.live is None:
        return then
    before, after = (
        make_promise(facts.domain.uuid, facts.domain.name, one, default_page_bytes=facts.host.hugepage_bytes)
        for one in (now, then.domain.live)
    )
    pools = tuple(
        msgspec.structs.replace(
            pool,
            promised_bytes=pool.promised_bytes + _find_added(pool, before, after),
        )
        for pool in facts.host.pools
    )
    return msgspec.structs.replace(then, host=msgspec.structs.replace(then.host, pools=pools))


def check_growth(pools: Iterable[MemoryPool], own: Promise, grown: Promise) -> None:
    """Refuse what these pools cannot give to one VM.

    Raises:
        AgentError: HOST_MEMORY_PROMISED; MEMORY_HARD_LIMIT of a cgroup's limit.
    """
    for pool in pools:
        added = _find_added(pool, own, grown)
        if added > 0 and pool.promised_bytes + added > pool.capacity_bytes:
            raise _refuse(pool, added)


def _find_added(pool: MemoryPool, before: Promise, after: Promise) -> int:
    """Return how much more of a pool a VM takes afterwards."""
    return after.measure(pool.page_bytes, pool.nodes) - before.measure(pool.page_bytes, pool.nodes)


def _refuse(pool: MemoryPool, added_bytes: int) -> AgentError:
    """Return the refusal with the sums: asked, promised, to whom, what of, and who could give some back."""
    kind = "normal memory" if pool.page_bytes == NORMAL_PAGES else f"hugepages of {format_size(pool.page_bytes)}"
    where = f" of host NUMA nodes {format_ids(pool.nodes)}" if pool.nodes else ""
    where = f" in cgroup {pool.cgroup}" if pool.cgroup else where
    most, idle = (
        ", ".join(f"{name} {format_size(size)}" for name, size in shares) for shares in (pool.most, pool.idle)
    )
    return AgentError(
        Code.MEMORY_HARD_LIMIT if pool.cgroup else Code.HOST_MEMORY_PROMISED,
        f"{format_size(added_bytes)} more of {kind}{where} is requested; {format_size(pool.promised_bytes)} of "
        f"{format_size(pool.capacity_bytes)} is promised to running VMs and tasks"
        + (f", most to {most}" if most else "")
        + (f", above the budget since {pool.over_since}" if pool.over_since else "")
        + f"; {format_size(pool.capacity_bytes)} is {pool.made_of}; "
        + (f"guests could give back: {idle}" if idle else "no guest is known to have any to give back"),
        remedy=_find_remedy(pool),
        details={
            "capacity": pool.capacity_bytes,
            "capacityFrom": pool.made_of,
            "promised": pool.promised_bytes,
            "requested": added_bytes,
            "most": [{"vm": name, "promised": size} for name, size in pool.most],
            "reclaimable": [{"vm": name, "size": size} for name, size in pool.idle],
            "overSince": pool.over_since or None,
        },
    )


def _find_remedy(pool: MemoryPool) -> str | None:
    """Return what helps where the code's own remedy does not: the ratio raises neither limits nor hugepages."""
    back = "Unplug memory from an idle VM (kvmagentctl reclaim --dry-run shows candidates), migrate one away, or "
    if pool.cgroup.endswith(_OF_LIBVIRT):
        return None
    if pool.cgroup:
        return "Raise the limit of that cgroup (systemctl set-property UNIT MemoryMax=SIZE), or remove it."
    if pool.page_bytes != NORMAL_PAGES:
        return f"{back}reserve more hugepages of that size on the host (vm.nr_hugepages)."
    if pool.made_of == SLICE_LIMIT:
        return f"{back}raise that limit (systemctl set-property machine.slice MemoryMax=SIZE)."
    return None
