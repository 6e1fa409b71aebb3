"""What the demo shows fits a terminal, and is drawn as it was shown."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.demo import ANSI, WIDTH, Screen, format_fields
from tests.lab.picture import draw_terminal

SVG = "{http://www.w3.org/2000/svg}"
PICTURE = Path(__file__).parents[2] / "docs/demo.svg"
numbers = st.none() | st.integers(0, 2**40)
fields_of_a_reply = st.fixed_dictionaries(
    {
        "memorySize": numbers,
        "slots": numbers,
        "ready": st.none() | st.booleans(),
        "memoryMethods": st.lists(st.sampled_from(["dimm", "virtio-mem"])),
        "headroom": st.fixed_dictionaries({"cpuNum": numbers}),
    }
)


@given(fields_of_a_reply)
def test_values_are_told_without_python_s_own_words(fields: dict[str, object]) -> None:
    shown = format_fields(fields)
    assert not set(shown) & set("[]{}'\""), shown
    assert "None" not in shown
    assert "True" not in shown


def test_no_line_is_wider_than_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.row("request", " ".join(["memorySize=4096MiB"] * 20))
    screen.step(" ".join(["word"] * 40))
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 5
    assert max(map(len, told)) <= WIDTH


def test_the_picture_is_of_lines_that_fit_and_says_what_was_shown() -> None:
    drawn = ElementTree.fromstring(draw_terminal(["\033[1ma <b>\033[0m & c", "", "second"], columns=WIDTH))
    assert ["".join(text.itertext()) for text in drawn.iter(f"{SVG}text")] == ["a <b> & c", "second"]
    shipped = ["".join(text.itertext()) for text in ElementTree.parse(PICTURE).iter(f"{SVG}text")]
    assert "It checks out." in shipped
    assert max(len(ANSI.sub("", line)) for line in shipped) <= WIDTH
