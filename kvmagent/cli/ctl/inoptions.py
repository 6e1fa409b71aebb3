"""Translates the agent's messages and remedies from the API's JSON into the options of kvmagentctl.

The agent names a request's field as JSON does, and kvmagentctl by its option:

    Use "affect": "config" and power the VM off and on.     Use --affect config and power the VM off and on.
    Send ReadyForHotplug with {"prepare": true} to ...      Run kvmagentctl ready VM --apply to ...
    Request a total of 1207959552 bytes.                    Request a total of 1152MiB.
    cpuNum is 9000: Expected int <= 8192                    CPUS must be at most 8192, got 9000

A sentence about a field that kvmagentctl does not offer is left out. What --json prints is the API's.
"""

import re
from collections.abc import Mapping

from kvmagent.cli.ctl.declared import find_options, load_commands
from kvmagent.model.units import GIB, KIB, MIB

_FIELD = re.compile(r'"(?P<name>[a-z]+(?:[A-Z][a-z]+)*)"(?:: (?:"(?P<word>[^"]*)"|(?P<value>true|false|[0-9]+)))?')
_OBJECT = re.compile(r'(?: with)? \{(?P<fields>"[^{}]*)\}')
_COMMAND = re.compile(r"(?:(?P<verb>[Ss]end) )?\b(?P<name>[A-Z][a-z]+(?:[A-Z][a-z]+)+)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_BYTES = re.compile(r"\b(?P<sizes>[0-9]+(?: or [0-9]+)*) bytes\b")
_RANGE = re.compile(r"\b(?P<name>[a-zA-Z]+) is (?P<value>-?[0-9]+): Expected int (?P<sign>[<>])= (?P<bound>[0-9]+)")
_UNITS = ((1024 * GIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
# Without --apply, kvmagentctl only shows what prepare would do.
_OPTIONS = {"prepare": "--apply"}
# kvmagentctl makes a task's id itself, a new one each time.
_PHRASES = {
    " with a new taskuuid": "",
    " with the same taskuuid": "",
    "GET /vms/{vmUuid}": "kvmagentctl vms",
    "GET /tasks/{taskUuid}": "kvmagentctl task ID",
}


def in_options(text: str) -> str:
    """Return a message or remedy of the agent for a user of kvmagentctl."""
    declared = load_commands()
    options: dict[str, str | None] = {}
    for command in reversed(declared.values()):
        options |= find_options(command.request)
    subcommands = {command.name: name for name, command in declared.items()}
    sentences = [
        sentence for sentence in _SENTENCE_END.split(text)
        if not any(options.get(field["name"], "") is None for field in _FIELD.finditer(sentence))
    ]  # fmt: skip
    text = _RANGE.sub(lambda found: _range(found, options), " ".join(sentences))
    text = _OBJECT.sub(lambda found: f" {found['fields'].replace(', ', ' ')}", text)
    text = _FIELD.sub(lambda found: _option(found, options), text)
    text = _COMMAND.sub(lambda found: _subcommand(found, subcommands), text)
    text = _BYTES.sub(lambda found: _sizes(found["sizes"]), text)
    for phrase, instead in _PHRASES.items():
        text = text.replace(phrase, instead)
    return text


def _option(found: re.Match[str], options: Mapping[str, str | None]) -> str:
    """Return a field as the option that it is; what is no field stays."""
    option, value = options.get(found["name"]), found["word"] or found["value"]
    if option is None:
        return found[0]
    if value == "false":
        return f"--no-{option.removeprefix('--')}"
    option = _OPTIONS.get(found["name"], option)
    return option if value in (None, "true") else f"{option} {value}"


def _range(found: re.Match[str], options: Mapping[str, str | None]) -> str:
    """Return what is out of its range as the option that it is, a size with its unit."""
    option, value, bound = options.get(found["name"]), found["value"], found["bound"]
    if option is None:
        return found[0]
    if found["name"].endswith("Size") and not value.startswith("-"):
        value, bound = _exact(int(value)), _exact(int(bound))
    return f"{option} must be at {'most' if found['sign'] == '<' else 'least'} {bound}, got {value}"


def _subcommand(found: re.Match[str], subcommands: Mapping[str, str]) -> str:
    name = subcommands.get(found["name"])
    if name is None:
        return found[0]
    if found["verb"] is None:
        return f"kvmagentctl {name}"
    return f"{'Run' if found['verb'] == 'Send' else 'run'} kvmagentctl {name} VM"


def _sizes(numbers: str) -> str:
    """Return sizes as an option takes them, to the byte."""
    return " or ".join(_exact(int(number)) for number in numbers.split(" or "))


def _exact(size_bytes: int) -> str:
    unit, name = next((unit, name) for unit, name in _UNITS if size_bytes % unit == 0) if size_bytes else (1, "B")
    return f"{size_bytes // unit}{name}"
