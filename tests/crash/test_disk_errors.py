"""A commit that was told as failed may be on disk all the same: what it did is found, and none of it is forgotten."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.shim import Shim, build_shim
from tests.crash.conftest import Host, MortalAgent, StartAgent
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer


@pytest.fixture
def agent(make_agent: StartAgent, host: Host, server: ManagementServer, shim: Shim) -> MortalAgent:
    """An agent that has done one task."""
    agent = make_agent(host.uri, environment=shim.environment())
    shim.watch(agent.directory / "state")
    assert send(agent, server, "t0", 2) == 200
    server.wait("t0", 10)
    wait_for(lambda: agent.get("/tasks/t0").body["state"] == "delivered", timeout_s=10, what="its end on disk")
    return agent


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Shim]:
    """What stands between the agent and its disk."""
    shim = Shim(build_shim(tmp_path), tmp_path / "control")
    yield shim
    shim.close()


def send(agent: MortalAgent, server: ManagementServer, task_uuid: str, cpus: int) -> int:
    """Send a task; its status."""
    body = {"vmUuid": "vm1", "cpuNum": cpus}
    return agent.post("/vm/hotplug/cpu", body, task_uuid=task_uuid, callback_url=server.url).status


def break_disk(shim: Shim) -> None:
    """Let every fsync fail, and every read of a page that is not known: the writer cannot open the file again, or its
    next try would take the place of the commit that failed."""
    shim.fail("syncs", "reads")


def lose_every_connection(agent: MortalAgent, shim: Shim) -> None:
    """Have the reader fail as well, so that nobody has the file open: whoever opens it next finds what its log has."""
    # By an index of which the reader has no page yet.
    assert agent.get("/tasks?vm=nobody").status == 503
    shim.fail()


def test_a_task_that_was_refused_and_is_on_disk_is_done_when_it_is_sent_again(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host
) -> None:
    break_disk(shim)
    assert send(agent, server, "t1", 3) == 503
    lose_every_connection(agent, shim)
    assert send(agent, server, "t1", 3) == 200
    assert server.wait("t1", 10)["cpuNum"] == 3
    assert host.vcpus("vm1") == (3, 3)


def test_a_task_that_was_refused_and_is_on_disk_is_done_although_nobody_sends_it_again(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host
) -> None:
    break_disk(shim)
    assert send(agent, server, "t1", 3) == 503
    lose_every_connection(agent, shim)
    assert agent.get("/tasks/t1").status == 200, "the commit that failed is not on disk: nothing was tried here"
    assert server.wait("t1", 10)["cpuNum"] == 3
    assert host.vcpus("vm1") == (3, 3)


@pytest.mark.parametrize("loss", ["removed", "replaced", "removed with -shm"])
def test_the_log_may_be_taken_away_while_the_disk_fails(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host, loss: str
) -> None:
    log = agent.directory / "state/journal.sqlite-wal"
    assert log.stat().st_size > 0
    break_disk(shim)
    assert send(agent, server, "t1", 3) == 503
    assert agent.get("/tasks?vm=nobody").status == 503  # by an index of which the reader has no page yet
    if loss == "replaced":
        log.rename(log.with_name("gone"))
        log.write_bytes(b"")
    else:
        log.unlink()
    if loss.endswith("-shm"):
        log.with_name("journal.sqlite-shm").unlink()
    shim.fail()
    wait_for(lambda: agent.get("/healthz").status == 200, timeout_s=20, what="the journal")
    assert agent.get("/tasks/t0").body["state"] == "delivered"
    assert send(agent, server, "t1", 3) == 200
    assert server.wait("t1", 10)["cpuNum"] == 3
    wait_for(lambda: agent.get("/tasks/t1").body["state"] == "delivered", timeout_s=10, what="its end on disk")
    agent.kill()
    agent.start()
    assert [agent.get(f"/tasks/{task}").body["state"] for task in ("t0", "t1")] == ["delivered", "delivered"]
    assert len(server.callbacks("t0")) == 1
    assert host.vcpus("vm1") == (3, 3)


def test_tasks_whose_journal_cannot_be_read_wait_for_it_in_their_order(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host
) -> None:
    """Nothing that was accepted is left to the next start."""
    host.pause()
    try:
        assert [send(agent, server, f"t{n}", 2 + n) for n in (1, 2, 3)] == [200] * 3
        shim.fail("reads")
    finally:
        host.resume()
    wait_for(lambda: "journal" in agent.get("/healthz").body["down"], timeout_s=30, what="a read that fails")
    assert not server.callbacks("t3")
    shim.fail()
    assert [server.wait(f"t{n}", 30)["cpuNum"] for n in (1, 2, 3)] == [3, 4, 5]
    assert host.vcpus("vm1") == (5, 5)
    wait_for(lambda: agent.get("/healthz").status == 200, timeout_s=20, what="the journal")


@pytest.mark.parametrize("is_failing", [False, True])
def test_nothing_is_accepted_onto_a_log_that_was_taken_away(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host, *, is_failing: bool
) -> None:
    """Killed before the log is mended, it loses nothing that it accepted since; what it loses, the next start tells."""
    if is_failing:
        break_disk(shim)
        assert send(agent, server, "t1", 3) == 503
    (agent.directory / "state/journal.sqlite-wal").unlink()
    sent = {f"new{n}": send(agent, server, f"new{n}", 3 + n) for n in range(5)}
    agent.kill()
    shim.fail()
    assert set(sent.values()) == {503 if is_failing else 200}
    agent.start()
    assert ("journal's WAL is missing" in agent.log()) == is_failing
    for task_uuid, status in sent.items():
        if status == 200:
            assert server.wait(task_uuid, 10)["success"]
    # Sent again, each is done; one that was done before is not done twice.
    for n, task_uuid in enumerate(["t0", "t1", *sent]):
        assert send(agent, server, task_uuid, max(2, n + 1)) == 200
        wait_for(lambda: server.callbacks(task_uuid), timeout_s=10, what=task_uuid)  # noqa: B023
    assert host.vcpus("vm1") == (7, 7)


def test_a_pruning_that_a_read_only_disk_refuses_forgets_nothing_and_is_made_up_for(
    make_agent: StartAgent, host: Host, server: ManagementServer, shim: Shim
) -> None:
    """A file system with errors turns read-only under open files: nothing asks for a change but the age."""
    agent = make_agent(host.uri, environment=shim.environment(), settings={"agent": {"keep_tasks": "1"}})
    shim.watch(agent.directory / "state")
    host.pause()
    try:
        assert send(agent, server, "unfinished", 2) == 200
        for n in range(3):
            assert agent.post("/vm/hotplug/ready", {"vmUuid": f"no{n}"}, task_uuid=f"no{n}", callback_url=server.url)
        assert [agent.post(f"/tasks/no{n}/cancel", {}).status for n in range(3)] == [200] * 3
        wait_for(lambda: {agent.get(f"/tasks/no{n}").body["state"] for n in range(3)} == {"delivered"},
                 timeout_s=20, what="their ends on disk")  # fmt: skip
        shim.fail("writes", "syncs", error=errno.EROFS)
        wait_for(lambda: "journal" in agent.get("/healthz").body["down"], timeout_s=30, what="a pruning")
        assert [agent.get(f"/tasks/no{n}").body["state"] for n in range(3)] == ["delivered"] * 3
        assert send(agent, server, "refused", 9) == 503
        shim.fail()
        wait_for(lambda: "journal" not in agent.get("/healthz").body["down"], timeout_s=30, what="the journal")
        wait_for(lambda: agent.get("/tasks/no0").status == 404, timeout_s=60, what="what was to be forgotten")
    finally:
        shim.fail()
        host.resume()
    assert server.wait("unfinished", 30)["cpuNum"] == 2
    assert agent.get("/tasks/refused").status == 404


def test_a_withdrawal_that_was_told_as_failed_and_happened_is_told_by_its_callback(
    agent: MortalAgent, shim: Shim, server: ManagementServer, host: Host
) -> None:
    host.pause()
    try:
        assert [send(agent, server, "t1", 3), send(agent, server, "t2", 4)] == [200, 200]
        agent.get("/tasks/t2")
        break_disk(shim)
        assert agent.post("/tasks/t2/cancel", {}).status == 503
        lose_every_connection(agent, shim)
        wait_for(lambda: agent.get("/tasks/t2").body["state"] == "delivered", timeout_s=10, what="its callback")
    finally:
        host.resume()
    assert server.wait("t2", 10)["errorCode"] == "CANCELLED"
    assert server.wait("t1", 20)["cpuNum"] == 3
    assert len(server.callbacks("t2")) == 1
