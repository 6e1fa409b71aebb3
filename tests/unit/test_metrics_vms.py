"""What is told of VMs: bounded in time whatever hangs, never a guess, and gone with the VM."""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, strategies

from kvmagent.api.metrics.events import Metrics
from kvmagent.api.metrics.sampler import Sampler
from kvmagent.api.metrics.vms import VmMetrics
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, GuestBlock, GuestVcpu, Host, MemoryDevice
from kvmagent.model.host import VmStats
from kvmagent.settings import MetricsSection
from tests.lab.processes import wait_for
from tests.unit.test_metrics_files import RULES

MIB = 1 << 20


def stats(uuid: str = "u1", *, vcpus: int | None = 4, run: int = 1) -> VmStats:
    return VmStats(uuid=uuid, name=f"vm-{uuid}", run=run, vcpus=vcpus, max_vcpus=8, balloon_bytes=1024 * MIB)


def facts(
    uuid: str = "u1",
    *,
    vcpus: int = 4,
    online: int | None = 2,
    blocks_online: int | None = 9,
    silence: Code | None = None,
    fell_silent: bool = False,
    running: bool = True,
) -> Facts:
    """A VM of 1 GiB with a dimm of 256 MiB behind it: 10 blocks of 128 MiB in all."""
    dimm = MemoryDevice(model="dimm", size_bytes=256 * MIB, node=0, slot=0, base=1024 * MIB)
    live = Definition(
        vcpu_current=vcpus,
        vcpu_maximum=8,
        vcpus=(),
        topology=None,
        total_bytes=1280 * MIB,
        current_bytes=1280 * MIB,
        max_memory_bytes=4096 * MIB,
        slots=4,
        cells=(),
        devices=(dimm,),
        acpi=True,
        balloon=True,
        agent_channel=True,
        machine="pc",
        arch="x86_64",
        hypervisor="kvm",
    )
    guest = Guest(
        silence=silence,
        vcpus=None if online is None else tuple(GuestVcpu(n, n < online, True) for n in range(vcpus)),
        blocks=None if blocks_online is None else tuple(GuestBlock(n, n < blocks_online, True) for n in range(10)),
        block_bytes=None if blocks_online is None else 128 * MIB,
        mem_total_bytes=None if blocks_online is None else 1000 * MIB,
    )
    domain = Domain(name=f"vm-{uuid}", uuid=uuid, state="running", live=live if running else None, config=None)
    return Facts(domain=domain, guest=guest, host=Host(), fell_silent=fell_silent)


def with_live(seen: Facts, **changes: Any) -> Facts:
    live = seen.domain.live
    assert live is not None
    return msgspec.structs.replace(
        seen, domain=msgspec.structs.replace(seen.domain, live=msgspec.structs.replace(live, **changes))
    )


def with_config(seen: Facts, **changes: Any) -> Facts:
    live = seen.domain.live
    assert live is not None
    return msgspec.structs.replace(
        seen, domain=msgspec.structs.replace(seen.domain, config=msgspec.structs.replace(live, **changes))
    )


class Watched:
    """VM metrics on a libvirt and a clock that are set by hand; with `hang` set, libvirt does not answer."""

    def __init__(self, *found: VmStats, wait_s: float = 0.2) -> None:
        self.found = found
        self.now = 100.0
        self.calls = 0
        self.hang: threading.Event | None = None
        self.away = False
        self.vms = VmMetrics(self._read, wait_s=wait_s, fresh_s=0.0, clock=lambda: self.now)

    def _read(self) -> tuple[VmStats, ...]:
        self.calls += 1
        if self.hang is not None:
            self.hang.wait(20)
        if self.away:
            raise AgentError(Code.LIBVIRT_UNAVAILABLE, "away")
        return self.found

    def told(self) -> dict[str, dict[str, float]]:
        """VM to metric to value; what is not a VM's stands under the empty name."""
        told: dict[str, dict[str, float]] = {}
        for family in self.vms.collect():
            for sample in family.samples:
                name = sample.name.removeprefix("kvmagent_")
                told.setdefault(sample.labels.get("uuid", ""), {})[name] = sample.value
        return told


