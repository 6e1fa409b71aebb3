"""libvirtd killed inside an attach: QEMU has the dimm, libvirt does not know it, and takes its slot for free."""

from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from kvmagent.model.units import MIB
from tests.fakes.agent import FakeAgent, make_domain, make_node
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec
from tests.unit.test_cpu_undo import LOST
from tests.unit.test_recovery import Agent as WaitingAgent
from tests.unit.test_recovery import Killed

UNKNOWN = "MEMORY_UNKNOWN_TO_LIBVIRT"


@pytest.fixture
def domain() -> FakeDomain:
    return make_domain(GuestSpec(name="vm1", agent_channel=False))


@pytest.fixture
def agent(tmp_path: Path, domain: FakeDomain) -> Iterator[FakeAgent]:
    running = FakeAgent(tmp_path, domain)
    yield running
    running.stop()


def lose(domain: FakeDomain, alias: str, *, slot: int = 0) -> None:
    """QEMU has a dimm of 128 MiB."""
    domain.unknown.append({"id": alias, "size": 128 * MIB, "slot": slot, "addr": 2**32, "node": 0})


def slots(domain: FakeDomain) -> list[str]:
    return [address.get("slot") for address in domain.live.iterfind("./devices/memory/address")]


def test_where_nothing_tells_of_it_before_the_plug_takes_a_slot_that_qemu_has_free_and_the_reply_counts_it(
    tmp_path: Path,
) -> None:
    domain = make_domain(GuestSpec(name="vm1", agent_channel=False, balloon=False))
    agent = FakeAgent(tmp_path, domain)
    lose(domain, "ua-kvmagent-earlier-0")
    reply = agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=512 * MIB).reply
    assert (reply["outcome"], reply["memorySize"]) == ("plugged", 640 * MIB)
    assert slots(domain) == ["1"]
    assert UNKNOWN in [warning["code"] for warning in reply["warnings"]]

    reply = agent.run("HotPlugMemory", "t2", vmUuid="vm1", memorySize=768 * MIB).reply
    assert (reply["outcome"], reply["memorySize"], reply["before"]["memorySize"]) == ("plugged", 768 * MIB, 640 * MIB)
    assert slots(domain) == ["1", "2"]
    (warning,) = (warning for warning in reply["warnings"] if warning["code"] == UNKNOWN)
    assert "ua-kvmagent-earlier-0 (128 MiB)" in warning["message"]
    assert "Power the VM off and on" in warning["remedy"]
    agent.stop()


def test_where_the_balloon_tells_of_it_it_is_counted_before_anything_is_decided(
    agent: FakeAgent, domain: FakeDomain
) -> None:
    lose(domain, "ua-kvmagent-earlier-0")
    reply = agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=512 * MIB).reply
    assert (reply["outcome"], reply["memorySize"], reply["before"]["memorySize"]) == ("plugged", 512 * MIB, 384 * MIB)


def test_the_task_that_was_cut_off_finds_its_own_dimm_and_plugs_no_other(tmp_path: Path, domain: FakeDomain) -> None:
    waiting = WaitingAgent(tmp_path, domain)
    attach = domain.attachDeviceFlags

    def attach_to_qemu_alone(xml: str, flags: int) -> None:
        domain.attachDeviceFlags = attach  # type: ignore[method-assign]
        lose(domain, "ua-kvmagent-t1-0")
        raise LOST

    domain.attachDeviceFlags = attach_to_qemu_alone  # type: ignore[method-assign]
    waiting.executor.run(waiting.accept("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB))
    reply = waiting.reply()
    waiting.journal.stop()
    assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB)
    assert slots(domain) == []
    assert [alias.get("name") for alias in domain.config.iterfind("./devices/memory/alias")] == ["ua-kvmagent-t1-0"]
    assert UNKNOWN in [warning["code"] for warning in reply["warnings"]]


@pytest.mark.parametrize("restarted", [False, True])
def test_the_task_that_was_cut_off_finds_its_own_virtio_mem_device_and_attaches_no_other(
    tmp_path: Path, domain: FakeDomain, *, restarted: bool
) -> None:
    """No balloon tells of it: QEMU refuses the second of that name, if nothing else."""
    waiting = WaitingAgent(tmp_path, domain)
    attach, alias = domain.attachDeviceFlags, "ua-kvmagent-t1-0"

    def attach_again(xml: str, flags: int) -> None:
        if flags & libvirt.VIR_DOMAIN_AFFECT_LIVE:
            raise qemu_refusal()
        attach(xml, flags)

    def attach_to_qemu_alone(xml: str, flags: int) -> None:
        domain.attachDeviceFlags = attach_again  # type: ignore[method-assign]
        size = {"size": 128 * MIB, "max-size": 3840 * MIB, "requested-size": 128 * MIB, "block-size": 2 * MIB}
        domain.unknown.append({"id": alias, "memaddr": 2**32, "node": 0, **size})
        if restarted:
            raise Killed
        raise LOST

    domain.attachDeviceFlags = attach_to_qemu_alone  # type: ignore[method-assign]
    task = waiting.accept("HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB, method="virtio-mem")
    if restarted:
        with pytest.raises(Killed):
            waiting.executor.run(task)
        waiting.node = make_node(tmp_path, domain)
        (task,) = waiting.journal.unfinished()
        waiting.executor = waiting.make_executor()
    waiting.executor.run(task)
    reply = waiting.reply()
    waiting.journal.stop()
    assert (reply["outcome"], reply["memorySize"]) == ("plugged", 384 * MIB), reply
    assert [one.get("name") for one in domain.config.iterfind("./devices/memory/alias")] == [alias]
    assert list(domain.live.iterfind("./devices/memory")) == []
    assert UNKNOWN in [warning["code"] for warning in reply["warnings"]]


def test_it_is_not_taken_for_one_that_can_be_removed(agent: FakeAgent, domain: FakeDomain) -> None:
    lose(domain, "ua-kvmagent-earlier-0")
    agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=384 * MIB)
    reply = agent.run("HotUnplugMemory", "t2", vmUuid="vm1", memorySize=256 * MIB, affect="live", timeoutSec=1).reply
    asked = [step["alias"] for step in reply["steps"] if "alias" in step]
    assert "ua-kvmagent-earlier-0" not in asked


def test_no_headroom_is_told_of_it(agent: FakeAgent, domain: FakeDomain) -> None:
    lose(domain, "ua-kvmagent-earlier-0")
    assert agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=512 * MIB, method="dimm").reply["success"]
    ready = agent.run("ReadyForHotplug", "t2", vmUuid="vm1").reply
    removed = agent.run("HotUnplugMemory", "t3", vmUuid="vm1", memorySize=256 * MIB).reply
    assert ready["headroom"]["removableMemorySize"] == removed["before"]["memorySize"] - removed["memorySize"] > 0


def test_a_refusal_for_another_reason_stays_what_it_is(agent: FakeAgent, domain: FakeDomain) -> None:
    domain.fail_next["attachDeviceFlags"] = qemu_refusal()
    reply = agent.run("HotPlugMemory", "t1", vmUuid="vm1", memorySize=384 * MIB).reply
    assert (reply["outcome"], reply["errorCode"], reply["warnings"]) == ("refused", "LIBVIRT_REFUSED", [])
    assert slots(domain) == []


def qemu_refusal() -> libvirt.libvirtError:
    return qemu_error(libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: unable to execute QEMU command 'device_add': no")
