"""A guest that was migrated live between two daemons of one host: known as such for the rest of its boot."""

from collections.abc import Callable
from typing import Any

import libvirt
import pytest

from tests.lab.agent import AgentProcess, find_command, find_free_port, new_task_uuid
from tests.lab.confined import hide_processes
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

FLAGS = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE


def test_the_first_vcpu_goes_alone_over_pauses_and_restarts_of_an_agent_that_sees_no_qemu(
    boot: Callable[[GuestSpec], Guest], server: ManagementServer
) -> None:
    """libvirt has forgotten how the guest came before anybody looks at it, and the agent is killed after that."""
    guest = boot(GuestSpec(name="traveller"))
    way = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://127.0.0.1:{find_free_port()}"}
    with (
        PrivateLibvirtd() as other,
        other.connect() as there,
        AgentProcess(uri=other.uri, command=hide_processes(find_command())) as agent,
    ):
        remembered = agent.directory / "state/migrations.json"
        with guest.domain() as domain:
            domain.migrate3(there, way, FLAGS)
        arrived = there.lookupByName("traveller")
        arrived.suspend()
        arrived.resume()
        assert arrived.state()[1] == libvirt.VIR_DOMAIN_RUNNING_UNPAUSED, "libvirt has forgotten"
        wait_for(
            lambda: remembered.exists() and guest.uuid in remembered.read_text(),
            timeout_s=60,
            what="the agent to keep how the guest came",
        )
        agent.kill()
        agent.start()
        assert "VM_MIGRATED" in warnings(agent)
        task = new_task_uuid()
        body = {"vmUuid": "traveller", "cpuNum": 3}
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
        reply = server.wait(task, 180)
        counts = [(step["count"], step["target"]) for step in reply["steps"] if step["step"] == "SetVcpus"]
        assert counts == [(2, "live"), (3, "both")], reply
        assert (reply["outcome"], reply["after"]["guestCpuNum"]) == ("online", 3), reply
        arrived.destroy()
        arrived.create()
        assert "VM_MIGRATED" not in warnings(agent), "another run"


def warnings(agent: AgentProcess) -> list[Any]:
    """The codes of what the agent warns of."""
    return [problem["code"] for problem in agent.get("/vms/traveller").body["warnings"]]