def troubles(watched: Watched) -> set[str]:
    """What is wrong with any VM."""
    samples = [sample for family in watched.vms.collect() for sample in family.samples]
    return {sample.labels["trouble"] for sample in samples if "trouble" in sample.labels and sample.value}


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched(stats())
    yield watched
    if watched.hang is not None:
        watched.hang.set()


def test_what_is_plugged_and_offline_is_what_one_look_at_vm_and_guest_found(watched: Watched) -> None:
    watched.vms.observed(facts())
    watched.now += 30
    told = watched.told()["u1"]
    assert told == {
        "vm_vcpus": 4,
        "vm_vcpus_max": 8,
        "vm_balloon_bytes": 1024 * MIB,
        "vm_memory_bytes": 1280 * MIB,
        "vm_restart_required": 0,
        "vm_slots_free": 3,
        "vm_guest_answers": 1,
        "vm_guest_vcpus": 2,
        "vm_offline_vcpus": 2,
        "vm_guest_vcpus_age_seconds": 30,
        "vm_guest_memory_bytes": 1000 * MIB,
        "vm_offline_memory_bytes": 128 * MIB,
        "vm_guest_memory_age_seconds": 30,
    }


def test_of_a_vm_that_nobody_looked_at_only_libvirt_s_numbers_are_told(watched: Watched) -> None:
    assert watched.told()["u1"].keys() == {"vm_vcpus", "vm_vcpus_max", "vm_balloon_bytes"}


def test_a_number_that_libvirt_does_not_tell_is_left_out(watched: Watched) -> None:
    watched.found = (stats(vcpus=None),)
    watched.vms.observed(facts())
    told = watched.told()["u1"]
    assert "vm_vcpus" not in told
    assert told["vm_offline_vcpus"] == 2


def test_a_vm_that_has_changed_since_its_guest_was_asked_has_no_offline_number(watched: Watched) -> None:
    watched.vms.observed(facts())
    watched.found = (stats(vcpus=6),)
    assert "vm_offline_vcpus" not in watched.told()["u1"]
    watched.vms.observed(facts(vcpus=6, online=6, blocks_online=None))
    told = watched.told()["u1"]
    assert told["vm_offline_vcpus"] == 0
    assert "vm_offline_memory_bytes" not in told


def test_a_guest_that_falls_silent_keeps_what_it_said_and_its_age_grows(watched: Watched) -> None:
    watched.vms.observed(facts())
    watched.now += 60
    watched.vms.observed(
        facts(online=None, blocks_online=None, silence=Code.GUEST_AGENT_UNRESPONSIVE, fell_silent=True)
    )
    told = watched.told()["u1"]
    assert (told["vm_guest_answers"], told["vm_offline_vcpus"], told["vm_guest_vcpus_age_seconds"]) == (0, 2, 60)


@pytest.mark.parametrize("silence", [Code.GUEST_AGENT_ABSENT, Code.GUEST_AGENT_DISCONNECTED, Code.VM_PAUSED])
def test_a_guest_that_never_answered_is_not_called_silent(watched: Watched, silence: Code) -> None:
    watched.vms.observed(facts(online=None, blocks_online=None, silence=silence))
    assert "vm_guest_answers" not in watched.told()["u1"]


def test_a_look_at_the_vcpus_leaves_what_is_known_of_the_memory(watched: Watched) -> None:
    watched.vms.observed(facts())
    watched.now += 10
    watched.vms.observed(facts(online=4, blocks_online=None))
    told = watched.told()["u1"]
    assert (told["vm_offline_vcpus"], told["vm_guest_vcpus_age_seconds"]) == (0, 0)
    assert (told["vm_offline_memory_bytes"], told["vm_guest_memory_age_seconds"]) == (128 * MIB, 10)


def test_a_vm_that_is_gone_or_off_leaves_no_series(watched: Watched) -> None:
    watched.vms.observed(facts())
    assert "u1" in watched.told()
    watched.found = (stats("u2"),)
    assert watched.told().keys() == {"", "u2"}
    watched.found = (stats(),)
    assert "vm_offline_vcpus" not in watched.told()["u1"], "it may have another guest by now"
    watched.vms.observed(facts())
    watched.vms.observed(facts(running=False))
    assert "vm_offline_vcpus" not in watched.told()["u1"]


