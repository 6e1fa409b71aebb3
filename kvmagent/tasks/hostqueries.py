"""Answers host queries: remembers what the caller said about itself, reads the host, and lets the plugin answer.

answer(query, ...)   at once, in the HTTP answer
run(task)            as a task: on its lane's thread, recorded and delivered like any other (tasks.endings)

If a plugin raises, or answers something that is not JSON, there is still an answer, and it says so.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from kvmagent.logs import Log, error_fields, log_context
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import HostView, Query
from kvmagent.recorder import Recorder
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.endings import Ended, Endings
from kvmagent.tasks.journal import Journal, Task, Undelivered
from kvmagent.tasks.managementserver import ManagementServerFile
from kvmagent.tasks.plugincalls import call
from kvmagent.tasks.replies import encode_answer, make_error, make_failed_answer

log = Log(__name__)


class HostNode(Protocol):
    """What is needed of hypervisor.node.Node."""

    def view_host(self, needs: frozenset[str]) -> HostView:
        """Return what is so of the host now."""


class HostQueries:
    """Thread-safe. `on_finished` takes the undelivered callback of a task that was answered."""

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
        self._queries = queries
        self._memory = memory
        self._callbacks = callbacks
        self._recorder = recorder or Recorder()
        self._endings = Endings(journal, on_finished=on_finished, recorder=self._recorder)
        self._noticed: set[str] = set()

    def run(self, task: Task) -> None:
        """Answer one task and record its reply. Answering twice does no harm: there is nothing to go on from."""
        with log_context(**task.log_fields):
            self._endings.end(task, self._answer_task)

    def answer(self, query: Query, request: Any, client: str) -> Ended:
        """Return the answer, and the error in it: if libvirt cannot be reached, nothing is made up.

        `client` is the caller's address; a server gets reports of events only where its callbacks may go.
        """
        ended = self._answer(query, request, client)
        self._recorder.ended(query.name, ended.outcome, ended.error.code if ended.error else None)
        return ended

    def _answer_task(self, task: Task) -> Ended:
        query = self._queries[task.command]
        try:
            request = msgspec.json.decode(task.request, type=query.request)
        except msgspec.MsgspecError as error:
            unreadable = AgentError(Code.TASK_UNREADABLE, f"{task.command}: {error}")
            log.error("task cannot be read", **error_fields(unreadable))
            return _fail(query, unreadable)
        return self._answer(query, request, task.client)

    def _answer(self, query: Query, request: Any, client: str) -> Ended:
        try:
            self._tell_ignored(query, request)
            server = call(query.remember, request, self._memory.get())
            if server is not None:
                self._callbacks.check(server.send_command_url, client)
                self._memory.remember(msgspec.structs.replace(server, client=client))
            view = msgspec.structs.replace(self._node.view_host(query.needs), server=self._memory.get())
            return Ended(encode_answer(query, call(query.answer, request, view)), "answered", None)
        except Exception as error:
            failure = make_error(error)
            if failure.expected:
                log.info("query cannot be answered", command=query.name, **error_fields(failure))
            else:
                log.failure("query cannot be answered", failure, command=query.name, error_code=failure.code)
            return _fail(query, failure)

    def _tell_ignored(self, query: Query, request: Any) -> None:
        for notice in call(query.notice, request):
            if notice not in self._noticed:
                self._noticed.add(notice)
                log.warning("part of a request is ignored", notice=notice, command=query.name)


def _fail(query: Query, error: AgentError) -> Ended:
    return Ended(make_failed_answer(query, error), "refused", error)
