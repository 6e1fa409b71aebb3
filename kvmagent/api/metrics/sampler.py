"""Asks each running VM's guest at intervals what it uses: /metrics then knows it of VMs that no command touches.

One guest at a time, spread over the interval: a thousand guests cost a few questions a second, and none is asked while
it has not answered the last time.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from kvmagent.api.deadline import Asker
from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Facts
from kvmagent.model.host import VmStats

log = Log(__name__)

_PARTS = frozenset({"cpus", "memory"})
# How long a guest may take. libvirt gives up a question to its agent sooner; what takes longer hangs in QEMU.
_WAIT_S = 15.0
# Guests that hang at once before no other is asked.
_AT_ONCE = 8
_STOP_WAIT_S = 1.0
# Where no VM runs, or libvirt is away.
_PAUSE_S = 10.0


class VmNode(Protocol):
    """What is needed of hypervisor.node.Node."""

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now; who wants to know of it learns it there."""


class Sampler:
    """Owns a thread. An `interval_s` of 0: none, and nobody is asked."""

    def __init__(
        self,
        node: VmNode,
        running: Callable[[], tuple[VmStats, ...]],
        *,
        interval_s: float,
        wait_s: float = _WAIT_S,
    ) -> None:
        self._node = node
        self._running = running
        self._interval_s = interval_s
        self._wait_s = wait_s
        self._asker = Asker(at_once=_AT_ONCE)
        self._asked: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin; the first guest is asked after its share of the interval."""
        if self._interval_s:
            self._thread.start()

    def stop(self) -> None:
        """End after the guest that is being asked, but for one that hangs."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_WAIT_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            vms = self._running()
            for vm in vms:
                if self._stopping.wait(self._interval_s / len(vms)):
                    return
                self._look(vm.uuid)
            if not vms:
                self._stopping.wait(min(_PAUSE_S, self._interval_s))

    def _look(self, uuid: str) -> None:
        if uuid in self._asked:
            return

        def observe() -> None:
            self._asked.add(uuid)
            try:
                self._node.observe(uuid, _PARTS)
            finally:
                self._asked.discard(uuid)

        try:
            self._asker.ask(observe, timeout_s=self._wait_s, about=f"sampling VM {uuid}")
        except AgentError as error:
            log.debug("guest was not sampled", vm=uuid, **error_fields(error))
        except Exception as error:
            log.failure("guest could not be sampled", error, vm=uuid)
