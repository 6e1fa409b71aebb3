"""Checks the host as the agent's user, in a process of its own that is ended if it hangs.

parent                                    child: python -m kvmagent.cli.ctl.look WHAT CONFIG [OVERRIDE...]
  find_identity   the unit's user and groups
  look_as         start, read, end in time  <-  {"begin": check}, then a Finding a line
"""

import contextlib
import grp
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from kvmagent.cli.ctl.findings import Finding

#: The agent's own user, as conf/kvmagent.sysusers makes it, and the group that opens libvirt's socket.
USER, _LIBVIRT_GROUP = "kvmagent", "libvirt"
_UNIT = "kvmagent.service"
_SYSTEMCTL_S = 5.0
_END_S = 5.0


class Identity(NamedTuple):
    """A user with its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


class Begun(msgspec.Struct):
    """The child has begun with a check."""

    begin: str


def find_user() -> pwd.struct_passwd | None:
    """Return the agent's user; None where there is none."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_unit().get("User") or USER)
    return None


def find_agent_pid() -> int | None:
    """Return the process of the agent that systemd runs; None where there is none."""
    pid = int(_unit().get("MainPID") or 0)
    return pid or None


def find_identity() -> Identity | None:
    """Return the agent's user with the groups that its unit gives it; None where there is none, or we may not be it."""
    user = find_user()
    if user is None or os.geteuid() != 0:
        return None
    unit = _unit()
    names = (unit.get("SupplementaryGroups") or _LIBVIRT_GROUP).split()
    groups = {*os.getgrouplist(user.pw_name, user.pw_gid)}
    for name in names:
        with contextlib.suppress(KeyError):
            groups.add(grp.getgrnam(name).gr_gid)
    return Identity(user.pw_name, user.pw_uid, user.pw_gid, tuple(sorted(groups)))


def look_as(
    identity: Identity | None,
    what: Literal["host", "configuration"],
    arguments: Iterable[str],
    *,
    timeout_s: float,
    sources: list[tuple[str, str]] | None = None,
) -> list[Finding]:
    """Return what a look finds, in no more than about this time; None: as who we are.

    `sources` are the configuration's files where we have read them, for they need not be where the agent can.
    """
    as_agent = (
        {} if identity is None else {"user": identity.uid, "group": identity.gid, "extra_groups": identity.groups}
    )
    child = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, "-I", "-m", "kvmagent.cli.ctl.look", what, *arguments],
        stdin=subprocess.DEVNULL if sources is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        start_new_session=True,
        **as_agent,
    )
    try:
        out, err = child.communicate(None if sources is None else json.dumps(sources).encode(), timeout=timeout_s)
        hung = False
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        try:
            out, err = child.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired as left:  # in the kernel: it ends when that lets it
            out, err = left.stdout or b"", left.stderr or b""
        hung = True
    findings, at = _read(out)
    if hung:
        remedy = "Find out what blocks it: systemctl status libvirtd virtqemud; ps -o pid,stat,wchan,args -C python3."
        findings.append(Finding(at, "wrong", f"no answer within {timeout_s:g} s", remedy))
    elif child.returncode:
        last = (err.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        message = f"the check ended with status {child.returncode}: {last}"
        remedy = "Make sure that the agent's user may read the installed files. If it may, report this line."
        findings.append(Finding(at, "wrong", message, remedy))
    return findings


def _read(out: bytes) -> tuple[list[Finding], str]:
    """Return the findings, and the check that the child was at."""
    findings: list[Finding] = []
    at = "look"
    for line in out.splitlines():
        with contextlib.suppress(msgspec.MsgspecError):  # cut off in the middle
            if line.startswith(b'{"begin"'):
                at = msgspec.json.decode(line, type=Begun).begin
            else:
                findings.append(msgspec.json.decode(line, type=Finding))
    return findings, at


def _unit() -> dict[str, str]:
    """Return what systemd says of the agent's unit; nothing where there is no systemd."""
    command = ["systemctl", "show", "-p", "User", "-p", "SupplementaryGroups", "-p", "MainPID", _UNIT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
