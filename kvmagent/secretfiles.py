"""Files that control the agent or hold secrets: only root and the agent's user may write or read them.

check_trusted, check_file   the path, each directory above and each link on the way: who could change them
read_file, read_private     the text; a pipe in place of a file is refused, not waited for
"""

import errno
import os
import pwd
import stat
from pathlib import Path

from kvmagent.logs import Log
from kvmagent.model.errors import AgentError, Code

log = Log(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITE = stat.S_IWGRP | stat.S_IWOTH
# As many links as the kernel follows. Source: path_resolution(7).
_MAX_LINKS = 40


class OpenToOthers(PermissionError):
    """A place that others can change; `remedy` is the command that closes it."""

    def __init__(self, words: str, place: Path, remedy: str) -> None:
        super().__init__(errno.EPERM, words, str(place))
        self.words = words
        self.remedy = remedy

    def __str__(self) -> str:
        return self.words


def owners_of(user_id: int | None = None) -> tuple[int, ...]:
    """Return who may own what the agent trusts: root, and the agent's user, this process's where none is given."""
    return 0, os.geteuid() if user_id is None else user_id


def check_trusted(path: Path, owners: tuple[int, ...]) -> None:
    """Refuse what others than its owners, root and the agent's user, can change or replace.

    Raises:
        OpenToOthers: it is so.
        OSError: it is not there, or cannot be looked at.
    """
    left, place, links = [*reversed(path.absolute().parts[1:])], Path("/"), 0
    _check_place(place, owners, is_last=not left)
    while left:
        name = left.pop()
        if name == "..":
            place = place.parent
            continue
        step = place / name
        found = step.lstat()
        if not stat.S_ISLNK(found.st_mode):
            place = step
            _check_place(place, owners, is_last=not left)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        # In a sticky directory others may have put it there.
        _check_owner(step, found.st_uid, owners)
        target = step.readlink()
        if target.is_absolute():
            place = Path("/")
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _check_place(place: Path, owners: tuple[int, ...], *, is_last: bool) -> None:
    found = place.lstat()
    _check_owner(place, found.st_uid, owners)
    # In a directory above, as /tmp is, the sticky bit keeps others from what is not theirs.
    kept = not is_last and found.st_mode & stat.S_ISVTX
    if found.st_mode & _WRITE and not kept:
        words = f"{place} is writable by others ({stat.S_IMODE(found.st_mode):04o})"
        raise OpenToOthers(words, place, f"chmod go-w {place}")


def _check_owner(place: Path, owner: int, owners: tuple[int, ...]) -> None:
    if owner not in owners:
        words = f"{place} belongs to user {_user_name(owner)}, neither root nor the agent's user"
        raise OpenToOthers(words, place, f"chown -h root {place}")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def make_private_directory(path: Path, key: str) -> None:
    """Make the agent's own directory with mode 0700, or take from others what they may do in it and its files.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting; also where others can replace the directory or
            have put a file there.
    """
    owners = owners_of()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = path.resolve(strict=True)
        _check_owner(real, real.stat().st_uid, owners)
        entries = [*real.iterdir()]
        for entry in entries:
            _check_owner(entry, entry.lstat().st_uid, owners)
        for found in (real, *(entry for entry in entries if entry.is_file() and not entry.is_symlink())):
            mode = found.stat().st_mode
            if mode & _OTHERS:
                log.warning("closed to others", path=found, mode=f"{stat.S_IMODE(mode):04o}")
                found.chmod(stat.S_IMODE(mode) & ~_OTHERS)
        check_trusted(path, owners)
    except OSError as error:
        raise _refusal(key, path, error) from error


def check_file(path: str, key: str, *, user_id: int | None = None) -> None:
    """Refuse a file by which others could decide what the agent does, and what is no file.

    `user_id` is the agent's user, this process's where none is given.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting.
    """
    try:
        check_trusted(Path(path), owners_of(user_id))
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AgentError(Code.BAD_CONFIGURATION, f"{key} {path} must be a file")
    except OSError as error:
        raise _refusal(key, path, error) from error


def check_directory(path: str, key: str, *, user_id: int | None = None) -> None:
    """Refuse a directory where others could put what decides what the agent does; `user_id` is as for `check_file`.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting.
    """
    try:
        check_trusted(Path(path), owners_of(user_id))
    except OSError as error:
        raise _refusal(key, path, error) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the agent's own (0600), on disk and whole: after whatever happens it has this or what it had.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    fresh = path.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_file(path: str, key: str) -> str:
    """Return the text of a file, whoever may read and change it.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting: it cannot be read, or is no file.
    """
    return _read(path, key, others=0)


def read_private(path: str, key: str) -> str:
    """Return the text of a file that must be readable by its owner alone: tokens, keys.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting: it cannot be read, or others can read it.
    """
    return _read(path, key, others=_OTHERS)


def _read(path: str, key: str, *, others: int) -> str:
    """Return a file's text; `others` are the bits that its mode may not have."""
    try:
        # A pipe would be waited for, with all that its other end wants to be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise AgentError(Code.BAD_CONFIGURATION, f"{key} {path} must be a file")
            if found.st_mode & others:
                raise AgentError(
                    Code.BAD_CONFIGURATION,
                    f"{key} {path} is accessible to others ({stat.S_IMODE(found.st_mode):04o}), it must be 0600",
                    remedy=f"chmod 0600 {path}",
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(key, path, error) from error


def _refusal(key: str, path: object, error: Exception) -> AgentError:
    remedy = error.remedy if isinstance(error, OpenToOthers) else None
    # Of a file that is open Python says its number.
    words = error.strerror if isinstance(error, OSError) and isinstance(error.filename, int) else error
    return AgentError(Code.BAD_CONFIGURATION, f"{key} {path}: {words}", remedy=remedy)
