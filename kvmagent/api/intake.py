"""Accepts a command: checks it, stores it, and only then answers; and cancels it, if it is not too late."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from kvmagent.api.wire import decode_request, parse_callback_url, parse_task_uuid, parse_traceparent
from kvmagent.audit import audit
from kvmagent.hypervisor.vmnames import VmNames
from kvmagent.logs import Log, log_context, struct_fields
from kvmagent.model.command import NO_CALLBACK, Command
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.model.roles import Access, Role
from kvmagent.model.vmname import VmId, parse_uuid
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.hostqueries import HostQueries
from kvmagent.tasks.journal import UNFINISHED, Journal, Task, task_not_yours
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.plugincalls import call
from kvmagent.tasks.withdrawal import Withdrawal

log = Log(__name__)

_TOLD_AS_VM = frozenset({"vm_uuid"})


class Accepted(msgspec.Struct, rename="camel"):
    """The immediate answer: the task is on disk, in this state."""

    task_uuid: str
    state: str


class Intake:
    """Thread-safe."""

    def __init__(
        self,
        journal: Journal,
        lanes: Lanes,
        delivery: Delivery,
        callbacks: CallbackClient,
        questions: HostQueries,
        withdrawal: Withdrawal,
        names: VmNames,
    ) -> None:
        self._names = names
        self._withdrawal = withdrawal
        self._questions = questions
        self._journal = journal
        self._lanes = lanes
        self._delivery = delivery
        self._callbacks = callbacks

    def accept(
        self, command: Command | Query, headers: Mapping[str, str], body: bytes, *, client: str, access: Access
    ) -> Accepted:
        """Store a command and return its state; the same task sent again is answered, not done again.

        `client` is the address that sent it, `access` who that proved to be and what that may.

        Raises:
            AgentError: everything that refuses a request at once; nothing was stored.
        """
        task_uuid, caller = headers.get("taskuuid", "")[:64], access.caller
        vm = VmId("", "")

        def tell(event: Literal["accepted", "refused"], outcome: str, error: str = "") -> None:
            who: dict[str, Any] = {"caller": caller, "client": client}
            audit(
                event, **who, what=command.name, vm=vm.name, uuid=vm.uuid, task=task_uuid, outcome=outcome, error=error
            )

        def tell_accepted() -> None:
            tell("accepted", "accepted")
            log.info("task accepted", client=client, **struct_fields(request, omit=_TOLD_AS_VM))

        with log_context(task=task_uuid, command=command.name):
            try:
                task_uuid = parse_task_uuid(headers.get("taskuuid"))
                callback_url = _parse_callback_url(command, headers)
                check_content_type(headers.get("content-type", "application/json"))
                request, lane = _read(command, body)
                known = self._names.find(lane)
                vm = known or VmId("", lane)
                role = _check_access(command, request, access)
                task = Task(
                    task_uuid=task_uuid,
                    command=command.name,
                    lane=lane,
                    request=msgspec.json.encode(request),
                    callback_url=callback_url,
                    client=client,
                    caller=caller,
                    traceparent=parse_traceparent(headers.get("traceparent")),
                    vm_uuid=known.uuid if known else "",
                    vm_name=known.name if known else "",
                )
                with log_context(**task.log_fields, role=role):
                    if callback_url != NO_CALLBACK:
                        self._callbacks.check(callback_url, client)
                    task, is_new = self._store(task, tell_accepted, for_all=access.is_admin)
            except AgentError as error:
                tell("refused", error.code, error.message)
                raise
        with log_context(**task.log_fields, role=role):
            if is_new:
                return Accepted(task_uuid=task_uuid, state="accepted")
            tell("accepted", f"known:{task.state}")
            log.info("task sent again", client=client, state=task.state)
            if task.state not in UNFINISHED:
                if task.state != "finished" and task.callback_url != NO_CALLBACK:
                    self._delivery.check_room(client)
                self._delivery.put(self._journal.owe_again(task_uuid))
            return Accepted(task_uuid=task_uuid, state=task.state)

    def cancel(self, task_uuid: str, *, client: str, access: Access) -> Accepted:
        """Cancel a task that has not changed anything yet; a second call changes nothing.

        Raises:
            AgentError: UNKNOWN_TASK; TASK_NOT_YOURS; TASK_NOT_CANCELLABLE, with what the task is doing.
        """
        what, caller = f"cancel {task_uuid}", access.caller
        try:
            if (known := self._journal.find(task_uuid)) is not None:
                check_owner(known, access)
            task = self._withdrawal.withdraw(task_uuid)
        except AgentError as error:
            audit("refused", caller=caller, client=client, what=what, outcome=error.code, error=error.message)
            raise
        outcome = Code.CANCELLED
        audit(
            "finished",
            caller=caller,
            client=client,
            what=what,
            vm=task.vm,
            uuid=task.vm_uuid,
            task=task_uuid,
            outcome=outcome,
        )
        return Accepted(task_uuid=task_uuid, state=task.state if task.state not in UNFINISHED else "finished")

    def answer(self, query: Query, headers: Mapping[str, str], body: bytes, *, client: str, access: Access) -> bytes:
        """Answer a host query at once, in JSON.

        Raises:
            AgentError: everything that refuses a request at once.
        """
        caller = access.caller
        with log_context(command=query.name):
            try:
                if "taskuuid" in headers:
                    raise AgentError(
                        Code.BAD_TASK_UUID,
                        f"{query.path} answers at once and does not accept a taskuuid header",
                        remedy="Leave the taskuuid header out; the answer is in the body.",
                    )
                check_content_type(headers.get("content-type", "application/json"))
                request, _ = _read(query, body)
            except AgentError as error:
                who: dict[str, Any] = {"caller": caller, "client": client}
                audit("refused", **who, what=query.name, outcome=error.code, error=error.message)
                raise
            ended = self._questions.answer(query, request, client)
            code, words = (ended.error.code, ended.error.message) if ended.error else ("", "")
            who = {"caller": caller, "client": client}
            audit("finished", **who, what=query.name, outcome=ended.outcome, error_code=code, error=words)
            return ended.reply

    def _store(self, task: Task, tell_accepted: Callable[[], None], *, for_all: bool) -> tuple[Task, bool]:
        """Store a task for which there is room; one that is known already needs none.

        It is logged before it can begin: by whom it is stored, in whose log context.
        """
        try:
            if task.callback_url != NO_CALLBACK:
                self._delivery.check_room(task.client)
            with self._lanes.hold_place(task):
                return self._journal.accept(task, for_all=for_all, then=tell_accepted)
        except AgentError as error:
            no_room = error.code in (Code.QUEUE_FULL, Code.STOPPING)
            if not no_room or self._journal.find(task.task_uuid) is None:
                raise
        return self._journal.accept(task, for_all=for_all, then=tell_accepted)


def check_owner(task: Task, access: Access) -> None:
    """Refuse another caller's task, and reveal nothing of it.

    Raises:
        AgentError: TASK_NOT_YOURS.
    """
    if task.caller != access.caller and not access.is_admin:
        raise task_not_yours(task.task_uuid)


def _check_access(declared: Command | Query, request: Any, access: Access) -> Role:
    """Return the role that lets a caller in, now that it is known which VM and what of it the request is about.

    Raises:
        AgentError: ROLE_MISSING.
    """
    if isinstance(declared, Query):
        return access.check(declared.role, host=True)
    role = access.check(declared.role, vm=request.vm_uuid)
    needed = call(declared.needs_also, request)
    return role if needed is None else access.check(needed, vm=request.vm_uuid)


def _parse_callback_url(declared: Command | Query, headers: Mapping[str, str]) -> str:
    """Return where the reply goes; a host query may leave it open, because it changes nothing."""
    default = NO_CALLBACK if isinstance(declared, Query) else None
    return parse_callback_url(headers.get("callbackurl", default))


def check_content_type(value: str) -> None:
    """Refuse what does not say that it is JSON: a form that a browser sends from elsewhere does not.

    Raises:
        AgentError: BAD_CONTENT_TYPE.
    """
    content_type = value.partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise AgentError(Code.BAD_CONTENT_TYPE, f"Content-Type is {content_type!r}")


def _read(declared: Command | Query, body: bytes) -> tuple[msgspec.Struct, str]:
    """Return the request and its lane: its VM's, or for a host query the query's own."""
    if isinstance(declared, Query):
        return decode_request(body or b"{}", declared.request), f"host/{declared.name}"
    request = decode_request(body, declared.request)
    # One lane for all ways to write a UUID.
    return request, parse_uuid(request.vm_uuid) or request.vm_uuid
