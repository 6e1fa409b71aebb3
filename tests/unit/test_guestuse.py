"""A guest with much more movable memory than its kernel can bear is warned of, and no other."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.model.facts import Facts, Guest, GuestBlock, GuestOs
from kvmagent.model.guestuse import find_imbalance
from tests.unit.test_placement import BLOCK, MIB, device, make_facts

LINUX = GuestOs(name="Debian", family="linux", kernel=(6, 1))


def told(facts: Facts, os: GuestOs | None = LINUX) -> list[str]:
    return [f"{one.code}: {one.message}" for one in find_imbalance(facts, os)]


def test_what_exceeds_three_times_the_boot_memory_is_told_with_the_parameters_that_help() -> None:
    facts = make_facts(device("dimm", 1664, at_mib=0), boot_bytes=512 * MIB)
    assert told(facts) == [
        "GUEST_MEMORY_IMBALANCED: 1664 MiB of plugged memory may be movable, "
        "more than 3 times the 512 MiB of boot memory"
    ]
    remedy = find_imbalance(facts, LINUX)[0].remedy
    assert "memory_hotplug.online_policy=auto-movable memory_hotplug.auto_movable_ratio=301" in remedy


@pytest.mark.parametrize("family", ["windows", "freebsd"])
def test_other_systems_have_no_such_zones(family: str) -> None:
    facts = make_facts(device("dimm", 8192, at_mib=0))
    assert not told(facts, msgspec.convert({"name": "other", "family": family}, GuestOs))
    assert told(facts, GuestOs(name="unknown"))
    assert told(facts, None)


@given(plugged=st.integers(0, 40), requested=st.integers(0, 40), fixed=st.integers(0, 40), off=st.booleans())
def test_only_what_may_be_movable_counts(plugged: int, requested: int, fixed: int, off: bool) -> None:
    """dimms and what virtio-mem devices give; not what the guest has online and could not take offline."""
    devices = [device("dimm", 128 * plugged, at_mib=0)] if plugged else []
    shape = {"requested_bytes": requested * BLOCK, "current_bytes": requested * BLOCK, "block_bytes": 2 * MIB}
    devices += [device("virtio-mem", 128 * 40, at_mib=128 * 64, **shape)] if requested else []
    first = 4096 // 128
    blocks = tuple(
        GuestBlock(index=index, online=not off, can_offline=n >= fixed)
        for n, index in enumerate(range(first, first + plugged))
    )
    facts = make_facts(*devices, boot_bytes=512 * MIB)
    silent = msgspec.structs.replace(facts, guest=Guest())
    facts = msgspec.structs.replace(facts, guest=Guest(block_bytes=BLOCK, blocks=blocks))
    movable = plugged + requested - (0 if off else min(fixed, plugged))
    assert bool(told(facts)) == (movable > 12)
    assert bool(told(silent)) == (plugged + requested > 12)
