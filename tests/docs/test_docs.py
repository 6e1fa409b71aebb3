"""The documents: what is made is as it would be made now, links lead somewhere, and what is shown exists."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from kvmagent import __version__
from kvmagent.cli.ctl.main import make_cli
from kvmagent.model.errors import CODES, LOOKS, Code
from kvmagent.settings import Settings, list_settings
from tests.docs.blocks import ROOT, fill
from tests.docs.test_plugin import EXAMPLES

DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]
MADE = re.compile(r"<!-- block: .*?<!-- end -->", re.DOTALL)
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@by_document
def test_made_parts_are_as_they_would_be_made_now(document: Path, request: pytest.FixtureRequest) -> None:
    made = fill(document.read_text())
    if request.config.getoption("--update-golden"):
        document.write_text(made)
    assert document.read_text() == made


@cache
def anchors(document: Path) -> set[str]:
    """The headings of a document, as a link names them. Source: GitHub Flavored Markdown, as its renderer does it."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_version_stands_in_one_place_and_the_collection_has_it_too() -> None:
    collection = yaml.safe_load((ROOT / "conf/ansible/galaxy.yml").read_text())
    assert collection["version"] == __version__
    newest = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == "Unreleased" or newest.startswith(f"{__version__} - ")
    named = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    for document in (*DOCUMENTS, ROOT / "conf/ansible/inventory.example.yml"):
        assert not named.search(MADE.sub("", document.read_text())), document


@by_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        assert "://" not in target, f"{target}: the documents stand for themselves"
        other = (document.parent / path).resolve() if path else document
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@by_document
def test_files_that_are_named_are_there(document: Path) -> None:
    for name in re.findall(r"`((?:kvmagent|plugins|docs|conf|init\.d|tests)/[\w./-]*\w)`", document.read_text()):
        assert (ROOT / name).exists(), name


@by_document
def test_settings_that_are_named_exist(document: Path) -> None:
    known = {f"{section}.{key}" for section, key, _value, _default in list_settings(Settings())}
    sections = "|".join(sorted({name.partition(".")[0] for name in known}))
    for name in re.findall(rf"`((?:{sections})\.\w+)(?: = [^`]*)?`", MADE.sub("", document.read_text())):
        assert name in known, name


@by_document
def test_codes_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", MADE.sub("", document.read_text())))
    assert {name for name in named if name not in Code.__members__} <= NO_CODES


# Words in capitals that are no codes: places to fill in, and names that are not the agent's.
NO_CODES = {"KVMAGENT_URL", "VERSION_ARCH", "KVMAGENT_TOKEN_FILE", "KVMAGENT_TOKEN"}


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command that a document shows: in indented blocks, and between backquotes."""
    text = document.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    shown = [line.partition(" # ")[0].strip() for line in re.findall(r"^    +(\S.*)$", prose, re.MULTILINE)]
    shown += re.findall(r"`([^`\n]+)`", prose)
    for line in shown:
        for part in re.split(r"; | && | \|\|? |<\(", line):
            words = part.strip(" )").split()
            if words and words[0] in ("kvmagentctl", "kvmagent", "virsh", "systemctl", "journalctl", "make"):
                yield words


@by_document
def test_commands_of_the_agent_exist_with_their_options(document: Path) -> None:
    kvmagentctl = make_cli()
    context = click.Context(kvmagentctl)
    for words in commands(document):
        if words[0] == "kvmagentctl" and len(words) > 1:
            options, command = set(own(kvmagentctl)) | {"--help"}, None
            for word in words[1:]:
                if command is None and (found := kvmagentctl.get_command(context, word)) is not None:
                    command, options = found, set(own(found)) | {"--help", "--json"}
                elif word.startswith("--"):
                    assert word.partition("=")[0] in options, words
            assert command is not None or words[1].startswith("-") or words[1] in EXAMPLES, words


def own(command: click.Command) -> Iterator[str]:
    for param in command.params:
        yield from (*param.opts, *param.secondary_opts)


@cache
def help_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@by_document
def test_commands_of_others_exist_with_their_options(document: Path) -> None:
    """virsh and the daemon's own: the options of what is installed here."""
    for words in commands(document):
        if words[0] == "virsh":
            name = next((word for word in words[1:] if not word.startswith("-") and "://" not in word), None)
            assert name is not None, words
            told = help_of("virsh", "help", name)
            assert told, f"virsh has no {name}: {words}"
            after = words[words.index(name) + 1 :]
            for word in after:
                if word.startswith("--"):
                    assert word in told, words
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, words
        elif words[0] == "kvmagent":
            told = help_of(str(Path(sys.executable).with_name("kvmagent")), "--help")
            for word in words[1:]:
                assert not word.startswith("--") or word in told, words


def test_log_lines_that_are_explained_are_written() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kvmagent").rglob("*.py"))
    text = (ROOT / "docs/operate.md").read_text()
    events = re.findall(r"^    (?:INFO|WARNING|ERROR) ([a-z ]+?) \w+=", text, re.MULTILINE)
    table = text[text.index("| line |") : text.index("## Health")]
    events += [
        event for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for event in re.findall("`(.+?)`", row)
    ]
    assert len(events) > 15
    for event in events:
        assert f'"{event}"' in sources, event


def test_parts_that_may_be_down_are_explained() -> None:
    sources = (ROOT / "kvmagent/api/resources.py").read_text() + (ROOT / "kvmagent/agent.py").read_text()
    text = (ROOT / "docs/operate.md").read_text()
    down = set(re.findall(r'down\["(\w+)"\]', sources)) | set(re.findall(r'"(\w+)": self\._\w+\.stalled_s', sources))
    assert len(down) >= 6
    for name in down:
        assert f"`{name}`" in text[text.index("| `down` |") : text.index("## Alarms")], name


@pytest.mark.parametrize("code", Code)
def test_every_code_is_explained(code: Code) -> None:
    text = (ROOT / "docs/troubleshoot.md").read_text()
    assert text.count(f"#### {code}\n") == 1


def test_what_to_look_at_is_told_of_codes_that_are_there() -> None:
    assert set(LOOKS) <= set(CODES)
