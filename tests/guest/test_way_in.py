"""A guest that reaches its host's loopback tries the agent, and does not get in.

guest -- 10.0.2.2:PORT --> QEMU's user-mode network --> 127.0.0.1:PORT, from QEMU's own process
"""

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.agent import LOOPBACK, AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.guest

# QEMU's user-mode network: the host as the guest sees it, and the guest. Source: QEMU, "Network emulation".
HOST, GUEST = "10.0.2.2", "10.0.2.15/24"
NETWORK = "<interface type='user'><model type='virtio'/></interface>"
BODY = json.dumps({"vmUuid": "wayin", "cpuNum": 4})
HEADERS = {"Content-Type": "application/json", "taskuuid": "t1", "callbackurl": "none"}


@pytest.fixture(scope="module")
def guest(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    guest = boot_module(GuestSpec(name="wayin", devices_xml=NETWORK, agent_channel=False))
    guest.run(f"ip link set eth0 up && ip addr add {GUEST} dev eth0")
    return guest


def ask(guest: Guest, port: int, *, host: str = HOST, token: str = "") -> str:
    """What the guest is answered when it asks for vCPUs, at a port of its host's loopback."""
    headers = {"Host": host, "Connection": "close", "Content-Length": str(len(BODY)), **HEADERS}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    head = "".join(f"{name}: {value}\\r\\n" for name, value in headers.items())
    guest.run(f"printf 'POST /vm/hotplug/cpu HTTP/1.1\\r\\n{head}\\r\\n%s' '{BODY}' > /run/request")
    return guest.run(f"nc -w 10 {HOST} {port} < /run/request || echo no connection")


def test_a_guest_with_user_mode_networking_does_not_get_in(guest: Guest, lab: PrivateLibvirtd, tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as open_to_all:
        # It does reach its host's loopback: what listens there is not kept from it.
        guest.run(f"(echo hello | nc {HOST} {open_to_all.getsockname()[1]} >/dev/null 2>&1 &)")
        open_to_all.settimeout(60)
        with open_to_all.accept()[0] as reached:
            assert reached.recv(5) == b"hello"
    with AgentProcess(uri=lab.uri, by_socket=True) as agent:
        assert "no connection" in ask(guest, agent.port)
        assert agent.get("/vms/wayin").status == 200
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"server:{hashlib.sha256(b'good').hexdigest()}\n")
    with AgentProcess(uri=lab.uri, settings={"security": {"tokens_file": str(tokens)}}, token="good") as agent:
        assert "CREDENTIALS_MISSING" in ask(guest, agent.port)
        assert "CREDENTIALS_WRONG" in ask(guest, agent.port, host=LOOPBACK, token="guess")
    network = {"allow_unauthenticated": "true", "allowed_clients": "192.0.2.0/24"}
    with AgentProcess(uri=lab.uri, settings={"security": network}, by_socket=True) as agent:
        assert "CLIENT_NOT_ALLOWED" in ask(guest, agent.port)
    assert guest.cpus_present() == "0"
