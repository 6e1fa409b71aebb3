"""What a ZStack server is told of real domains, and what it would believe of them; and what it is never told."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests.http.test_zstack import HOST, ZStack, connect
from tests.lab.agent import AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

LIMIT_S = 30


class Watched:
    """A server that an agent has been connected to, and what it is told of one VM from here on."""

    def __init__(self, lab: PrivateLibvirtd, agent: AgentProcess, server: ManagementServer, vm: str) -> None:
        self.zstack, self.agent, self.lab, self.vm = ZStack(agent, server), agent, lab, vm
        connect(self.zstack)

    def kinds(self) -> list[str]:
        """The kinds of events that the agent has seen of the VM, in order."""
        lines = [line for line in self.agent.log().splitlines() if "vm event" in line and f"vm={self.vm}" in line]
        return [line.partition("kind=")[2].split()[0] for line in lines]

    def told(self) -> list[tuple[str, Any]]:
        """The reports about the VM, in order, without what all paths begin with."""
        reports = [(path, body) for path, body in self.zstack.told() if body.get("vmUuid") == self.vm]
        assert all(path.startswith("/kvm/report") for path, _ in reports)
        return [
            (path.removeprefix("/kvm/report"), {name: body[name] for name in body if name != "vmUuid"})
            for path, body in reports
        ]

    def after(self, kind: str, act: Callable[[], Any]) -> None:
        """Do something to the VM and wait until the agent has seen an event of this kind."""
        before = self.kinds().count(kind)
        act()
        wait_for(lambda: self.kinds().count(kind) > before, timeout_s=LIMIT_S, what=f"the event {kind} of {self.vm}")

    def state(self) -> str:
        """What the server would believe of the VM: the same from both of its questions, where it is active."""
        states = self.zstack.call("/vm/checkstate", {"vmUuids": [self.vm], "hostUuid": HOST})["states"]
        synced = self.zstack.call("/vm/vmsync", {"hostUuid": HOST})["states"]
        assert synced.get(self.vm, "Shutdown") == states[self.vm]
        return str(states[self.vm])

    def in_shutdown(self) -> bool:
        """Whether the server would believe that the VM is on its way down."""
        return self.vm in self.zstack.call("/vm/vmsync", {"hostUuid": HOST})["vmInShutdowns"]


@contextlib.contextmanager
def watch(lab: PrivateLibvirtd, vm: str) -> Iterator[Watched]:
    with ManagementServer() as server, AgentProcess(uri=lab.uri) as agent:
        yield Watched(lab, agent, server, vm)


def qemu_pid(lab: PrivateLibvirtd, vm: str) -> int:
    """The process of a VM's QEMU, by the file that libvirt keeps."""
    (file,) = lab.directory.rglob(f"{vm}.pid")
    return int(file.read_text())


def test_pause_reset_save_kill_and_destroy_are_told_as_zstack_tells_them(
    define: Callable[..., Guest], lab: PrivateLibvirtd
) -> None:
    vm = uuid.uuid4().hex
    with watch(lab, vm) as watched:
        guest = define(GuestSpec(name=vm), running=False)
        assert watched.state() == "Shutdown"

        def call(method: str, *arguments: Any) -> Callable[[], None]:
            def run() -> None:
                with guest.domain() as domain:
                    getattr(domain, method)(*arguments)

            return run

        watched.after("started", guest.start)
        assert watched.state() == "Running"
        watched.after("paused", call("suspend"))
        assert watched.state() == "Paused"
        watched.after("resumed", call("resume"))
        watched.after("stopped", call("managedSave"))
        assert watched.state() == "Shutdown"
        watched.after("started", guest.start)
        watched.after("rebooted", call("reset"))
        watched.after("stopped", lambda: os.kill(qemu_pid(lab, vm), signal.SIGKILL))
        assert watched.state() == "Shutdown"
        watched.after("started", guest.start)
        watched.after("stopped", call("destroy"))
        assert watched.state() == "Shutdown"
        watched.agent.stop()  # after what is being sent
        start = ("vmstart", {})
        told = watched.told()
        assert told[:4] == [start, start, ("vmreboot", {}), start]
        # QEMU says that it was told to end where it comes to saying anything.
        assert told[4:] in ([], [("vmshutdown", {"detail": "by host"})])


