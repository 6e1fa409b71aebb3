"""kvmagentctl's own file: agents by name, and the default one.

~/.config/kvmagent/ctl.conf      the user's ($XDG_CONFIG_HOME)     over
/etc/kvmagent/ctl.conf           the host's, where it can be read

[default]
agent = node1

[agent node1]
url = https://node1:7070
ca = /etc/kvmagent/ca.pem
token_file = ~/.config/kvmagent/token
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.inifile import Entry, read_entries
from kvmagent.model.errors import AgentError

HOST_FILE = Path("/etc/kvmagent/ctl.conf")
_DEFAULT, _AGENT = "default", "agent "
_FILES = ("ca", "cert", "key", "token_file")
_KEYS = ("url", *_FILES)


class CtlConf(NamedTuple):
    """How each named agent is reached, as the options name it; and which one is the default, or nothing."""

    agents: Mapping[str, Mapping[str, str]]
    default: str = ""

    def find(self, name: str) -> Mapping[str, str]:
        """Return how an agent is reached.

        Raises:
            CtlError: no file names it.
        """
        if name in self.agents:
            return self.agents[name]
        known = ", ".join(sorted(self.agents)) or "none"
        raise CtlError(
            Exit.USAGE,
            "UNKNOWN_AGENT",
            f"no agent is named {name!r}; known: {known}",
            f"Write a section [agent {name}] with its url into {user_file(os.environ)}.",
        )


def user_file(environment: Mapping[str, str]) -> Path:
    """Return where the user's own file is, or would be."""
    base = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "kvmagent" / "ctl.conf"


def load_conf() -> CtlConf:
    """Return what the user's file and the host's say.

    Raises:
        CtlError: one says what nobody understands.
    """
    return read_conf((HOST_FILE, user_file(os.environ)))


def read_conf(files: tuple[Path, ...]) -> CtlConf:
    """Return what files say, a later one over an earlier; one that is not there or closed to us says nothing.

    Raises:
        CtlError: one says what nobody understands.
    """
    sources = []
    for file in files:
        try:
            sources.append((str(file), file.read_text()))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise _wrong(f"{file}: {error}") from error
    try:
        sections = read_entries(sources)
    except AgentError as error:
        raise _wrong(error.message) from error
    agents: dict[str, dict[str, str]] = {}
    default = ""
    for title, section in sections.items():
        if title == _DEFAULT:
            for key, entry in section.keys.items():
                _check_key(key, entry, ("agent",))
                default = entry.value
        elif title.startswith(_AGENT):
            name = title.removeprefix(_AGENT).strip()
            agents[name] = {key: _read_value(key, entry) for key, entry in section.keys.items()}
            if "url" not in agents[name]:
                raise _wrong(f"{section.where}: [{title}] has no url")
        else:
            raise _wrong(f"{section.where}: section [{title}]; allowed are [default] and [agent NAME]")
    conf = CtlConf(agents, default)
    if default:
        conf.find(default)
    return conf


def _read_value(key: str, entry: Entry) -> str:
    _check_key(key, entry, _KEYS)
    return str(Path(entry.value).expanduser()) if key in _FILES else entry.value


def _check_key(key: str, entry: Entry, known: tuple[str, ...]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; allowed are {', '.join(known)}"
    raise _wrong(f"{entry.where}: unknown key {key!r}{hint}")


def _wrong(words: str) -> CtlError:
    return CtlError(Exit.USAGE, "BAD_CTL_CONF", words, "Correct the file; kvmagentctl(1), FILES, shows one.")
