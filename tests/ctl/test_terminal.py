"""What others wrote reaches a terminal as text: it moves no cursor, turns nothing around, and is still JSON."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.api.security import new_token
from kvmagent.cli.ctl.client import Agent, Target
from kvmagent.cli.ctl.terminal import Terminal, paint, quoted_json
from tests.ctl.ctl import Ctl
from tests.ctl.front import Answer, Front

# CSI as one character, a title, bidi override and isolate, zero width space, line separator, delete, tag.
HOSTILE = ["\x9b2J", "\033]0;title\a", "\u202egnp", "\u2066", "\u200b", "\u2028", "\x7f", "\U000e0041", "\r", "\x00"]
COLOUR = re.compile(r"\033\[[0-9;]*m")
ANY_TEXT = st.text() | st.lists(st.sampled_from(HOSTILE)).map("".join)


def is_text(shown: str) -> bool:
    return all(char.isprintable() or char in "\n\t" for char in COLOUR.sub("", shown))


@given(ANY_TEXT)
def test_whatever_a_line_holds_nothing_but_text_and_our_colours_is_written(text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        terminal = Terminal()
        terminal.print(paint("kvm", "red") + text)
        terminal.tell(text)
        terminal.print_json({text: [text]})
    assert is_text(out.getvalue())
    assert is_text(err.getvalue())


@given(st.dictionaries(ANY_TEXT, ANY_TEXT), st.sampled_from([None, 2]))
def test_quoted_json_means_the_same(value: dict[str, str], indent: int | None) -> None:
    assert json.loads(quoted_json(value, indent=indent)) == value


def test_an_agent_s_words_are_quoted_in_every_form() -> None:
    hostile = "".join(HOSTILE)
    body = {"errorCode": "X", "error": f"a{hostile}b", "remedy": hostile, "ready": True, "version": hostile}
    body |= {"down": {hostile: hostile}, "queued": 0, "callbacksOwed": 0}
    with Front(lambda request: Answer(503 if request.path == "/healthz" else 400, body)) as front:
        ctl = Ctl({"KVMAGENT_URL": front.url, "NO_COLOR": "1"})
        for command in (("vms",), ("vms", "--json"), ("status", "--json"), ("task", "x")):
            shown = ctl.on_terminal(*command).out.replace("\r\n", "\n")
            assert is_text(shown), command
            assert "\033" not in shown
            assert "Traceback" not in shown


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(new_token("operator")[0])
    return path


@pytest.mark.parametrize(
    ("url", "warns"),
    [
        ("http://node1.example:7070", True),
        ("http://192.0.2.1", True),
        ("http://[2001:db8::1]", True),
        ("http://127.0.0.1.example", True),
        ("https://node1.example", False),
        ("http://127.0.0.2:7070", False),
        ("http://[::1]:7070", False),
        ("http://localhost:7070", False),
        ("unix:///run/agent.sock", False),
    ],
)
def test_a_token_that_would_cross_a_network_in_clear_text_is_warned_of(token_file: Path, url: str, warns: bool) -> None:
    assert bool(Agent(Target(url, token_file=str(token_file))).warning) is warns
    assert not Agent(Target(url)).warning


@pytest.mark.parametrize("way", ["--url", "--hosts", "doctor"])
def test_the_warning_comes_whichever_way_the_host_was_named(token_file: Path, tmp_path: Path, way: str) -> None:
    with Front(lambda request: Answer(400, {"errorCode": "X", "error": "no", "remedy": ""})) as front:
        # As the resolver reads it this is loopback; kvmagentctl takes it as a name.
        url = front.url.replace("127.0.0.1", "0x7f000001")
        (tmp_path / "hosts").write_text(f"{url}\n")
        arguments = {
            "--url": ("--url", url, "vms"),
            "--hosts": ("vms", "--hosts", str(tmp_path / "hosts")),
            "doctor": ("--url", url, "doctor", "--config", str(tmp_path / "none.conf")),
        }
        done = Ctl({})(*arguments[way], "--token-file", str(token_file))
        assert front.requests
    assert "is plain HTTP: others on the network can read the token" in done.out + done.err
    assert token_file.read_text() not in done.out + done.err
