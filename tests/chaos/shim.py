"""Owns the library that stands between an agent and its kernel: built here, told by a file what to do to the agent."""

import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

_SOURCE = Path(__file__).with_name("shim.c")
_NUMBERS = ("calls", "kill_at", "kinds", "error", "every", "seen", "failed", "ahead_s")
_DIRECTORY_BYTES = 256
_KINDS = {"reads": 1, "writes": 2, "syncs": 4}

Kind = Literal["reads", "writes", "syncs"]


def build_shim(directory: Path) -> Path:
    """Compile the library into a directory and return its file."""
    library = directory / "shim.so"
    compiler = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*compiler, str(_SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class Shim:
    """What is done to one agent, which is started with `environment`."""

    def __init__(self, library: Path, control: Path) -> None:
        self._library = library
        self._control = control
        size = 8 * len(_NUMBERS) + _DIRECTORY_BYTES
        control.write_bytes(b"\0" * size)
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)

    def watch(self, directory: Path) -> None:
        """Say where the files are whose calls may fail."""
        name, start = os.fsencode(directory.resolve()), 8 * len(_NUMBERS)
        assert len(name) < _DIRECTORY_BYTES
        self._memory[start : start + len(name) + 1] = name + b"\0"

    def environment(self) -> Mapping[str, str]:
        """What an agent needs in its environment."""
        return {"LD_PRELOAD": str(self._library), "KVMAGENT_SHIM": str(self._control)}

    def fail(self, *kinds: Kind, error: int = errno.EIO, every: int = 1) -> None:
        """Let one in so many calls of these kinds fail; without a kind none."""
        self._set("error", error)
        self._set("every", every)
        self._set("kinds", sum(_KINDS[kind] for kind in kinds))

    def kill_after(self, calls: int) -> None:
        """Kill the agent when it has made so many more counted calls; 0: never."""
        self._set("kill_at", self._get("calls") + calls if calls else 0)

    def step_clock(self, ahead_s: int) -> None:
        """Let the agent's wall clock be so much ahead of the real one; its monotonic clock stays the kernel's."""
        self._set("ahead_s", ahead_s)

    @property
    def calls(self) -> int:
        """How many calls were counted."""
        return self._get("calls")

    @property
    def failed(self) -> int:
        """How many calls were made to fail."""
        return self._get("failed")

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()

    def _get(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * _NUMBERS.index(name))[0])

    def _set(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * _NUMBERS.index(name), value)
