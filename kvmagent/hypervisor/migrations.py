"""Which VMs were live-migrated to this host, in their present run: known for the rest of it.

    find   libvirt connected     how each running VM came: its reason to run, its QEMU's command line where it is seen
    hear   an event of libvirt   a VM starts or runs on by migration, is restored, or stops
    note   an observation        libvirt's own word; a run of which nothing is known yet: what `find` looks at, for all
    save   once a second         what is new goes into a small file, so that it outlives the agent

libvirt forgets it at the first pause. A confined agent (ProtectProc=invisible) sees no QEMU: what it has not heard
and not seen before that pause nobody can tell it.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import libvirt

from kvmagent.hypervisor.host import read_boot_id
from kvmagent.hypervisor.qemuprocess import find_incoming
from kvmagent.hypervisor.vmfile import VmFile
from kvmagent.logs import Log
from kvmagent.model.facts import Facts, format_run

log = Log(__name__)

MIGRATED = frozenset({libvirt.VIR_DOMAIN_RUNNING_MIGRATED, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY})
# QEMU is started for these as for a migration: its command line is no proof.
_RESTORED = frozenset({libvirt.VIR_DOMAIN_RUNNING_RESTORED, libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT})
_RESTORATIONS = frozenset(
    {
        (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED),
        (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT),
    }
)
# What the file has behind the run of a VM that was restored.
_SAVED_RESTORED = " restored"
_RUNNING = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
_ARRIVALS = frozenset(
    {
        (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED),
        (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED),
        (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY),
    }
)


class _Came(NamedTuple):
    """How a VM came to its present run on this host."""

    run: str
    migrated: bool
    restored: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether it has to outlive the agent: the rest of the runs began here, as QEMU's command line shows."""
        return self.migrated or self.restored


class Migrations:
    """Thread-safe. `path` is the file, which has the run of each VM that came so or was restored; without one, nothing
    outlives this.

    `host_root` is where the kernel's files of the host are.
    """

    def __init__(self, path: Path | None = None, *, host_root: Path = Path("/")) -> None:
        self._file = None if path is None else VmFile(path, str, "which VMs came by live migration")
        self._host_root = host_root
        self._boot_id = read_boot_id(host_root)
        self._lock = threading.Lock()
        self._known: dict[str, _Came] = {}
        self._is_saved = True

    def load(self) -> None:
        """Read what was kept."""
        if self._file is not None:
            kept = self._file.load().items()
            # Every run ends with the host's boot.
            present = [(uuid, *run.partition(_SAVED_RESTORED)) for uuid, run in kept]
            self._known = {
                uuid: _Came(run, migrated=not restored, restored=bool(restored))
                for uuid, run, restored, _ in present
                if run.endswith(f"@{self._boot_id}")
            }

    def find(self, connection: libvirt.virConnect) -> list[int]:
        """Look at what runs on a new connection; it gets no callback of ours, and so there are no ids to return."""
        self._look(connection)
        return []

    def hear(self, domain: libvirt.virDomain, event: int, detail: int) -> None:
        """Take a lifecycle event into account. For the event loop's thread: what is new is written later."""
        if (event, detail) in _ARRIVALS | _RESTORATIONS:
            self._put(domain, migrated=(event, detail) in _ARRIVALS, restored=(event, detail) in _RESTORATIONS)
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._forget(domain.UUIDString())

    def note(self, connection: libvirt.virConnect, facts: Facts) -> bool:
        """Take an observation of a VM into account, and return whether it came here by live migration in this run."""
        uuid, run, told = facts.domain.uuid, facts.run, facts.domain.migrated
        if run is None:
            if facts.domain.live is None:
                self._forget(uuid)
            return told
        with self._lock:
            known = self._known.get(uuid)
        is_new = known is None or known.run != run
        incoming = self._look(connection) if is_new and not told else frozenset()
        with self._lock:
            known = self._known.get(uuid)
            # Its event may have come meanwhile.
            if told or known is None or known.run != run:
                known = _Came(run, told or uuid in incoming)
                self._remember(uuid, known)
        return known.migrated

    def known(self) -> frozenset[str]:
        """Return the VMs of which something is remembered."""
        with self._lock:
            return frozenset(self._known)

    def forget(self, uuids: Iterable[str]) -> None:
        """Forget VMs that are not on this host any more."""
        for uuid in uuids:
            self._forget(uuid)

    def save(self) -> None:
        """Write what has changed, if anything has."""
        with self._lock:
            if self._is_saved:
                return
            self._is_saved = True
            kept = [(uuid, one) for uuid, one in self._known.items() if one.is_kept]
            came = {uuid: one.run if one.migrated else f"{one.run}{_SAVED_RESTORED}" for uuid, one in kept}
        if self._file is not None and not self._file.save(came):
            self._is_saved = False

    def _look(self, connection: libvirt.virConnect) -> frozenset[str]:
        """Look at how all running VMs came, and return those whose QEMUs were started for a VM that ran before.

        A look costs more the more processes the host has, so one look is for all. A VM that does not run yet is left
        out: its QEMU may still be missing. A VM that may have come either way is decided when it is observed.
        """
        with self._lock:
            before = dict(self._known)
        reasons: list[tuple[libvirt.virDomain, int | None]] = []
        try:
            for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, _RUNNING):
                if stats.get("state.state") == libvirt.VIR_DOMAIN_RUNNING:
                    reasons.append((domain, stats.get("state.reason")))
        except libvirt.libvirtError as error:
            log.info("VMs that were migrated could not be found, the next look tries again", error=str(error))
        incoming = find_incoming(self._host_root)
        for domain, reason in reasons:
            if reason in MIGRATED | _RESTORED or domain.UUIDString() not in incoming:
                self._put(domain, migrated=reason in MIGRATED, restored=reason in _RESTORED, before=before)
        return incoming

    def _put(
        self, domain: libvirt.virDomain, *, migrated: bool, restored: bool, before: dict[str, _Came] | None = None
    ) -> None:
        """Remember how a VM came; one that came by migration and is set back to a snapshot came so all the same.

        `before` is what was known when the VM was listed: what an event has changed since is newer, and stays.
        """
        run, uuid = format_run(domain.ID(), self._boot_id), domain.UUIDString()
        if run is not None:
            with self._lock:
                known = self._known.get(uuid)
                if before is not None and known != before.get(uuid):
                    return
                if migrated or known is None or known.run != run:
                    self._remember(uuid, _Came(run, migrated, restored))

    def _remember(self, uuid: str, came: _Came) -> None:
        former = self._known.get(uuid)
        self._known[uuid] = came
        if former != came and (came.is_kept or (former is not None and former.is_kept)):
            self._is_saved = False

    def _forget(self, uuid: str) -> None:
        with self._lock:
            former = self._known.pop(uuid, None)
            if former is not None and former.is_kept:
                self._is_saved = False
