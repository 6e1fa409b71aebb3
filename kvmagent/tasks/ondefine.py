"""Prepares VMs without a request, if the operator wants it (prepare.on_define).

    libvirt: defined, started     -> note      -+
    start; libvirt is back -> note_all  -+-> thread: observe the VM once, and the command's own decision
                                                    refused: reported once, in log and audit trail; no task
                                                    nothing to change: nothing
                                                    else a task is handed in, as any caller would

What it does is a task like any other: journaled, in the VM's lane, with its owner and the operator's hooks asked. Of a
VM there is one at a time, so that a definition is prepared once; the event of its own definition finds it prepared. A
definition whose task failed is not tried again until it is another, or the agent starts anew. Whoever else keeps on
defining a VM as it was before gets a few in a row answered, and waits a minute.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol
from uuid import uuid4

import msgspec

from kvmagent.audit import audit
from kvmagent.logs import Log, error_fields
from kvmagent.model.command import Command, VmRequest, Wish
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.fields import MOST_BYTES, MOST_CPUS
from kvmagent.model.roles import LOCAL, Access
from kvmagent.model.units import Amount
from kvmagent.model.vmname import parse_uuid
from kvmagent.recorder import Recorder
from kvmagent.tasks.decision import decide
from kvmagent.tasks.journal import UNFINISHED, Task
from kvmagent.tasks.plugincalls import call
from kvmagent.tasks.replies import make_error

log = Log(__name__)

#: Whose tasks these are.
OWN_ACCESS = Access("agent:on_define", frozenset({"read", "prepare"}))
_SUCCESS = ("configured", "unchanged")
# What may be otherwise in a moment: the VM is observed again.
_PASSING = (Code.LIBVIRT_UNAVAILABLE, Code.JOURNAL_UNAVAILABLE, Code.QUEUE_FULL, Code.STOPPING)
_PAUSE_S = 0.5
# The pause after an observation failed for such a reason.
_LONG_PAUSE_S = 10.0
# So many of its tasks are unfinished at once: those of callers have the other workers.
_AT_ONCE = 4
# A VM is prepared so often in so many seconds.
_MOST_IN_A_ROW, _ROW_S = 5, 60.0
_STOP_WAIT_S = 5.0

# Takes the body of a request in under a task's id.
HandIn = Callable[[Command, str, bytes], None]


class Looks(Protocol):
    """What is needed of hypervisor.node.Node."""

    def list_vms(self) -> list[str]:
        """Return the UUIDs of all VMs of this host."""

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now."""


class Maxima(NamedTuple):
    """How far VMs can grow after a prepare; a factor is for VMs that have no room to grow."""

    cpus: Amount
    memory: Amount

    def wish_for(self, config: Definition, vm: str) -> Wish:
        """Return what to prepare a definition for."""
        cpus_full = config.vcpu_maximum <= config.vcpu_current
        memory_full = (config.max_memory_bytes or 0) <= config.total_bytes
        return Wish(
            vm,
            max_cpu_num=_find_maximum(self.cpus, config.vcpu_current, MOST_CPUS, is_full=cpus_full),
            max_memory_size=_find_maximum(self.memory, config.total_bytes, MOST_BYTES, is_full=memory_full),
        )


def _find_maximum(wanted: Amount, has: int, most: int, *, is_full: bool) -> int | None:
    """Return the maximum to ask for, of one that has so much; a factor leaves what has room as it is."""
    return None if wanted.is_factor and not is_full else min(most, max(has, wanted.of(has)))


class _Mine(NamedTuple):
    """A task that was handed in, and the definition that it is for; None: an earlier agent's."""

    task_uuid: str
    config: Definition | None


class _Failed(NamedTuple):
    """A definition whose task failed; what it `touched` it may have defined itself."""

    config: Definition
    touched: bool


