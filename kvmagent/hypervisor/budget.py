"""Keeps the host's memory budget: what running VMs may use, and what accepted tasks are about to add.

    look(connection, ...)        the pools that a VM's memory comes from: facts, for the planners
    reserve(connection, ...)     before a task's first step; refused where the host cannot keep it
    release(task)                with the task's end
    begin(), note(facts, begun)  what was observed of a VM: its size, and what `look` does not return of it
    note_change(uuid), hear      a step was performed, or an event of libvirt came: this VM may have another size now
    note_gap()                   events were lost: any VM may have changed, or be another run of the same number
    view(connection)             for /healthz, metrics and the operator

A look at all VMs is good for a second; within it the next look reads again only those VMs that are known to have
changed: by a task's step, by what an event told, or that were observed with another size. So a plug costs the same
however many VMs run. What a task has observed of its own VM is not read a second time, unless the VM changed or was
read after that observation began. What others do to a VM without an event (`virsh setmem` of a VM without balloon
events, `virsh attach-device`) counts up to a second late; if no events come, so does a VM that others start. A
definition that changed and left the size as it was (`virsh numatune`) counts when the agent observes that VM next, as
each task does first.

What is asked here of libvirt waits for no QEMU, so that one that hangs holds up no other VM's plug; how much is
resident is asked for by `view` alone, which waits for it without any lock. A look at all VMs reads a definition again
only where run or size changed, or events were lost.
Thread-safe: between looking and reserving nobody else reserves. libvirt is asked under a lock of its own: one that
hangs holds up neither `release` nor `note`.
"""

import itertools
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import libvirt
import msgspec

from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.host import read_capacity, read_cgroups, read_limits
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.hypervisor.promises import ReadVm, find_vm, make_read, read_vms
from kvmagent.model.command import Reservation
from kvmagent.model.facts import Domain, Facts, MemoryDevice, MemoryPool
from kvmagent.model.host import HostMemory
from kvmagent.model.hostbudget import (
    ANYWHERE,
    NORMAL_PAGES,
    HostCapacity,
    Promise,
    check_growth,
    make_promise,
)
from kvmagent.model.ledger import Ledger, find_pools, measure_pool
from kvmagent.model.reclaim import find_spare, find_unused
from kvmagent.model.units import KIB

# How long a look at all VMs, and at what is resident of them, is good.
_LOOK_S = 1.0
# After how long what a guest said of its memory is outdated.
_NOTE_S = 600.0
_ACTIVE = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
# In place of a UUID: all VMs are to be read; and the definitions of all of them.
_ALL, _ANEW = "", "anew"


