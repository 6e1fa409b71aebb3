"""A day of two hosts in a minute, before a server that reads as ZStack does: what it believes is true each time."""

import uuid
from collections.abc import Callable
from contextlib import ExitStack

import libvirt
import libvirt_qemu
import pytest

from tests.lab.agent import AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.zstackserver import Host, Unreadable, ZStackServer, parse, read_text

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
LIMIT_S = 60
REPORTED = {"reportvmstart", "reportvmshutdown", "reportvmshutdown/from/guest", "reportvmreboot", "reconnectme"}


class Truth:
    """What libvirt says when the server comes to believe something; what was untrue then."""

    def __init__(self) -> None:
        self.labs: dict[str, PrivateLibvirtd] = {}
        self.checked: list[str] = []
        self.untrue: list[str] = []

    def compare(self, host: Host, vm: str, state: str) -> None:
        with self.labs[host.uuid].connect() as connection:
            try:
                found = connection.lookupByName(vm).state()[0]
            except libvirt.libvirtError:
                found = libvirt.VIR_DOMAIN_SHUTOFF
        off = found in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTDOWN)
        # Called off while its QEMU could still run its guest: a server may start it a second time.
        if (state == "Shutdown" and not off) or (state == "Running" and found == libvirt.VIR_DOMAIN_PAUSED):
            self.untrue.append(f"{vm} is believed {state}, and is in libvirt's state {found}")
        self.checked.append(state)


def test_a_day(boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd) -> None:
    truth, vm = Truth(), uuid.uuid4().hex
    with ExitStack() as stack:
        server = stack.enter_context(ZStackServer(truth.compare))
        other_lab = stack.enter_context(PrivateLibvirtd())
        agent, other = (stack.enter_context(AgentProcess(uri=one.uri)) for one in (lab, other_lab))
        host, other_host = Host(agent.port), Host(other.port)
        truth.labs = {host.uuid: lab, other_host.uuid: other_lab}

        # Morning: both hosts are added, a VM is started.
        for one in (host, other_host):
            server.connect(one)
            server.ping(one)
        guest = boot(GuestSpec(name=vm))
        server.ping(host)
        assert host.states == {vm: "Running"}

        # It gets more of both, while the pings go on.
        _, cpu = server.send(host, "/vm/increase/cpu", {"vmUuid": vm, "cpuNum": 2, "kvmHostAddons": None})
        server.ping(host)
        assert server.wait("/vm/increase/cpu", cpu) == {"success": True, "error": "", "cpuNum": 2}
        reply = server.call(host, "/vm/increase/mem", {"vmUuid": vm, "memorySize": 384 * MIB})
        assert reply == {"success": True, "error": "", "memorySize": 384 * MIB}
        assert guest.cpus_online() == "0-1"
        refused = server.call(host, "/vm/increase/cpu", {"vmUuid": vm, "cpuNum": 64})
        assert not refused["success"]
        assert "stop the VM and start it again" in refused["error"]

        # Noon: the agent is killed in the middle of a task, and started again.
        status, task = server.send(
            host, "/vm/online/changecpumem", {"vmUuid": vm, "cpuNum": 3, "memorySize": 512 * MIB}
        )
        assert status == 200
        agent.kill()
        with pytest.raises(ConnectionError):
            server.ping(host)
        agent.start()
        assert server.wait("/vm/online/changecpumem", task) == {
            "success": True,
            "error": "",
            "cpuNum": 3,
            "memorySize": 512 * MIB,
        }
        server.ping(host)
        assert host.reconnects == 0  # it still knows who connected

        # The server is restarted: it forgets a task, which the agent then leaves alone.
        status, forgotten = server.send(host, "/vm/increase/cpu", {"vmUuid": vm, "cpuNum": 4})
        assert status == 200
        server.restart()
        server.connect(host)
        server.connect(other_host)
        wait_for(lambda: forgotten in server.late, timeout_s=LIMIT_S, what="the forgotten task's callback")
        wait_for(lambda: agent.get(f"/tasks/{forgotten}").body["state"] == "gone", timeout_s=LIMIT_S, what="its end")

        # Afternoon: a snapshot's pause is none; a migration moves the VM.
        with guest.domain() as domain:
            domain.suspend()
            domain.resume()
        server.ping(host)
        # The harness does not outlive the first QEMU: its socket goes with it.
        guest.run_later("until [ -e /tmp/off ]; do usleep 200000; done; poweroff -f")
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_UNSAFE
        flags |= libvirt.VIR_MIGRATE_PERSIST_DEST
        to = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://127.0.0.1:{find_free_port()}"}
        with guest.domain() as domain:
            domain.migrateToURI3(other_lab.uri, to, flags)
        server.forget(host, vm)
        for one in (other_host, host):
            server.ping(one)
        assert (host.states, other_host.states) == ({}, {vm: "Running"})

        # Evening: its user switches it off from inside.
        with other_lab.connect() as connection:
            create = '{"execute": "guest-file-open", "arguments": {"path": "/tmp/off", "mode": "w"}}'
            libvirt_qemu.qemuAgentCommand(connection.lookupByName(vm), create, 10, 0)
        wait_for(lambda: other_host.states[vm] == "Shutdown", timeout_s=LIMIT_S, what="the server to know")
        server.ping(other_host)
        wait_for(lambda: "kind=stopped" in other.log(), timeout_s=LIMIT_S, what="the end of QEMU")
        server.ping(other_host)
        assert other_host.states == {vm: "Shutdown"}

        agent.stop()
        other.stop()
    assert truth.untrue == []
    assert {"Running", "Shutdown"} <= set(truth.checked)
    assert {path.removeprefix("/kvm/") for path, _ in server.reports} <= REPORTED
    shutdowns = [body for path, body in server.reports if path == "/kvm/reportvmshutdown"]
    assert shutdowns == [{"vmUuid": vm, "detail": "by guest"}]


def test_the_server_s_side_reads_as_tomcat_and_gson_do() -> None:
    text = '{"error": "é", "cpuNum": 1, "later": {"a": [1]}}'
    assert read_text(text.encode(), "application/json") != text
    assert read_text(text.encode(), "application/json; charset=utf-8") == text
    fields = {"cpuNum": "int", "memorySize": "long", "states": {"*": "String"}}
    read = parse(text, fields)
    assert read == {"success": True, "error": "é", "cpuNum": 1, "memorySize": 0, "states": None}
    for broken in ("", "[]", '{"cpuNum": 2147483648}', '{"cpuNum": "two"}', '{"states": []}', '{"error": {}}'):
        with pytest.raises(Unreadable):
            parse(broken, fields)
