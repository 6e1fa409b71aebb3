"""Metrics of running VMs: from libvirt for all at once, and from the last observation of each guest.

    scrape  -> one libvirt call for all VMs, waited for _WAIT_S at most -> else the last answer, and its age
    observe -> what a command, a read or the sampler saw of VM and guest at the same moment

Sums over all VMs are always exported. Which VMs have series of their own, metrics.per_vm says, and how many at most,
metrics.max_vms: those in trouble come first.

A number of one moment is never compared with a number of another: what is plugged and offline is told only while the
VM has as many vCPUs, and is in the same run, as when its guest was asked. The series of a VM that is gone, or off, go
with it.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvmagent.api.deadline import Asker
from kvmagent.api.metrics.table import METRICS, make_gauge
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.host import VmStats
from kvmagent.settings import MetricsSection

# How long a scrape waits for libvirt, and how long an answer is good for scrapes that follow.
_WAIT_S, _FRESH_S = 2.0, 2.0
# Calls that hang at once: one that hangs in a VM keeps the next from waiting for that VM.
_AT_ONCE = 3
# A guest that has answered and was then not read for so long, as KvmagentVmUnreadable has it.
_UNREADABLE_S = 1800.0
# What is wrong with a VM: the name of it, and whether these numbers show it. The alerts on VMs ask for the same.
_TROUBLES: Mapping[str, Callable[[Mapping[str, float]], bool]] = MappingProxyType(
    {
        "guest_silent": lambda numbers: numbers.get("kvmagent_vm_guest_answers") == 0,
        "vcpus_offline": lambda numbers: numbers.get("kvmagent_vm_offline_vcpus", 0) > 0,
        "memory_offline": lambda numbers: numbers.get("kvmagent_vm_offline_memory_bytes", 0) > 0,
        "slots_exhausted": lambda numbers: numbers.get("kvmagent_vm_slots_free") == 0,
        "restart_required": lambda numbers: numbers.get("kvmagent_vm_restart_required") == 1,
        "unreadable": lambda numbers: (
            numbers.get("kvmagent_vm_guest_answers") == 1
            and numbers.get("kvmagent_vm_guest_vcpus_age_seconds", 0) > _UNREADABLE_S
        ),
    }
)
# Of all VMs the sum of what each has.
_SUMS = ("vcpus", "promised_bytes", "resident_bytes", "offline_vcpus", "offline_memory_bytes")


@dataclass(frozen=True)
class _Seen:
    """What was last learnt of a VM; `run` is its libvirt id, None until all VMs are read the next time.

    `..._at` are of the monotonic clock. Of a guest that does not answer, what it last said stays.
    """

    vcpus: int
    memory_bytes: int
    slots_free: int | None
    restart_required: bool
    run: int | None = None
    answers: bool | None = None
    guest_vcpus: int | None = None
    offline_vcpus: int | None = None
    vcpus_at: float | None = None
    guest_memory_bytes: int | None = None
    offline_memory_bytes: int | None = None
    memory_at: float | None = None


class VmMetrics(Collector):
    """Thread-safe. `read_stats` returns what libvirt reports on all running VMs, and may hang."""

    def __init__(
        self,
        read_stats: Callable[[], tuple[VmStats, ...]],
        *,
        section: MetricsSection | None = None,
        wait_s: float = _WAIT_S,
        fresh_s: float = _FRESH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_stats = read_stats
        #: Which VMs have series of their own, and how many at most.
        self.section = section or MetricsSection()
        self._wait_s = wait_s
        self._fresh_s = fresh_s
        self._clock = clock
        self._asker = Asker(at_once=_AT_ONCE)
        self._asking = threading.Lock()
        self._stats: tuple[VmStats, ...] = ()
        self._stats_at: float | None = None
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}

    def observed(self, facts: Facts) -> None:
        """Keep what was seen of a VM."""
        live, uuid = facts.domain.live, facts.domain.uuid
        with self._lock:
            if live is None:
                self._seen.pop(uuid, None)
                return
            slots_free = facts.count_free_slots(live) if live.max_memory_bytes is not None else None
            former = self._seen.get(uuid)
            if former is not None and former.vcpus == live.vcpu_current and former.memory_bytes == live.memory_bytes:
                seen = replace(former, slots_free=slots_free, restart_required=facts.restart_required)
            else:
                seen = _Seen(
                    live.vcpu_current,
                    live.memory_bytes,
                    slots_free,
                    facts.restart_required,
                    run=former.run if former else None,
                )
            self._seen[uuid] = self._with_guest(seen, facts)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the metrics, in bounded time whatever hangs."""
        self._refresh()
        now = self._clock()
        with self._lock:
            seen = dict(self._seen)
        values: dict[str, list[tuple[tuple[str, ...], float]]] = {name: [] for name in METRICS if _is_of_vm(name)}
        vms = [_Told(vm, _numbers(vm, seen.get(vm.uuid), now)) for vm in self._stats]
        if self._stats_at is not None:
            values["kvmagent_vm_stats_age_seconds"].append(((), now - self._stats_at))
            for name, value, *labels in _sum_up(vms):
                values[name].append((tuple(labels), value))
            chosen = _choose(vms, self.section)
            values["kvmagent_vms_with_series"].append(((), len(chosen)))
            for one in chosen:
                for name, value in one.numbers.items():
                    values[name].append(((one.vm.uuid, one.vm.name), value))
        return [make_gauge(name, known) for name, known in values.items()]

    def running(self) -> tuple[VmStats, ...]:
        """Return the running VMs as libvirt reported last, or reports now."""
        self._refresh()
        return self._stats

    def _with_guest(self, seen: _Seen, facts: Facts) -> _Seen:
        guest, now = facts.guest, self._clock()
        if facts.fell_silent:
            seen = replace(seen, answers=False)
        if guest.cpus_online is not None:
            seen = replace(
                seen,
                answers=True,
                guest_vcpus=guest.cpus_online,
                offline_vcpus=facts.offline_vcpus,
                vcpus_at=now,
            )
        if guest.blocks is not None:
            seen = replace(
                seen,
                answers=True,
                guest_memory_bytes=guest.mem_total_bytes,
                offline_memory_bytes=facts.offline_memory_bytes,
                memory_at=now,
            )
        return seen

    def _refresh(self) -> None:
        """Ask libvirt anew; whoever comes while another asks takes the last answer."""
        if not self._asking.acquire(blocking=False):
            return
        try:
            if self._stats_at is not None and self._clock() - self._stats_at < self._fresh_s:
                return
            asked_at = self._clock()
            stats = self._asker.ask(self._read_stats, timeout_s=self._wait_s, about="the VMs' statistics")
            self._stats, self._stats_at = stats, asked_at
            self._forget({vm.uuid: vm.run for vm in stats})
        except AgentError:
            pass  # the age of the last answer shows it
        finally:
            self._asking.release()

    def _forget(self, runs: dict[str, int]) -> None:
        """Forget the VMs that do not run any more, and what was seen of another run of one."""
        with self._lock:
            self._seen = {
                uuid: replace(seen, run=runs[uuid])
                for uuid, seen in self._seen.items()
                if uuid in runs and seen.run in (None, runs[uuid])
            }


