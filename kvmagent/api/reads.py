"""The GET paths: VMs, tasks, health and the OpenAPI document, which tells of all paths."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, get_args

import msgspec

from kvmagent import __version__
from kvmagent.api.deadline import Asker
from kvmagent.api.metrics.events import CONTENT_TYPE, Metrics
from kvmagent.api.openapi import OwnPath, build_openapi
from kvmagent.api.server import Answer, Call, Handler
from kvmagent.api.wire import encode, encode_error
from kvmagent.hypervisor.node import Node
from kvmagent.model.command import Command
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal, State, TaskSummary
from kvmagent.tasks.lanes import Lanes

_DEFAULT_LIMIT, _MAX_LIMIT = 100, 1000
_PATHS = (
    OwnPath("/vms", "All VMs of this host with their numbers and what stands in the way of hotplug"),
    OwnPath("/vms/{vmUuid}", "One VM: facts, headroom, blockers"),
    OwnPath(
        "/tasks",
        "Tasks, newest first",
        {
            "vm": {"type": "string"},
            "state": {"enum": list(get_args(State))},
            "limit": {"type": "integer", "minimum": 1, "maximum": _MAX_LIMIT, "default": _DEFAULT_LIMIT},
        },
    ),
    OwnPath("/tasks/{taskUuid}", "One task: state, goal, steps, reply, delivery"),
    OwnPath(
        "/tasks/{taskUuid}/cancel",
        "Take a task back that has not touched its VM yet: it ends as refused, code CANCELLED, and its callback is "
        "sent; 409 with what it is doing where it is too late",
        method="post",
    ),
    OwnPath(
        "/host/reclaimable",
        "What the guests of running VMs do not use, and by which means it could leave; nothing is taken",
    ),
    OwnPath("/healthz", "200 when the agent is ready, 503 and what is down when it is not"),
    OwnPath(
        "/metrics",
        "Metrics of the agent and its VMs, in Prometheus' text format",
        content={CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}},
    ),
    OwnPath("/openapi.json", "This document"),
)
# How long libvirt may take to answer for one VM, and to show that it is there. Less than the server's threads at
# once, so that commands are accepted whatever hangs.
_VM_WAIT_S, _CHECK_WAIT_S, _AT_ONCE = 10.0, 3.0, 12


class Reads:
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
        self._openapi = encode(build_openapi(declared, _PATHS))

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Return the GET paths and what answers them."""
        return {
            ("GET", "/vms"): self._vms,
            ("GET", "/vms/*"): self._vm,
            ("GET", "/tasks"): self._tasks,
            ("GET", "/tasks/*"): self._task,
            ("GET", "/host/reclaimable"): self._reclaimable,
            ("GET", "/healthz"): self._health,
            ("GET", "/metrics"): self._render_metrics,
            ("GET", "/openapi.json"): lambda _call: Answer(self._openapi),
        }

    def _vms(self, call: Call) -> Answer:
        _check_query(call, ())
        uuids = self._asker.ask(self._node.list_vms, timeout_s=_CHECK_WAIT_S, about="listing VMs")
        # Made JSON one by one: what cannot be said of one VM is said of no other.
        questions = {uuid: partial(self._encode_vm, uuid) for uuid in uuids}
        answers = self._asker.ask_all(questions, timeout_s=_VM_WAIT_S, about="reading the VM")
        # One VM that hangs is told as such, and hides no other; one that is gone since it was listed is left out.
        vms = [
            {"vmUuid": uuid} | msgspec.json.decode(encode_error(answer)) if isinstance(answer, AgentError) else answer
            for uuid, answer in answers.items()
            if not (isinstance(answer, AgentError) and answer.code is Code.VM_NOT_FOUND)
        ]
        return Answer(encode({"vms": vms}))

    def _encode_vm(self, uuid: str) -> msgspec.Raw:
        return msgspec.Raw(encode(self._describe_vm(uuid)))

    def _reclaimable(self, call: Call) -> Answer:
        """Ask each running VM's guest; one that cannot be read is left out, and so is one that is off."""
        _check_query(call, ())
        budget = self._asker.ask(self._node.view_budget, timeout_s=_CHECK_WAIT_S, about="reading the host's memory")
        questions = {uuid: partial(self._node.find_reclaimable, uuid) for uuid in budget.promises}
        answers = self._asker.ask_all(questions, timeout_s=_VM_WAIT_S, about="reading the VM")
        found = [answer for answer in answers.values() if not isinstance(answer, AgentError)]
        return Answer(encode({"host": budget.host, "vms": sorted(found, key=lambda one: -one.reclaimable)}))

    def _vm(self, call: Call) -> Answer:
        _check_query(call, ())
        return Answer(encode(self._describe(call.parts[0])))

    def _describe(self, vm: str) -> Any:
        return self._asker.ask(lambda: self._describe_vm(vm), timeout_s=_VM_WAIT_S, about=f"reading VM {vm}")

    def _tasks(self, call: Call) -> Answer:
        _check_query(call, ("vm", "state", "limit"))
        limit = call.query.get("limit", str(_DEFAULT_LIMIT))
        if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_LIMIT:
            raise AgentError(Code.BAD_QUERY, f"limit is {limit!r}, needed is 1 to {_MAX_LIMIT}")
        state = call.query.get("state")
        if state is not None and state not in get_args(State):
            raise AgentError(Code.BAD_QUERY, f"state is {state!r}, needed is one of {', '.join(get_args(State))}")
        tasks = self._journal.newest(state=state, lane=call.query.get("vm"), limit=int(limit))  # type: ignore[arg-type]
        return Answer(encode({"tasks": [_summary(task) for task in tasks]}))

    def _task(self, call: Call) -> Answer:
        _check_query(call, ())
        task = self._journal.find(call.parts[0])
        if task is None:
            raise AgentError(Code.UNKNOWN_TASK, f"no task has the id {call.parts[0]!r}")
        steps = [
            msgspec.json.decode(step.step)
            | {
                "elapsedMs": step.elapsed_ms,
                "cutOff": step.cut_off,
                "problem": msgspec.Raw((step.problem or "null").encode()),
            }
            for step in self._journal.steps(task.task_uuid)
        ]
        whole = _summary(task) | {
            "request": msgspec.Raw(task.request),
            "goal": msgspec.Raw(task.goal or b"null"),
            "steps": steps,
            "reply": msgspec.Raw(task.reply or b"null"),
        }
        return Answer(encode(whole))

    def _render_metrics(self, call: Call) -> Answer:
        _check_query(call, ())
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
            {"vm": lane, "taskUuid": task.task_uuid, "command": task.command, "seconds": round(seconds, 1)}
            for lane, (task, seconds) in sorted(self._lanes.running().items(), key=lambda item: -item[1][1])
        ]
        body = {
            "ready": not down,
            "down": down,
            "version": __version__,
            "host": self._node.read_load(),
            "memory": self._node.last_budget(),
            "running": running,
            "queued": self._lanes.depth(),
            "owedCallbacks": self._delivery.owed(),
        }
        return Answer(encode(body), status=503 if down else 200)


class _Told(msgspec.Struct, rename="camel"):
    """What went wrong, as far as a reply tells it; a plugin of another's may have it in any shape."""

    error: Any = None
    error_code: Any = None
    remedy: Any = None


# Made here and once, for the reason that model.shapes gives.
_TOLD = msgspec.json.Decoder(_Told)


def _summary(task: TaskSummary) -> dict[str, Any]:
    told = _TOLD.decode(task.reply) if task.reply else _Told()
    return {
        "taskUuid": task.task_uuid,
        "command": task.command,
        "vm": task.lane,
        "state": task.state,
        "outcome": task.outcome,
        "error": told.error or None,
        "errorCode": told.error_code,
        "remedy": told.remedy,
        "acceptedAt": task.accepted_at,
        "startedAt": task.started_at,
        "finishedAt": task.finished_at,
        "client": task.client,
        "delivery": {"url": task.callback_url, "attempts": task.attempts, "error": task.delivery_error},
    }


def _check_query(call: Call, known: tuple[str, ...]) -> None:
    unknown = [name for name in call.query if name not in known]
    if unknown:
        raise AgentError(Code.BAD_QUERY, f"unknown query parameter {unknown[0]!r}")
