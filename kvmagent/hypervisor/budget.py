"""Keeps the host's memory budget: what all running VMs may have, and what accepted tasks are about to bring them to.

    look(connection, ...)     the pools that a VM's memory comes from: facts, for the planners
    reserve(connection, ...)  before a task's first step; refused where the host cannot keep it
    release(task)             with the task's end
    view(connection)          for /healthz, metrics and the operator

All VMs are asked for in one call; the definition of a VM is read again only where that call shows another run or size.
Thread-safe: between looking and reserving nobody else reserves.
"""

import threading
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import libvirt
import msgspec

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.host import read_capacity
from kvmagent.hypervisor.libvirterrors import libvirt_errors
from kvmagent.model.facts import Definition, MemoryPool
from kvmagent.model.host import HostMemory
from kvmagent.model.hostbudget import HostCapacity, Promise, check_pool, find_pools, make_promise, measure_pool
from kvmagent.model.units import KIB

# Looks that come so close together are one: a list of VMs is many looks.
_SAME_LOOK_S = 0.05
# How old what is shown may be: a page and a scraper ask often.
_VIEW_S = 1.0
# In place of the sizes that show whether a VM has changed: what is requested of a virtio-mem device is not among them.
_UNTOLD = (None,)
_ACTIVE = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT


class Reservation(msgspec.Struct, frozen=True):
    """What an accepted task may bring the guest of a running VM to."""

    uuid: str
    guest_bytes: int


# When was looked last, and what was seen.
_NOTHING_SEEN: tuple[float, HostCapacity, dict[str, Promise]] = (-inf, HostCapacity(0, 0, 1.0), {})


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
        self._lock = threading.Lock()
        self._reservations: dict[str, Reservation] = {}
        self._known: dict[str, tuple[tuple[int | None, ...], Promise]] = {}
        self._over_since: float | None = None
        #: What `view` saw last.
        self.last: BudgetView | None = None
        self._seen = _NOTHING_SEEN

    def recall(self, task_uuid: str, uuid: str, guest_bytes: int) -> None:
        """Take up the reservation of a task that an earlier agent has begun; nothing is judged again."""
        with self._lock:
            self._reservations[task_uuid] = Reservation(uuid, guest_bytes)
            self._seen = _NOTHING_SEEN

    def reserve(self, connection: libvirt.virConnect, task_uuid: str, uuid: str, guest_bytes: int) -> None:
        """Reserve what brings the guest of a running VM to so much, before the first step towards it.

        Raises:
            AgentError: HOST_MEMORY_PROMISED, and nothing is reserved; libvirt's errors.
        """
        with self._lock:
            capacity = self._read_capacity()
            promises = self._read(connection, capacity)
            own = promises.get(uuid)
            if own is None or guest_bytes <= own.guest_bytes:
                return
            grown = promises | {uuid: own.grown_to(guest_bytes)}
            for pool in find_pools(capacity, promises.values(), grown[uuid]):
                then = measure_pool(capacity, grown.values(), pool.page_bytes, pool.nodes)
                if (error := check_pool(pool, then.promised_bytes - pool.promised_bytes)) is not None:
                    raise error
            self._reservations[task_uuid] = Reservation(uuid, guest_bytes)
            self._seen = _NOTHING_SEEN

    def release(self, task_uuid: str) -> None:
        """Free what a task has reserved; from now on the VM counts with what it has."""
        with self._lock:
            self._reservations.pop(task_uuid, None)
            self._seen = _NOTHING_SEEN

    def look(self, connection: libvirt.virConnect, uuid: str) -> tuple[MemoryPool, ...]:
        """Return the pools that a running VM's memory comes from; none for a VM that is off.

        Raises:
            AgentError: libvirt's errors.
        """
        with self._lock:
            capacity, promises = self._see(connection, _SAME_LOOK_S)
            own = promises.get(uuid)
            return () if own is None else find_pools(capacity, promises.values(), own)

    def view(self, connection: libvirt.virConnect) -> BudgetView:
        """Return the whole budget.

        Raises:
            AgentError: libvirt's errors.
        """
        with self._lock:
            capacity, promises = self._see(connection, _VIEW_S)
            pool = measure_pool(capacity, promises.values(), 0, frozenset())
            if pool.promised_bytes <= pool.capacity_bytes:
                self._over_since = None
            elif self._over_since is None:
                self._over_since = self._clock()
            now = sum(promise.size_bytes for _, promise in self._known.values())
            host = HostMemory(
                physical=capacity.physical_bytes,
                reserve=capacity.reserve_bytes,
                overcommit=capacity.overcommit,
                hugepages=sum(capacity.hugepages.values()),
                budget=pool.capacity_bytes,
                promised=pool.promised_bytes,
                reserved=sum(promise.size_bytes for promise in promises.values()) - now,
                resident=sum(promise.resident_bytes or 0 for promise in promises.values()),
                over_since=self._over_since,
            )
            self.last = BudgetView(host, promises)
            return self.last

    def _see(self, connection: libvirt.virConnect, age_s: float) -> tuple[HostCapacity, dict[str, Promise]]:
        """Return what the last look saw, where it is no older than this; else look."""
        looked_at, capacity, promises = self._seen
        if time.monotonic() - looked_at > age_s:
            capacity = self._read_capacity()
            promises = self._read(connection, capacity)
        return capacity, promises

    def _read_capacity(self) -> HostCapacity:
        return read_capacity(self._host_root, self._reserve_bytes, self._overcommit)

    def _read(self, connection: libvirt.virConnect, capacity: HostCapacity) -> dict[str, Promise]:
        """Return what every running VM may have, what is reserved for it included."""
        with libvirt_errors("reading the VMs' memory"):
            found = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BALLOON, _ACTIVE)
        known: dict[str, tuple[tuple[int | None, ...], Promise]] = {}
        for domain, stats in found:
            uuid = domain.UUIDString()
            key: tuple[int | None, ...] = (domain.ID(), stats.get("balloon.current"), stats.get("balloon.maximum"))
            old = self._known.get(uuid)
            if old is not None and old[0] == key and None not in key:
                promise = old[1]
            elif (live := self._read_live(domain)) is not None:
                promise = make_promise(uuid, domain.name(), live, default_page_bytes=capacity.default_page_bytes)
                if live.virtio_mems:
                    key = _UNTOLD
            else:
                continue
            if "balloon.rss" in stats:
                promise = msgspec.structs.replace(promise, resident_bytes=stats["balloon.rss"] * KIB)
            known[uuid] = key, promise
        self._known = known
        promises = {uuid: promise for uuid, (_, promise) in known.items()}
        for reservation in self._reservations.values():
            if reservation.uuid in promises:
                promises[reservation.uuid] = promises[reservation.uuid].grown_to(reservation.guest_bytes)
        self._seen = time.monotonic(), capacity, promises
        return promises

    def _read_live(self, domain: libvirt.virDomain) -> Definition | None:
        """Return the definition of a running VM; None for one that has ended since it was listed."""
        try:
            return parse_definition(domain.XMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                return None
            with libvirt_errors("reading a VM"):
                raise
