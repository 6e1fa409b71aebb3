"""A VM that came by live migration is known as such for the rest of its run, where nobody sees its QEMU."""

from copy import copy
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.migrations import Migrations
from kvmagent.hypervisor.vmfile import VmFile
from kvmagent.model.facts import Facts
from tests.fakes.agent import make_domain, make_host, make_node
from tests.fakes.libvirt import libvirt_error
from tests.lab.domainxml import GuestSpec

SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4)
ARRIVES = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED)
RESTORED = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED)
REVERTED = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT)
STOPS = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
STARTS = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED)


class Daemon:
    """libvirt's side: what runs, and its events. One VM."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.domain_id = 7
        self.reason: int | None = None
        self.error: libvirt.libvirtError | None = None
        self.heard_by: Migrations | None = None
        #: What runs beside it.
        self.others: list[Daemon] = []
        self.asked = 0

    def UUIDString(self) -> str:
        return self.uuid

    def ID(self) -> int:
        return self.domain_id

    def getAllDomainStats(self, stats: int, flags: int) -> Any:
        if self.error is not None:
            raise self.error
        self.asked += 1
        return [
            (one, {"state.state": libvirt.VIR_DOMAIN_RUNNING, "state.reason": one.reason})
            for one in (self, *self.others)
            if one.reason is not None
        ]

    def fire(self, event: tuple[int, int]) -> None:
        assert self.heard_by is not None
        self.heard_by.hear(self, *event)


@pytest.fixture
def seen(tmp_path: Path) -> Facts:
    """The VM as a confined agent sees it, and libvirt forgot how it came."""
    return make_node(tmp_path, make_domain(SPEC)).observe("vm1", frozenset())


def with_run(facts: Facts, domain_id: int) -> Facts:
    assert facts.domain.live is not None
    live = msgspec.structs.replace(facts.domain.live, domain_id=domain_id)
    return msgspec.structs.replace(facts, domain=msgspec.structs.replace(facts.domain, live=live))


def write_process(directory: Path, pid: int, uuid: str, *arguments: str) -> None:
    """The QEMU of a VM."""
    process = directory / "host/proc" / str(pid)
    process.mkdir(parents=True, exist_ok=True)
    words = ("/usr/bin/qemu-system-x86_64", "-uuid", uuid, *arguments)
    (process / "cmdline").write_text("".join(f"{one}\0" for one in words))


def make(directory: Path, daemon: Daemon) -> Migrations:
    """What a new agent has."""
    migrations = Migrations(directory / "migrations.json", host_root=make_host(directory / "host"))
    migrations.load()
    daemon.heard_by = migrations
    migrations.find(daemon)
    return migrations


@pytest.mark.parametrize("how", ["event", "at the start", "look"])
def test_it_outlives_the_agent_and_ends_with_the_run(tmp_path: Path, seen: Facts, how: str) -> None:
    daemon = Daemon(seen.domain.uuid)
    if how == "at the start":
        daemon.reason = libvirt.VIR_DOMAIN_RUNNING_MIGRATED
    first, now = make(tmp_path, daemon), with_run(seen, 7)
    if how == "event":
        daemon.fire(ARRIVES)
    if how == "look":
        told = msgspec.structs.replace(now, domain=msgspec.structs.replace(now.domain, migrated=True))
        assert first.note(daemon, told)
    first.save()
    daemon.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
    second = make(tmp_path, daemon)
    assert second.note(daemon, now)
    assert not second.note(daemon, with_run(seen, 8)), "another run"
    second.save()
    assert not make(tmp_path, daemon).note(daemon, now), "and that is kept too"


@pytest.mark.parametrize("how", [RESTORED, REVERTED, libvirt.VIR_DOMAIN_RUNNING_RESTORED])
def test_a_vm_that_was_restored_on_this_host_did_not_come_by_migration(tmp_path: Path, seen: Facts, how: Any) -> None:
    """Its QEMU is started as for a migration, which is what libvirt-guests has done with every VM after a boot."""
    daemon, now = Daemon(seen.domain.uuid), with_run(seen, 7)
    write_process(tmp_path, 4711, seen.domain.uuid, "-incoming", "defer")
    assert make(tmp_path, daemon).note(daemon, now), "nobody heard how it came"
    (tmp_path / "migrations.json").unlink(missing_ok=True)
    if isinstance(how, int):
        daemon.reason = how
    migrations = make(tmp_path, daemon)
    if not isinstance(how, int):
        daemon.fire(how)
    assert not migrations.note(daemon, now)
    daemon.fire(ARRIVES)
    daemon.fire(REVERTED)
    assert migrations.note(daemon, now), "it came, and was set back to a snapshot"


@pytest.mark.parametrize("how", [RESTORED, REVERTED, libvirt.VIR_DOMAIN_RUNNING_RESTORED])
def test_that_a_vm_was_restored_outlives_the_agent_though_libvirt_forgets_it(
    tmp_path: Path, seen: Facts, how: Any
) -> None:
    """It is paused and resumed, and a new agent sees a QEMU that was started as for a migration."""
    daemon, now = Daemon(seen.domain.uuid), with_run(seen, 7)
    write_process(tmp_path, 4711, seen.domain.uuid, "-incoming", "defer")
    if isinstance(how, int):
        daemon.reason = how
    first = make(tmp_path, daemon)
    if not isinstance(how, int):
        daemon.fire(how)
    first.save()
    daemon.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
    second = make(tmp_path, daemon)
    assert not second.note(daemon, now)
    assert second.note(daemon, with_run(seen, 8)), "another run, of which nobody heard"
    second.save()
    daemon.fire(STOPS)
    second.save()
    assert VmFile(tmp_path / "migrations.json", str, "").load() == {}


@pytest.mark.parametrize("end", ["stops", "is seen off", "is gone", "the host is booted anew"])
def test_it_is_forgotten_where_the_run_ends(tmp_path: Path, seen: Facts, end: str) -> None:
    """libvirt counts its ids from 1 again where it is started and no VM runs: the next run may have the same."""
    daemon = Daemon(seen.domain.uuid)
    first = make(tmp_path, daemon)
    daemon.fire(ARRIVES)
    if end == "stops":
        daemon.fire(STOPS)
    if end == "is seen off":
        off = msgspec.structs.replace(seen.domain, live=None)
        first.note(daemon, msgspec.structs.replace(seen, domain=off))
    if end == "is gone":
        first.forget(first.known())
    first.save()
    if end == "the host is booted anew":
        (make_host(tmp_path / "anew") / "proc/sys/kernel/random/boot_id").write_text("boot-2\n")
        again = Migrations(tmp_path / "migrations.json", host_root=tmp_path / "anew")
        again.load()
        assert not again.known()
        return
    assert not make(tmp_path, daemon).note(daemon, with_run(seen, 7))


def test_what_cannot_be_asked_or_kept_costs_no_more_than_that(
    tmp_path: Path, seen: Facts, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = Daemon(seen.domain.uuid)
    daemon.error = libvirt_error(3, 12, "this function is not supported by the connection driver")
    nowhere = Migrations(tmp_path / "missing" / "migrations.json", host_root=make_host(tmp_path / "host"))
    nowhere.load()
    daemon.heard_by = nowhere
    assert nowhere.find(daemon) == []
    daemon.fire(ARRIVES)
    for _ in range(3):
        nowhere.save()
    assert len([record for record in caplog.records if "cannot be saved" in record.getMessage()]) == 1
    (tmp_path / "missing").mkdir()
    nowhere.save()
    assert VmFile(tmp_path / "missing" / "migrations.json", str, "").load() == {daemon.uuid: "7@boot-1"}
    assert nowhere.note(daemon, with_run(seen, 7))


def make_other(n: int, reason: int | None) -> Daemon:
    other = Daemon(f"00000000-0000-0000-0000-{n:012}")
    other.domain_id, other.reason = n, reason
    return other


def observed(seen: Facts, vm: Daemon) -> Facts:
    """An observation of another VM."""
    facts = with_run(seen, vm.domain_id)
    return msgspec.structs.replace(facts, domain=msgspec.structs.replace(facts.domain, uuid=vm.uuid))


def test_one_look_at_the_processes_is_for_all_vms_that_run(tmp_path: Path, seen: Facts) -> None:
    """Else the first command for each of many VMs would look at each process of the host."""
    daemon = make_other(1, libvirt.VIR_DOMAIN_RUNNING_BOOTED)
    migrations = Migrations(host_root=make_host(tmp_path / "host"))
    daemon.others = [make_other(n, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED) for n in range(2, 1000)]
    for vm in daemon.others[::2]:
        write_process(tmp_path, vm.domain_id, vm.uuid)
    came = daemon.others[0]
    write_process(tmp_path, came.domain_id, came.uuid, "-incoming", "defer")
    for vm in (daemon, *daemon.others):
        assert migrations.note(daemon, observed(seen, vm)) == (vm is came)
    assert daemon.asked <= 2, "the one that came is looked at by itself"


def test_a_vm_that_does_not_run_yet_is_left_to_its_own_observation(tmp_path: Path, seen: Facts) -> None:
    """While another is looked at, it comes or is restored: its QEMU is not there yet, or libvirt has not said how."""
    first = make_other(1, libvirt.VIR_DOMAIN_RUNNING_BOOTED)
    first.others = [coming, restored] = [make_other(2, None), make_other(3, libvirt.VIR_DOMAIN_RUNNING_UNKNOWN)]
    migrations = Migrations(host_root=make_host(tmp_path / "host"))
    write_process(tmp_path, 3, restored.uuid, "-incoming", "defer")
    assert not migrations.note(first, observed(seen, first))
    write_process(tmp_path, 2, coming.uuid, "-incoming", "defer")
    coming.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
    assert migrations.note(first, observed(seen, coming))
    migrations.hear(restored, *RESTORED)
    assert not migrations.note(first, observed(seen, restored))


def test_a_look_overwrites_nothing_that_an_event_told_while_it_went_on(tmp_path: Path, seen: Facts) -> None:
    """The VM ends and comes back by migration, after the look has listed its earlier run."""

    class Returning(Daemon):
        def getAllDomainStats(self, stats: int, flags: int) -> Any:
            listed = [(copy(one), told) for one, told in super().getAllDomainStats(stats, flags)]
            if self.heard_by is not None and self.domain_id == 7:
                self.fire(STOPS)
                self.domain_id = 8
                self.fire(ARRIVES)
            return listed

    daemon = Returning(seen.domain.uuid)
    daemon.reason = libvirt.VIR_DOMAIN_RUNNING_BOOTED
    migrations = Migrations(host_root=make_host(tmp_path / "host"))
    daemon.heard_by = migrations
    migrations.find(daemon)
    daemon.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
    assert migrations.note(daemon, with_run(seen, 8))


@given(
    events=st.lists(
        st.sampled_from(["arrives", "stops", "starts", "pauses", "look", "another is looked at", "agent restarts"])
    ),
    is_seen=st.booleans(),
)
def test_after_whatever_happens_it_is_known_of_just_the_present_run(
    tmp_path_factory: pytest.TempPathFactory, events: list[str], is_seen: bool
) -> None:
    directory = tmp_path_factory.mktemp("run")
    seen = make_node(directory, make_domain(SPEC)).observe("vm1", frozenset())
    daemon = Daemon(seen.domain.uuid)
    migrations, running, came = make(directory, daemon), False, False
    for event in events:
        if event in ("arrives", "starts"):
            if running:
                daemon.fire(STOPS)
            daemon.domain_id += 1
            running, came = True, event == "arrives"
            if is_seen:
                write_process(directory, 4711, daemon.uuid, *(["-incoming", "defer"] if came else []))
            daemon.reason = libvirt.VIR_DOMAIN_RUNNING_MIGRATED if came else libvirt.VIR_DOMAIN_RUNNING_BOOTED
            daemon.fire(ARRIVES if came else STARTS)
        elif event == "stops" and running:
            daemon.fire(STOPS)
            running, daemon.reason = False, None
        elif event == "pauses" and running:
            daemon.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
        elif event == "another is looked at":
            another = make_other(1000 + len(daemon.others), libvirt.VIR_DOMAIN_RUNNING_BOOTED)
            daemon.others.append(another)
            assert not migrations.note(daemon, observed(seen, another))
        elif event == "agent restarts":
            migrations.save()
            migrations = make(directory, daemon)
        if running and event == "look":
            assert migrations.note(daemon, with_run(seen, daemon.domain_id)) == came
    if running:
        assert migrations.note(daemon, with_run(seen, daemon.domain_id)) == came
