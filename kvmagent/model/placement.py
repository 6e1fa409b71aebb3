"""Where QEMU puts the next dimm, and whether the guest can use it there: it can only at a multiple of its memory block.

Source: QEMU hw/mem/memory-device.c, memory_device_get_free_addr: the first gap that is large enough, from the start of
the region on; hw/i386/pc.c: the region begins at the next multiple of 1 GiB above 4 GiB and the boot memory that lies
there. Observed: behind an nvdimm of 258 MiB, or a virtio-mem device of 514 MiB, Linux takes no dimm ("unaligned
hotplug range"); libvirt and QEMU say nothing.
"""

from bisect import insort
from collections.abc import Iterator

from kvmagent.model.checks import block_bytes, blocker, find_changed, find_page_bytes
from kvmagent.model.command import Affect
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Facts, MemoryDevice
from kvmagent.model.reply import Blocker
from kvmagent.model.units import GIB, MIB, align_down, align_up, format_size

# What QEMU aligns memory to that is backed by normal pages. Source: QEMU include/qemu/osdep.h, QEMU_VMALLOC_ALIGN.
_ALIGNMENT_BYTES = 2 * MIB
# Boot memory that lies below 4 GiB: all of it up to the first, else the second. Source: QEMU pc_q35.c, pc_piix.c.
_LOW_BYTES = {"q35": (0xB0000000, 2 * GIB), "pc": (0xE0000000, 3 * GIB)}
# Where memory of an AMD VM goes on that would reach the addresses below 1 TiB which its IOMMU keeps.
_AMD_START_BYTES = 1024 * GIB
_OUTSIDE = frozenset({"sgx-epc"})

_Span = tuple[int, int, MemoryDevice | None]


def check_placement(facts: Facts, affect: Affect, sizes_bytes: tuple[int, ...], node: int | None) -> Iterator[Blocker]:
    """No device may be in the way by which the next dimms would come to lie where the guest cannot use them."""
    quantum, page = block_bytes(facts), find_page_bytes(facts, node or 0) or 0
    for name, definition in find_changed(facts.domain, affect):
        start, spans = find_spans(definition)
        for size in sizes_bytes:
            base, before = find_gap(start, spans, size, max(_ALIGNMENT_BYTES, page))
            if base % quantum and before is not None:
                yield blocker(
                    Code.MEMORY_DEVICE_MISALIGNED,
                    f"behind {before.alias or 'a device'} ({before.model}, {format_size(before.size_bytes)}) of the "
                    f"{name} definition the next dimm would not lie at a multiple of the guest's block of "
                    f"{format_size(quantum)}",
                )
                break
            _put(spans, (base, base + size, None))


def find_spans(definition: Definition) -> tuple[int, list[_Span]]:
    """Return where the region for devices begins, and what lies in it, in order.

    The place of a device that libvirt does not tell is where QEMU would have put it behind the others.
    """
    devices = [device for device in definition.devices if device.model not in _OUTSIDE]
    known = [device for device in devices if device.base is not None]
    start = _find_start(definition, [device.base or 0 for device in known])
    spans: list[_Span] = [(device.base or 0, (device.base or 0) + _extent(device), device) for device in known]
    spans.sort(key=_place)
    # Gaps only fill up: of devices alike, each next one lies behind the one before.
    lowest: dict[tuple[int, int], int] = {}
    for device in devices:
        if device.base is None:
            kind = _extent(device), max(_ALIGNMENT_BYTES, device.block_bytes or 0)
            base, _ = find_gap(lowest.get(kind, start), spans, *kind)
            lowest[kind] = base
            _put(spans, (base, base + _extent(device), device))
    return start, spans


def _find_start(definition: Definition, bases: list[int]) -> int:
    lowest = min(bases, default=None)
    machine = "q35" if "q35" in definition.machine else "pc"
    if definition.arch not in ("x86_64", "i686"):
        return 0 if lowest is None else align_down(lowest, GIB)
    most, low = _LOW_BYTES[machine]
    above = 0 if definition.boot_bytes < most else definition.boot_bytes - low
    start = align_up(4 * GIB + above, GIB)
    if lowest is not None and lowest >= _AMD_START_BYTES > start:
        start = align_up(_AMD_START_BYTES + above, GIB)
    return start if lowest is None else min(start, align_down(lowest, GIB))


def find_gap(start: int, spans: list[_Span], size: int, alignment: int) -> tuple[int, MemoryDevice | None]:
    """Return the place of a device of that size among spans in order, and which device lies right before it."""
    base, before = align_up(start, alignment), None
    for first, end, device in spans:
        if base + size <= first:
            break
        if end > base:
            base, before = align_up(end, alignment), device
    return base, before


def _put(spans: list[_Span], span: _Span) -> None:
    insort(spans, span, key=_place)


def _place(span: _Span) -> tuple[int, int]:
    return span[:2]


def _extent(device: MemoryDevice) -> int:
    """Return the guest addresses that a device takes: an nvdimm's labels have none."""
    return device.size_bytes - device.label_bytes
