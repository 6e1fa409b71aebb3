"""The packages of tests/clients/package.json, for Node.js: a generator of TypeScript clients, and its compiler.

Installed once for each lock file, by npm from its registry as it is set up on this host.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.lab.image import cache_directory, call, publish

CLIENTS = Path(__file__).parents[1] / "clients"
#: What the generator needs at least.
NODE = 18


def find_node() -> str | None:
    """The path of node, None where there is none that is new enough: Ubuntu 22.04 has an older one."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return None
    version = re.match(
        r"v(\d+)", subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    )
    return node if version and int(version.group(1)) >= NODE else None


def find_node_packages() -> Path:
    """The directory `node_modules`, filled if need be.

    Raises:
        ImageError: npm failed.
    """
    files = [CLIENTS / name for name in ("package.json", "package-lock.json")]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    directory = cache_directory() / f"node-{key}"
    if not (directory / "node_modules").exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            unpacked = Path(scratch) / "node"
            unpacked.mkdir()
            for file in files:
                shutil.copy(file, unpacked)
            call("npm", "ci", "--prefix", str(unpacked), "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
            publish(unpacked, directory)
    return directory / "node_modules"


if __name__ == "__main__":
    if find_node() is None:
        print(f"no node {NODE} or newer: the TypeScript client is not tested here")
    else:
        find_node_packages()
