"""Sizes: every size inside the agent is in bytes; libvirt's KiB exist only in hypervisor/."""

import re
from collections.abc import Callable
from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_SIZE = re.compile(r"(?P<amount>[0-9]+(?:\.[0-9]+)?) ?(?:(?P<unit>[KMGT])(?:i?b)?|b)", re.IGNORECASE)


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


def parse_size(text: str) -> int:
    """Return the bytes of a size as people write it; `format_size` gives such. Units are powers of 1024 alone.

    `parse_size("4G")`, `parse_size("4GiB")` and `parse_size("4096 MiB")` are the same.

    Raises:
        ValueError: no size; the message says why, and what would be one.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None and text.strip().isdecimal():
        raise ValueError(f"{text.strip()} has no unit: write {text.strip()}M for MiB, or {text.strip()}B for bytes")
    if found is None:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, as in 4G, 1.5GiB or 512MiB")
    whole, _, part = found["amount"].partition(".")
    unit_bytes = _UNITS[(found["unit"] or "").upper()]
    divisor: int = 10 ** len(part)
    size_bytes, rest = divmod(int(whole + part) * unit_bytes, divisor)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return size_bytes


class Amount(NamedTuple):
    """An amount, or how many times what there is."""

    number: int
    is_factor: bool = False

    def of(self, has: int) -> int:
        """Return the amount, of one that has so much."""
        return self.number * has if self.is_factor else self.number


def parse_amount(text: str, parse: Callable[[str], int]) -> Amount:
    """Return an amount as people write it: x4 is four times what there is, anything else is what `parse` makes of it.

    Raises:
        ValueError: it is neither.
    """
    if text[:1] in ("x", "X") and text[1:].isdecimal() and int(text[1:]) > 0:
        return Amount(int(text[1:]), is_factor=True)
    return Amount(parse(text))


def parse_count(text: str) -> int:
    """Return a number of 1 or more.

    Raises:
        ValueError: it is none.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text.strip()!r} is not a whole number of 1 or more")
    return int(text)


def format_ids(ids: "frozenset[int] | tuple[int, ...]") -> str:
    """Return ids as the kernel writes them: `{0, 1, 2, 5}` is "0-2,5"."""
    spans: list[list[int]] = []
    for number in sorted(ids):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
