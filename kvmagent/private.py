"""What nobody else on the host may read: the state directory, keys and tokens. Checked when the agent starts."""

import os
import stat
from pathlib import Path

from kvmagent.logs import Log
from kvmagent.model.errors import AgentError, Code

log = Log(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_directory(path: Path, key: str) -> None:
    """Make the agent's own directory with mode 0700, or take from others what they may do in it and its files.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for found in (path, *(entry for entry in path.iterdir() if entry.is_file() and not entry.is_symlink())):
            mode = found.stat().st_mode
            if mode & _OTHERS:
                log.warning("closed to others", path=found, mode=f"{stat.S_IMODE(mode):04o}")
                found.chmod(stat.S_IMODE(mode) & ~_OTHERS)
    except OSError as error:
        raise AgentError(Code.BAD_CONFIGURATION, f"{key} {path}: {error}") from error


def read_private(path: str, key: str) -> str:
    """Return the text of an operator's file which must be readable by the agent alone: tokens, keys.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the `key` of the setting: it cannot be read, or others can read it.
    """
    try:
        # A pipe would be waited for, with all that its other end wants to be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="ascii") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise AgentError(Code.BAD_CONFIGURATION, f"{key} {path} must be a file")
            if found.st_mode & _OTHERS:
                raise AgentError(
                    Code.BAD_CONFIGURATION,
                    f"{key} {path} has mode {stat.S_IMODE(found.st_mode):04o}, needed is 0600",
                    remedy=f"chmod 0600 {path}",
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(Code.BAD_CONFIGURATION, f"{key} {path}: {error}") from error
