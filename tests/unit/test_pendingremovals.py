"""Removals that complete after the answer: recorded, followed by the definition, and told where that was asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.hypervisor.deviceevents import DeviceEvent, DeviceEvents
from kvmagent.model.errors import AgentError
from kvmagent.tasks.journal import Task
from kvmagent.tasks.pendingremovals import PendingRemovals
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
    agent.journal.record_delivery("late", "delivered", None)
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
    late = PendingRemovals(agent.journal, put.append)
    late.start()
    agent.ahead_s += 60
    late.look_after()
    assert put == []
    deliver(agent)
    agent.executor.run(task_of(agent))
    assert task_of(agent).outcome == "online"


def test_what_is_pending_is_looked_at_again_and_again_and_given_up_in_the_end(agent: FakeAgent) -> None:
    ask_back(agent, late_callback=True)
    deliver(agent)
    put: list[str] = []
    late = PendingRemovals(agent.journal, lambda task: put.append(task.task_uuid))
    late.start()
    for _ in range(10):
        agent.ahead_s += 61
        late.look_after()
    assert put == ["late"] * 10
    agent.ahead_s += 86400
    late.look_after()
    late.look_after()
    assert len(put) == 10


def test_a_step_of_the_clock_neither_ends_the_watch_nor_delays_it(agent: FakeAgent) -> None:
    ask_back(agent, late_callback=True)
    deliver(agent)
    put: list[str] = []
    late = PendingRemovals(agent.journal, lambda task: put.append(task.task_uuid))
    late.start()
    for step_s in (2 * 86400, -4 * 86400):
        agent.clock_is_off_s += step_s
        agent.ahead_s += 61
        late.look_after()
    assert put == ["late"] * 2


class Watch:
    """Late removals on an agent's journal, and what they give to lanes."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.put: list[Task] = []
        self.late = PendingRemovals(agent.journal, self.put.append)

    def look(self) -> None:
        """Let a second pass, and carry out what is due."""
        self.flush()
        self.agent.ahead_s += 2
        self.late.look_after()
        for task in self.put:
            self.agent.executor.run(task)
        self.put.clear()

    def flush(self) -> None:
        """Wait for what was handed to the journal without waiting."""
        with pytest.raises(AgentError):
            self.agent.journal.owe_again("nobody")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_refusal_that_comes_late_is_recorded_and_told_even_over_a_restart(
    agent: FakeAgent, domain: FakeDomain, restarted: bool
) -> None:
    ask_back(agent, late_callback=True)
    deliver(agent)
    watch = Watch(agent)
    watch.late.start()
    events = DeviceEvents(watch.late.note_refusal)
    agent.finished.clear()
    for vm, kind, alias in (
        ("another-vm", "removal-failed", ALIAS),
        (domain.UUIDString(), "removal-failed", "ua-another"),
        (domain.UUIDString(), "removed", ALIAS),
    ):
        events.put(vm, DeviceEvent(kind, alias))  # type: ignore[arg-type]
    watch.look()
    assert task_of(agent).outcome == "pending"

    events.put(domain.UUIDString(), DeviceEvent("removal-failed", ALIAS))
    watch.flush()
    if restarted:
        watch = Watch(agent)
        watch.late.start()
    watch.look()
    ended = task_of(agent)
    # Its memory was taken offline in the guest, and nobody has asked for it back.
    assert (ended.state, ended.outcome) == ("finished", "partial")
    assert agent.finished == ["late"]
    reply = reply_of(ended)
    assert (reply["success"], reply["late"], reply["errorCode"]) == (False, True, "MEMORY_REMOVAL_REFUSED")
    assert (reply["memorySize"], reply["drift"], reply["sameRun"]) == (384 * MIB, [], True)
    assert "auto-movable" in reply["remedy"]
    assert [step["problem"] for step in reply["steps"] if "problem" in step] == ["MEMORY_REMOVAL_REFUSED"]
    assert domain.config.find("./devices/memory") is not None


def test_a_refusal_between_the_wait_s_end_and_the_answer_is_not_lost(agent: FakeAgent, domain: FakeDomain) -> None:
    ask_back(agent, late_callback=True)
    deliver(agent)
    watch = Watch(agent)
    watch.late.note_refusal(domain.UUIDString(), ALIAS)  # nobody waits for it yet
    watch.late.add("late")
    watch.look()
    assert task_of(agent).outcome == "partial"


def test_a_refusal_of_an_earlier_request_is_none_of_this_one(agent: FakeAgent, domain: FakeDomain) -> None:
    ask_back(agent, late_callback=True)
    deliver(agent)
    watch = Watch(agent)
    agent.ahead_s -= 60
    watch.late.note_refusal(domain.UUIDString(), ALIAS)
    agent.ahead_s += 60
    watch.late.add("late")
    watch.look()
    assert task_of(agent).outcome == "pending"


@pytest.mark.parametrize("start", [True, False])
def test_a_removal_that_was_pending_at_power_off_is_lost_and_said_so(
    agent: FakeAgent, domain: FakeDomain, start: bool
) -> None:
    task = ask_back(agent, late_callback=True)
    deliver(agent)
    domain.power_cycle(start=start)
    agent.executor.run(task)
    reply = reply_of(task_of(agent))
    assert (reply["success"], reply["late"], reply["errorCode"]) == (False, True, "REMOVAL_LOST")
    assert reply["outcome"] == ("refused" if start else "partial")
    assert reply["sameRun"] is (False if start else None)
    assert (reply["after"]["memorySize"], reply["after"]["configMemorySize"]) == (
        384 * MIB if start else None,
        384 * MIB,
    )
    assert domain.config.find("./devices/memory") is not None


def test_vcpus_that_were_to_leave_at_power_off_are_lost_too(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1")
    domain = make_domain(spec, make_guest(spec), virt_type="kvm")
    agent = FakeAgent(tmp_path, domain)
    try:
        assert agent.run("HotPlugCpu", "plug", vmUuid="vm1", cpuNum=3).reply["outcome"] == "online"
        domain.guest.unplugs = "not answering"
        agent.run("HotUnplugCpu", "late", vmUuid="vm1", cpuNum=1, timeoutSec=1)
        deliver(agent)
        domain.power_cycle()
        agent.executor.run(task_of(agent))
        reply = reply_of(task_of(agent))
        assert (reply["outcome"], reply["errorCode"], reply["cpuNum"]) == ("refused", "REMOVAL_LOST", 3)
    finally:
        agent.stop()
