"""What the agent says in the API's words is told to a user of kvmagentctl in his own."""

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from kvmagent.cli.ctl.changes import find
from kvmagent.cli.ctl.declared import find_options, load_commands
from kvmagent.cli.ctl.inoptions import in_options
from kvmagent.model.errors import CODES, Code
from kvmagent.model.units import parse_size
from tests.ctl.ctl import Ctl

PLANS = Path(__file__).parents[1] / "golden" / "plans"
COMMANDS = load_commands()
FIELDS = {name for command in COMMANDS.values() for name in find_options(command.request)}
#: What only a broken client is told: kvmagentctl makes these requests itself.
OF_HTTP = {code for code, one in CODES.items() if re.search("header|JSON|HTTP|The taskuuid", one.meaning + one.remedy)}
#: Said of the policy in a VM's metadata, whose attributes these are.
OF_POLICY = {"maxCpuNum", "maxMemorySize", "guestOnline"}


def spoken() -> list[str]:
    """Return every text that the agent says to an operator: the table's, and those of all golden plans."""
    texts = {info.remedy for code, info in CODES.items() if code not in OF_HTTP}
    for path in PLANS.glob("*.json"):
        texts |= set(_texts(json.loads(path.read_text()).get("reply") or {}))
    return sorted(texts)


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    if not isinstance(value, dict):
        return []
    own = [value[name] for name in ("message", "remedy", "error", "why") if isinstance(value.get(name), str)]
    return own + [text for one in value.values() for text in _texts(one)]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('Use "affect": "config" and power the VM off.', "Use --affect config and power the VM off."),
        ('with a longer "timeoutSec" if', "with a longer --timeout if"),
        ('VM db-7 is shutoff, and "affect" is both', "VM db-7 is shutoff, and --affect is both"),
        ('Send ReadyForHotplug with {"prepare": true, "slots": 4} to', "Run kvmagentctl ready VM --apply --slots 4 to"),
        ('"guestOnline": false', "--no-guest-online"),
        ('Look again. To be told, use "lateCallback": true. Then rest.', "Look again. Then rest."),
        ("Request a total of 1207959552 or 1073741825 bytes.", "Request a total of 1152MiB or 1073741825B."),
        ("Send the command with a new taskuuid if", "Send the command if"),
        ('qemu says "failure": "config"', 'qemu says "failure": "config"'),
    ],
)
def test_fields_are_told_as_options(said: str, told: str) -> None:
    assert in_options(said) == told


def test_nothing_of_json_is_left_in_what_the_agent_says() -> None:
    texts = spoken()
    assert len(texts) > 150
    for text in texts:
        told = in_options(text)
        assert not re.search(r'"\w+":|taskuuid|vmUuid|callbackurl', told), text
        named = set(re.findall(r"\b[a-z]+(?:[A-Z][a-z]+)+\b", told)) & FIELDS
        assert not named - (OF_POLICY if "policy" in told else set()), text
        for sizes in re.findall(r"total of (\S+)(?: or (\S+))?[ .]", told):
            assert all(parse_size(size.rstrip(".,")) for size in sizes if size), told


def test_every_option_that_is_told_is_one_of_a_subcommand() -> None:
    offered = set[str]()
    for name in COMMANDS:
        made = find(name)
        assert made is not None
        for param in made.params:
            offered |= {*param.opts, *param.secondary_opts}
    for text in spoken():
        before = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", in_options(text))) - before <= offered, text


def test_the_api_names_fields_in_one_way_alone() -> None:
    """What is not in quotes is not found, and a user of kvmagentctl would be told of JSON."""
    single = {name for name in FIELDS if not name.islower()}
    for text in spoken():
        bare = re.sub(r'"\w+"(: ("[^"]*"|true|false))?', "", text)
        bare = re.sub(r"<policy[^>]*>", "", bare)
        named = single & set(re.findall(r"\w+", bare))
        assert not named - (OF_POLICY if "policy" in text else {"vmUuid"}), text
        assert not re.search(r"\b(affect|method|strict|prepare|node)\b(?= (is |both|live|config|dimm|out))", bare), text


def test_a_total_that_is_too_much_is_told_by_its_option(ctl: Ctl) -> None:
    for words, arguments in (
        ("CPUS must be at most 8192, got 8193", ("plug-cpu", "db-7", "+8192")),
        ("MEMORY must be at most 9007199254740991B, got 10239999999232MiB", ("plug-memory", "db-7", "+9999999999G")),
        ("--max-cpus must be at most 8192, got 9000", ("ready", "--all", "--prepare", "--max-cpus", "x9000")),
    ):
        done = ctl(*arguments)
        assert words in done.out + done.err, arguments
        assert done.status in (1, 2)


def test_whatever_is_said_by_others_stays() -> None:
    for text in ("", "it's 5 < 6", 'error: "unknown": {', "Linux 5.8 says {}", click.style("red", fg="red")):
        assert in_options(text) == text


def test_a_remedy_for_every_code_is_left() -> None:
    for code in Code:
        assert in_options(CODES[code].remedy) or not CODES[code].remedy, code
