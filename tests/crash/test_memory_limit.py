"""The limit of memory that the unit sets: what the kernel kills for it comes back with all that it had accepted."""

import contextlib
import http.client
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.conftest import Host, StartAgent
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

# Of either kind of control groups: where the memory controller is, and the file of its limit.
HIERARCHIES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
# For what a process takes from the moment on in which it gets there.
LIMIT_BYTES = 512 * 1024


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with so little memory."""
    root, limit = next(one for one in HIERARCHIES if (Path(one[0]) / "cgroup.procs").exists())
    if os.getuid() != 0:
        pytest.skip("control groups are root's")
    if limit == "memory.max":
        (Path(root) / "cgroup.subtree_control").write_text("+memory")
    group = Path(root) / f"kvmagent-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        (group / limit).write_text(str(LIMIT_BYTES))
        yield group
    finally:
        group.rmdir()


def test_an_agent_that_the_kernel_kills_for_its_memory_has_its_tasks_when_it_is_started_again(
    make_agent: StartAgent, host: Host, server: ManagementServer, group: Path
) -> None:
    agent = make_agent(host.uri)

    def send(task_uuid: str, body: object) -> int:
        return agent.post("/vm/hotplug/cpu", body, task_uuid=task_uuid, callback_url=server.url).status

    assert send("t0", {"vmUuid": "vm1", "cpuNum": 2}) == 200
    server.wait("t0", 10)
    host.pause()
    try:
        assert [send(f"t{n}", {"vmUuid": "vm1", "cpuNum": n + 2}) for n in (1, 2)] == [200, 200]
        (group / "cgroup.procs").write_text(str(agent.pid))

        def is_killed() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                send(uuid.uuid4().hex, b'{"vmUuid": "' + b"x" * 900_000 + b'"}')
            return not agent.is_running()

        wait_for(is_killed, timeout_s=30, what="its end")
        agent.start(health=503)
    finally:
        host.resume()
    assert [server.wait(f"t{n}", 30)["cpuNum"] for n in (1, 2)] == [3, 4]
    assert host.vcpus("vm1") == (4, 4)
    assert len(server.callbacks("t0")) == 1
