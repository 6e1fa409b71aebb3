"""An agent on the lab's libvirtd, and a management server's way to it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.server import ManagementServer

Send = Callable[..., Any]


@pytest.fixture(scope="module")
def agent(lab: PrivateLibvirtd) -> Iterator[AgentProcess]:
    """The agent, as a process."""
    with AgentProcess(uri=lab.uri) as running:
        yield running


@pytest.fixture(scope="module")
def send(agent: AgentProcess, server: ManagementServer) -> Send:
    """Sends a command for a guest and returns what its callback says."""

    def call(path: str, guest: Guest, **fields: Any) -> Any:
        task = fields.pop("task", None) or new_task_uuid()
        body = {"vmUuid": guest.uuid, **fields}
        reply = agent.post(path, body, task_uuid=task, callback_url=server.url)
        assert reply == (200, {"taskUuid": task, "state": "accepted"})
        return server.wait(task, 180)

    return call
