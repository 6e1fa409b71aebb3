"""Keeps the host's memory budget: what all running VMs may have, and what accepted tasks are about to bring them to.

    look(connection, ...)     the pools that a VM's memory comes from: facts, for the planners
    reserve(connection, ...)  before a task's first step; refused where the host cannot keep it
    release(task)             with the task's end
    note(facts)               what was observed of a VM that `look` does not return: what its guest does not use
    view(connection)          for /healthz, metrics and the operator

What is asked here of libvirt waits for no QEMU, so that one that hangs holds up no other VM's plug; how much is
resident is asked for by `view` alone, which waits for it without any lock. A definition is read again only where run
or size changed.
Thread-safe: between looking and reserving nobody else reserves. libvirt is asked under a lock of its own: one that
hangs holds up neither `release` nor `note`.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import libvirt
import msgspec

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.host import read_capacity, read_cgroups, read_limits
from kvmagent.hypervisor.libvirterrors import libvirt_errors, translate
from kvmagent.logs import Log
from kvmagent.model.command import Reservation
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Domain, Facts, MemoryDevice, MemoryPool
from kvmagent.model.host import HostMemory
from kvmagent.model.hostbudget import (
    NORMAL_PAGES,
    HostCapacity,
    Part,
    Promise,
    check_growth,
    find_pools,
    make_promise,
    measure_pool,
)
from kvmagent.model.reclaim import find_spare, find_unused
from kvmagent.model.units import KIB

log = Log(__name__)

# Looks that come so close together are one: a list of VMs is many looks. On a host of many VMs a look takes its time,
# and is good for so many times of that: else the looks for each of n VMs would ask n times of all n.
_SAME_LOOK_S, _SAME_LOOK_TIMES = 0.05, 20
# How old what is shown may be: a page and a scraper ask often.
_VIEW_S = 1.0
# How long what a guest said of its memory is no news.
_NOTE_S = 600.0
# In place of the sizes that show whether a VM has changed: what is requested of a virtio-mem device is not among them.
_UNTOLD = (None,)
_ACTIVE = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
_ENDED = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)


class _Note(msgspec.Struct, frozen=True):
    """What was seen of one run of a VM: what its guest could do without, and what QEMU alone knows to be there."""

    domain_id: int | None
    noted_at: float
    spare_bytes: int | None
    unknown: tuple[MemoryDevice, ...]


class _Seen(msgspec.Struct, frozen=True):
    """What was seen at a time: the host, what each VM may have, and of that what is so without reservations (`now`).

    `changes` is how many there had been before: after one more it is no longer so.
    """

    at: float = -inf
    took_s: float = 0.0
    changes: int = 0
    capacity: HostCapacity = HostCapacity(0, 0, 1.0)
    promises: dict[str, Promise] = {}
    now: dict[str, Promise] = {}


class BudgetView(msgspec.Struct, frozen=True):
    """The budget at one moment: of normal memory in `host`, and what each running VM may have."""

    host: HostMemory
    promises: dict[str, Promise]


class Budget:
    """`reserve_bytes` is left to the host itself, `overcommit` times the rest may be promised."""

    def __init__(
        self,
        *,
        reserve_bytes: int = 0,
        overcommit: float = 1.0,
        host_root: Path = Path("/"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reserve_bytes = reserve_bytes
        self._overcommit = overcommit
        self._host_root = host_root
        self._clock = clock
        # Who asks libvirt has the one; what is kept is touched under the other, for a moment.
        self._asking, self._lock = threading.Lock(), threading.Lock()
        self._reservations: dict[str, tuple[str, Reservation]] = {}
        self._notes: dict[str, _Note] = {}
        self._changes = 0
        # Touched by who asks alone.
        self._known: dict[str, tuple[tuple[int | None, ...], Promise]] = {}
        self._over_since: dict[tuple[int, frozenset[int], str], float] = {}
        self._seen = _Seen()
        self._resident: tuple[float, dict[str, int]] = -inf, {}
        #: What `view` saw last.
        self.last: BudgetView | None = None

    def recall(self, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Take up the reservation of a task that an earlier agent has begun; nothing is judged again."""
        with self._lock:
            self._reservations[task_uuid] = uuid, reservation
            self._changes += 1

    def reserve(self, connection: libvirt.virConnect, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Reserve what a task brings a running VM to, before the first step towards it.

        Raises:
            AgentError: HOST_MEMORY_PROMISED, MEMORY_HARD_LIMIT, and nothing is reserved; libvirt's errors.
        """
        with self._asking:
            seen = self._look(connection)
            own = seen.promises.get(uuid)
            if own is None or (grown := own.grown_to(reservation)) == own:
                return
            check_growth(self._find_pools(seen, own), own, grown)
            self.recall(task_uuid, uuid, reservation)

    def set_ratios(self, *, reserve_bytes: int, overcommit: float) -> None:
        """Promise by other ratios from now on; what was promised stays so."""
        with self._lock:
            self._reserve_bytes, self._overcommit = reserve_bytes, overcommit
            self._changes += 1

    def release(self, task_uuid: str) -> None:
        """Free what a task has reserved, which has ended: from now on the VM counts with what it has."""
        with self._lock:
            self._reservations.pop(task_uuid, None)
            self._changes += 1

    def note(self, facts: Facts) -> None:
        """Remember of a running VM what its guest does not use, and memory that libvirt does not know."""
        live, unused = facts.domain.live, find_unused(facts)
        if live is None:
            return
        unknown = tuple(device for device in live.devices if not device.known)
        spare = None if unused is None else find_spare(*unused)
        with self._lock:
            known = self._notes.get(facts.domain.uuid)
            if known is None or known.domain_id != live.domain_id or known.unknown != unknown:
                self._changes += bool(unknown or (known and known.unknown))
            elif unused is None:
                return
            self._notes[facts.domain.uuid] = _Note(live.domain_id, time.monotonic(), spare, unknown)

    def look(self, connection: libvirt.virConnect, vm: Domain) -> tuple[MemoryPool, ...]:
        """Return the pools that a VM's memory comes from; of one that is off as if it ran as its definition says.

        Raises:
            AgentError: libvirt's errors.
        """
        with self._asking:
            age_s = min(max(_SAME_LOOK_S, _SAME_LOOK_TIMES * self._seen.took_s), _VIEW_S)
            seen = self._see(connection, age_s)
            own = seen.promises.get(vm.uuid)
            if own is None and vm.live is None and vm.config is not None:
                page_bytes = seen.capacity.default_page_bytes
                own = make_promise(vm.uuid, vm.name, vm.config, default_page_bytes=page_bytes)
                seen = msgspec.structs.replace(seen, promises={**seen.promises, vm.uuid: own})
            return () if own is None else self._find_pools(seen, own)

    def view(self, connection: libvirt.virConnect) -> BudgetView:
        """Return the whole budget.

        Raises:
            AgentError: libvirt's errors.
        """
        resident = self._read_resident(connection)
        with self._asking:
            seen = self._see(connection, _VIEW_S)
            capacity, promises = seen.capacity, seen.promises
            promises = {
                uuid: msgspec.structs.replace(promise, resident_bytes=resident.get(uuid))
                for uuid, promise in promises.items()
            }
            pool = measure_pool(capacity, promises.values(), NORMAL_PAGES, frozenset())
            host = HostMemory(
                physical=capacity.physical_bytes,
                reserve=capacity.reserve_bytes,
                overcommit=capacity.overcommit,
                hugepages=sum(capacity.hugepages.values()),
                budget=pool.capacity_bytes,
                promised=pool.promised_bytes,
                reserved=pool.promised_bytes
                - measure_pool(capacity, seen.now.values(), NORMAL_PAGES, frozenset()).promised_bytes,
                resident=sum(promise.resident_bytes or 0 for promise in promises.values()),
                over_since=self._over_since.get(_find_kind(self._date(pool))),
            )
            self.last = BudgetView(host, promises)
            return self.last

    def _read_resident(self, connection: libvirt.virConnect) -> dict[str, int]:
        """Return how much of each running VM is resident, no older than what is shown."""
        at, resident = self._resident
        if time.monotonic() - at > _VIEW_S:
            with libvirt_errors("reading the VMs' memory"):
                found = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BALLOON, _ACTIVE)
            told = ((domain.UUIDString(), stats.get("balloon.rss")) for domain, stats in found)
            resident = {uuid: rss * KIB for uuid, rss in told if rss is not None}
            self._resident = time.monotonic(), resident
        return resident

    def _find_pools(self, seen: _Seen, own: Promise) -> tuple[MemoryPool, ...]:
        limits = read_limits(self._host_root, own.cgroups)
        return tuple(map(self._date, find_pools(seen.capacity, seen.promises.values(), own, limits)))

    def _date(self, pool: MemoryPool) -> MemoryPool:
        """Return a pool with since when more of it is promised than there is, as far as anybody looked."""
        kind = _find_kind(pool)
        if pool.promised_bytes <= pool.capacity_bytes:
            self._over_since.pop(kind, None)
            return pool
        since = datetime.fromtimestamp(self._over_since.setdefault(kind, self._clock()), UTC)
        return msgspec.structs.replace(pool, over_since=f"{since:%Y-%m-%d %H:%M} UTC")

    def _see(self, connection: libvirt.virConnect, age_s: float) -> _Seen:
        """Return what the last look saw, where it is no older than this and nothing has changed since; else look."""
        is_so = time.monotonic() - self._seen.at <= age_s and self._seen.changes == self._changes
        return self._seen if is_so else self._look(connection)

    def _look(self, connection: libvirt.virConnect) -> _Seen:
        """Return what every running VM may have, what is reserved for it included.

        What is released while libvirt is asked still counts: what the task plugged may be missing in the answer.
        """
        began = time.monotonic()
        with self._lock:
            changes, before, notes = self._changes, dict(self._reservations), dict(self._notes)
        capacity = read_capacity(self._host_root, self._reserve_bytes, self._overcommit)
        now = self._read(connection, capacity, notes)
        with self._lock:
            reservations = before | self._reservations
            self._notes = {uuid: note for uuid, note in self._notes.items() if uuid in now}
        promises = dict(now)
        for uuid, reservation in reservations.values():
            if uuid in promises:
                promises[uuid] = promises[uuid].grown_to(reservation)
        now_s = time.monotonic()
        self._seen = _Seen(now_s, now_s - began, changes, capacity.without_others(now.values()), promises, now)
        return self._seen

    def _read(
        self, connection: libvirt.virConnect, capacity: HostCapacity, notes: dict[str, _Note]
    ) -> dict[str, Promise]:
        """Return what every running VM may have without any reservation."""
        with libvirt_errors("reading the VMs' memory"):
            found = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        cgroups = read_cgroups(self._host_root)
        known: dict[str, tuple[tuple[int | None, ...], Promise]] = {}
        now: dict[str, Promise] = {}
        for domain in found:
            uuid, number = domain.UUIDString(), domain.ID()
            try:
                _, maximum_kib, current_kib, vcpus, _ = domain.info()
            except libvirt.libvirtError as error:
                if _is_ended(error):
                    continue
                raise translate(error, "reading a VM") from error
            key: tuple[int | None, ...] = (number, current_kib, maximum_kib, vcpus)
            old = self._known.get(uuid)
            if old is not None and old[0] == key and None not in key:
                promise = old[1]
            elif (read := self._read_promise(domain, capacity.default_page_bytes)) is not None:
                promise = read[0]
                key = _UNTOLD if read[1] else key
            else:
                continue
            known[uuid] = key, promise
            note = notes.get(uuid)
            # How much is resident is as it was shown last: it names who could give back, and decides nothing.
            promise = msgspec.structs.replace(
                promise, cgroups=cgroups.get(number, ()), resident_bytes=self._resident[1].get(uuid)
            )
            now[uuid] = promise if note is None or note.domain_id != number else _with_note(promise, note)
        self._known = known
        return now

    def _read_promise(self, domain: libvirt.virDomain, default_page_bytes: int | None) -> tuple[Promise, bool] | None:
        """Return what a running VM may have, and whether that may change untold; None for one that has ended.

        One whose definition cannot be read counts with all that libvirt says it has: it fails the budget of no other.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE.
        """
        uuid, name = domain.UUIDString(), domain.name()
        try:
            live: Definition = parse_definition(domain.XMLDesc(0))
            return make_promise(uuid, name, live, default_page_bytes=default_page_bytes), bool(live.virtio_mems)
        except (libvirt.libvirtError, ValueError) as error:
            if _is_ended(error):
                return None
            problem = translate(error, "reading a VM") if isinstance(error, libvirt.libvirtError) else None
            if problem is not None and problem.code is Code.LIBVIRT_UNAVAILABLE:
                raise problem from error
            log.warning("definition of a VM cannot be read, it counts with its maximum", vm=name, error=str(error))
        try:
            _, maximum_kib, _, vcpus, _ = domain.info()
        except libvirt.libvirtError as error:
            if _is_ended(error):
                return None
            raise translate(error, "reading a VM") from error
        part = Part(0, NORMAL_PAGES, frozenset(), maximum_kib * KIB)
        return Promise(uuid, name, (part,), vcpus=vcpus), False


def _find_kind(pool: MemoryPool) -> tuple[int, frozenset[int], str]:
    return pool.page_bytes, pool.nodes, pool.cgroup


def _is_ended(error: Exception) -> bool:
    """Return whether it says that the VM has ended since it was listed."""
    return isinstance(error, libvirt.libvirtError) and error.get_error_code() in _ENDED


def _with_note(promise: Promise, note: _Note) -> Promise:
    """Return a promise with what was seen of the VM besides."""
    sizes = promise.node_bytes
    for device in note.unknown:
        sizes[device.node or 0] = sizes.get(device.node or 0, 0) + device.promised_bytes
    whole = promise.grown_to(Reservation(sizes, promise.ballooned_bytes, promise.vcpus))
    is_new = time.monotonic() - note.noted_at < _NOTE_S
    return msgspec.structs.replace(whole, spare_bytes=note.spare_bytes if is_new else None)
