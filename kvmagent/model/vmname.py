"""How a VM may be named: by its domain's name, or by its UUID with or without dashes."""

_HEX = frozenset("0123456789abcdef")


def parse_uuid(vm: str) -> str | None:
    """Return the UUID that a VM is named by, lower case and without dashes; None where it is a name only."""
    bare = vm.replace("-", "").lower()
    return bare if len(bare) == 32 and _HEX.issuperset(bare) else None
