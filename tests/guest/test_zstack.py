"""A ZStack management server's whole conversation with a host that has a real guest."""

import threading
import uuid
from collections.abc import Callable

import pytest

from tests.http.test_zstack import HOST, ZStack, connect
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
LIMIT_S = 30
#: All that ZStack's own agent reports of VMs, and of gaps in what it has seen.
REPORTED = {
    "/kvm/reportvmstart",
    "/kvm/reportvmshutdown",
    "/kvm/reportvmshutdown/from/guest",
    "/kvm/reportvmcrash",
    "/kvm/reportvmreboot",
    "/kvm/reconnectme",
}


def test_from_connect_to_a_vm_that_was_stopped_from_outside(
    boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd
) -> None:
    vm = uuid.uuid4().hex
    with ManagementServer() as server, AgentProcess(uri=lab.uri) as agent:
        zstack = ZStack(agent, server)
        assert zstack.sync("/host/echo")[0] == 200
        assert zstack.call("/host/fact", {})["libvirtVersion"].count(".") == 2
        assert connect(zstack)["qemuVersion"].count(".") == 2
        guest = boot(GuestSpec(name=vm))
        wait_for(
            lambda: zstack.reports("/kvm/reportvmstart") == [{"vmUuid": vm}],
            timeout_s=LIMIT_S,
            what="the start's report",
        )
        assert zstack.call("/host/capacity", {})["usedMemory"] == 256 * MIB
        assert zstack.call("/vm/vmsync", {"hostUuid": HOST})["states"] == {vm: "Running"}

        # A long plug, and a ping every moment of it: the server gives up a host that does not answer.
        pings: list[bool] = []
        done = threading.Event()

        def ping() -> None:
            while not done.wait(0.2):
                pings.append(zstack.call("/host/ping", {"hostUuid": HOST})["hostUuid"] == HOST)

        pinging = threading.Thread(target=ping)
        pinging.start()
        mem_total_kib = guest.mem_total_kib()
        reply = zstack.call("/vm/increase/cpu", {"vmUuid": vm, "cpuNum": 2, "kvmHostAddons": None})
        assert (reply["success"], reply["cpuNum"], reply["outcome"]) == (True, 2, "online")
        assert guest.cpus_online() == "0-1"
        reply = zstack.call("/vm/increase/mem", {"vmUuid": vm, "memorySize": 384 * MIB})
        assert (reply["success"], reply["memorySize"], reply["outcome"]) == (True, 384 * MIB, "online")
        assert guest.mem_total_kib() - mem_total_kib == 128 * 1024
        reply = zstack.call("/vm/online/changecpumem", {"vmUuid": vm, "cpuNum": 3, "memorySize": 512 * MIB})
        assert (reply["success"], reply["cpuNum"], reply["memorySize"]) == (True, 3, 512 * MIB)
        assert guest.cpus_online() == "0-2"
        assert guest.mem_total_kib() - mem_total_kib == 256 * 1024
        done.set()
        pinging.join()
        assert pings
        assert all(pings)

        lab.restart()
        wait_for(lambda: zstack.reports("/kvm/reconnectme"), timeout_s=LIMIT_S, what="the request to connect again")
        connect(zstack)

        guest.run("true")
        guest.reboot()
        wait_for(lambda: zstack.reports("/kvm/reportvmreboot"), timeout_s=LIMIT_S, what="the reboot's report")
        guest.power_off()
        wait_for(
            lambda: zstack.reports("/kvm/reportvmshutdown/from/guest"), timeout_s=LIMIT_S, what="the guest's shutdown"
        )
        wait_for(lambda: "kind=stopped" in agent.log(), timeout_s=LIMIT_S, what="the end of QEMU")
        assert zstack.call("/vm/checkstate", {"vmUuids": [vm], "hostUuid": HOST})["states"] == {vm: "Shutdown"}
        assert zstack.call("/vm/vmsync", {"hostUuid": HOST})["states"] == {}
        agent.stop()  # after what is being sent
        assert {path for path, _ in zstack.told()} <= REPORTED
        assert zstack.reports("/kvm/reportvmreboot") == [{"vmUuid": vm}]
        assert zstack.reports("/kvm/reportvmshutdown") == [{"vmUuid": vm, "detail": "by guest"}]
