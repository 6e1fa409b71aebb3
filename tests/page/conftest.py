import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agent import write_node
from tests.lab.domainxml import GuestSpec
from tests.page.browser import Browser
from tests.page.scene import ANSWERS
from tests.page.stage import Stage


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """The browser, started once; every `open` starts from nothing."""
    if shutil.which("chromium") is None and platform.freedesktop_os_release()["ID"] == "ubuntu":
        pytest.skip("Ubuntu has chromium as a snap alone")
    with Browser() as running:
        yield running


@pytest.fixture
def stage() -> Iterator[Stage]:
    """The page with the answers of the scene."""
    with Stage(ANSWERS) as running:
        yield running


@pytest.fixture
def node_uri(tmp_path: Path) -> str:
    """libvirt's test driver with two VMs of ours."""
    return write_node(tmp_path, *(GuestSpec(name=name) for name in ("vm1", "vm2")))
