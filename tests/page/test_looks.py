"""How the page looks, against pictures that a person has looked at: `--update-golden` draws them anew.

Compared is what an eye compares: both pictures at a quarter of their size, in patches. Another version of the browser
draws the edges of letters differently, and fails nothing; a bar, a colour or a line that is elsewhere does.
"""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageFilter

from tests.page.browser import Browser
from tests.page.scene import TASKS, VMS, full_host
from tests.page.stage import Stage
from tests.page.states import STATES, bring, violations

PICTURES = Path(__file__).parent / "golden"
WINDOWS = {
    "desk-light": {"width": 1440, "height": 900, "scheme": "light"},
    "desk-dark": {"width": 1440, "height": 900, "scheme": "dark"},
    "phone-light": {"width": 390, "height": 844, "scheme": "light"},
}
SCALE = 4
# A patch differs when a colour of it does by more than this, of 255; a picture when so much of any tile of it does.
TOLERANCE, PART, TILE = 20, 0.04, 16


def draw(browser: Browser, stage: Stage, name: str) -> Image.Image:
    browser.open(stage.url, **WINDOWS[name])
    browser.wait(f"document.querySelectorAll('#vm-rows tbody').length === {len(VMS)}")
    browser.wait(f"document.querySelectorAll('#task-list > li').length === {len(TASKS)}")
    # One row as whoever looks for the cause has it.
    browser.run("document.querySelector('#vm-rows .problems-of').click()")
    browser.wait("document.querySelector('.ladder li')")
    browser.wait("document.querySelector('#vms-age').innerText && document.fonts.status === 'loaded'")
    # On a slow machine it is not "just now".
    browser.run("document.querySelectorAll('.age').forEach((words) => { words.style.visibility = 'hidden' })")
    return Image.open(io.BytesIO(browser.screenshot())).convert("RGB")


def difference(one: Image.Image, other: Image.Image) -> float:
    """How much differs of the tile in which most does, of 1; all of it where one picture is larger."""
    if abs(one.width - other.width) > SCALE or abs(one.height - other.height) > 2 * SCALE:
        return 1.0
    width, height = one.width // SCALE, min(one.height, other.height) // SCALE
    box = (0, 0, width * SCALE, height * SCALE)
    blur, shrink = ImageFilter.BoxBlur(1), Image.Resampling.BOX
    small = [image.crop(box).resize((width, height), shrink).filter(blur) for image in (one, other)]
    red, green, blue = ImageChops.difference(*small).split()
    largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    differs = largest.point([255 * (value > TOLERANCE) for value in range(256)])
    tiles = differs.resize((-(-width // TILE), -(-height // TILE)), shrink)
    return float(tiles.getextrema()[1]) / 255


@pytest.mark.parametrize("name", WINDOWS)
def test_looks_as_it_did(
    browser: Browser, stage: Stage, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    compare(draw(browser, stage, name), name, tmp_path, request)


@pytest.mark.parametrize("window", ["desk-light", "phone-light"])
@pytest.mark.parametrize("state", STATES)
def test_each_state_looks_as_it_did_and_breaks_no_rule_of_accessibility(
    browser: Browser, stage: Stage, state: str, window: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bring(browser, stage, state, **WINDOWS[window])
    browser.run("document.querySelectorAll('.age').forEach((words) => { words.style.visibility = 'hidden' })")
    compare(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"), f"{state}-{window}", tmp_path, request)
    assert violations(browser) == []


def compare(seen: Image.Image, name: str, directory: Path, request: pytest.FixtureRequest) -> None:
    """Hold what is seen against its picture."""
    golden = PICTURES / f"{name}.png"
    if request.config.getoption("--update-golden"):
        seen.save(golden, optimize=True)
    seen.save(directory / f"{name}.png")
    differs = difference(seen, Image.open(golden).convert("RGB"))
    assert differs <= PART, f"{differs:.2%} of {golden.name} differs; it looks now as {directory / golden.name}"


def test_a_host_with_200_vms_shows_the_six_in_trouble_first(
    browser: Browser, stage: Stage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stage.answers["/vms"] = (200, {"vms": full_host()})
    browser.open(stage.url, **WINDOWS["desk-light"])
    browser.wait("document.querySelectorAll('#vm-rows tbody').length === 100")
    browser.wait("document.querySelector('#vms-age').innerText && document.fonts.status === 'loaded'")
    browser.run("document.querySelectorAll('.age').forEach((words) => { words.style.visibility = 'hidden' })")
    seen, golden = Image.open(io.BytesIO(browser.screenshot())).convert("RGB"), PICTURES / "desk-200-vms.png"
    seen = seen.crop((0, 0, seen.width, min(seen.height, 1800)))
    if request.config.getoption("--update-golden"):
        seen.save(golden, optimize=True)
    seen.save(tmp_path / golden.name)
    differs = difference(seen, Image.open(golden).convert("RGB"))
    assert differs <= PART, f"{differs:.2%} of {golden.name} differs; it looks now as {tmp_path / golden.name}"


CHANGES = (
    "document.querySelector('.bar i.offline').className = 'used'",
    "document.querySelectorAll('.trouble')[0].style.visibility = 'hidden'",
    "document.body.style.setProperty('--red', '#1b7445')",
    "document.querySelector('#figures').style.marginTop = '12px'",
)


def test_what_an_eye_sees_is_seen(browser: Browser, stage: Stage) -> None:
    before = draw(browser, stage, "desk-light")
    assert difference(before, before) == 0
    for change in CHANGES:
        browser.run(change)
        after = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        assert difference(before, after) > PART, change
        before = after
