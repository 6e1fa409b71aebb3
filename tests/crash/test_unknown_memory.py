"""What a libvirtd that was killed inside an attach leaves: QEMU has a dimm, libvirt does not know of it."""

import json
from typing import Any

import libvirt_qemu
import pytest
from lxml import etree

from tests.crash.conftest import StartAgent, find_dimms
from tests.lab.agent import new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.server import ManagementServer

MIB = 2**20
ALIAS, TASK = "ua-kvmagent-earlier-0", new_task_uuid()
pytestmark = pytest.mark.guest


def ask_qemu(guest: Guest, command: str, **arguments: Any) -> Any:
    with guest.domain() as domain:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))["return"]


def test_later_plugs_work_and_count_it(lab: Any, define: Any, make_agent: StartAgent, server: ManagementServer) -> None:
    guest: Guest = define(GuestSpec(name="unknown"))
    # The commands that libvirtd sends, of which it did not live to see the end.
    ask_qemu(guest, "object-add", **{"qom-type": "memory-backend-ram", "id": f"mem{ALIAS}", "size": 128 * MIB})
    ask_qemu(guest, "device_add", driver="pc-dimm", id=ALIAS, memdev=f"mem{ALIAS}", slot=0, node=0)
    lab.restart()
    agent = make_agent(lab.uri)
    body = {"vmUuid": "unknown", "memorySize": 512 * MIB}
    assert agent.post("/vm/hotplug/memory", body, task_uuid=TASK, callback_url=server.url).status == 200
    reply = server.wait(TASK, 60)
    assert (reply["outcome"], reply["memorySize"], reply["before"]["memorySize"]) == ("plugged", 512 * MIB, 384 * MIB)
    (warning,) = (one for one in reply["warnings"] if one["code"] == "MEMORY_UNKNOWN_TO_LIBVIRT")
    assert f"{ALIAS} (128 MiB)" in warning["message"]
    of_qemu = {one["data"]["id"]: one["data"]["slot"] for one in ask_qemu(guest, "query-memory-devices")}
    assert of_qemu == {ALIAS: 0, f"ua-kvmagent-{TASK}-0": 1}
    live, config = find_dimms(guest)
    assert live == [f"ua-kvmagent-{TASK}-0"]
    assert sorted(config) == [f"ua-kvmagent-{TASK}-{n}" for n in range(2)]


def test_memory_that_no_device_uses_yet_is_no_hindrance(
    lab: Any, define: Any, make_agent: StartAgent, server: ManagementServer
) -> None:
    guest: Guest = define(GuestSpec(name="half"))
    task = new_task_uuid()
    alias = f"ua-kvmagent-{task}-0"
    # Killed a little earlier than above.
    ask_qemu(guest, "object-add", **{"qom-type": "memory-backend-ram", "id": f"mem{alias}", "size": 128 * MIB})
    lab.restart()
    agent = make_agent(lab.uri)
    body = {"vmUuid": "half", "memorySize": 384 * MIB}
    assert agent.post("/vm/hotplug/memory", body, task_uuid=task, callback_url=server.url).status == 200
    reply = server.wait(task, 60)
    assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB)
    assert find_dimms(guest) == ([alias], [alias])


@pytest.mark.parametrize("has_device", [False, True])
def test_a_virtio_mem_device_is_not_attached_twice_either(
    lab: Any, define: Any, make_agent: StartAgent, server: ManagementServer, *, has_device: bool
) -> None:
    """No system runs in this VM that would take its memory: what counts is that the device is found."""
    name = f"virtio{int(has_device)}"
    guest: Guest = define(GuestSpec(name=name))
    task = new_task_uuid()
    alias, size = f"ua-kvmagent-{task}-0", 128 * MIB
    ask_qemu(guest, "object-add", **{"qom-type": "memory-backend-ram", "id": f"mem{alias}", "size": 2 * size})
    if has_device:
        with guest.domain() as domain:
            ports = etree.fromstring(domain.XMLDesc()).findall("./devices/controller[@model='pcie-root-port']/alias")
        device = {"driver": "virtio-mem-pci", "id": alias, "memdev": f"mem{alias}", "node": 0, "requested-size": size}
        ask_qemu(guest, "device_add", **device, bus=ports[-1].get("name"), **{"block-size": 2 * MIB})
    lab.restart()
    agent = make_agent(lab.uri)
    body = {"vmUuid": name, "memorySize": 384 * MIB, "method": "virtio-mem", "timeoutSec": 1}
    assert agent.post("/vm/hotplug/memory", body, task_uuid=task, callback_url=server.url).status == 200
    reply = server.wait(task, 60)
    codes = {warning["code"] for warning in reply["warnings"]}
    assert [one["data"]["id"] for one in ask_qemu(guest, "query-memory-devices")] == [alias], reply
    assert ("MEMORY_UNKNOWN_TO_LIBVIRT" in codes) is has_device, reply
    assert reply["errorCode"] == ("LIBVIRT_REFUSED" if has_device else "VIRTIO_MEM_STALLED"), reply


def test_a_virtio_mem_device_in_the_port_of_the_next_one_is_named_and_nothing_is_lost(
    lab: Any, define: Any, make_agent: StartAgent, server: ManagementServer
) -> None:
    """libvirt takes the port for free, and QEMU refuses it; dimms need none."""
    guest: Guest = define(GuestSpec(name="port"))
    with guest.domain() as domain:
        devices = etree.fromstring(domain.XMLDesc()).find("devices")
    taken = {int(address.get("bus"), 16) for address in devices.iterfind(".//address[@type='pci']")}
    ports = devices.findall("./controller[@model='pcie-root-port']")
    port = next(one.find("alias").get("name") for one in ports if int(one.get("index")) not in taken)
    backend = {"qom-type": "memory-backend-ram", "id": f"mem{ALIAS}", "size": 256 * MIB}
    ask_qemu(guest, "object-add", **backend)
    ask_qemu(guest, "device_add", driver="virtio-mem-pci", id=ALIAS, memdev=f"mem{ALIAS}", node=0, bus=port)
    lab.restart()
    agent, objects = make_agent(lab.uri), ask_qemu(guest, "qom-list", path="/objects")
    former = guest.persistent_xml()
    # The first finds out that there is one on its way, and tells a slot less afterwards; the second knows before.
    for method, outcome in (("virtio-mem", "partial"), ("virtio-mem", "refused"), ("dimm", "plugged")):
        task = new_task_uuid()
        body = {"vmUuid": "port", "memorySize": 384 * MIB, "method": method}
        assert agent.post("/vm/hotplug/memory", body, task_uuid=task, callback_url=server.url).status == 200
        reply = server.wait(task, 60)
        assert reply["outcome"] == outcome, reply
        (warning,) = (one for one in reply["warnings"] if one["code"] == "MEMORY_UNKNOWN_TO_LIBVIRT")
        assert f"{ALIAS} (256 MiB)" in warning["message"]
        assert "Power the VM off and on" in warning["remedy"]
        if outcome == "refused":
            assert f"in use by virtio-mem-pci,id={ALIAS}" in reply["error"]
        if method == "virtio-mem":
            assert (reply["errorCode"], guest.persistent_xml()) == ("LIBVIRT_REFUSED", former)
            assert ask_qemu(guest, "qom-list", path="/objects") == objects
    assert find_dimms(guest) == ([f"ua-kvmagent-{task}-0"],) * 2
