"""Removals that complete after the answer: recorded, followed by the definition, and told where that was asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.tasks.journal import Task
from kvmagent.tasks.late import LateRemovals
from tests.fakes.agent import MIB, FakeAgent, make_domain, make_guest
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for

ALIAS = "ua-kvmagent-plug-0"


@pytest.fixture
def domain() -> FakeDomain:
    spec = GuestSpec(name="vm1")
    return make_domain(spec, make_guest(spec))


@pytest.fixture
def agent(tmp_path: Path, domain: FakeDomain) -> Iterator[FakeAgent]:
    """An agent that has plugged a dimm and asked for it back, which the guest has not answered."""
    running = FakeAgent(tmp_path, domain)
    assert running.run("HotPlugMemory", "plug", vmUuid="vm1", memorySize=384 * MIB).reply["outcome"] == "online"
    domain.guest.unplugs = "not answering"
    yield running
    running.stop()


def ask_back(agent: FakeAgent, *, late_callback: bool) -> Task:
    done = agent.run(
        "HotUnplugMemory", "late", vmUuid="vm1", memorySize=256 * MIB, timeoutSec=1, lateCallback=late_callback
    )
    assert (done.reply["outcome"], done.reply["success"]) == ("pending", False)
    assert done.reply["errorCode"] == "MEMORY_REMOVAL_PENDING"
    assert agent.pending == ["late"]
    return task_of(agent)


def deliver(agent: FakeAgent) -> None:
    """The receiver takes the first callback."""
    agent.journal.settle("late", "delivered", None)
    wait_for(lambda: task_of(agent).state == "delivered", timeout_s=10, what="the journal")


def task_of(agent: FakeAgent) -> Task:
    task = agent.journal.find("late")
    assert task is not None
    return task


def reply_of(task: Task) -> Any:
    assert task.reply is not None
    return msgspec.json.decode(task.reply)


def test_the_definition_follows_and_a_second_callback_is_owed(agent: FakeAgent, domain: FakeDomain) -> None:
    task = ask_back(agent, late_callback=True)
    deliver(agent)
    agent.executor.run(task_of(agent))
    assert task_of(agent).outcome == "pending"
    assert domain.config.find("./devices/memory") is not None

    domain.let_go(ALIAS)
    agent.finished.clear()
    agent.executor.run(task)
    ended = task_of(agent)
    assert (ended.state, ended.outcome, ended.attempts) == ("finished", "online", 0)
    assert agent.finished == ["late"]
    reply = reply_of(ended)
    assert (reply["success"], reply["late"], reply["memorySize"]) == (True, True, 256 * MIB)
    assert reply["drift"] == []
    assert domain.config.find("./devices/memory") is None


def test_without_being_asked_for_it_is_recorded_and_not_told(agent: FakeAgent, domain: FakeDomain) -> None:
    task = ask_back(agent, late_callback=False)
    deliver(agent)
    domain.let_go(ALIAS)
    agent.finished.clear()
    agent.executor.run(task)
    ended = task_of(agent)
    assert (ended.state, ended.outcome) == ("delivered", "online")
    assert agent.finished == []
    assert domain.config.find("./devices/memory") is None


def test_the_first_callback_goes_first(agent: FakeAgent, domain: FakeDomain) -> None:
    task = ask_back(agent, late_callback=True)
    domain.let_go(ALIAS)
    agent.executor.run(task)
    assert task_of(agent).outcome == "pending"
    put: list[Task] = []
    now = [task.finished_at or 0.0]
    late = LateRemovals(agent.journal, put.append, clock=lambda: now[0])
    late.start()
    now[0] += 60
    late.look_after()
    assert put == []
    deliver(agent)
    agent.executor.run(task_of(agent))
    assert task_of(agent).outcome == "online"


def test_what_is_pending_is_looked_at_again_and_again_and_given_up_in_the_end(agent: FakeAgent) -> None:
    task = ask_back(agent, late_callback=True)
    deliver(agent)
    now = [task.finished_at or 0.0]
    put: list[str] = []
    late = LateRemovals(agent.journal, lambda task: put.append(task.task_uuid), clock=lambda: now[0])
    late.start()
    for _ in range(10):
        now[0] += 61
        late.look_after()
    assert put == ["late"] * 10
    now[0] += 86400
    late.look_after()
    late.look_after()
    assert len(put) == 10
