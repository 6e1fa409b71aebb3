"""VM names: a domain's name, or its UUID with or without dashes."""

from typing import NamedTuple

_HEX = frozenset("0123456789abcdef")


class VmId(NamedTuple):
    """One VM: its UUID as libvirt writes it, and its name."""

    uuid: str
    name: str


def parse_uuid(vm: str) -> str | None:
    """Return the UUID that a VM is named by, lower case and without dashes; None where it is a name only."""
    bare = vm.replace("-", "").lower()
    return bare if len(bare) == 32 and _HEX.issuperset(bare) else None


def dashed_uuid(vm: str) -> str | None:
    """Return the UUID that a VM is named by as libvirt writes it, with dashes; None where it is a name only."""
    bare = parse_uuid(vm)
    return None if bare is None else "-".join((bare[:8], bare[8:12], bare[12:16], bare[16:20], bare[20:]))
