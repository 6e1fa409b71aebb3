"""INI text as entries that know their file and line. Reads no file."""

import configparser
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmagent.model.errors import AgentError, Code

_SECTION = re.compile(r"\[(?P<name>.+)\]")
_KEY = re.compile(r"(?P<key>[^\s#;\[][^=:]*?)\s*[=:]")


class Entry(NamedTuple):
    """A key's value, and where it stands: "/etc/kvmagent/kvmagent.conf, line 12", or the option that sets it."""

    value: str
    where: str


@dataclass
class Section:
    """A section: where it stands first, and its keys."""

    where: str
    keys: dict[str, Entry] = field(default_factory=dict)


def read_entries(sources: Iterable[tuple[str, str]], overrides: Iterable[str] = ()) -> dict[str, Section]:
    """Return what (name, text) sources say, a later one over an earlier, and `section.key=value` overrides over all.

    Raises:
        AgentError: BAD_CONFIGURATION: it is no INI text, or an override none.
    """
    sections: dict[str, Section] = {}
    for name, text in sources:
        lines = _find_lines(text)
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(text, source=name)
        except configparser.Error as error:
            raise AgentError(Code.BAD_CONFIGURATION, " ".join(str(error).split())) from error
        for section in parser.sections():
            found = sections.setdefault(section, Section(_where(name, lines.get((section, "")))))
            for key, value in parser.items(section):
                found.keys[key] = Entry(value, _where(name, lines.get((section, key))))
    for override in overrides:
        place, equals, value = override.partition("=")
        section, dot, key = place.strip().partition(".")
        if not (equals and dot and section and key):
            raise AgentError(Code.BAD_CONFIGURATION, f"--set {override}: not of the form section.key=value")
        sections.setdefault(section, Section("--set")).keys[key] = Entry(value.strip(), "--set")
    return sections


def _where(name: str, line: int | None) -> str:
    return ", ".join(filter(None, (name, f"line {line}" if line else "")))


def _find_lines(text: str) -> dict[tuple[str, str], int]:
    """Return the line of each section ("" for a key) and key, as configparser names them."""
    lines: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _SECTION.match(line):
            section = header["name"]
            lines.setdefault((section, ""), number)
        elif key := _KEY.match(line):
            lines[section, key["key"].lower()] = number
    return lines
