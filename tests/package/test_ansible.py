"""The Ansible role: it rolls the package out to a machine with certificates, and changes nothing the second time."""

import http.client
import json
import re
import shutil
import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.lab.agent import find_free_port
from tests.lab.pki import LOOPBACK, Authority
from tests.lab.processes import wait_for
from tests.lab.tree import FreshDebian, Tree
from tests.package.conftest import (
    CONTROLLER,
    NEWER,
    ROOT,
    control,
    health,
    issue,
    make_newer,
    play_site,
    write_inventory,
)

Play = Callable[..., str]


@pytest.fixture(scope="module")
def port() -> int:
    """Where the agent shall listen."""
    return find_free_port()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA, whose files are in the controller's directory."""
    return Authority(tmp_path_factory.mktemp("controller"))


@pytest.fixture(scope="module")
def controller(deb: Path, port: int, authority: Authority) -> Path:
    """What a controller has: the package, the certificates, an inventory with the machine itself."""
    directory = write_inventory(authority, port, {"kvmagent_deb": f"{CONTROLLER}/{deb.name}"})
    (directory / deb.name).write_bytes(deb.read_bytes())
    return directory


@pytest.fixture(scope="module")
def tree(debian: FreshDebian, controller: Path) -> Tree:
    """A machine that Ansible can log in to: with Python, and services that run."""
    tree = debian.copy("ansible")
    tree.install("python3-apt", "systemd-standalone-sysusers")
    tree.run_services()
    control(tree, controller)
    return tree


@pytest.fixture(scope="module")
def play(tree: Tree) -> Play:
    """Runs the playbook on the machine; what it printed."""
    return lambda **variables: tree.run(*play_site(variables))


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


def test_local_commands_work_afterwards_and_lists_are_as_the_configuration_has_them(
    rolled_out: str, tree: Tree
) -> None:
    assert json.loads(tree.run("kvmagentctl", "status", "--json"))["ready"] is True
    assert json.loads(tree.run("kvmagentctl", "config", "--json"))["security"]["allowed_names"] == [
        "server.example",
        "prometheus.example",
    ]


def test_a_renewed_certificate_is_read_without_a_restart(
    rolled_out: str, play: Play, tree: Tree, authority: Authority, controller: Path, port: int
) -> None:
    play()  # as the inventory has it, whatever other tests have set
    (before,) = tree.processes()
    context = authority.client(controller / "server.pem")
    former = serial(port, context)
    issue(authority, "node1", LOOPBACK)
    assert re.search(r"node1 .* failed=0 ", output := play()), output
    wait_for(lambda: serial(port, context) != former, timeout_s=60, what="the new certificate")
    assert [one.pid for one in tree.processes()] == [before.pid]


def test_an_older_package_is_a_rollback_that_keeps_tasks_and_configuration(
    rolled_out: str,
    play: Play,
    tree: Tree,
    deb: Path,
    authority: Authority,
    controller: Path,
    port: int,
    tmp_path: Path,
) -> None:
    older = tree.run("kvmagent", "--version").strip()
    controller = authority.ca_file.parent
    newer = shutil.move(make_newer(deb, tmp_path), controller / f"kvmagent_{NEWER}-1.deb")
    assert re.search(r"node1 .* failed=0 ", output := play(kvmagent_deb=f"{CONTROLLER}/{newer.name}")), output
    assert tree.run("kvmagent", "--version").strip() == NEWER
    tree.run("sh", "-c", "kvmagentctl plug-cpu test 77 || true")
    (task,) = tree.run("kvmagentctl", "tasks", "--limit", "1", "-o", "name").split()
    configuration = tree.run("cat", "/etc/kvmagent/kvmagent.conf")
    assert re.search(r"node1 .* failed=0 ", output := play(kvmagent_deb=f"{CONTROLLER}/{deb.name}")), output
    assert tree.run("kvmagent", "--version").strip() == older
    told = json.loads(tree.run("kvmagentctl", "status", "--json"))
    assert (told["version"], told["ready"]) == (older, True), "it is the older agent that runs"
    assert json.loads(tree.run("kvmagentctl", "task", task, "--json"))["request"]["cpuNum"] == 77
    assert tree.run("cat", "/etc/kvmagent/kvmagent.conf") == configuration
    assert health(port, authority.client(controller / "server.pem")) == 200


# The operator's day, after docs/operate.md, on the node that the role rolled out: each line is written there.
DAY = (
    ("kvmagentctl status", r"ready, version"),
    ("kvmagentctl vms", r"^test +running"),
    ("kvmagentctl plug-cpu test 99 2>&1 || true", r"^kvmagentctl: MACHINE_NOT_SUPPORTED: "),
    ("kvmagentctl tasks --vm test --since 2h", r"HotPlugCpu +test +delivered +refused MACHINE_NOT_SUPPORTED"),
    ("kvmagentctl log test", r"none; requested: vCPUs 99 +refused MACHINE_NOT_SUPPORTED +unix:root"),
    ("kvmagentctl config --check", r"good"),
    ("service kvmagent status", r"is running"),
    ("kvmagentctl reclaim --dry-run", r"(?m)^VM +PROMISED"),
    ("cd /root && kvmagentctl support-bundle", r"kvmagent-support-\S+\.tar\.gz: \d+ files"),
    ("curl -s --unix-socket /run/kvmagent/kvmagent.sock http://localhost/healthz", r'"ready":true'),
)


def test_the_operator_s_day_after_the_manual(rolled_out: str, tree: Tree) -> None:
    """As root of the node, line by line. What is seen is what the manual says."""
    manual = (ROOT / "docs/operate.md").read_text()
    tree.install("curl")
    for line, seen in DAY:
        told = tree.run("sh", "-c", line)
        assert re.search(seen, told, re.MULTILINE), f"{line}:\n{told}"
        program = line.removeprefix("cd /root && ").split()
        assert " ".join(program[:1] if program[0] == "curl" else program[:2]) in manual, f"not in the manual: {line}"


def serial(port: int, context: ssl.SSLContext) -> str:
    """The serial number of the certificate that the agent shows."""
    with closing(http.client.HTTPSConnection(LOOPBACK, port, timeout=20, context=context)) as connection:
        connection.connect()
        shown = connection.sock.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])
