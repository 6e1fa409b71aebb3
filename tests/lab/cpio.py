"""Owns the archive format of an initramfs. Writes only, and knows nothing of what is in it."""

from __future__ import annotations

import io
import stat
from pathlib import Path


class Archive:
    """A cpio archive of the kind that the kernel unpacks ("newc"), in memory; all in it belongs to root.

    Directories on the way to a name are added by themselves.
    Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux 6.1.
    """

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._directories: set[str] = set()
        self._number = 0

    def add_directory(self, name: str) -> None:
        """Add a directory, once."""
        if name not in self._directories:
            self._directories.add(name)
            self._add(name, stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes, *, mode: int) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, content)

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive. Nothing may be added after it."""
        self._write("TRAILER!!!", mode=0)
        return self._out.getvalue()

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        for parent in reversed(Path(name).parents[:-1]):
            self.add_directory(str(parent))
        self._write(name, mode, content, device)

    def _write(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._number += 1
        encoded = name.encode() + b"\0"
        owner, links, time, check = (0, 0), 1, 0, 0
        fields = (self._number, mode, *owner, links, time, len(content), 0, 0, *device, len(encoded), check)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields))
        for part in (encoded, content):
            self._out.write(part)
            self._out.write(b"\0" * (-self._out.tell() % 4))
