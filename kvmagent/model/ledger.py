"""Sums up by pool what running VMs may use: a change and a look at a pool cost the same however many VMs run.

Pure. Not thread-safe.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, ValuesView

import msgspec

from kvmagent.model.facts import MemoryPool
from kvmagent.model.hostbudget import ANYWHERE, NORMAL_PAGES, Claim, HostCapacity, Promise

# How many of the VMs that have most, and of those that could do without some, are named in a refusal.
_NAMED = 3

# So many sets of host NUMA nodes that overlap are all looked at.
_MOST_SETS = 64

# Bytes, name and UUID of a VM.
_Share = tuple[int, str, str]


class _Tally:
    """One pool: what is promised of it, to whom, and who could give how much of it back; both lists in order."""

    def __init__(self, page_bytes: int, nodes: frozenset[int], promises: Iterable[Promise]) -> None:
        self._page_bytes = page_bytes
        self._nodes = nodes
        self.promised_bytes = 0
        self.most: list[_Share] = []
        self.idle: list[_Share] = []
        for promise in promises:
            self.add(promise)

    def add(self, promise: Promise) -> None:
        share, idle = self._find_shares(promise)
        self.promised_bytes += share[0]
        insort(self.most, share)
        insort(self.idle, idle)

    def remove(self, promise: Promise) -> None:
        share, idle = self._find_shares(promise)
        self.promised_bytes -= share[0]
        del self.most[bisect_left(self.most, share)]
        del self.idle[bisect_left(self.idle, idle)]

    def _find_shares(self, promise: Promise) -> tuple[_Share, _Share]:
        size = promise.measure(self._page_bytes, self._nodes)
        return (size, promise.name, promise.uuid), (min(size, promise.idle_bytes), promise.name, promise.uuid)


class Ledger:
    """One promise of each running VM, by UUID."""

    def __init__(self) -> None:
        self._promises: dict[str, Promise] = {}
        # How many claims there are of each kind, and what is promised of each size of pages.
        self._kinds: Counter[tuple[int, frozenset[int]]] = Counter()
        self._sums: Counter[int] = Counter()
        self._members: dict[str, set[str]] = {}
        # By pages, nodes and cgroup; each from the first time that it is asked for.
        self._tallies: dict[tuple[int, frozenset[int], str], _Tally] = {}

    def get(self, uuid: str) -> Promise | None:
        """Return what a VM may have; None for one that does not run."""
        return self._promises.get(uuid)

    def promises(self) -> ValuesView[Promise]:
        """Return what each VM may have."""
        return self._promises.values()

    def put(self, promise: Promise) -> None:
        """Have a VM with this from now on."""
        if self._promises.get(promise.uuid) == promise:
            return
        self.remove(promise.uuid)
        self._promises[promise.uuid] = promise
        self._count(promise, 1)
        for cgroup in promise.cgroups:
            self._members.setdefault(cgroup, set()).add(promise.uuid)
        for tally in self._find_tallies(promise):
            tally.add(promise)

    def remove(self, uuid: str) -> None:
        """Have a VM no more, if there is one."""
        promise = self._promises.pop(uuid, None)
        if promise is None:
            return
        self._count(promise, -1)
        for tally in self._find_tallies(promise):
            tally.remove(promise)
        for cgroup in promise.cgroups:
            self._members[cgroup].discard(uuid)
            if not self._members[cgroup]:
                del self._members[cgroup]
                self._tallies = {key: tally for key, tally in self._tallies.items() if key[2] != cgroup}

    def sum_pages(self, page_bytes: int) -> int:
        """Return what is promised of pages of a size, wherever they come from."""
        return self._sums[page_bytes]

    def find_node_sets(self, page_bytes: int) -> set[frozenset[int]]:
        """Return the sets of host NUMA nodes that memory of such pages is bound to, the empty one included."""
        return {nodes for pages, nodes in self._kinds if pages == page_bytes}

    def count(self, pool: MemoryPool, asking: str) -> MemoryPool:
        """Return a pool with what is promised of it; see `measure_pool` for `asking`."""
        key = pool.page_bytes, pool.nodes, pool.cgroup
        tally = self._tallies.get(key)
        if tally is None:
            members = self._members.get(pool.cgroup, ()) if pool.cgroup else self._promises
            tally = _Tally(pool.page_bytes, pool.nodes, (self._promises[uuid] for uuid in members))
            self._tallies[key] = tally
        idle = [share for share in tally.idle[: -_NAMED - 2 : -1] if share[2] != asking]
        return msgspec.structs.replace(
            pool,
            promised_bytes=tally.promised_bytes,
            most=_name(tally.most[: -_NAMED - 1 : -1]),
            idle=_name(idle[:_NAMED]),
        )

    def _count(self, promise: Promise, sign: int) -> None:
        for claim in promise.claims:
            kind = claim.page_bytes, claim.nodes
            self._kinds[kind] += sign
            if not self._kinds[kind]:
                del self._kinds[kind]
        for page_bytes in {claim.page_bytes for claim in promise.claims}:
            self._sums[page_bytes] += sign * promise.measure(page_bytes, ANYWHERE)

    def _find_tallies(self, promise: Promise) -> list[_Tally]:
        """Return the tallies that a VM is in: those of a cgroup are no other VM's affair."""
        return [tally for (_, _, cgroup), tally in self._tallies.items() if not cgroup or cgroup in promise.cgroups]


def measure_pool(
    capacity: HostCapacity, ledger: Ledger, page_bytes: int, nodes: frozenset[int], asking: str = ""
) -> MemoryPool:
    """Return how one kind of memory is promised. Of NUMA nodes only what VMs must have from there is counted.

    `asking` is the UUID of the VM that wants more: it is not named as one that could give some back.
    """
    size, made_of = capacity.measure(page_bytes, nodes)
    return ledger.count(MemoryPool(page_bytes, nodes, size, 0, made_of=made_of), asking)


