"""Sizes: every size inside the agent is a count of bytes; libvirt's KiB exist in hypervisor/ alone."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def align_up(size_bytes: int, quantum_bytes: int) -> int:
    """Return the smallest multiple of `quantum_bytes` that is not below `size_bytes`."""
    return -(-size_bytes // quantum_bytes) * quantum_bytes


def align_down(size_bytes: int, quantum_bytes: int) -> int:
    """Return the largest multiple of `quantum_bytes` that is not above `size_bytes`."""
    return size_bytes // quantum_bytes * quantum_bytes


def format_size(size_bytes: int) -> str:
    """Return a size for people: exact where four digits of a unit say it, else with one decimal.

    `format_size(536870912)` is "512 MiB"; `format_size(428752896)` is "408.9 MiB".
    """
    for unit, name in ((1024 * GIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0 and size_bytes < 10000 * unit:
            return f"{size_bytes // unit} {name}"
    for unit, name in ((1024 * GIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} B"


def format_ids(ids: "frozenset[int] | tuple[int, ...]") -> str:
    """Return ids as the kernel writes them: `{0, 1, 2, 5}` is "0-2,5"."""
    spans: list[list[int]] = []
    for number in sorted(ids):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