def test_what_was_seen_of_an_earlier_run_is_not_told_of_this_one(watched: Watched) -> None:
    watched.vms.observed(facts())
    assert "vm_offline_vcpus" in watched.told()["u1"]
    watched.found = (stats(run=2),)
    assert "vm_offline_vcpus" not in watched.told()["u1"]


def test_a_libvirt_that_is_away_leaves_the_last_answer_with_its_age(watched: Watched) -> None:
    assert watched.told()[""].items() >= {"vm_stats_age_seconds": 0, "vms_running": 1}.items()
    watched.away = True
    watched.now += 40
    told = watched.told()
    assert told[""].items() >= {"vm_stats_age_seconds": 40, "vms_running": 1}.items()
    assert told["u1"]["vm_vcpus"] == 4


def test_before_libvirt_has_answered_nothing_is_told(watched: Watched) -> None:
    watched.away = True
    assert watched.told() == {}


def test_scrapes_are_answered_in_time_while_libvirt_hangs_and_few_calls_hang(watched: Watched) -> None:
    watched.told()
    watched.hang = threading.Event()
    started = time.monotonic()
    for _ in range(5):
        assert watched.told()["u1"]["vm_vcpus"] == 4
    assert time.monotonic() - started < 20
    assert watched.calls == 1 + 3


def test_who_scrapes_while_another_waits_gets_the_last_answer_at_once() -> None:
    watched = Watched(stats(), wait_s=600)
    watched.told()
    watched.hang = threading.Event()
    first = threading.Thread(target=watched.told)
    first.start()
    wait_for(lambda: watched.calls == 2, timeout_s=5, what="the first to ask")
    assert watched.told()["u1"]["vm_vcpus"] == 4
    assert watched.calls == 2
    watched.hang.set()
    first.join()


def test_a_thousand_vms_are_told_quickly() -> None:
    found = tuple(stats(f"u{n}") for n in range(1000))
    metrics, vms = Metrics(), VmMetrics(lambda: found)
    metrics.add_vms(vms)
    for vm in found:
        metrics.observed(facts(vm.uuid))
    text = metrics.render().decode()
    assert text.count("\nkvmagent_vm_") == 13 * 1000 + 1
    assert 'kvmagent_vm_offline_vcpus{name="vm-u999",uuid="u999"} 2.0' in text


# Of a VM: how many of its vCPUs its guest uses, of its blocks, whether its agent fell silent, whether it is left alone.
STATES = strategies.tuples(
    strategies.integers(0, 4), strategies.integers(8, 10), strategies.booleans(), strategies.booleans()
)


@given(
    states=strategies.lists(STATES, max_size=12),
    per_vm=strategies.sampled_from(["all", "trouble", "off"]),
    max_vms=strategies.integers(0, 12),
)
def test_series_of_vms_are_bounded_and_the_sums_are_those_of_all(
    states: list[tuple[int, int, bool, bool]], per_vm: Any, max_vms: int
) -> None:
    watched = Watched(*(stats(f"u{n:02}") for n in range(len(states))))
    for n, (online, blocks, silent, unseen) in enumerate(states):
        if not unseen:
            watched.vms.observed(facts(f"u{n:02}", online=online, blocks_online=blocks))
        if silent:
            watched.vms.observed(
                facts(
                    f"u{n:02}", online=None, blocks_online=None, silence=Code.GUEST_AGENT_UNRESPONSIVE, fell_silent=True
                )
            )
    whole = watched.told()
    sums = whole.pop("", {})
    in_trouble = {
        uuid
        for uuid, told in whole.items()
        if told.get("vm_offline_vcpus") or told.get("vm_offline_memory_bytes") or told.get("vm_guest_answers") == 0
    }
    watched.vms.section = MetricsSection(per_vm=per_vm, max_vms=max_vms)
    told = watched.told()
    kept = told.pop("", {})
    assert kept.pop("vms_with_series") == len(told) <= max_vms
    assert kept.items() == {name: value for name, value in sums.items() if name != "vms_with_series"}.items()
    assert all(told[uuid] == whole[uuid] for uuid in told)
    wanted = {"all": whole.keys(), "trouble": in_trouble, "off": set()}[per_vm]
    assert told.keys() <= wanted
    assert len(told) == min(max_vms, len(wanted))
    assert in_trouble & wanted <= told.keys() or told.keys() <= in_trouble, "those in trouble come first"
    assert kept["vms_vcpus"] == 4 * len(states)
    assert kept["vms_offline_vcpus"] == sum(one.get("vm_offline_vcpus", 0) for one in whole.values())


