"""Files in which the kernel describes itself and processes: /proc and /sys. What cannot be read is None.

Source: proc(5).
"""

from pathlib import Path

from kvmagent.model.units import KIB


def read_text(path: Path) -> str | None:
    """Return a file's text without the space around it."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_fields(path: Path) -> dict[str, str]:
    """Return the first value of each "name: value" line."""
    fields: dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def read_lines(path: Path) -> dict[str, str]:
    """Return the first value of each "name value" line."""
    lines: dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        lines.setdefault(name, value.strip())
    return lines


def read_sizes(path: Path) -> dict[str, int]:
    """Return the sizes of a meminfo file in bytes; a NUMA node's has "Node N" in front of each name."""
    fields = {name.split()[-1]: value for name, value in read_fields(path).items() if name}
    return {name: int(value.split()[0]) * KIB for name, value in fields.items() if value.endswith(" kB")}
