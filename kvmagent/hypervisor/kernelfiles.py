"""Files of /proc and /sys, in which the kernel describes itself and processes. None stands for an unreadable one.

`read_certain` and `list_certain` are for what must not be taken for nothing: of what is there and cannot be read now,
for want of a descriptor for example, they raise an AgentError.

Source: proc(5).
"""

import errno
import os
import re
from pathlib import Path

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.units import KIB

# The line of a size; a NUMA node's file has "Node N" in front of each name.
_SIZE = re.compile(r"^(?:Node \d+ )?([^\s:]+):[ \t]+(\d+) kB$", re.MULTILINE)


# What says nothing of the file: it may be there and readable a moment later.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def read_text(path: str | Path) -> str | None:
    """Return a file's text without the space around it."""
    try:
        return _read(path)
    except OSError:
        return None


def read_certain(path: str | Path) -> str | None:
    """Return a file's text without the space around it.

    Raises:
        AgentError: INTERNAL_ERROR.
    """
    try:
        return _read(path)
    except OSError as error:
        _check_passing(error)
        return None


def list_certain(directory: str | Path) -> list[str]:
    """Return the names of what is in a directory; none where there is no such directory.

    Raises:
        AgentError: INTERNAL_ERROR.
    """
    try:
        return os.listdir(directory)
    except OSError as error:
        _check_passing(error)
        return []


def _read(path: str | Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return file.read().decode(errors="replace").strip()


def _check_passing(error: OSError) -> None:
    if error.errno in _PASSING:
        raise AgentError(Code.INTERNAL_ERROR, f"/proc or /sys cannot be read: {error}", expected=False) from error


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
    return parse_sizes(read_text(path))


def parse_sizes(text: str | None) -> dict[str, int]:
    """Return the sizes that a meminfo file's text has, in bytes."""
    return {name: int(size_kib) * KIB for name, size_kib in _SIZE.findall(text or "")}