def find_pools(
    capacity: HostCapacity, ledger: Ledger, own: Promise, limits: dict[str, int], *, most_sets: int = _MOST_SETS
) -> tuple[MemoryPool, ...]:
    """Return the pools that a VM's memory comes from.

    Each kind of pages in all, and from the nodes that it is bound to, alone and together with others that VMs share
    with these: what is bound to two nodes may fill the one. `limits` are those of cgroups.
    From more than `most_sets` sets of nodes it is those with the least room.
    """
    kinds: dict[tuple[int, frozenset[int]], int] = {(NORMAL_PAGES, ANYWHERE): 0}
    for claim in own.claims:
        found = {ANYWHERE: 0} | (_widen(claim, own, capacity, ledger, most_sets) if claim.nodes else {})
        for nodes, at_least in found.items():
            kind = claim.page_bytes, nodes
            kinds[kind] = max(at_least, kinds.get(kind, 0))
    pools = []
    for page_bytes, nodes in sorted(kinds, key=lambda kind: (kind[0], sorted(kind[1]))):
        pool = measure_pool(capacity, ledger, page_bytes, nodes, own.uuid)
        promised = max(pool.promised_bytes, kinds[page_bytes, nodes])
        pools.append(msgspec.structs.replace(pool, promised_bytes=promised))
    for cgroup in (one for one in own.cgroups if one in limits):
        pool = MemoryPool(NORMAL_PAGES, ANYWHERE, limits[cgroup], 0, cgroup=cgroup, made_of="its memory.max")
        pools.append(ledger.count(pool, own.uuid))
    return tuple(pools)


def _widen(
    claim: Claim, own: Promise, capacity: HostCapacity, ledger: Ledger, most_sets: int
) -> dict[frozenset[int], int]:
    """Return the sets of nodes in which a claim can be short of room, and what is promised of each at least.

    That is its own, and those that overlap with it; where these are too many, those with the least room.
    Source: Hall's theorem: each VM has its place if no set of nodes is promised to more than it holds.
    """
    found = {claim.nodes}
    for other in sorted(ledger.find_node_sets(claim.page_bytes), key=sorted):
        found |= {nodes | other for nodes in found if nodes & other}
        if len(found) > most_sets:
            break
    else:
        return dict.fromkeys(found, 0)
    # The VM may grow by others of its claims at the same time.
    unions, bound = {claim.nodes}, {one.nodes for one in own.claims if one.page_bytes == claim.page_bytes and one.nodes}
    for other in sorted(bound, key=sorted):
        unions |= {nodes | other for nodes in unions}
        if len(unions) > _MOST_SETS:
            unions = {claim.nodes, frozenset().union(*bound)}
            break
    demands = _sum_demands(claim, ledger)
    tightest = (_find_tightest(nodes, claim.page_bytes, capacity, demands) for nodes in unions)
    sums = {nodes: sum(size for kind, size in demands.items() if kind <= nodes) for nodes in tightest}
    return dict.fromkeys(unions, 0) | sums


def _sum_demands(claim: Claim, ledger: Ledger) -> Counter[frozenset[int]]:
    """Return what is promised of each set of nodes alone, of those that overlap with a claim's or with such a set.

    Of a VM that is bound to several, its balloon may hold what is of another: each counts with the most that it can be.
    """
    near, kinds = claim.nodes, ledger.find_node_sets(claim.page_bytes)
    while (wider := near.union(*(nodes for nodes in kinds if nodes & near))) != near:
        near = wider
    demands: Counter[frozenset[int]] = Counter()
    for promise in ledger.promises():
        sizes: Counter[frozenset[int]] = Counter()
        for one in promise.claims:
            if one.page_bytes == claim.page_bytes and one.nodes & near:
                sizes[one.nodes] += one.size_bytes
        most = promise.size_bytes - promise.claims[-1].size_bytes
        demands.update({nodes: min(size, most) for nodes, size in sizes.items()})
    return demands


def _find_tightest(
    own: frozenset[int], page_bytes: int, capacity: HostCapacity, demands: Counter[frozenset[int]]
) -> frozenset[int]:
    """Return of all sets with these nodes in them the one with the least room.

    A maximum flow: what is bound to nodes outside is put there, and moved on to others of its own where a node is full.
    Where something finds no place, all nodes that could be made free for it are full, and belong to the set.
    """
    outside = frozenset[int]().union(*demands) - own
    room = {node: capacity.measure(page_bytes, frozenset({node}))[0] for node in outside}
    placed: dict[int, Counter[frozenset[int]]] = {node: Counter() for node in outside}
    tight = own
    for kind, size in demands.items():
        left = size if kind - own else 0
        while left:
            # Each node with what would be moved to it, and from where.
            reached: dict[int, tuple[int, frozenset[int]] | None] = dict.fromkeys(kind - own)
            queue = list(reached)
            for node in queue:
                if room[node]:
                    break
                for other in +placed[node]:
                    new = other - own - set(reached)
                    reached |= dict.fromkeys(new, (node, other))
                    queue += new
            else:
                tight |= set(reached)
                break
            moves, amount, last = list[tuple[int, int, frozenset[int]]](), min(left, room[node]), node
            while (move := reached[node]) is not None:
                moves.append((node, *move))
                node, amount = move[0], min(amount, placed[move[0]][move[1]])
            room[last] -= amount
            for to, origin, other in moves:
                placed[origin][other] -= amount
                placed[to][other] += amount
            placed[node][kind] += amount
            left -= amount
    return tight


def _name(shares: Iterable[_Share]) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for size, name, _ in shares if size)
