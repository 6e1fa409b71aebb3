"""The GET paths: VMs, tasks, health and the OpenAPI document, which describes all paths."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import msgspec

from kvmagent import __version__
from kvmagent.api.deadline import Asker
from kvmagent.api.intake import Accepted, check_owner
from kvmagent.api.metrics.events import CONTENT_TYPE, Metrics
from kvmagent.api.openapi import OwnPath, build_openapi, find_vm_shape
from kvmagent.api.pages import LIST_QUERY, Page, answer_list, choose_fields, read_page
from kvmagent.api.planning import PATH as PLAN_PATH
from kvmagent.api.schemas import (
    API_VERSION,
    EXTENSIONS,
    DeliveryState,
    Health,
    History,
    HistoryEntry,
    ReclaimableMemory,
    RunningTask,
    TaskEntry,
    TaskList,
    VmNumbers,
    WhoAmI,
    WholeTask,
)
from kvmagent.api.server import Answer, Call, Handler, Route
from kvmagent.api.wire import encode, encode_error
from kvmagent.hypervisor.node import Node
from kvmagent.model.command import Command
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.model.plans import PlanReply, PlanRequest
from kvmagent.model.roles import Access
from kvmagent.model.urls import shown_json, shown_text, shown_url
from kvmagent.model.vmname import VmId, dashed_uuid
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import ChangeRecord, Journal, State, TaskSummary
from kvmagent.tasks.lanes import Lanes

# Of tasks and changes, which are listed newest first.
_NEWEST = 100
_NEWEST_QUERY = {**LIST_QUERY, "limit": {**LIST_QUERY["limit"], "default": _NEWEST}}
# At least so many VMs are read together, where a page lacks few because roles hide others.
_VMS_AT_ONCE = 16
# Of a page of VMs the last one's UUID, of others the last one's number.
_VM_CURSOR, _NUMBER_CURSOR = re.compile(r"[0-9a-f-]{36}"), re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# A segment of a path that stands for any text.
_VARIABLE = re.compile(r"\{\w+\}")
OWN_PATHS = (
    OwnPath(
        "listVms",
        "/vms",
        "All VMs of this host, with their numbers and what prevents hotplug",
        "read",
        "vms",
        query=LIST_QUERY,
    ),
    OwnPath("getVm", "/vms/{vmUuid}", "One VM: facts, headroom, blockers", "read", "vm"),
    OwnPath(
        "listHistory",
        "/vms/{vmUuid}/history",
        "Changes of a VM: who, when, from what to what, with what outcome; newest first, kept longer than tasks",
        "read",
        History,
        query=_NEWEST_QUERY,
    ),
    OwnPath(
        "listTasks",
        "/tasks",
        "Tasks, newest first: the caller's own; with the role read for all VMs, everybody's",
        "caller",
        TaskList,
        query={
            "vm": {"type": "string", "description": "The VM's name or UUID, whichever the task was sent with"},
            "state": {"enum": list(get_args(State))},
            "outcome": {"type": "string"},
            "caller": {"type": "string"},
            "since": {"type": "number", "description": "Accepted then or later, seconds since the epoch"},
            "until": {"type": "number", "description": "Accepted before then, seconds since the epoch"},
            "id": {"type": "string", "description": "The beginning of the task's id"},
            **_NEWEST_QUERY,
        },
    ),
    OwnPath("getTask", "/tasks/{taskUuid}", "One task: state, goal, steps, reply, delivery", "caller", WholeTask),
    OwnPath(
        "cancelTask",
        "/tasks/{taskUuid}/cancel",
        "Cancel a task that has not changed its VM yet: it ends as refused with code CANCELLED, and its callback is "
        "sent; if it is too late: 409 and what the task is doing",
        "caller",
        Accepted,
        method="post",
    ),
    OwnPath(
        "planHotplug",
        PLAN_PATH,
        "Whether and how a VM could reach given totals: now or after a restart, why, by which steps, how long. "
        "Answered at once; nothing is changed or reserved",
        "read",
        PlanReply,
        method="post",
        request=PlanRequest,
    ),
    OwnPath(
        "getReclaimable",
        "/host/reclaimable",
        "Memory that the guests of running VMs do not use, and how it could be removed; nothing is changed",
        "read",
        ReclaimableMemory,
        host=True,
    ),
    OwnPath(
        "getHealth",
        "/healthz",
        "200 if the agent is ready; otherwise 503 and what is down",
        "read",
        Health,
        host=True,
    ),
    OwnPath(
        "getMetrics",
        "/metrics",
        "Metrics of the agent and its VMs, in Prometheus' text format",
        "read",
        CONTENT_TYPE.partition(";")[0],
        host=True,
    ),
    OwnPath(
        "whoAmI",
        "/whoami",
        "How the agent identifies the caller, and which roles it has for which VMs",
        "caller",
        WhoAmI,
    ),
    OwnPath("getOpenapi", "/openapi.json", "This document", "caller", "application/json"),
)
# How long libvirt may take to answer for one VM, and to show that it is there. Less than the server's threads at
# once, so that commands are accepted whatever hangs.
_VM_WAIT_S, _CHECK_WAIT_S, _AT_ONCE = 10.0, 3.0, 12


class Resources:
    """Thread-safe. `describe_vm` answers ReadyForHotplug for one VM, or nothing when no plugin offers it.

    `find_stalls` names the parts of the agent that make no progress, with what is known of each.
    """

    def __init__(
        self,
        node: Node,
        journal: Journal,
        lanes: Lanes,
        delivery: Delivery,
        declared: Iterable[Command | Query],
        *,
        describe_vm: Callable[[str], Any],
        find_stalls: Callable[[], Mapping[str, str]],
        metrics: Metrics,
    ) -> None:
        self._node = node
        self._journal = journal
        self._lanes = lanes
        self._delivery = delivery
        self._describe_vm = describe_vm
        self._find_stalls = find_stalls
        self._metrics = metrics
        self._asker = Asker(at_once=_AT_ONCE)
        declared = list(declared)
        self._vm_fields = _names_of(find_vm_shape(declared))
        self._openapi = encode(build_openapi(declared, OWN_PATHS))

    def routes(self, *, cancel: Handler, plan: Handler) -> Mapping[tuple[str, str], Route]:
        """Return the paths of the OpenAPI document that no plugin declares, and what answers them."""
        handlers: Mapping[str, Handler] = {
            "/vms": self._vms,
            "/vms/{vmUuid}": self._vm,
            "/vms/{vmUuid}/history": self._history,
            "/tasks": self._tasks,
            "/tasks/{taskUuid}": self._task,
            "/tasks/{taskUuid}/cancel": cancel,
            PLAN_PATH: plan,
            "/host/reclaimable": self._reclaimable,
            "/healthz": self._health,
            "/metrics": self._render_metrics,
            "/whoami": _whoami,
            "/openapi.json": lambda _call: Answer(self._openapi),
        }
        return {
            (own.method.upper(), _VARIABLE.sub("*", own.path)): Route(
                handlers[own.path], own.needs, own.host, frozenset(own.query), changes=own.path != PLAN_PATH
            )
            for own in OWN_PATHS
        }

    def _vms(self, call: Call) -> Answer:
        page = read_page(call.query, cursor=_VM_CURSOR, fields=self._vm_fields)
        ahead = sorted(self._asker.ask(self._node.list_vms, timeout_s=_CHECK_WAIT_S, about="listing VMs"))
        if page.cursor is not None:
            ahead = [uuid for uuid in ahead if uuid > page.cursor]
        most = len(ahead) if page.limit is None else page.limit
        found: dict[str, Any] = {}
        while ahead and len(found) < most:
            count = max(most - len(found), _VMS_AT_ONCE)
            found |= self._read_vms(ahead[:count], page.fields, call.access)
            ahead = ahead[count:]
        told = list(found)[:most]
        # A VM that the caller may not see is in no cursor.
        more = {"next": told[-1]} if ahead or len(told) < len(found) else {}
        return answer_list(call, page, encode({"vms": [found[uuid] for uuid in told], **more}))

    def _read_vms(self, uuids: Iterable[str], fields: frozenset[str] | None, access: Access) -> dict[str, Any]:
        """Return VMs as JSON, those that the caller may see."""
        # Made JSON one by one: what cannot be said of one VM is said of no other.
        questions = {uuid: partial(self._encode_vm, uuid, fields, access) for uuid in uuids}
        answers = self._asker.ask_all(questions, timeout_s=_VM_WAIT_S, about="reading the VM")
        # One VM that hangs is shown as such, and hides no other; one that was deleted since the listing is left out.
        return {
            uuid: {"vmUuid": uuid} | msgspec.json.decode(encode_error(answer))
            if isinstance(answer, AgentError)
            else answer
            for uuid, answer in answers.items()
            if answer is not None
            and not (isinstance(answer, AgentError) and (answer.code is Code.VM_NOT_FOUND or not access.covers(uuid)))
        }

    def _encode_vm(self, uuid: str, fields: frozenset[str] | None, access: Access) -> msgspec.Raw | None:
        """Return a VM as JSON, or those fields of it; None for one that the caller's roles are not for."""
        described = self._describe_vm(uuid)
        name = _NAMED.decode(described).name if access.vms else None
        if not access.covers_vm(uuid, name or ""):
            return None
        return described if fields is None else choose_fields(described, fields | {"vmUuid"})

    def _reclaimable(self, call: Call) -> Answer:
        """Ask each running VM's guest; one that cannot be read is left out, and so is one that is off."""
        budget = self._asker.ask(self._node.view_budget, timeout_s=_CHECK_WAIT_S, about="reading the host's memory")
        questions = {uuid: partial(self._node.find_reclaimable, uuid) for uuid in budget.promises}
        answers = self._asker.ask_all(questions, timeout_s=_VM_WAIT_S, about="reading the VM")
        found = [answer for answer in answers.values() if not isinstance(answer, AgentError)]
        return Answer(encode(ReclaimableMemory(budget.host, sorted(found, key=lambda one: -one.reclaimable))))

    def _vm(self, call: Call) -> Answer:
        call.access.check("read", vm=call.parts[0])
        return Answer(encode(self._describe(call.parts[0])))

    def _describe(self, vm: str) -> Any:
        return self._asker.ask(lambda: self._describe_vm(vm), timeout_s=_VM_WAIT_S, about=f"reading VM {vm}")

    def _tasks(self, call: Call) -> Answer:
        vm = call.query.get("vm")
        page = read_page(call.query, cursor=_NUMBER_CURSOR, fields=_TASK_FIELDS)
        state = call.query.get("state")
        if state is not None and state not in get_args(State):
            raise AgentError(Code.BAD_QUERY, f"state must be one of {', '.join(get_args(State))}; got {state!r}")
        tasks = self._journal.newest(
            state=state,  # type: ignore[arg-type]
            vm=None if vm is None else self._find_id(vm),
            owner=None if call.access.may("read") else call.access.caller,
            caller=call.query.get("caller"),
            outcome=call.query.get("outcome"),
            since=_parse_moment(call, "since"),
            until=_parse_moment(call, "until"),
            prefix=call.query.get("id"),
            **_of_page(page),
        )
        return _answer_newest(call, page, "tasks", tasks, lambda task: TaskEntry(**_summary(task)))

    def _history(self, call: Call) -> Answer:
        page = read_page(call.query, cursor=_NUMBER_CURSOR, fields=_CHANGE_FIELDS)
        vm = call.parts[0]
        call.access.check("read", vm=vm)
        changes = self._journal.changes(self._find_id(vm), **_of_page(page))
        if not changes:
            self._asker.ask(lambda: self._node.check_vm(vm), timeout_s=_CHECK_WAIT_S, about=f"reading VM {vm}")

        def may_see(change: ChangeRecord) -> bool:
            # A VM that once had this name may be another's by now.
            return call.access.covers_vm(change.vm_uuid, change.vm_name)

        return _answer_newest(call, page, "changes", changes, _entry, may_see=may_see)

    def _find_id(self, vm: str) -> VmId:
        """Return a VM's UUID and name. Of one that was not seen what it is called may be either."""
        return self._node.names.find(vm) or VmId(dashed_uuid(vm) or "", vm)

    def _task(self, call: Call) -> Answer:
        task = self._journal.find(call.parts[0])
        if task is None:
            raise AgentError(Code.UNKNOWN_TASK, f"there is no task with the id {call.parts[0]!r}")
        if not call.access.may("read"):
            check_owner(task, call.access)
        steps = [
            msgspec.json.decode(step.step)
            | {
                "elapsedMs": step.elapsed_ms,
                "cutOff": step.cut_off,
                "problem": msgspec.Raw((step.problem or "null").encode()),
            }
            for step in self._journal.steps(task.task_uuid)
        ]
        # JSON already, as the journal has it.
        own: dict[str, Any] = {
            "request": shown_json(msgspec.json.decode(task.request)),
            "goal": msgspec.Raw(task.goal or b"null"),
            "reply": msgspec.Raw(task.reply or b"null"),
        }
        return Answer(encode(WholeTask(**_summary(task), **own, steps=steps)))

    def _render_metrics(self, call: Call) -> Answer:
        return Answer(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    def _look_at_libvirt(self) -> None:
        """Prove that libvirt answers now, which a budget that was read a moment ago does not."""
        self._node.check()
        self._node.view_budget()

    def _health(self, call: Call) -> Answer:
        down = dict(self._find_stalls())
        try:
            self._asker.ask(self._look_at_libvirt, timeout_s=_CHECK_WAIT_S, about="libvirt")
        except AgentError as error:
            down["libvirt"] = error.message
        if failure := self._journal.check():
            down["journal"] = failure
        try:
            self._lanes.check_room()
        except AgentError as error:
            down["queue"] = error.message
        running = [
            RunningTask(self._find_id(lane).name or lane, task.task_uuid, task.command, round(seconds, 1))
            for lane, (task, seconds) in sorted(self._lanes.running().items(), key=lambda item: -item[1][1])
        ]
        body = Health(
            ready=not down,
            down=down,
            version=__version__,
            api_version=API_VERSION,
            extensions=[one.name for one in EXTENSIONS],
            host=self._node.read_load(),
            memory=self._node.last_budget(),
            running=running,
            queued=self._lanes.depth(),
            owed_callbacks=self._delivery.owed(),
        )
        return Answer(encode(body), status=503 if down else 200)


class _Told(msgspec.Struct, rename="camel"):
    """What went wrong, as far as a reply says it; a plugin of another's may have it in any shape."""

    error: Any = None
    error_code: Any = None
    remedy: Any = None


class _Named(msgspec.Struct):
    """What a VM is called."""

    name: str | None = None


# Made here and once, for the reason that model.decoders gives.
_TOLD = msgspec.json.Decoder(_Told)
_NAMED = msgspec.json.Decoder(_Named)


def _names_of(shape: type[msgspec.Struct]) -> frozenset[str]:
    """Return the names that the fields of a shape have in JSON."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(shape))


_TASK_FIELDS, _CHANGE_FIELDS = _names_of(TaskEntry), _names_of(HistoryEntry)


def _of_page(page: Page) -> dict[str, Any]:
    """Return how many entries to read: one more than the page has, to know whether there are more."""
    return {"before": None if page.cursor is None else int(page.cursor), "limit": (page.limit or _NEWEST) + 1}


def _answer_newest(
    call: Call,
    page: Page,
    name: str,
    found: Sequence[Any],
    tell: Callable[[Any], Any],
    *,
    may_see: Callable[[Any], bool] = lambda _one: True,
) -> Answer:
    """Return a page of what the journal has, by its number; what the caller may not see is left out of it."""
    most = page.limit or _NEWEST
    entries: list[Any] = [tell(one) for one in found[:most] if may_see(one)]
    if page.fields is not None:
        entries = [choose_fields(encode(one), page.fields | {"taskUuid"}) for one in entries]
    more = {"next": str(found[most - 1].seq)} if len(found) > most else {}
    return answer_list(call, page, encode({name: entries, **more}))


def _summary(task: TaskSummary) -> dict[str, Any]:
    told = _TOLD.decode(task.reply) if task.reply else _Told()
    # An older agent may have written it with the URL's query.
    error = task.delivery_error and shown_text(task.delivery_error)
    return {
        "task_uuid": task.task_uuid,
        "command": task.command,
        "vm": task.vm,
        "vm_uuid": task.vm_uuid or None,
        "state": task.state,
        "outcome": task.outcome,
        "error": told.error or None,
        "error_code": told.error_code,
        "remedy": told.remedy,
        "accepted_at": task.accepted_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "client": task.client,
        "caller": task.caller,
        "delivery": DeliveryState(shown_url(task.callback_url), task.attempts, error),
    }


def _entry(record: ChangeRecord) -> HistoryEntry:
    totals: dict[str, int] = msgspec.json.decode(record.totals)

    def numbers(end: str) -> VmNumbers:
        ours = {name.removesuffix(end): value for name, value in totals.items() if name.endswith(end)}
        return msgspec.convert(ours, VmNumbers)

    told = {name: getattr(record, name) for name in _TOLD_AS_RECORDED}
    asked = msgspec.json.decode(record.asked, type=VmNumbers)
    return HistoryEntry(vm=record.vm_name, asked=asked, before=numbers("Before"), after=numbers("After"), **told)


_TOLD_AS_RECORDED = (
    "task_uuid", "vm_uuid", "command", "caller", "client", "accepted_at", "finished_at", "outcome", "error_code",
)  # fmt: skip


def _parse_moment(call: Call, name: str) -> float | None:
    """Return a moment of the query, seconds since the epoch."""
    text = call.query.get(name)
    if text is None:
        return None
    # Python takes more for a number than JSON does: 1_000, and digits of other scripts.
    moment = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(moment):
        raise AgentError(Code.BAD_QUERY, f"{name} must be seconds since the epoch, got {text!r}")
    return moment


def _whoami(call: Call) -> Answer:
    access = call.access
    return Answer(encode(WhoAmI(access.caller, call.client, sorted(access.roles), list(access.vms) or None)))