class Preparations:
    """Thread-safe. `find_task` looks a task up in the journal, `hand_in` stores a new one."""

    def __init__(
        self,
        node: Looks,
        command: Command,
        maxima: Maxima,
        *,
        find_task: Callable[[str], Task | None],
        hand_in: HandIn,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        assert command.prepares is not None
        self._node = node
        self._command = command
        self._prepares = command.prepares
        self._maxima = maxima
        self._find_task = find_task
        self._hand_in = hand_in
        self._clock = clock
        self._recorder = recorder or Recorder()
        self._lock = threading.Lock()
        # By UUID, whether it was defined: whatever of its XML is new then.
        self._noted: dict[str, bool] = {}
        self._all_noted = False
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prepare", daemon=True)
        # Of the thread alone, by UUID: when to look again, tasks that are unfinished, those that could not be stored
        # yet, definitions whose task failed, of which it was told why they are not prepared, when it was prepared.
        self._look_at_s: dict[str, float] = {}
        self._mine: dict[str, _Mine] = {}
        self._offered: dict[str, _Mine] = {}
        self._failed: dict[str, _Failed] = {}
        self._told: dict[str, tuple[Definition, Code]] = {}
        self._prepared_at: dict[str, list[float]] = {}

    def start(self, unfinished: Iterable[Task]) -> None:
        """Begin by observing all VMs; `unfinished` are the tasks that an earlier agent left."""
        self.recall(unfinished)
        self.note_all()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, but for one that a hung libvirt holds."""
        self._stopping.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_WAIT_S)

    def recall(self, unfinished: Iterable[Task]) -> None:
        """Take up which of an earlier agent's tasks were handed in from here."""
        for task in unfinished:
            if task.caller == OWN_ACCESS.caller:
                self._mine[task.lane] = _Mine(task.task_uuid, None)

    def note(self, uuid: str, *, is_new: bool) -> None:
        """Note that a VM was defined (`is_new`), or started. Only hands over: libvirt's event loop calls this."""
        uuid = parse_uuid(uuid) or uuid
        with self._lock:
            self._noted[uuid] = is_new or self._noted.get(uuid, False)
        self._woken.set()

    def note_all(self) -> None:
        """Note that any VM may have been defined or started unseen. Only hands over."""
        with self._lock:
            self._all_noted = True
        self._woken.set()

    def _run(self) -> None:
        pause_s: float | None = None
        while True:
            self._woken.wait(pause_s)
            self._woken.clear()
            if self._stopping.is_set():
                return
            try:
                pause_s = self.look()
            except Exception as error:
                log.failure("VMs cannot be observed", error)
                pause_s = _LONG_PAUSE_S

    def look(self) -> float | None:
        """Observe the VMs that are due; return in how many seconds to do it again, None: when one is noted."""
        now = self._clock()
        try:
            self._forget_finished()
            if self._all_noted:
                self._list_all()
        except AgentError as error:
            log.debug("VMs cannot be observed now", **error_fields(error))
            return _LONG_PAUSE_S
        with self._lock:
            due = {uuid: new for uuid, new in self._noted.items() if self._look_at_s.get(uuid, now) <= now}
            for uuid in due:
                del self._noted[uuid]
        for uuid, is_new in due.items():
            self._look_at_s.pop(uuid, None)
            pause_s = None if self._stopping.is_set() else self._look_at(uuid, is_new=is_new)
            if pause_s is not None:
                self._look_at_s[uuid] = now + pause_s
                self.note(uuid, is_new=is_new)
        waits = [max(0.0, at - now) for at in self._look_at_s.values()]
        return min([*waits, _PAUSE_S] if self._mine else waits, default=None)

    def _list_all(self) -> None:
        self._all_noted = False
        try:
            here = {parse_uuid(uuid) or uuid for uuid in self._node.list_vms()}
        except AgentError:
            self._all_noted = True
            raise
        with self._lock:
            self._noted = dict.fromkeys(here, False) | self._noted
        for known in (self._look_at_s, self._offered, self._failed, self._told, self._prepared_at):
            for uuid in known.keys() - here:
                del known[uuid]

    def _forget_finished(self) -> None:
        for uuid, mine in list(self._mine.items()):
            task = self._find_task(mine.task_uuid)
            if task is not None and task.state in UNFINISHED:
                continue
            del self._mine[uuid]
            if task is None or task.outcome in _SUCCESS:
                continue
            code = _find_code(task)
            if code in _PASSING:
                self.note(uuid, is_new=False)
            elif mine.config is not None:
                touched = task.outcome != "refused" or code == Code.NOT_VERIFIED
                self._failed[uuid] = _Failed(mine.config, touched=touched)

    def _look_at(self, uuid: str, *, is_new: bool) -> float | None:
        """Observe one VM, and hand in what it needs; return in how many seconds to do it again, if at all."""
        now = self._clock()
        prepared_at = [at for at in self._prepared_at.get(uuid, ()) if now - at < _ROW_S]
        if len(prepared_at) >= _MOST_IN_A_ROW:
            log.warning("definition changes again and again", uuid=uuid, prepared=len(prepared_at))
            return _ROW_S - (now - prepared_at[0])
        if uuid in self._mine or len(self._mine) >= _AT_ONCE:
            return _PAUSE_S
        try:
            facts = self._node.observe(uuid, self._command.observe_guest)
        except Exception as error:
            failure = make_error(error)
            if failure.code is not Code.VM_NOT_FOUND:
                log.warning("VM cannot be observed", uuid=uuid, **error_fields(failure))
            return _LONG_PAUSE_S if failure.code in _PASSING else None
        config = facts.domain.config
        failed = self._failed.get(uuid)
        if config is None or (failed is not None and failed.config == config and (failed.touched or not is_new)):
            return None
        told = {"vm": facts.domain.name, "uuid": facts.domain.uuid}
        try:
            request = call(self._prepares, self._maxima.wish_for(config, uuid))
            _, steps = decide(self._command, request, facts, "")
        except Exception as error:
            self._tell_refused(uuid, config, make_error(error), told)
            return None
        self._told.pop(uuid, None)
        if not steps:
            return None
        log.info("definition will be prepared", **told)
        if not self._offer(uuid, config, request, told):
            return _LONG_PAUSE_S
        self._prepared_at[uuid] = [*prepared_at, now]
        return None

    def _offer(self, uuid: str, config: Definition, request: VmRequest, told: dict[str, str]) -> bool:
        """Submit a task; return False to try again, under the same id because it may be stored."""
        known = self._offered.get(uuid)
        mine = known if known is not None and known.config == config else _Mine(f"prepare-{uuid4().hex}", config)
        self._offered[uuid] = mine
        try:
            self._hand_in(self._command, mine.task_uuid, msgspec.json.encode(request))
        except Exception as raised:
            error = make_error(raised)
            if error.code in _PASSING:
                log.warning("definition cannot be prepared yet", **told, **error_fields(error))
                return False
            self._failed[uuid] = _Failed(config, touched=False)
            self._tell_refused(uuid, config, error, told)
        else:
            self._mine[uuid] = mine
        del self._offered[uuid]
        return True

    def _tell_refused(self, uuid: str, config: Definition, failure: AgentError, told: dict[str, str]) -> None:
        if self._told.get(uuid) == (config, failure.code):
            return
        self._told[uuid] = config, failure.code
        if failure.expected:
            log.info("definition is not prepared", **told, **error_fields(failure))
        else:
            log.failure("definition is not prepared", failure, **told)
        audit(
            "refused",
            caller=OWN_ACCESS.caller,
            client=LOCAL,
            what=self._command.name,
            vm=told["vm"],
            uuid=told["uuid"],
            outcome=failure.code,
            error=failure.message,
        )
        self._recorder.ended(self._command.name, "refused", failure.code)


class _Told(msgspec.Struct, rename="camel"):
    """What is read of a reply."""

    error_code: str | None = None


def _find_code(task: Task) -> str | None:
    """Return the code that a task ended in."""
    return None if task.reply is None else msgspec.json.decode(task.reply, type=_Told).error_code
