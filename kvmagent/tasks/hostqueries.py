"""Answers questions to the host: remembers what the asker told of itself, looks, and lets the plugin answer.

answer(query, ...)   at once, in the HTTP answer
run(task)            as a task: on its lane's thread, recorded and delivered like any other
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from kvmagent.audit import audit
from kvmagent.logs import Log, error_fields, log_context
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import HostView, Query
from kvmagent.recorder import Recorder
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.journal import Journal, Task, Undelivered
from kvmagent.tasks.managementserver import ManagementServerFile

log = Log(__name__)


class HostNode(Protocol):
    """What is needed of hypervisor.node.Node."""

    def view_host(self, needs: frozenset[str]) -> HostView:
        """Return what is so of the host now."""


class HostQueries:
    """Thread-safe. `on_finished` takes what is owed for a task that was answered."""

    def __init__(
        self,
        node: HostNode,
        journal: Journal,
        queries: Mapping[str, Query],
        memory: ManagementServerFile,
        callbacks: CallbackClient,
        *,
        on_finished: Callable[[Undelivered], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._node = node
        self._journal = journal
        self._queries = queries
        self._memory = memory
        self._callbacks = callbacks
        self._on_finished = on_finished
        self._recorder = recorder or Recorder()
        self._noticed: set[str] = set()

    def run(self, task: Task) -> None:
        """Answer one task and record its reply. Answering twice does no harm: there is nothing to go on from."""
        query = self._queries[task.command]
        with log_context(**task.log_fields):
            try:
                self._journal.start_task(task.task_uuid)
                reply, failure = self._answer_task(query, task)
                outcome = "refused" if failure else "answered"
                owed = self._journal.finish(task.task_uuid, msgspec.json.encode(reply), outcome)
            except AgentError as error:
                if error.code is Code.CANCELLED:
                    log.info("task was cancelled")
                    return
                # The journal was closed under it: the next start finds the task unfinished and answers it.
                log.error("task stays in the journal", **error_fields(error))
                return
            self._on_finished(owed)
            log.info("task finished", outcome=outcome, **(error_fields(failure) if failure else {}))
            audit(
                "finished",
                caller=task.caller,
                client=task.client,
                what=task.command,
                vm=task.vm,
                task=task.task_uuid,
                outcome=failure.code if failure else outcome,
            )

    def answer(self, query: Query, request: Any, client: str) -> tuple[msgspec.Struct, AgentError | None]:
        """Return the answer, and the error that it tells: where libvirt cannot be asked nothing is made up.

        `client` is the address that asks; a server is told of events only where its callbacks may go.
        """
        reply, failure = self._find_answer(query, request, client)
        self._recorder.ended(query.name, "refused" if failure else "answered", failure.code if failure else None)
        return reply, failure

    def _find_answer(self, query: Query, request: Any, client: str) -> tuple[msgspec.Struct, AgentError | None]:
        for notice in query.notice(request):
            if notice not in self._noticed:
                self._noticed.add(notice)
                log.warning("part of a request is ignored", notice=notice, command=query.name)
        try:
            server = query.remember(request, self._memory.get())
            if server is not None:
                self._callbacks.check(server.send_command_url, client)
                self._memory.remember(msgspec.structs.replace(server, client=client))
            view = self._node.view_host(query.needs)
            return query.answer(request, msgspec.structs.replace(view, server=self._memory.get())), None
        except AgentError as error:
            log.info("question cannot be answered", command=query.name, **error_fields(error))
            return query.fail(f"{error.message}. {error.remedy}"), error
        except Exception as error:
            log.failure("question failed in a way that nothing expected", error, command=query.name)
            words = f"{type(error).__name__}: {error}"
            return query.fail(words), AgentError(Code.INTERNAL_ERROR, words, expected=False)

    def _answer_task(self, query: Query, task: Task) -> tuple[msgspec.Struct, AgentError | None]:
        try:
            request = msgspec.json.decode(task.request, type=query.request)
        except msgspec.MsgspecError as error:
            unreadable = AgentError(Code.TASK_UNREADABLE, f"{task.command}: {error}")
            self._recorder.ended(query.name, "refused", unreadable.code)
            return query.fail(unreadable.message), unreadable
        return self.answer(query, request, task.client)