def test_a_vm_whose_guest_is_off_and_whose_qemu_is_not_still_has_its_disks(
    boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd
) -> None:
    vm = uuid.uuid4().hex
    guest = boot(GuestSpec(name=vm))
    with watch(lab, vm) as watched:
        pid = qemu_pid(lab, vm)
        # libvirt hears of the power-off when QEMU can no longer act on what libvirt then asks of it: to end.
        lab.pause()
        try:
            guest.run_later("poweroff -f")
            wait_for(lambda: is_halted(guest, pid), timeout_s=LIMIT_S, what="the guest's power-off")
            os.kill(pid, signal.SIGSTOP)
        finally:
            lab.resume()
        try:
            wait_for(lambda: "shutdown" in watched.kinds(), timeout_s=LIMIT_S, what="the guest's shutdown")
            assert watched.state() == "Running"
            assert watched.in_shutdown()
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: "stopped" in watched.kinds(), timeout_s=LIMIT_S, what="the end of QEMU")
        assert watched.state() == "Shutdown"
        assert not watched.in_shutdown()
        watched.agent.stop()
        assert watched.told() == [("vmshutdown", {"detail": "by guest"}), ("vmshutdown/from/guest", {})]


def is_halted(guest: Guest, pid: int) -> bool:
    """Whether the guest said its last word, and QEMU has dealt with what came after it: its threads are asleep."""
    return "Power down" in guest.console() and all(time.sleep(0.02) or is_asleep(pid) for _ in range(10))


def is_asleep(pid: int) -> bool:
    # A thread may end meanwhile.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
        return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"S"}
    return False


def test_a_live_migration_is_a_start_on_one_side_and_nothing_on_the_other(
    define: Callable[..., Guest], lab: PrivateLibvirtd
) -> None:
    vm = uuid.uuid4().hex
    guest = define(GuestSpec(name=vm), running=False)
    guest.start()
    guest.wait_booted()  # caught in its firmware, it may reset on the other side
    with PrivateLibvirtd() as target, watch(lab, vm) as source_side, watch(target, vm) as target_side:
        assert (source_side.state(), target_side.state()) == ("Running", "Shutdown")
        flags = (
            libvirt.VIR_MIGRATE_LIVE
            | libvirt.VIR_MIGRATE_PEER2PEER
            | libvirt.VIR_MIGRATE_PERSIST_DEST
            | libvirt.VIR_MIGRATE_UNSAFE
        )
        uri = f"tcp://127.0.0.1:{find_free_port()}"
        with guest.domain() as domain:
            domain.migrateToURI3(target.uri, {libvirt.VIR_MIGRATE_PARAM_URI: uri}, flags)
        wait_for(lambda: "stopped" in source_side.kinds(), timeout_s=LIMIT_S, what="the VM to have left")
        wait_for(lambda: "resumed" in target_side.kinds(), timeout_s=LIMIT_S, what="the VM to have come")
        # The definition that stays behind is no VM of that host.
        assert (source_side.state(), target_side.state()) == ("Shutdown", "Running")
        assert source_side.zstack.call("/vm/vmsync", {"hostUuid": HOST})["states"] == {}
        source_side.agent.stop()
        target_side.agent.stop()
        assert source_side.told() == []
        assert target_side.told() == [("vmstart", {})]


def test_a_panic_that_the_guest_tells_is_a_crash(define: Callable[..., Guest], lab: PrivateLibvirtd) -> None:
    vm = uuid.uuid4().hex
    guest = define(GuestSpec(name=vm, devices_xml="<panic model='isa'/>"), running=False)
    guest.start()
    with watch(lab, vm) as watched:
        # What the pvpanic driver of a guest's kernel does: bit 0 on the device's port is a panic.
        # Source: QEMU docs/specs/pvpanic.rst
        with guest.domain() as domain:
            libvirt_qemu.qemuMonitorCommand(domain, "o /b 0x505 1", libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        wait_for(lambda: "stopped" in watched.kinds(), timeout_s=LIMIT_S, what="the end of QEMU")
        assert watched.state() == "Shutdown"
        watched.agent.stop()
        assert watched.told()[0] == ("vmcrash", {})
        assert watched.told()[1:] in ([], [("vmshutdown", {"detail": "by host"})])
