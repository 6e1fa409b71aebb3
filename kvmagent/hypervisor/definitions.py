"""The facts of each VM's definitions, parsed again only if libvirt's XML has changed.

A task begins with what the one before it ended with, and whoever lists VMs, or sums up what is promised to them, finds
most of them as they were. Kept by VM: so it costs as little with 1,000 VMs as with 10.
Observed: parsing one takes 0.2 ms, finding it here 0.003 ms; those of 1,000 VMs, live and persistent, take 3 MiB.
"""

import threading
from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal, NamedTuple

import libvirt

from kvmagent.hypervisor.domainxml import parse_live
from kvmagent.model.facts import Definition

_Which = Literal["live", "config"]
# What ends a definition: a VM that is off has no live one.
_ENDS: dict[int, _Which] = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "live",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "config",
}


class _Parsed(NamedTuple):
    """What an XML of that digest says, and what `is_agent_connected` says of it."""

    digest: bytes
    definition: Definition
    connected: bool | None


class Definitions:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parsed: dict[str, dict[_Which, _Parsed]] = {}

    def read_live(self, uuid: str, xml: str) -> tuple[Definition, bool | None]:
        """Return the facts of a running VM's XML, and whether its guest has opened its agent channel.

        Raises:
            ValueError: when it is not a domain that libvirt wrote.
        """
        parsed = self._parse(uuid, "live", xml)
        return parsed.definition, parsed.connected

    def read_config(self, uuid: str, xml: str) -> Definition:
        """Return the facts of a VM's persistent XML.

        Raises:
            ValueError: when it is not a domain that libvirt wrote.
        """
        return self._parse(uuid, "config", xml).definition

    def hear(self, domain: libvirt.virDomain, event: int, _detail: int) -> None:
        """Let go of a definition that has ended."""
        if (which := _ENDS.get(event)) is not None:
            uuid = domain.UUIDString()
            with self._lock:
                kept = self._parsed.get(uuid, {})
                kept.pop(which, None)
                if not kept:
                    self._parsed.pop(uuid, None)

    def known(self) -> frozenset[str]:
        """Return the VMs of which something is kept."""
        with self._lock:
            return frozenset(self._parsed)

    def forget(self, uuids: Iterable[str]) -> None:
        """Forget VMs that are not on this host any more."""
        with self._lock:
            for uuid in uuids:
                self._parsed.pop(uuid, None)

    def _parse(self, uuid: str, which: _Which, xml: str) -> _Parsed:
        # Not the text itself: of 1,000 VMs that would be 10 MiB.
        digest = blake2b(xml.encode(), digest_size=16).digest()
        with self._lock:
            kept = self._parsed.get(uuid, {}).get(which)
        if kept is None or kept.digest != digest:
            kept = _Parsed(digest, *parse_live(xml))
            with self._lock:
                self._parsed.setdefault(uuid, {})[which] = kept
        return kept
