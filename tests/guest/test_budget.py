"""The host's memory on real guests: promised once, side by side, and free again when a guest gives it back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.kernelfiles import read_sizes
from kvmagent.hypervisor.qemuprocess import find_pid
from kvmagent.model.hostbudget import make_promise
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
#: What two guests may grow by in all, and each alone wants.
ROOM, WANTED = 400 * MIB, 256 * MIB


def promised_of(guest: Guest) -> int:
    live = parse_definition(guest.live_xml())
    return make_promise(guest.uuid, guest.name, live, default_page_bytes=None).size_bytes


def resident_of(guest: Guest) -> int:
    return read_sizes(Path(f"/proc/{find_pid(Path('/'), guest.uuid)}/status"))["VmRSS"]


def test_memory_that_the_guest_freed_leaves_the_host_s_use(
    boot: Callable[[GuestSpec], Guest], send: Callable[..., Any]
) -> None:
    guest = boot(GuestSpec(name="vm3", memory_mib=512))
    reply = send("/vm/hotplug/ready", guest, prepare=True, freePageReporting=True)
    assert reply["outcome"] == "configured", reply
    assert reply["changes"] == [{"field": "freePageReporting", "former": False, "prepared": True}]
    assert send("/vm/hotplug/ready", guest, prepare=True)["outcome"] == "unchanged", "it stays on"

    def fill_and_free() -> tuple[int, int]:
        before = resident_of(guest)
        guest.run("mkdir -p /fill; mount -t tmpfs none /fill; dd if=/dev/zero of=/fill/x bs=1M count=150; sync")
        full = resident_of(guest)
        assert full > before + 100 * MIB
        guest.run("umount /fill")
        return before, full

    before, full = fill_and_free()
    assert resident_of(guest) > full - 50 * MIB, "without it the host keeps the pages"
    guest.restart()
    before, full = fill_and_free()
    wait_for(lambda: resident_of(guest) < full - 100 * MIB, timeout_s=60, what=f"less than {full}, as before {before}")


def test_of_two_guests_that_together_would_exceed_it_one_is_refused_until_the_other_gives_back(
    lab: PrivateLibvirtd, boot: Callable[[GuestSpec], Guest]
) -> None:
    guests = [boot(GuestSpec(name=name, kernel_args="memhp_default_state=online_movable")) for name in ("vm1", "vm2")]
    promised = sum(map(promised_of, guests))
    meminfo = read_sizes(Path("/proc/meminfo"))
    pages = sum(
        int((path / "nr_hugepages").read_text()) * int(path.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        for path in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")
    )
    reserve = meminfo["MemTotal"] - pages - promised - ROOM
    settings = {"host": {"memory_reserve": str(reserve)}}
    with ManagementServer() as server, AgentProcess(uri=lab.uri, settings=settings) as agent:
        memory = agent.get("/healthz").body["memory"]
        assert (memory["physical"], memory["reserve"]) == (meminfo["MemTotal"], reserve)
        assert (memory["promised"], memory["reserved"], memory["budget"]) == (promised, 0, promised + ROOM)

        def is_resident_told() -> bool:
            resident = agent.get("/healthz").body["memory"]["resident"]
            return bool(resident == pytest.approx(sum(map(resident_of, guests)), rel=0.2))

        wait_for(is_resident_told, timeout_s=60, what="what is resident: libvirt leaves out a VM that is busy")

        def send(path: str, guest: Guest, size: int) -> dict[str, object]:
            task = new_task_uuid()
            body = {"vmUuid": guest.name, "memorySize": size}
            assert agent.post(path, body, task_uuid=task, callback_url=server.url).status == 200
            return server.wait(task, 120)

        def plug(guest: Guest) -> dict[str, object]:
            return send("/vm/hotplug/memory", guest, WANTED + 256 * MIB)

        with ThreadPoolExecutor(2) as pool:
            replies = list(pool.map(plug, guests))
        assert sorted(reply["outcome"] for reply in replies) == ["online", "refused"]
        first, second = sorted(range(2), key=lambda n: replies[n]["outcome"])
        refused = replies[second]
        assert refused["errorCode"] == "HOST_MEMORY_PROMISED"
        assert "is promised to running VMs and tasks, most to" in str(refused["error"])
        ready = agent.get(f"/vms/{guests[second].name}").body
        assert ready["headroom"]["memorySize"] == 128 * MIB, "no VM shows room that the host has not"

        given_back = send("/vm/hotunplug/memory", guests[first], 256 * MIB)
        assert given_back["success"], given_back
        assert plug(guests[second])["outcome"] == "online"
        memory = agent.get("/healthz").body["memory"]
        assert memory["promised"] == sum(map(promised_of, guests))
        assert memory["reserved"] == 0
