"""Memory that is bound to overlapping sets of host NUMA nodes: refused where, and only where, it has no place."""

import itertools
from collections.abc import Iterator
from random import Random

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvmagent.model.errors import AgentError
from kvmagent.model.hostbudget import NORMAL_PAGES, HostCapacity, NodeCapacity, Part, Promise, check_growth
from kvmagent.model.ledger import Ledger, find_pools
from kvmagent.model.units import GIB

Sizes = list[tuple[frozenset[int], int]]


def make_promise(number: int, sizes: Sizes, ballooned: int = 0) -> Promise:
    parts = tuple(Part(node, NORMAL_PAGES, nodes, size * GIB) for node, (nodes, size) in enumerate(sizes))
    return Promise(f"uuid{number}", f"vm{number}", parts, ballooned_bytes=ballooned * GIB)


def make_host(sizes: list[int]) -> HostCapacity:
    nodes = tuple(NodeCapacity(n, size * GIB) for n, size in enumerate(sizes))
    return HostCapacity(1 << 60, 0, 1.0, nodes=nodes)


def grow(own: Promise, added: list[int]) -> Promise:
    parts = (
        msgspec.structs.replace(part, size_bytes=part.size_bytes + size * GIB)
        for part, size in itertools.zip_longest(own.parts, added[: len(own.parts)], fillvalue=0)
    )
    return msgspec.structs.replace(own, parts=tuple(parts))


def find_short(capacity: HostCapacity, vms: list[Promise]) -> Iterator[frozenset[int]]:
    """All sets of nodes that are promised to more than they hold, each looked at."""
    ids = [node.id for node in capacity.nodes]
    for nodes in (frozenset(some) for n in ids for some in itertools.combinations(ids, n + 1)):
        if sum(vm.measure(NORMAL_PAGES, nodes) for vm in vms) > capacity.measure(NORMAL_PAGES, nodes)[0]:
            yield nodes


def is_refused(capacity: HostCapacity, vms: list[Promise], own: Promise, grown: Promise, most_sets: int) -> bool:
    ledger = Ledger()
    for vm in vms:
        ledger.put(vm)
    try:
        check_growth(find_pools(capacity, ledger, own, {}, most_sets=most_sets), own, grown)
    except AgentError:
        return True
    return False


parts = st.tuples(st.frozensets(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 6))


@settings(max_examples=300, deadline=None)
@given(
    host=st.lists(st.integers(4, 24), min_size=5, max_size=5),
    sizes=st.lists(st.lists(parts, min_size=1, max_size=3), min_size=1, max_size=8),
    added=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    ballooned=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=8, max_size=8),
)
def test_what_has_no_place_is_refused_and_nothing_else(
    host: list[int], sizes: list[Sizes], added: list[int], ballooned: list[int]
) -> None:
    """Which pages a balloon holds is not told: of a VM that is bound to several sets the least room is a bound."""
    capacity = make_host(host)
    vms = [make_promise(n, parts, ballooned[n] if n else 0) for n, parts in enumerate(sizes)]
    grown = grow(vms[0], added)
    assume(not any(find_short(capacity, vms)))
    is_short = any(find_short(capacity, [grown, *vms[1:]]))
    assert is_refused(capacity, vms, vms[0], grown, most_sets=1024) == is_short
    few = is_refused(capacity, vms, vms[0], grown, most_sets=0)
    is_exact = all(not vm.ballooned_bytes or len({part.host_nodes for part in vm.parts}) == 1 for vm in vms)
    assert few == is_short if is_exact else few >= is_short


def test_vms_that_are_bound_to_pairs_of_many_nodes_are_looked_at_in_few_sets() -> None:
    """All unions of them are tens of thousands."""
    choose = Random(7)
    ledger = Ledger()
    vms = [make_promise(n, [(frozenset(choose.sample(range(16), 2)), 4)]) for n in range(120)]
    for vm in vms:
        ledger.put(vm)
    pools = find_pools(make_host([48] * 16), ledger, vms[0], {})
    assert len(pools) <= 4
    assert sum(vm.measure(NORMAL_PAGES, frozenset(range(16))) for vm in vms) == 480 * GIB