class _Note(msgspec.Struct, frozen=True):
    """What was observed of one run of a VM: what its guest could do without, and what QEMU alone knows to be there."""

    domain_id: int | None
    noted_at: float
    spare_bytes: int | None
    unknown: tuple[MemoryDevice, ...]


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
        definitions: Definitions | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reserve_bytes = reserve_bytes
        self._overcommit = overcommit
        self._host_root = host_root
        self._definitions = definitions or Definitions()
        self._clock = clock
        self._monotonic = monotonic
        # Who asks libvirt has the one; what is kept is touched under the other, for a moment.
        self._asking, self._lock = threading.Lock(), threading.Lock()
        self._reservations: dict[str, tuple[str, Reservation]] = {}
        self._notes: dict[str, _Note] = {}
        # The VMs to read again at the next look; for some of them an observation has already supplied the new state.
        self._stale = {_ALL}
        self._observed: dict[str, ReadVm] = {}
        # When each VM, and all, last changed or were read: an observation that began before is outdated.
        self._moments = itertools.count()
        self._changed_at: dict[str, int] = {}
        self._changed_at_all = 0
        # Changed by who asks alone.
        self._looked_at = -inf
        self._known: dict[str, ReadVm] = {}
        self._capacity = HostCapacity(0, 0, 1.0)
        self._cgroups: dict[int, tuple[str, ...]] = {}
        # What each VM may have, without what is reserved for it and with that.
        self._now, self._promised = Ledger(), Ledger()
        self._over_since: dict[tuple[int, frozenset[int], str], float] = {}
        self._resident: tuple[float, dict[str, int]] = -inf, {}
        #: What `view` saw last.
        self.last: BudgetView | None = None

    def recall(self, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Take up the reservation of a task that an earlier agent has begun; nothing is judged again."""
        with self._lock:
            self._reservations[task_uuid] = uuid, reservation
            self._expect_change(uuid)

    def reserve(self, connection: libvirt.virConnect, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Reserve the memory that a task needs, before its first step; the task has just observed the running VM.

        Raises:
            AgentError: HOST_MEMORY_PROMISED, MEMORY_HARD_LIMIT, and nothing is reserved; libvirt's errors.
        """
        asked_at = self._monotonic()
        with self._asking:
            self._see(connection, asked_at)
            own = self._promised.get(uuid)
            if own is None or (grown := own.grown_to(reservation)) == own:
                return
            check_growth(self._find_pools(own), own, grown)
            with self._lock:
                self._reservations[task_uuid] = uuid, reservation
            self._promised.put(grown)

    def set_ratios(self, *, reserve_bytes: int, overcommit: float) -> None:
        """Promise by other ratios from now on; what was promised stays so."""
        with self._lock:
            self._reserve_bytes, self._overcommit = reserve_bytes, overcommit
            self._stale.add(_ALL)

    def release(self, task_uuid: str) -> None:
        """Free what a task has reserved, which has ended: from now on the VM counts with what it has."""
        with self._lock:
            uuid, _ = self._reservations.pop(task_uuid, (None, None))
            if uuid is None:
                return
            if uuid not in self._stale and (known := self._known.get(uuid)) is not None:
                # It was observed after the last step, and is to count without the reservation.
                self._observed[uuid] = known
            self._stale.add(uuid)

    def note_change(self, uuid: str) -> None:
        """Read this VM again at the next look: it may have changed. Asks nobody and waits for nobody."""
        with self._lock:
            self._expect_change(uuid)

    def note_gap(self) -> None:
        """Read all VMs anew: events may have been lost, and a restarted libvirt gives out its numbers again."""
        with self._lock:
            self._stale |= {_ALL, _ANEW}
            self._observed.clear()
            self._changed_at_all = next(self._moments)

    def _expect_change(self, uuid: str) -> None:
        """Read this VM at the next look, whatever was observed before; under the lock."""
        self._stale.add(uuid)
        self._observed.pop(uuid, None)
        self._changed_at[uuid] = next(self._moments)

    def hear(self, domain: libvirt.virDomain, _event: int, _detail: int) -> None:
        """Take a lifecycle event into account: a VM that starts, or comes by migration, counts at once."""
        self.note_change(domain.UUIDString())

    def begin(self) -> int:
        """Return what `note` has to know of an observation that begins now."""
        return next(self._moments)

    def note(self, facts: Facts, begun: int) -> None:
        """Remember what was observed of a VM: what its guest does not use, memory that libvirt does not know.

        If it is not what was read here last, that counts from the next look on. The VM is read again where the
        observation is outdated, or has more in it than libvirt has; and where it has hugepages: those in use are held
        against what VMs are read to have after it.
        """
        uuid, live, unused = facts.domain.uuid, facts.domain.live, find_unused(facts)
        if live is None:
            if uuid in self._known:
                self.note_change(uuid)
            return
        unknown = tuple(device for device in live.devices if not device.known)
        read = make_read(facts.domain, live, self._capacity.default_page_bytes)
        spare = None if unused is None else find_spare(*unused)
        with self._lock:
            known = self._known.get(uuid)
            if uuid in self._stale or known is None or (known.number, known.promise) != (read.number, read.promise):
                self._stale.add(uuid)
                is_current = begun > max(self._changed_at_all, self._changed_at.get(uuid, 0))
                has_hugepages = _has_hugepages(read.promise) or _has_hugepages(self._now.get(uuid))
                if is_current and not unknown and not has_hugepages:
                    self._observed[uuid] = read
            former = self._notes.get(uuid)
            if former is None or former.domain_id != live.domain_id or former.unknown != unknown:
                if uuid not in self._stale and known is not None:
                    # The note is added to the last reading, which is still valid.
                    self._observed[uuid] = known
                self._stale.add(uuid)
            elif unused is None:
                return
            self._notes[uuid] = _Note(live.domain_id, self._monotonic(), spare, unknown)

    def look(self, connection: libvirt.virConnect, vm: Domain) -> tuple[MemoryPool, ...]:
        """Return the pools that a VM's memory comes from; of one that is off as if it ran as its definition says.

        Raises:
            AgentError: libvirt's errors.
        """
        asked_at = self._monotonic()
        with self._asking:
            self._see(connection, asked_at)
            own = self._promised.get(vm.uuid)
            if own is not None:
                return self._find_pools(own)
            if vm.live is not None or vm.config is None:
                return ()
            own = make_promise(vm.uuid, vm.name, vm.config, default_page_bytes=self._capacity.default_page_bytes)
            self._promised.put(own)
            try:
                return self._find_pools(own)
            finally:
                self._promised.remove(vm.uuid)

    def view(self, connection: libvirt.virConnect) -> BudgetView:
        """Return the whole budget.

        Raises:
            AgentError: libvirt's errors.
        """
        resident = self._read_resident(connection)
        asked_at = self._monotonic()
        with self._asking:
            self._see(connection, asked_at)
            capacity, promised = self._capacity, self._promised
            promises = {
                one.uuid: msgspec.structs.replace(one, resident_bytes=resident.get(one.uuid))
                for one in promised.promises()
            }
            pool = measure_pool(capacity, promised, NORMAL_PAGES, ANYWHERE)
            host = HostMemory(
                physical=capacity.physical_bytes,
                reserve=capacity.reserve_bytes,
                overcommit=capacity.overcommit,
                hugepages=sum(capacity.hugepages.values()),
                budget=pool.capacity_bytes,
                promised=pool.promised_bytes,
                reserved=pool.promised_bytes - self._now.sum_pages(NORMAL_PAGES),
                resident=sum(promise.resident_bytes or 0 for promise in promises.values()),
                over_since=self._over_since.get(_find_kind(self._date(pool))),
                budget_from=pool.made_of,
            )
            self.last = BudgetView(host, promises)
            return self.last

    def _read_resident(self, connection: libvirt.virConnect) -> dict[str, int]:
        """Return how much of each running VM is resident, no older than what is shown."""
        at, resident = self._resident
        if self._monotonic() - at > _LOOK_S:
            with libvirt_errors("reading the VMs' memory"):
                found = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BALLOON, _ACTIVE)
            told = ((domain.UUIDString(), stats.get("balloon.rss")) for domain, stats in found)
            resident = {uuid: rss * KIB for uuid, rss in told if rss is not None}
            self._resident = self._monotonic(), resident
            # Who could give memory back follows from it.
            self.note_change(_ALL)
        return resident

    def _find_pools(self, own: Promise) -> tuple[MemoryPool, ...]:
        limits = read_limits(self._host_root, own.cgroups)
        return tuple(map(self._date, find_pools(self._capacity, self._promised, own, limits)))

    def _date(self, pool: MemoryPool) -> MemoryPool:
        """Return a pool with since when more of it is promised than there is, as far as anybody looked."""
        kind = _find_kind(pool)
        if pool.promised_bytes <= pool.capacity_bytes:
            self._over_since.pop(kind, None)
            return pool
        since = datetime.fromtimestamp(self._over_since.setdefault(kind, self._clock()), UTC)
        return msgspec.structs.replace(pool, over_since=f"{since:%Y-%m-%d %H:%M} UTC")

    def _see(self, connection: libvirt.virConnect, asked_at: float) -> None:
        """Read what is due: all VMs, or those that have changed.

        Who had to wait for somebody else's look takes it, however long it took: where libvirt is slow, each of those
        who wait would read all VMs again.

        What is released while libvirt is asked still counts: what the task plugged may be missing in the answer.
        """
        with self._lock:
            stale, self._stale = self._stale, set()
            observed, self._observed = self._observed, {}
            before = dict(self._reservations)
        now_s = self._monotonic()
        is_all = _ALL in stale or asked_at - self._looked_at > _LOOK_S
        if not (is_all or stale):
            return
        # What a task has plugged of the hugepages in use would count twice: as reserved, and as used by others.
        stale.update(uuid for uuid, _ in before.values() if _has_hugepages(self._now.get(uuid)))
        try:
            capacity = self._capacity
            if is_all or stale - observed.keys():
                # Not for what was observed, and has no hugepages to hold against those in use: 0.3 ms of each plug.
                capacity = read_capacity(self._host_root, self._reserve_bytes, self._overcommit)
            page_bytes = capacity.default_page_bytes
            if is_all:
                known = {uuid: vm for uuid, vm in self._known.items() if _ANEW not in stale and uuid not in stale}
                # Those that have ended are read as None.
                former = self._known.keys() | stale - {_ALL, _ANEW}
                read = dict.fromkeys(former) | read_vms(connection, known, page_bytes, self._definitions)
            else:
                read = {
                    uuid: observed.get(uuid) or find_vm(connection, uuid, page_bytes, self._definitions)
                    for uuid in stale
                }
            if is_all or any(vm is not None and vm.number not in self._cgroups for vm in read.values()):
                self._cgroups = read_cgroups(self._host_root)
        except BaseException:
            with self._lock:
                self._stale |= stale | {_ALL}
            raise
        if is_all:
            self._looked_at = now_s
        self._put(read, before)
        self._capacity = capacity.without_others(self._now.sum_pages)
        with self._lock:
            # What was observed meanwhile may be older than what was read; a task that ended during the read recorded
            # the old state.
            now = next(self._moments)
            for uuid in read:
                self._observed.pop(uuid, None)
            if is_all:
                self._changed_at, self._changed_at_all = {}, now
            else:
                self._changed_at |= dict.fromkeys(read, now)

    def _put(self, read: dict[str, ReadVm | None], before: dict[str, tuple[str, Reservation]]) -> None:
        """Have these VMs as they were read, with what is or was reserved for them."""
        reserved: dict[str, list[Reservation]] = {}
        with self._lock:
            for uuid, reservation in (before | self._reservations).values():
                reserved.setdefault(uuid, []).append(reservation)
            notes = {uuid: note for uuid in read if (note := self._notes.get(uuid)) is not None}
            for uuid in notes:
                if read[uuid] is None:
                    del self._notes[uuid]
        for uuid, vm in read.items():
            if vm is None:
                self._known.pop(uuid, None)
                self._now.remove(uuid)
                self._promised.remove(uuid)
                continue
            self._known[uuid] = vm
            # How much is resident is as it was shown last: it names who could give back, and decides nothing.
            promise = msgspec.structs.replace(
                vm.promise, cgroups=self._cgroups.get(vm.number, ()), resident_bytes=self._resident[1].get(uuid)
            )
            note = notes.get(uuid)
            if note is not None and note.domain_id == vm.number:
                promise = self._with_note(promise, note)
            self._now.put(promise)
            for reservation in reserved.get(uuid, ()):
                promise = promise.grown_to(reservation)
            self._promised.put(promise)

    def _with_note(self, promise: Promise, note: _Note) -> Promise:
        """Return a promise with what was observed of the VM besides."""
        if note.unknown:
            sizes = promise.node_bytes
            for device in note.unknown:
                sizes[device.node or 0] = sizes.get(device.node or 0, 0) + device.promised_bytes
            promise = promise.grown_to(Reservation(sizes, promise.ballooned_bytes, promise.vcpus))
        is_new = self._monotonic() - note.noted_at < _NOTE_S
        return msgspec.structs.replace(promise, spare_bytes=note.spare_bytes if is_new else None)


def _has_hugepages(promise: Promise | None) -> bool:
    return promise is not None and any(part.page_bytes != NORMAL_PAGES for part in promise.parts)


def _find_kind(pool: MemoryPool) -> tuple[int, frozenset[int], str]:
    return pool.page_bytes, pool.nodes, pool.cgroup
