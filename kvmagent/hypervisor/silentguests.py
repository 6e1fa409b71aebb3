"""Which guests fell silent: their agent spoke before in the present run of the VM, and does not now.

A guest that has the channel and no agent says nothing either, and nothing is wrong with it: libvirt tells no
difference. It is known for as long as the agent runs; after its restart a guest that is silent counts as one without.
"""

import threading
from collections.abc import Iterable

from kvmagent.model.errors import Code
from kvmagent.model.facts import Facts

# Of a guest that has an agent: it ought to answer. One that has none, or is paused, does neither.
_SILENCES = (Code.GUEST_AGENT_DISCONNECTED, Code.GUEST_AGENT_UNRESPONSIVE, Code.GUEST_AGENT_INVALID)


class SilentGuests:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The run in which each VM's guest agent spoke.
        self._spoke: dict[str, str] = {}

    def note(self, facts: Facts) -> bool:
        """Take an observation of a VM into account, and return whether its guest fell silent."""
        uuid, run = facts.domain.uuid, facts.run
        with self._lock:
            if self._spoke.get(uuid) != run:
                self._spoke.pop(uuid, None)
            if run is not None and facts.guest.spoke:
                self._spoke[uuid] = run
            return facts.guest.silence in _SILENCES and uuid in self._spoke

    def known(self) -> frozenset[str]:
        """Return the VMs of which something is remembered."""
        with self._lock:
            return frozenset(self._spoke)

    def forget(self, uuids: Iterable[str]) -> None:
        """Forget VMs that are not on this host any more."""
        with self._lock:
            for uuid in uuids:
                self._spoke.pop(uuid, None)
