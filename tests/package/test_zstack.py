"""docs/zstack.md on a machine: its steps word for word, then a server's side; and the same by the Ansible role."""

import http.client
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.lab.agent import find_free_port
from tests.lab.booted import Booted
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer
from tests.lab.tree import FreshDebian
from tests.package.conftest import CONTROLLER, ROOT, control, play_site

pytestmark = pytest.mark.guest

DOCUMENT = ROOT / "docs/zstack.md"
SERVER = "10.0.0.100"


class Original(BaseHTTPRequestHandler):
    """ZStack's own agent: it answers everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"orig")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def original() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Original) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


class Node:
    """A booted machine, and a server's way to it."""

    def __init__(self, machine: Booted, port: int, server: ManagementServer) -> None:
        self.machine, self.port, self.server = machine, port, server

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def increase_cpu(self) -> Any:
        """The callback of a command for a VM that is not there: the whole way, without a guest."""
        task = uuid.uuid4().hex
        body = {"vmUuid": "f" * 32, "cpuNum": 2}
        assert self.post("/vm/increase/cpu", body, taskuuid=task, callbackurl=self.server.url)[0] == 200
        return self.server.wait(task, 60)

    def is_served(self) -> None:
        """See that both agents are reached, and that the doctor says so."""
        assert self.post("/host/ping", {"hostUuid": "h"}) == (200, "orig")
        reply = self.increase_cpu()
        assert (reply["success"], reply["errorCode"]) == (False, "VM_NOT_FOUND")
        assert "Reconnect the host in ZStack" in reply["error"]
        assert "caller=token:zstack" in self.machine.journal("kvmagent.service")
        told = json.loads(self.machine.run("sh", "-c", "kvmagentctl doctor --json || true"))
        front = [(one["level"], one["message"]) for one in told["findings"] if one["check"] == "front"]
        assert [level for level, _ in front] == ["good", "good"], front


@pytest.fixture
def boot(debian: FreshDebian, deb: Path, tmp_path: Path) -> Iterator[Callable[[str], Booted]]:
    """Boots a machine with libvirt, which shows a directory of the test as the controller's."""
    machines: list[Booted] = []

    def boot_machine(name: str) -> Booted:
        tree = debian.copy(name)
        tree.install("systemd-sysv", "dbus", "libpam-systemd", "polkitd", "libvirt-daemon-system", "python3-apt")
        tree.run("apt-get", "install", "--yes", "--quiet", "--download-only", "--no-install-recommends", "haproxy")
        (tmp_path / deb.name).write_bytes(deb.read_bytes())
        control(tree, tmp_path)
        machine = Booted(tree)
        machine.__enter__()
        machines.append(machine)
        return machine

    yield boot_machine
    for machine in machines:
        machine.__exit__(None, None, None)


def test_the_manual_s_steps_make_a_node_and_its_way_back_unmakes_it(
    boot: Callable[[str], Booted], original: int, server: ManagementServer
) -> None:
    text = DOCUMENT.read_text()
    (steps,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (back,) = re.findall(r"^    (systemctl disable --now .*)$", text, re.MULTILINE)
    machine = boot("zstack")
    node = Node(machine, find_free_port(), server)
    # What another machine would have anyway: a server of another address, and ports that nobody has.
    own, shipped = find_free_port(), "/usr/share/doc/kvmagent/examples/zstack/haproxy.cfg"
    here = {f"{SERVER}:8080": f"127.0.0.1:{server.port}", SERVER: "127.0.0.1", "port = 7071": f"port = {own}"}
    for manual, value in here.items():
        assert manual in steps
        steps = steps.replace(manual, value)
    copied = f"cp {shipped} /etc/haproxy/haproxy.cfg\n"
    assert copied in steps
    ports = {
        "127.0.0.1:7070$": f"127.0.0.1:{original}",
        "127.0.0.1:7071$": f"127.0.0.1:{own}",
        ":7072$": f":{node.port}",
    }
    edits = " ".join(f"-e 's/{found}/{port}/'" for found, port in ports.items())
    steps = steps.replace(copied, f"{copied}sed -i {edits} /etc/haproxy/haproxy.cfg\n")
    # A package that is just installed listens on 7070, which may be another test's.
    conf = f"mkdir -p /etc/kvmagent && printf '[http]\\nport = {own}\\n' >/etc/kvmagent/kvmagent.conf"
    machine.run("sh", "-c", conf)
    keep = "-oDpkg::Options::=--force-confdef -oDpkg::Options::=--force-confold"
    steps = steps.replace("apt-get install --yes ", f"apt-get install --yes --no-install-recommends {keep} ")
    done = machine.run(
        "sh", "-euc", f"cd {CONTROLLER}\n{steps.replace('kvmagentctl doctor', 'kvmagentctl doctor || true')}"
    )
    assert f"good     front: port {node.port} forwards hotplug to this agent" in done, done
    wait_for(lambda: node.post("/host/echo", {})[0] == 200, timeout_s=30, what="the front")
    node.is_served()
    assert machine.run("stat", "--format=%U %a", "/etc/default/haproxy", "/etc/kvmagent/tokens").splitlines() == [
        "root 600",
        "kvmagent 600",
    ]
    assert roles(machine) == ["token:zstack plug", "group:kvmagent-admin admin"]
    assert "kvmagent/kvmagent" in machine.journal("haproxy.service")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", "kvmagent")
    wait_for(lambda: node.post("/vm/increase/cpu", {})[0] == 400, timeout_s=60, what="the agent to be back")
    node.is_served()
    machine.run("sh", "-c", back)
    with pytest.raises(ConnectionRefusedError):
        node.post("/host/echo", {})


def test_the_role_makes_the_same_node_and_changes_nothing_the_second_time(
    boot: Callable[[str], Booted], original: int, server: ManagementServer, tmp_path: Path, deb: Path
) -> None:
    machine = boot("zstack-ansible")
    node = Node(machine, find_free_port(), server)
    own = find_free_port()
    machine.run("sh", "-c", f"mkdir -p /etc/kvmagent && printf '[http]\\nport = {own}\\n' >/etc/kvmagent/kvmagent.conf")
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "kvmagent_deb": f"{CONTROLLER}/{deb.name}",
        "kvmagent_install_recommends": False,
        "kvmagent_zstack_servers": ["127.0.0.1"],
        "kvmagent_zstack_callback_port": server.port,
        "kvmagent_zstack_front_port": node.port,
        "kvmagent_zstack_port": own,
        "kvmagent_zstack_original_port": original,
    }
    (tmp_path / "inventory.yml").write_text(json.dumps({"kvmagent": {"hosts": {"node1": variables}}}))
    play = play_site({})
    first = machine.run(*play)
    assert re.search(r"node1 .* failed=0 ", first), first
    node.is_served()
    assert roles(machine) == ["token:zstack plug", "group:kvmagent-admin admin", "certificate:* admin"]
    assert re.search(r"node1 .* changed=0 .* failed=0 ", again := machine.run(*play)), again


def roles(machine: Booted) -> list[str]:
    """Who may do what on the node: haproxy's token plugs, and nothing else."""
    return machine.run("sed", "-n", "s/^roles = //p", "/etc/kvmagent/kvmagent.conf").strip().split(", ")
