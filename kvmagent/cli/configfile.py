"""The configuration: the file and those in conf.d beside it."""

import os
from collections.abc import Iterable
from pathlib import Path

from kvmagent.model.errors import AgentError, Code
from kvmagent.secretfiles import check_directory, check_file, read_file
from kvmagent.settings import Settings, parse_sources

# What a directory beside the file is called; its *.conf are read after the file, in the order of their names.
_BESIDE = "conf.d"
_REMEDY = (
    "Write the file (kvmagent --sample prints one) so that the agent's user can read it, or name another with --config."
)


def read_settings(path: Path, overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of a file and its conf.d, with `section.key=value` overrides applied.

    Raises:
        AgentError: BAD_CONFIGURATION: a file cannot be read, or what it says is wrong.
    """
    return parse_sources(read_sources(path), overrides)


def read_sources(path: Path) -> list[tuple[str, str]]:
    """Return the files of a configuration with their contents.

    Raises:
        AgentError: BAD_CONFIGURATION: one cannot be read.
    """
    return [(str(file), _read(file)) for file in find_files(path)]


def find_files(path: Path) -> list[Path]:
    """Return the files of a configuration, in the order in which they are read: a later one wins.

    Raises:
        AgentError: BAD_CONFIGURATION: the directory beside the file cannot be looked into.
    """
    beside = path.parent / _BESIDE
    try:
        names = sorted(os.listdir(beside))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        words = f"the configuration {beside}: {error.strerror}"
        raise AgentError(Code.BAD_CONFIGURATION, words, remedy=_REMEDY) from error
    return [path, *(beside / name for name in names if name.endswith(".conf") and not name.startswith("."))]


def check_files(path: Path, *, user_id: int | None = None) -> None:
    """Refuse a configuration that others than root and the agent's user can change, or add to.

    `user_id` is the agent's user, this process's where none is given.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    for file in find_files(path):
        check_file(str(file), "the configuration", user_id=user_id)
    # An empty one too: what is put there counts from the next start on.
    if (beside := path.parent / _BESIDE).exists():
        check_directory(str(beside), "the configuration", user_id=user_id)


def _read(path: Path) -> str:
    try:
        return read_file(str(path), "the configuration")
    except AgentError as error:
        raise AgentError(Code.BAD_CONFIGURATION, error.message, remedy=_REMEDY) from error