@pytest.mark.parametrize(
    ("trouble", "seen"),
    [
        (
            "guest_silent",
            facts(online=None, blocks_online=None, silence=Code.GUEST_AGENT_UNRESPONSIVE, fell_silent=True),
        ),
        ("vcpus_offline", facts(online=3, blocks_online=10)),
        ("memory_offline", facts(online=4, blocks_online=9)),
        ("restart_required", with_config(facts(online=4, blocks_online=10), vcpu_maximum=16)),
        ("slots_exhausted", with_live(facts(online=4, blocks_online=10), slots=1)),
    ],
)
def test_a_vm_in_trouble_has_series_and_is_counted_by_what_is_wrong(
    watched: Watched, trouble: str, seen: Facts
) -> None:
    watched.vms.section = MetricsSection(per_vm="trouble")
    watched.vms.observed(facts(online=4, blocks_online=10))
    assert "u1" not in watched.told()
    watched.vms.observed(seen)
    assert "u1" in watched.told()
    assert troubles(watched) == {trouble}


def test_a_guest_that_is_read_no_more_is_in_trouble_when_its_alert_would_fire(watched: Watched) -> None:
    watched.vms.section = MetricsSection(per_vm="trouble")
    watched.vms.observed(facts(online=4, blocks_online=10))
    watched.now += 1800
    assert "u1" not in watched.told()
    watched.now += 1
    assert "u1" in watched.told()
    assert troubles(watched) == {"unreadable"}


def test_each_alert_on_a_vm_fires_for_vms_in_trouble_alone() -> None:
    """With per_vm = trouble no alert is lost: the rules' conditions are the troubles, one each."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    of_vms = [rule["alert"] for rule in rules if re.search(r"kvmagent_vm_(?!stats_age)", rule["expr"])]
    watched = Watched(stats())
    kinds = {
        sample.labels["trouble"] for f in watched.vms.collect() for sample in f.samples if "trouble" in sample.labels
    }
    assert len(of_vms) == len(kinds)


class Guests:
    """A node whose guests answer, but for those that hang."""

    def __init__(self, *uuids: str, hanging: frozenset[str] = frozenset()) -> None:
        self.found = tuple(stats(uuid) for uuid in uuids)
        self.hanging = hanging
        self.let_go = threading.Event()
        self.asked: list[str] = []

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        assert parts == {"cpus", "memory"}
        self.asked.append(vm)
        if vm in self.hanging:
            self.let_go.wait(20)
        if vm == "gone":
            raise AgentError(Code.VM_NOT_FOUND, "gone")
        return facts(vm)


def run(guests: Guests, interval_s: float, **options: Any) -> Sampler:
    sampler = Sampler(guests, lambda: guests.found, interval_s=interval_s, **options)
    sampler.start()
    return sampler


def test_each_guest_is_asked_in_turn_again_and_again() -> None:
    guests = Guests("u1", "gone", "u2")
    sampler = run(guests, 0.03)
    wait_for(lambda: len(guests.asked) >= 6, timeout_s=10, what="two rounds")
    sampler.stop()
    assert guests.asked[:6] == ["u1", "gone", "u2"] * 2


def test_a_guest_that_hangs_holds_up_no_other_and_is_not_asked_twice() -> None:
    guests = Guests("u1", "hung", "u2", hanging=frozenset({"hung"}))
    sampler = run(guests, 0.03, wait_s=0.05)
    wait_for(lambda: guests.asked.count("u2") >= 4, timeout_s=10, what="four rounds")
    assert guests.asked.count("hung") == 1
    guests.let_go.set()
    wait_for(lambda: guests.asked.count("hung") > 1, timeout_s=10, what="the hung guest to be asked again")
    sampler.stop()


def test_guests_are_asked_as_seldom_as_told_and_never_with_zero() -> None:
    guests = Guests("u1", "u2")
    rare = run(guests, 3600.0)
    never = run(guests, 0)
    assert not guests.asked
    assert not [thread for thread in threading.enumerate() if thread is never._thread]
    rare.stop()
    never.stop()
    assert not guests.asked
