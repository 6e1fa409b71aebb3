"""axe-core, Deque's checker of accessibility: its one script, out of a Python package that brings it for another driver
of browsers and is not installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.lab.image import ImageError, cache_directory

PACKAGE = "axe-playwright-python==0.1.8"
_SCRIPT = "axe_playwright_python/axe.min.js"


def find_axe() -> str:
    """The script, fetched if need be.

    Raises:
        ImageError: pip cannot fetch it.
    """
    kept = cache_directory() / f"{PACKAGE}.js"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={scratch}", PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                raise ImageError(f"{PACKAGE} cannot be fetched: {done.stderr[-300:]}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                script = wheel.read(_SCRIPT)
            fresh = Path(scratch) / "axe.js"
            fresh.write_bytes(script)
            fresh.replace(kept)
    return kept.read_text()


if __name__ == "__main__":
    find_axe()
