"""Debian's chromium, headless, driven by selenium: one window, with a log of what it asked for and complained of.

Its font is the lab's alone (tests/lab/fonts.py), whatever this machine has.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.lab.fonts import find_fonts
from tests.lab.processes import Guard, wait_for

# Quiet, and drawing the same everywhere.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--lang=en-US", "--hide-scrollbars"),
    *("--disable-lcd-text", "--font-render-hinting=none", "--force-device-scale-factor=1"),
    *("--force-color-profile=srgb", "--disable-dev-shm-usage"),
)
FONTCONFIG = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


class Browser:
    """One window."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvmagent-browser-"))
        self._guard = Guard(self._directory)

    def __enter__(self) -> Browser:
        try:
            self._start()
        except BaseException:
            self._guard.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.driver.quit()
        finally:
            self._guard.release()

    def _start(self) -> None:
        browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
        if not (browser and driver):
            raise RuntimeError("chromium or chromium-driver is not there: run `make setup`")
        fonts = self._directory / "fonts.conf"
        fonts.write_text(FONTCONFIG.format(fonts=find_fonts(), cache=self._directory / "fontcache"))
        # HOME is how the guard knows the processes.
        environment = {**os.environ, "HOME": str(self._directory), "FONTCONFIG_FILE": str(fonts), "TZ": "UTC"}
        options = ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={self._directory / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(executable_path=driver, env=environment))
        self.driver.set_page_load_timeout(20)

    def open(self, url: str, *, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """Open a page in a window of this size, with no memory of an earlier one, and forget what was logged."""
        self._command("Storage.clearDataForOrigin", origin=url.rstrip("/"), storageTypes="all")
        phone = width < 600
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self._command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get("about:blank")
        self.complaints()
        self.requests()
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page; return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any, timeout_s: float = 15.0) -> Any:
        """Wait until an expression of the page is true, and return it."""
        return wait_for(lambda: self.run(f"return {script}", *arguments), timeout_s=timeout_s, what=script)

    def text(self, selector: str) -> str:
        """What is to be read in an element; a space that breaks no line is one like others."""
        text = str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))
        return text.replace("\N{NO-BREAK SPACE}", " ")

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        size = self._command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._command("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def complaints(self) -> list[str]:
        """What the console was told since this was asked last: errors, and what the policy forbade."""
        return [entry["message"] for entry in self._log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The URLs that were asked for since this was asked last."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def _log(self, kind: Literal["browser", "performance"]) -> list[dict[str, Any]]:
        return self.driver.get_log(kind)  # type: ignore[no-any-return, no-untyped-call]

    def _command(self, name: str, **parameters: Any) -> dict[str, Any]:
        return self.driver.execute_cdp_cmd(name, parameters)  # type: ignore[no-any-return]
