"""The clients: each gives VMs of its own vCPUs and memory, task after task, as a management server does.

    define a VM -> tasks with growing totals, a few ahead of their results -> all results -> count -> the next VM

What got no answer, or 503, is sent again with the same id until it is accepted: from then on it must be done once.
"""

import contextlib
import http.client
import random
import sys
import threading
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import libvirt

from tests.chaos.count import Count, Sent
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.processes import LOAD_FACTOR, wait_for
from tests.lab.server import Callback, ManagementServer

MIB = 2**20
# How far a client runs ahead of its results; how many tasks a VM gets before it is counted.
AHEAD, TASKS_PER_VM = 4, 24
PAUSE_S = 0.05
# For all results of a VM to come: libvirt, the disk and the receiver may be away in between.
RESULTS_S = 180.0
SPEC = {"vcpus": 1, "max_vcpus": TASKS_PER_VM + 1, "memory_mib": 256, "max_memory_mib": 8192, "slots": 32}
STEP_MIB = 128


class Results(ManagementServer):
    """Keeps every whole body by its task, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.by_task: dict[str, list[Any]] = defaultdict(list)

    def record(self, path: str, headers: Mapping[str, str], content: bytes) -> Callback:
        callback = super().record(path, headers, content)
        self._callbacks.clear()
        # An agent that is killed while it sends leaves half a callback, which is none.
        if len(content) == int(callback.headers["content-length"]):
            self.by_task[callback.task_uuid].append(callback.body)
        return callback


@dataclass
class Client(threading.Thread):
    """One client. `failure` is what it died of."""

    number: int
    seed: int
    agent: AgentProcess
    results: Results
    bad_urls: list[str]
    make_guest: Callable[[GuestSpec], Guest]
    count: Count
    failure: BaseException | None = None
    vms: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(name=f"client{self.number}", daemon=True)
        self._chance = random.Random(self.seed)

    def __hash__(self) -> int:
        return id(self)

    def end(self) -> None:
        """Begin nothing new; what was sent is still waited for and counted."""
        self._ended.set()

    def where(self) -> str:
        """Where it waits, for whom finds it waiting for ever."""
        frame = sys._current_frames().get(self.ident or 0)
        return f"{self.name} waits at\n{''.join(traceback.format_stack(frame))}"

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                self._serve_a_vm()
        except BaseException as failure:
            self.failure = failure

    def _serve_a_vm(self) -> None:
        self.vms += 1
        guest = self.make_guest(GuestSpec(name=f"c{self.number}v{self.vms}", **SPEC))
        self._insist(lambda: begin(guest))
        sent: list[Sent] = []
        for n in range(TASKS_PER_VM):
            if self._ended.is_set():
                break
            sent.append(self._send(guest.name, n))
            while sum(one.uuid not in self.results.by_task for one in sent) >= AHEAD and not self._ended.is_set():
                self._ended.wait(PAUSE_S)
        wait_for(
            lambda: all(one.uuid in self.results.by_task for one in sent),
            timeout_s=RESULTS_S,
            what=f"the results of {[one.uuid for one in sent if one.uuid not in self.results.by_task]}",
        )
        self._insist(lambda: self.count.check_vm(guest, sent, self.results.by_task))
        self._insist(lambda: end(guest))

    def _send(self, vm: str, n: int) -> Sent:
        """Have the n-th task of a VM accepted: of two in turn one more vCPU, and 128 MiB more."""
        if n % 2:
            path, body = "/vm/hotplug/memory", {"memorySize": (SPEC["memory_mib"] + STEP_MIB * (n // 2 + 1)) * MIB}
        else:
            path, body = "/vm/hotplug/cpu", {"cpuNum": SPEC["vcpus"] + n // 2 + 1}
        task_uuid = uuid.UUID(int=self._chance.getrandbits(128)).hex
        sent = Sent(task_uuid, path, next(iter(body.values())))
        self._insist(lambda: self._post(path, {"vmUuid": vm, **body}, task_uuid, self.results.url))
        self.count.accepted += 1
        if self._chance.random() < 0.1:
            self._ask_for_nobody(vm)
        if self._chance.random() < 0.05:
            self.count.withdrawals += 1
            with contextlib.suppress(OSError, http.client.HTTPException):  # it may have happened, or not
                self.agent.post(f"/tasks/{task_uuid}/cancel", {})
        return sent

    def _ask_for_nobody(self, vm: str) -> None:
        """Have a task accepted whose receiver never takes its result: it is owed in the end, and holds up no other."""
        task_uuid, url = uuid.UUID(int=self._chance.getrandbits(128)).hex, self._chance.choice(self.bad_urls)
        self._insist(lambda: self._post("/vm/hotplug/ready", {"vmUuid": vm}, task_uuid, url))
        self.count.for_nobody.append(task_uuid)

    def _post(self, path: str, body: Mapping[str, Any], task_uuid: str, url: str) -> None:
        answer = self.agent.post(path, body, task_uuid=task_uuid, callback_url=url)
        if answer.status == 503:
            self.count.refused += 1
            raise OSError("not now")
        assert answer.status == 200, answer

    def _insist(self, do: Callable[[], Any]) -> None:
        """Do something as soon as agent and libvirt let it be done; it may have happened when it is said to fail."""
        deadline = time.monotonic() + LOAD_FACTOR * RESULTS_S
        while True:
            try:
                do()
            except (OSError, http.client.HTTPException, libvirt.libvirtError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)
            else:
                return


def begin(guest: Guest) -> None:
    """Have it defined and paused, whatever of that is done already: a killed libvirtd takes its answer along."""
    if not guest.is_defined():
        guest.define()
    if not guest.is_running():
        guest.start_paused()


def end(guest: Guest) -> None:
    """Have neither guest nor definition, whatever is left of them."""
    if guest.is_defined():
        with guest.domain() as domain:
            if domain.isActive():
                domain.destroy()
            domain.undefine()
