"""Files in which the kernel describes itself and processes: /proc and /sys. What cannot be read is None.

Source: proc(5).
"""

import os
import re
from pathlib import Path

from kvmagent.model.units import KIB

# The line of a size; a NUMA node's file has "Node N" in front of each name.
_SIZE = re.compile(r"^(?:Node \d+ )?([^\s:]+):[ \t]+(\d+) kB$", re.MULTILINE)


def read_text(path: str | Path) -> str | None:
    """Return a file's text without the space around it."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return None


def list_names(directory: str | Path) -> list[str]:
    """Return the names of what is in a directory; none where it cannot be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


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


def read_sizes(path: str | Path) -> dict[str, int]:
    """Return the sizes of a meminfo file in bytes."""
    return {name: int(size_kib) * KIB for name, size_kib in _SIZE.findall(read_text(path) or "")}
