"""Taking a task back: before it has touched anything, once, and with a callback; never halfway."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Journal, Task, Undelivered
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.withdrawal import Withdrawal
from tests.fakes.agent import COMMANDS, FakeAgent, make_domain
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec


class Caller:
    """A caller of an agent whose VM can be made to hold up what comes to a named step."""

    def __init__(self, directory: Path) -> None:
        self.domain: FakeDomain = make_domain(GuestSpec(name="vm1"))
        self.agent = FakeAgent(directory, self.domain)
        self.journal: Journal = self.agent.journal
        self.told: list[Undelivered] = []
        lanes = Lanes(self.agent.executor.run, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)
        self.withdrawal = Withdrawal(self.journal, lanes, COMMANDS, on_finished=self.told.append)

    def accept(self, **fields: Any) -> Task:
        request = msgspec.json.encode({"vmUuid": "vm1", **fields})
        url = "http://127.0.0.1:9/"
        task = Task(task_uuid="t1", command="HotPlugCpu", lane="vm1", request=request, callback_url=url, client="::1")
        return self.journal.accept(task)[0]

    def find(self) -> Task:
        task = self.journal.find("t1")
        assert task is not None
        return task

    def reply(self) -> dict[str, Any]:
        return dict(msgspec.json.decode(self.find().reply or b"{}"))

    def hold(self, call: str) -> tuple[threading.Event, threading.Event]:
        """Hold the next call of libvirt: an event that it has come, and one that lets it go on."""
        came, go_on, original = threading.Event(), threading.Event(), getattr(self.domain, call)

        def held(*arguments: Any) -> Any:
            came.set()
            assert go_on.wait(20)
            return original(*arguments)

        setattr(self.domain, call, held)
        return came, go_on


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    made = Caller(tmp_path)
    yield made
    made.agent.stop()


def test_a_task_that_waits_ends_as_refused_with_its_callback(caller: Caller) -> None:
    task = caller.accept(cpuNum=2)
    caller.withdrawal.withdraw("t1")
    assert [owed.task_uuid for owed in caller.told] == ["t1"]
    assert (caller.find().state, caller.find().outcome) == ("finished", "refused")
    reply = caller.reply()
    assert (reply["success"], reply["outcome"], reply["errorCode"]) == (False, "refused", "CANCELLED")
    assert reply["vmUuid"] == "vm1"
    assert reply["remedy"]
    assert caller.journal.unfinished() == []
    # A worker that had it in hand does nothing with it.
    caller.agent.executor.run(task)
    assert caller.domain.calls == []
    assert caller.agent.finished == []
    assert caller.reply() == reply


def test_taking_it_back_twice_is_taking_it_back_once(caller: Caller) -> None:
    caller.accept(cpuNum=2)
    caller.withdrawal.withdraw("t1")
    caller.journal.record_delivery("t1", "delivered", None)
    assert caller.withdrawal.withdraw("t1").outcome == "refused"
    assert len(caller.told) == 1


@pytest.mark.parametrize("fields", [{"cpuNum": 2}, {"cpuNum": 1}, {"cpuNum": 9}, {"cpuNum": 2, "dryRun": True}])
def test_a_task_that_only_looks_at_its_vm_can_be_taken_back(caller: Caller, fields: dict[str, Any]) -> None:
    task = caller.accept(**fields)
    came, go_on = caller.hold("XMLDesc")
    worker = threading.Thread(target=caller.agent.executor.run, args=(task,))
    worker.start()
    assert came.wait(20)
    caller.withdrawal.withdraw("t1")
    go_on.set()
    worker.join(20)
    assert caller.domain.calls == []
    assert caller.reply()["errorCode"] == "CANCELLED"
    assert (len(caller.told), caller.agent.finished) == (1, [])


def test_a_task_that_has_begun_goes_on_and_says_what_it_is_doing(caller: Caller) -> None:
    task = caller.accept(cpuNum=2)
    came, go_on = caller.hold("setVcpusFlags")
    worker = threading.Thread(target=caller.agent.executor.run, args=(task,))
    worker.start()
    assert came.wait(20)
    with pytest.raises(AgentError) as refused:
        caller.withdrawal.withdraw("t1")
    go_on.set()
    worker.join(20)
    assert refused.value.code is Code.TASK_NOT_CANCELLABLE
    assert refused.value.details == {"state": "running", "step": "SetVcpus"}
    assert caller.reply()["outcome"] == "online"
    assert caller.told == []


def test_a_task_that_has_ended_has_ended(caller: Caller) -> None:
    caller.agent.executor.run(caller.accept(cpuNum=2))
    with pytest.raises(AgentError) as refused:
        caller.withdrawal.withdraw("t1")
    assert refused.value.code is Code.TASK_NOT_CANCELLABLE
    assert refused.value.details == {"state": "finished", "outcome": "online"}


def test_what_nobody_sent_cannot_be_taken_back(caller: Caller) -> None:
    with pytest.raises(AgentError) as refused:
        caller.withdrawal.withdraw("t1")
    assert refused.value.code is Code.UNKNOWN_TASK


def test_a_task_of_a_plugin_that_is_gone_can_be_taken_back_too(caller: Caller) -> None:
    task = Task(task_uuid="t1", command="Gone", lane="vm1", request=b"{}", callback_url="http://x/", client="::1")
    caller.journal.accept(task)
    caller.withdrawal.withdraw("t1")
    assert caller.reply()["errorCode"] == "CANCELLED"
