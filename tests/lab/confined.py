"""Owns a process confined as a systemd unit confines it, where no systemd runs: capabilities, privileges, system calls.

    setpriv: no capability, no new privileges -> this file: the unit's SystemCallFilter and MemoryDenyWriteExecute,
                                                 as libseccomp builds them -> the command

What the unit's mount namespace hides is not hidden here.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
_MASKED_EQ = 7
_NOBODY_S_GROUP = 65533
_WRITE, _EXEC = 2, 4
# With MemoryDenyWriteExecute, memory that is or was writable never becomes executable: system call, and for its third
# argument the bits that are looked at with the values that they may have. Source: systemd 252 seccomp-util.c,
# seccomp_memory_deny_write_execute.
_PROTECTED = {
    "mmap": (_WRITE | _EXEC, (0, _WRITE, _EXEC)),
    "mprotect": (_EXEC, (0,)),
    "pkey_mprotect": (_EXEC, (0,)),
}


def confine(unit: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs a command as the unit confines it."""
    setpriv = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    return [*setpriv, sys.executable, "-I", __file__, str(unit), *command]


def hide_processes(command: Sequence[str]) -> list[str]:
    """The command line that runs a command as root under ProtectProc=invisible: it sees no other user's processes.

    A group whose members see them all there has to be another than root's.
    """
    hide = f'mount --make-rprivate /; mount -t proc -o hidepid=invisible,gid={_NOBODY_S_GROUP} proc /proc; exec "$@"'
    return ["unshare", "--mount", "sh", "-ec", hide, "sh", "setpriv", "--bounding-set=-sys_ptrace", *command]


def read_service(unit: Path) -> dict[str, list[str]]:
    """The [Service] section: each key with its values, in order."""
    values: dict[str, list[str]] = {}
    service = unit.read_text().partition("[Service]\n")[2].partition("\n[")[0]
    for line in service.splitlines():
        key, equals, value = line.partition("=")
        if equals and not key.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def find_allowed_calls(unit: Path) -> set[str]:
    """The names of the system calls that the unit's SystemCallFilter lets through."""
    allowed: set[str] = set()
    for value in read_service(unit)["SystemCallFilter"]:
        names = set().union(*(_expand(word) for word in value.removeprefix("~").split()))
        allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed


def _expand(word: str) -> set[str]:
    """The system calls of a group, as systemd defines it; a name stands for itself."""
    if not word.startswith("@"):
        return {word}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
    return set().union(*(_expand(line) for line in lines if line and not line.startswith("#")))


class _Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def _load_filter(allowed: set[str]) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(_EPERM)))
    for name in allowed:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # not of this architecture
            continue
        mask, values = _PROTECTED.get(name, (0, ()))
        rules = [_Comparison(2, _MASKED_EQ, mask, value) for value in values]
        for rule in rules or [None]:
            array = (_Comparison * 1)(rule) if rule else None
            done = seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(_ALLOW), number, len(array or ()), array)
            assert done == 0, (name, done)
    assert seccomp.seccomp_load(context) == 0


def main() -> None:
    """Confine this process, then become the command."""
    unit, *command = sys.argv[1:]
    _load_filter(find_allowed_calls(Path(unit)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
