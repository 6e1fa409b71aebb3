"""The Ansible role: it rolls the package out to a machine with certificates, and changes nothing the second time."""

import http.client
import json
import re
import ssl
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lab.agent import find_free_port
from tests.lab.pki import LOOPBACK, Authority
from tests.lab.tree import FreshDebian, Tree
from tests.package.conftest import ROOT

CONTROLLER, COLLECTIONS = "/srv/controller", "/srv/collections"

Play = Callable[..., str]


@pytest.fixture(scope="module")
def port() -> int:
    """Where the agent shall listen."""
    return find_free_port()


@pytest.fixture(scope="module")
def controller(deb: Path, port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a controller has: the package, the certificates, an inventory with the machine itself."""
    directory = tmp_path_factory.mktemp("controller")
    (directory / deb.name).write_bytes(deb.read_bytes())
    authority = Authority(directory)
    for file, name in (("node1", LOOPBACK), ("server", "server.example")):
        both = authority.issue(name, file_name=file)
        key = re.search(r"-----BEGIN[^-]*PRIVATE KEY-----.*?-----END[^-]*-----\n", both.read_text(), re.DOTALL)
        assert key
        (directory / f"{file}.key").write_text(key.group())
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "kvmagent_deb": f"{CONTROLLER}/{deb.name}",
        "kvmagent_pki": CONTROLLER,
        "kvmagent_address": LOOPBACK,
        "kvmagent_port": port,
        "kvmagent_client_cert": f"{CONTROLLER}/server.pem",
        "kvmagent_client_key": f"{CONTROLLER}/server.key",
        "kvmagent_install_recommends": False,
        "kvmagent_settings": {"libvirt": {"uri": "test:///default"}, "security": {"allowed_names": "server.example"}},
    }
    inventory = {"kvmagent": {"hosts": {"node1": variables}}}
    (directory / "inventory.yml").write_text(json.dumps(inventory))
    return directory


@pytest.fixture(scope="module")
def tree(debian: FreshDebian, controller: Path) -> Tree:
    """A machine that Ansible can log in to: with Python, and services that run."""
    tree = debian.copy("ansible")
    tree.install("python3-apt", "systemd-standalone-sysusers")
    tree.run_services()
    tree.bind(controller, CONTROLLER)
    tree.bind(ROOT / "conf/ansible", f"{COLLECTIONS}/ansible_collections/kvmagent/hotplug")
    # The controller's Ansible is the one of these tests.
    for prefix in {sys.prefix, sys.base_prefix} - {"/usr"}:
        tree.bind(Path(prefix), prefix)
    return tree


@pytest.fixture(scope="module")
def play(tree: Tree) -> Play:
    """Runs the playbook on the machine; what it printed."""

    def run(**variables: Any) -> str:
        command = ["env", f"ANSIBLE_COLLECTIONS_PATH={COLLECTIONS}", sys.executable, "-m", "ansible", "playbook"]
        command += ["--inventory", f"{CONTROLLER}/inventory.yml", "--extra-vars", json.dumps(variables)]
        return tree.run(*command, "kvmagent.hotplug.site")

    return run


@pytest.fixture(scope="module")
def rolled_out(play: Play) -> str:
    """What the first run printed."""
    return play()


def test_a_machine_gets_the_agent_with_its_certificates_and_is_seen_healthy(
    rolled_out: str, controller: Path, port: int
) -> None:
    assert re.search(r"node1 .* failed=0 ", rolled_out), rolled_out
    context = ssl.create_default_context(cafile=controller / "ca.pem")
    context.load_cert_chain(controller / "server.pem")
    assert health(port, context) == 200
    with pytest.raises((ssl.SSLError, http.client.HTTPException, ConnectionError)):
        health(port, ssl.create_default_context(cafile=controller / "ca.pem"))


def test_the_second_run_changes_nothing(rolled_out: str, play: Play, tree: Tree) -> None:
    (before,) = tree.processes()
    assert re.search(r"node1 .* changed=0 .* failed=0 ", again := play()), again
    assert tree.processes() == [before]


def test_a_setting_that_changes_restarts_the_agent_and_a_token_is_the_agent_s_alone(
    rolled_out: str, play: Play, tree: Tree
) -> None:
    (before,) = tree.processes()
    token = tree.run("kvmagent", "--new-token", "zstack").splitlines()[0]
    output = play(kvmagent_tokens=[token])
    assert re.search(r"node1 .* changed=3 .* failed=0 ", output), output
    assert token not in output
    (after,) = tree.processes()
    assert before.pid != after.pid
    assert tree.run("stat", "--format=%U %a", "/etc/kvmagent/tokens").strip() == "kvmagent 600"
    roles = tree.run("grep", "^roles", "/etc/kvmagent/kvmagent.conf").strip()
    assert roles == "roles = group:kvmagent-admin admin, certificate:* admin, token:* plug unplug prepare read"


def health(port: int, context: ssl.SSLContext) -> int:
    """The status of /healthz."""
    with closing(http.client.HTTPSConnection(LOOPBACK, port, timeout=20, context=context)) as connection:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