def _is_of_vm(name: str) -> bool:
    return name.startswith(("kvmagent_vm_", "kvmagent_vms_"))


class _Told(NamedTuple):
    """A VM and its numbers, by the metric; one that is not known has none."""

    vm: VmStats
    numbers: Mapping[str, float]

    @property
    def troubles(self) -> list[str]:
        """What is wrong with it."""
        return [name for name, shows in _TROUBLES.items() if shows(self.numbers)]


def _choose(vms: list[_Told], section: MetricsSection) -> list[_Told]:
    """Return the VMs that have series of their own: by UUID, so that the same ones have them at each scrape."""
    if section.per_vm == "off":
        return []
    ordered = sorted(vms, key=lambda one: (not one.troubles, one.vm.uuid))
    return [one for one in ordered if one.troubles or section.per_vm == "all"][: section.max_vms]


def _sum_up(vms: list[_Told]) -> Iterable[tuple[str, float] | tuple[str, float, str]]:
    """Return the sums over all VMs: metric, value, and its label's value where it has one."""
    yield "kvmagent_vms_running", len(vms)
    for name in _SUMS:
        yield f"kvmagent_vms_{name}", sum(one.numbers.get(f"kvmagent_vm_{name}", 0) for one in vms)
    troubles = Counter(trouble for one in vms for trouble in one.troubles)
    for trouble in _TROUBLES:
        yield "kvmagent_vms_in_trouble", troubles[trouble], trouble


def _numbers(vm: VmStats, seen: _Seen | None, now: float) -> Mapping[str, float]:
    return {name: value for name, value in _find_numbers(vm, seen, now) if value is not None}


def _find_numbers(vm: VmStats, seen: _Seen | None, now: float) -> Iterable[tuple[str, float | None]]:
    yield "kvmagent_vm_vcpus", vm.vcpus
    yield "kvmagent_vm_vcpus_max", vm.max_vcpus
    yield "kvmagent_vm_balloon_bytes", vm.balloon_bytes
    yield "kvmagent_vm_promised_bytes", vm.promised_bytes
    yield "kvmagent_vm_resident_bytes", vm.resident_bytes
    if seen is None or seen.run not in (None, vm.run):
        return
    yield "kvmagent_vm_memory_bytes", seen.memory_bytes
    yield "kvmagent_vm_slots_free", seen.slots_free
    yield "kvmagent_vm_restart_required", seen.restart_required
    yield "kvmagent_vm_guest_answers", seen.answers
    if seen.vcpus_at is not None and vm.vcpus in (None, seen.vcpus):
        yield "kvmagent_vm_guest_vcpus", seen.guest_vcpus
        yield "kvmagent_vm_offline_vcpus", seen.offline_vcpus
        yield "kvmagent_vm_guest_vcpus_age_seconds", now - seen.vcpus_at
    if seen.memory_at is not None:
        yield "kvmagent_vm_guest_memory_bytes", seen.guest_memory_bytes
        yield "kvmagent_vm_offline_memory_bytes", seen.offline_memory_bytes
        yield "kvmagent_vm_guest_memory_age_seconds", now - seen.memory_at
