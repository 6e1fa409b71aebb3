"""Which CPUs of a guest the agent itself has left offline: those that it plugged, or took offline, and has not seen in
use since. Whoever sends the same again wants them online; others that are offline are so by their owner's will.

    before a step that plugs them      keep     on disk with the step's beginning, whatever becomes of the agent
    at each observation of the VM      add      given to planners; what the guest uses, or has no more, is forgotten

Kept for each run of a VM, apart from its tasks: those are forgotten sooner.
"""

import msgspec

from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.steps import AnyStep
from kvmagent.tasks.journal import Journal


class OfflineCpus:
    """Thread-safe, as the journal is."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def keep(self, facts: Facts, step: AnyStep) -> None:
        """Keep what a step is going to leave offline, as far as it is known before."""
        cpus = step.leaves_offline(facts)
        if cpus and facts.run is not None:
            self._journal.keep_left(facts.domain.uuid, facts.run, cpus)

    def add(self, facts: Facts) -> Facts:
        """Return the facts of a VM with what was left offline there, and forget what no longer is."""
        if facts.domain.live is None:
            return facts
        try:
            run, kept = self._journal.find_left(facts.domain.uuid)
            if not kept or facts.run is None:
                return facts
            left = _find_left(facts, kept) if run == facts.run else frozenset[int]()
            if left != kept:
                self._journal.keep_left(facts.domain.uuid, facts.run, left, instead=True)
        except AgentError:  # a disk that fails hides no VM
            return facts
        return msgspec.structs.replace(facts, left_offline=left)


def _find_left(facts: Facts, kept: frozenset[int]) -> frozenset[int]:
    """Return what of it may still be offline: a guest that lists all that its VM has has no others."""
    live, listed = facts.domain.live, facts.guest.vcpus
    if live is None or listed is None:
        return kept
    left = kept - {cpu.id for cpu in listed if cpu.online}
    return left & {cpu.id for cpu in listed} if len(listed) >= live.vcpu_current else left
