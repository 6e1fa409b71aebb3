"""A package as `make deb` builds it, and clean machines to install it on; both are made once."""

import fcntl
import http.client
import json
import os
import platform
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmagent import __version__
from tests.lab.pki import LOOPBACK, Authority
from tests.lab.tree import FreshDebian, Tree

ROOT = Path(__file__).parents[2]


Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="package")
def host_is_debian() -> None:
    """The package is for Debian, and built on it."""
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("the package is for Debian")


@pytest.fixture(scope="package")
def deb(host_is_debian: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, which the first that needs it compiles for all workers of this run."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "deb"
    directory.mkdir(exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = list(directory.glob("kvmagent_*.deb"))
        return built[0] if built else build(directory)


@pytest.fixture(scope="package")
def debian(host_is_debian: None) -> Iterator[FreshDebian]:
    """Where clean machines come from."""
    with FreshDebian() as debian:
        debian.bootstrap()
        yield debian


def build(directory: Path) -> Path:
    """Build the package as `make deb` does, with the Python packages of these tests."""
    # Python writes what it compiles, whatever the shell of these tests says of that.
    done = run(
        "env",
        "--unset=PYTHONDONTWRITEBYTECODE",
        "sh",
        str(ROOT / "conf/debian/build.sh"),
        sys.executable,
        str(directory),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (deb,) = directory.glob("kvmagent_*.deb")
    return deb


def run(*command: str) -> Done:
    """Run a command, whatever comes of it."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


CONTROLLER, COLLECTIONS = "/srv/controller", "/srv/collections"
NEWER = f"{int(__version__.partition('.')[0]) + 1}.0"


def control(tree: Tree, controller: Path) -> None:
    """Have a machine control itself: with a controller's files, the collection, and the Ansible of these tests."""
    tree.bind(controller, CONTROLLER)
    tree.bind(ROOT / "conf/ansible", f"{COLLECTIONS}/ansible_collections/kvmagent/hotplug")
    for prefix in {sys.prefix, sys.base_prefix} - {"/usr"}:
        tree.bind(Path(prefix), prefix)


def play_site(variables: Mapping[str, Any]) -> list[str]:
    """The command that runs the role on such a machine, which is an inventory's only host."""
    command = ["env", f"ANSIBLE_COLLECTIONS_PATH={COLLECTIONS}", sys.executable, "-m", "ansible", "playbook"]
    command += ["--inventory", f"{CONTROLLER}/inventory.yml", "--extra-vars", json.dumps(variables)]
    return [*command, "kvmagent.hotplug.site"]


def issue(authority: Authority, file: str, name: str) -> None:
    """Make a certificate beside the CA's, and its key in a file of its own."""
    both = authority.issue(name, file_name=file)
    key = re.search(r"-----BEGIN[^-]*PRIVATE KEY-----.*?-----END[^-]*-----\n", both.read_text(), re.DOTALL)
    assert key
    both.with_suffix(".key").write_text(key.group())


def write_inventory(authority: Authority, port: int, package: Mapping[str, str]) -> Path:
    """Write what a controller has: certificates, and an inventory with the machine itself; the directory of it."""
    directory = authority.ca_file.parent
    for file, name in (("node1", LOOPBACK), ("server", "server.example")):
        issue(authority, file, name)
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "kvmagent_pki": CONTROLLER,
        "kvmagent_address": LOOPBACK,
        "kvmagent_port": port,
        "kvmagent_client_cert": f"{CONTROLLER}/server.pem",
        "kvmagent_client_key": f"{CONTROLLER}/server.key",
        "kvmagent_install_recommends": False,
        "kvmagent_settings": {
            "libvirt": {"uri": "test:///default"},
            "security": {"allowed_names": ["server.example", "prometheus.example"]},
        },
        **package,
    }
    inventory = {"kvmagent": {"hosts": {"node1": variables}}}
    (directory / "inventory.yml").write_text(json.dumps(inventory))
    return directory


def health(port: int, context: ssl.SSLContext) -> int:
    """The status of /healthz."""
    with closing(http.client.HTTPSConnection(LOOPBACK, port, timeout=20, context=context)) as connection:
        connection.request("GET", "/healthz")
        return connection.getresponse().status


def make_newer(deb: Path, directory: Path) -> Path:
    """The same package as its next version: other code, other defaults in its configuration."""
    content, newer = directory / "content", directory / f"kvmagent_{NEWER}-1.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", str(deb), str(content)], check=True)
    edit(content / "DEBIAN/control", r"(?m)^Version: .*$", f"Version: {NEWER}-1")
    edit(content / "usr/share/kvmagent/kvmagent.conf", r"\Z", "# A key of the new version\nnewer_key = 1\n")
    set_version(content)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(content), str(newer)], check=True)
    return newer


def set_version(content: Path) -> None:
    """Make the programs of an unpacked package those of the next version."""
    (module,) = content.glob("usr/lib/kvmagent/lib/python3*/site-packages/kvmagent/__init__.py")
    edit(module, r'__version__ = ".*"', f'__version__ = "{NEWER}"')


def edit(file: Path, pattern: str, text: str) -> None:
    """Replace the one place where the pattern is found."""
    changed, count = re.subn(pattern, text, file.read_text())
    assert count == 1, file
    file.write_text(changed)
