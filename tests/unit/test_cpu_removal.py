"""Removing several vCPUs: the guest is asked until the deadline, told apart by what it did, and loses nothing else."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent_plugins.vm.vcpus import enabled_ids
from tests.fakes.agent import FakeAgent, make_domain, make_guest
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec

AT_ONCE = 12_004_000
NOT_SUPPORTED = qemu_error(
    libvirt.VIR_ERR_INTERNAL_ERROR,
    "internal error: unable to execute QEMU command 'device_del': CPU hot unplug not supported on this machine",
)


def make(count: int = 4, *, virt_type: str = "kvm", **guest: Any) -> FakeDomain:
    """A domain with so many vCPUs, all but one removable, all used by its guest."""
    spec = GuestSpec(name="vm1", max_vcpus=8)
    domain = make_domain(spec, make_guest(spec, auto_online=True, **guest), virt_type=virt_type)
    domain.setVcpusFlags(count, 3 | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
    domain.calls.clear()
    return domain


def asks(domain: FakeDomain) -> list[str]:
    return [call for call in domain.calls if call.startswith("setVcpusFlags") and not call.endswith(", 18)")]


def remove(directory: Path, domain: FakeDomain, *, version: int = 9_000_000, **fields: Any) -> Any:
    agent = FakeAgent(directory, domain)
    assert domain.connection is not None
    domain.connection.lib_version = version
    try:
        return agent.run("HotUnplugCpu", **{"vmUuid": "vm1", "cpuNum": 1, "timeoutSec": 1, **fields}).reply
    finally:
        agent.stop()


def test_the_guest_is_asked_again_after_each_that_left(tmp_path: Path) -> None:
    domain = make(unplugs="slow", looks=4)
    reply = remove(tmp_path, domain, timeoutSec=20)
    assert (reply["outcome"], reply["cpuNum"], reply["after"]["configCpuNum"]) == ("online", 1, 1), reply
    assert len(asks(domain)) == 3


def test_newer_libvirt_is_asked_once_and_does_not_make_anybody_wait(tmp_path: Path) -> None:
    domain = make(unplugs="slow", looks=4)
    reply = remove(tmp_path, domain, version=AT_ONCE, timeoutSec=20)
    assert (reply["outcome"], reply["cpuNum"]) == ("online", 1), reply
    assert asks(domain) == ["setVcpusFlags(1, 33)"]


def test_what_was_never_asked_for_is_told_and_is_not_waited_for(tmp_path: Path) -> None:
    """The first has left late, and nobody asks for the others: that is the end of it, and no removal is pending."""
    domain = make(unplugs="slow", looks=10**6)
    agent = FakeAgent(tmp_path, domain)
    try:
        reply = agent.run("HotUnplugCpu", "late", vmUuid="vm1", cpuNum=1, timeoutSec=1).reply
        assert (reply["outcome"], reply["errorCode"]) == ("pending", "CPU_REMOVAL_PENDING")
        assert "the guest was not asked for 2 of them" in reply["error"]
        agent.journal.record_delivery("late", "delivered", None)
        domain.leaving[3] = 1
        domain.vcpusFlags(1)
        agent.executor.run(agent.journal.find("late"))  # type: ignore[arg-type]
        task = agent.journal.find("late")
        assert task is not None
        assert task.outcome == "partial"
        assert b'"errorCode":"CPU_REMOVAL_UNFINISHED"' in (task.reply or b"")
        assert b'"configCpuNum":3' in (task.reply or b"")
    finally:
        agent.stop()


def test_what_the_guest_had_no_time_for_is_used_again(tmp_path: Path) -> None:
    """The first leaves while libvirt waits for it, and by then the time of the task is over."""
    domain = make()
    ask = domain.setVcpusFlags

    def take_long(count: int, flags: int) -> None:
        time.sleep(1)
        ask(count, flags)

    domain.setVcpusFlags = take_long  # type: ignore[method-assign]
    reply = remove(tmp_path, domain)
    assert (reply["outcome"], reply["errorCode"], reply["cpuNum"]) == ("partial", "CPU_REMOVAL_UNFINISHED", 3), reply
    assert reply["after"]["guestCpuNum"] == reply["after"]["configCpuNum"] == 3


@pytest.mark.parametrize("version", [9_000_000, AT_ONCE])
def test_what_the_guest_refuses_is_used_again(tmp_path: Path, version: int) -> None:
    domain = make(unplugs="slow", looks=2, kept_cpus=frozenset({2}))
    reply = remove(tmp_path, domain, version=version, timeoutSec=20)
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "CPU_REMOVAL_REFUSED"), reply
    assert "refused to give up vcpu2" in reply["error"]
    assert all(domain.guest.online_cpus.values()), domain.guest.online_cpus
    assert ("the guest was not asked for 1 of them" in reply["error"]) == (version < AT_ONCE)
    assert reply["cpuNum"] == reply["after"]["configCpuNum"] == reply["after"]["guestCpuNum"]


@pytest.mark.parametrize("version", [9_000_000, AT_ONCE])
def test_a_removal_that_libvirt_refuses_leaves_the_guest_as_it_was(tmp_path: Path, version: int) -> None:
    domain = make()
    domain.guest.online_cpus[2] = False  # by the guest's owner
    domain.fail_next["setVcpusFlags"] = NOT_SUPPORTED
    reply = remove(tmp_path, domain, version=version)
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "LIBVIRT_REFUSED"), reply
    assert reply["before"] == reply["after"]
    assert domain.guest.online_cpus == {0: True, 1: True, 2: False, 3: True}


def test_where_it_cannot_be_put_back_the_reply_says_so(tmp_path: Path) -> None:
    domain = make()
    domain.fail_next["setVcpusFlags"] = NOT_SUPPORTED
    refuse = domain.setVcpusFlags

    def refuse_and_break(count: int, flags: int) -> None:
        domain.guest.broken_cpus = True
        refuse(count, flags)

    domain.setVcpusFlags = refuse_and_break  # type: ignore[method-assign]
    reply = remove(tmp_path, domain)
    assert (reply["success"], reply["outcome"], reply["after"]["guestCpuNum"]) == (False, "partial", 1), reply
    (told,) = [one for one in reply["warnings"] if one["code"] == "GUEST_CPU_OFFLINE"]
    assert "1-3 were taken offline for a removal" in told["message"]


def test_memory_that_libvirt_will_not_detach_is_used_again(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1")
    domain = make_domain(spec, make_guest(spec, auto_online=True))
    agent = FakeAgent(tmp_path, domain)
    try:
        assert agent.run("HotPlugMemory", "plug", vmUuid="vm1", memorySize=512 << 20).reply["outcome"] == "online"
        domain.fail_next["detachDeviceAlias"] = NOT_SUPPORTED
        reply = agent.run("HotUnplugMemory", "less", vmUuid="vm1", memorySize=256 << 20, timeoutSec=1).reply
        assert (reply["outcome"], reply["errorCode"]) == ("refused", "LIBVIRT_REFUSED"), reply
        assert all(domain.guest.blocks.values())
    finally:
        agent.stop()


@given(
    count=st.integers(2, 7),
    target=st.integers(1, 6),
    looks=st.integers(1, 4),
    kept=st.frozensets(st.integers(1, 6), max_size=2),
    version=st.sampled_from([9_000_000, AT_ONCE]),
    how=st.sampled_from(["lets go", "slow", "refuses", "not answering"]),
    offline=st.frozensets(st.integers(1, 6), max_size=2),
)
@settings(deadline=None, max_examples=40)
def test_the_reply_says_what_is_so_and_the_guest_keeps_what_it_used(
    count: int, target: int, looks: int, kept: frozenset[int], version: int, how: str, offline: frozenset[int]
) -> None:
    domain = make(count, unplugs=how, looks=looks, kept_cpus=kept if how == "slow" else frozenset())
    owners = frozenset(n for n in offline if n < count)
    for n in owners:
        domain.guest.online_cpus[n] = False
    with TemporaryDirectory() as directory:
        reply = remove(
            Path(directory),
            domain,
            version=version,
            cpuNum=min(target, count),
            timeoutSec=1 if how == "not answering" else 20,
        )
    have = enabled_ids(parse_definition(domain.XMLDesc(0)))
    assert reply["cpuNum"] == reply["after"]["configCpuNum"] == len(have)
    assert (reply["success"] is True) == (len(have) <= min(target, count))
    used = frozenset(n for n, online in domain.guest.online_cpus.items() if online)
    if reply["outcome"] != "pending":
        assert used == frozenset(have) - owners
    else:
        assert how == "not answering"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    agents = []

    def run_on(domain: FakeDomain, **host: Any) -> Any:
        agents.append(FakeAgent(tmp_path, domain, **host))
        return agents[0].run("HotUnplugCpu", vmUuid="vm1", cpuNum=1, timeoutSec=1).reply

    yield run_on
    agents[0].stop()


def test_an_emulated_vm_s_vcpus_leave_only_where_the_operator_allows_it(run: Callable[..., Any]) -> None:
    reply = run(make(virt_type="qemu"), removes_emulated=True)
    assert (reply["outcome"], reply["cpuNum"]) == ("online", 1), reply


def test_by_default_an_emulated_vm_keeps_its_vcpus(run: Callable[..., Any]) -> None:
    domain = make(virt_type="qemu")
    reply = run(domain)
    assert (reply["outcome"], reply["errorCode"], domain.calls) == ("refused", "CPU_REMOVAL_UNSAFE", [])


def test_a_machine_that_gives_no_vcpu_up_is_refused_before_its_guest_is_touched(run: Callable[..., Any]) -> None:
    domain = make()
    for root in (domain.live, domain.config):
        root.find("./os/type").set("arch", "s390x")
        root.find("./os/type").set("machine", "s390-ccw-virtio-7.2")
    reply = run(domain)
    assert (reply["outcome"], reply["errorCode"], domain.calls) == ("refused", "MACHINE_NOT_SUPPORTED", [])
    assert domain.guest.online_cpus == {0: True, 1: True, 2: True, 3: True}
