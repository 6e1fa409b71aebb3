"""A VM that came by live migration is known as such for the rest of its run, where nobody sees its QEMU."""

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

    def UUIDString(self) -> str:
        return self.uuid

    def ID(self) -> int:
        return self.domain_id

    def getAllDomainStats(self, stats: int, flags: int) -> Any:
        if self.error is not None:
            raise self.error
        state = {"state.state": libvirt.VIR_DOMAIN_RUNNING, "state.reason": self.reason}
        return [(self, state)] if self.reason is not None else []

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
        assert first.note(told)
    first.save()
    daemon.reason = libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
    second = make(tmp_path, daemon)
    assert second.note(now)
    assert not second.note(with_run(seen, 8)), "another run"
    second.save()
    assert not make(tmp_path, daemon).note(now), "and that is kept too"


@pytest.mark.parametrize("how", [RESTORED, REVERTED, libvirt.VIR_DOMAIN_RUNNING_RESTORED])
def test_a_vm_that_was_restored_on_this_host_did_not_come_by_migration(tmp_path: Path, seen: Facts, how: Any) -> None:
    """Its QEMU is started as for a migration, which is what libvirt-guests has done with every VM after a boot."""
    daemon, now = Daemon(seen.domain.uuid), with_run(seen, 7)
    process = tmp_path / "host/proc/4711"
    process.mkdir(parents=True)
    arguments = ("/usr/bin/qemu-system-x86_64", "-uuid", seen.domain.uuid, "-incoming", "defer")
    (process / "cmdline").write_text("".join(f"{one}\0" for one in arguments))
    assert make(tmp_path, daemon).note(now), "nobody heard how it came"
    (tmp_path / "migrations.json").unlink(missing_ok=True)
    if isinstance(how, int):
        daemon.reason = how
    migrations = make(tmp_path, daemon)
    if not isinstance(how, int):
        daemon.fire(how)
    assert not migrations.note(now)
    daemon.fire(ARRIVES)
    daemon.fire(REVERTED)
    assert migrations.note(now), "it came, and was set back to a snapshot"


@pytest.mark.parametrize("end", ["stops", "is seen off", "is gone", "the host is booted anew"])
def test_it_is_forgotten_where_the_run_ends(tmp_path: Path, seen: Facts, end: str) -> None:
    """libvirt counts its ids from 1 again where it is started and no VM runs: the next run may have the same."""
    daemon = Daemon(seen.domain.uuid)
    first = make(tmp_path, daemon)
    daemon.fire(ARRIVES)
    if end == "stops":
        daemon.fire(STOPS)
    if end == "is seen off":
        first.note(msgspec.structs.replace(seen, domain=msgspec.structs.replace(seen.domain, live=None)))
    if end == "is gone":
        first.forget(first.known())
    first.save()
    if end == "the host is booted anew":
        (make_host(tmp_path / "anew") / "proc/sys/kernel/random/boot_id").write_text("boot-2\n")
        again = Migrations(tmp_path / "migrations.json", host_root=tmp_path / "anew")
        again.load()
        assert not again.known()
        return
    assert not make(tmp_path, daemon).note(with_run(seen, 7))


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
    assert len([record for record in caplog.records if "cannot be kept" in record.getMessage()]) == 1
    (tmp_path / "missing").mkdir()
    nowhere.save()
    assert VmFile(tmp_path / "missing" / "migrations.json", str, "").load() == {daemon.uuid: "7@boot-1"}
    assert nowhere.note(with_run(seen, 7))


@given(events=st.lists(st.sampled_from(["arrives", "stops", "starts", "look", "agent restarts"])))
def test_after_whatever_happens_it_is_known_of_just_the_present_run(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
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
            daemon.fire(ARRIVES if came else STARTS)
        elif event == "stops" and running:
            daemon.fire(STOPS)
            running = False
        elif event == "agent restarts":
            migrations.save()
            migrations = make(directory, daemon)
        if running and event == "look":
            assert migrations.note(with_run(seen, daemon.domain_id)) == came
    if running:
        assert migrations.note(with_run(seen, daemon.domain_id)) == came
