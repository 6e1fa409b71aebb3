"""The peer of a UNIX socket, as the kernel reports it; nothing that the peer says about itself counts.

Source: unix(7), SO_PEERCRED; socket(7), SO_PEERGROUPS (Linux 4.13). Both are of the moment of connect(2).
"""

import errno
import grp
import pwd
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("3i")  # pid, uid, gid
_SO_PEERGROUPS = 59
_GID = struct.Struct("I")
# Python asks for no more bytes than 1024. Who is in more groups than fit is known by its first one alone.
_MAX_GROUPS = 256


class LocalUser(NamedTuple):
    """A user of this host, by name where it has one, and the names of its process's groups."""

    uid: int
    name: str
    groups: tuple[str, ...] = ()


def find_local_user(sock: socket.socket) -> LocalUser:
    """Return whose process connected to a UNIX socket.

    Raises:
        OSError: the kernel does not say.
    """
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS * _GID.size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        found = b""
    gids = dict.fromkeys([gid, *(number for (number,) in _GID.iter_unpack(found))])
    return LocalUser(uid, _user_name(uid), tuple(map(_group_name, gids)))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
