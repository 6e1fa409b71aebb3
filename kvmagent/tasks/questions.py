"""Answers questions to the host: remembers what the asker told of itself, looks, and lets the plugin answer."""

import logging
from typing import Any, Protocol

import msgspec

from kvmagent.model.errors import AgentError
from kvmagent.model.host import HostView, Query
from kvmagent.tasks.callbacks import Callbacks
from kvmagent.tasks.servermemory import ServerMemory

log = logging.getLogger(__name__)


class HostNode(Protocol):
    """What is needed of hypervisor.node.Node."""

    def view_host(self, needs: frozenset[str]) -> HostView:
        """Return what is so of the host now."""


class Questions:
    """Thread-safe."""

    def __init__(self, node: HostNode, memory: ServerMemory, callbacks: Callbacks) -> None:
        self._node = node
        self._callbacks = callbacks
        self._memory = memory
        self._noticed: set[str] = set()

    def answer(self, query: Query, request: Any, client: str) -> tuple[msgspec.Struct, AgentError | None]:
        """Return the answer, and the error that it tells: where libvirt cannot be asked nothing is made up.

        `client` is the address that asks; a server is told of events only where its callbacks may go.
        """
        notice = query.notice(request)
        if notice is not None and notice not in self._noticed:
            self._noticed.add(notice)
            log.warning("%s command=%s", notice, query.name)
        try:
            server = query.remember(request, self._memory.get())
            if server is not None:
                self._callbacks.check(server.send_command_url, client)
                self._memory.remember(msgspec.structs.replace(server, client=client))
            view = self._node.view_host(query.needs)
        except AgentError as error:
            return query.fail(f"{error.message}. {error.remedy}"), error
        return query.answer(request, msgspec.structs.replace(view, server=self._memory.get())), None
