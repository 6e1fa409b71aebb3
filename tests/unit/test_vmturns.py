"""One VM has one goal at a time, by whatever name its tasks come; and who waits for another's end keeps no thread."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.journal import Journal, Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.vmturns import NotYet, VmTurns
from tests.fakes.agent import COMMANDS, UUID, make_domain, make_node
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for

SPELLINGS = ("vm1", UUID, UUID.replace("-", ""))


class Killed(BaseException):
    """The agent dies: nothing handles this."""


class Agent:
    """Lanes of one thread, an executor and a journal on one VM; `kill_at` is a point that tasks.faults names."""

    def __init__(self, directory: Path) -> None:
        self.domain: FakeDomain = make_domain(GuestSpec(name="vm1", max_vcpus=8))
        self.kill_at = ""
        self.journal = Journal(directory / "journal.sqlite", on_accepted=lambda task: None)
        self.journal.start()
        self.executor = Executor(
            make_node(directory, self.domain),
            self.journal,
            COMMANDS,
            on_finished=lambda owed: None,
            on_pending=lambda task_uuid: None,
            wake=lambda task: self.lanes.wake(task),
            libvirt_wait_s=5.0,
            fault=self._fault,
        )
        self.waited: set[str] = set()
        self.lanes = Lanes(self._run, workers=1, max_queued=99, max_queued_per_lane=99, max_queued_per_client=99)

    def _run(self, task: Task) -> None:
        try:
            self.executor.run(task)
        except NotYet:
            self.waited.add(task.task_uuid)
            raise

    def wait_parked(self, *task_uuids: str) -> None:
        """Wait until these were run, had to wait, and left the thread. That the queue is long says nothing: it is
        before the first is run, too."""
        wait_for(lambda: self.waited >= set(task_uuids) and not self.lanes.running(), timeout_s=60, what="them to wait")

    def _fault(self, name: str) -> None:
        if name == self.kill_at:
            self.kill_at = ""
            raise Killed

    def accept(self, task_uuid: str, vm: str, cpu_num: int, **fields: Any) -> Task:
        request = msgspec.json.encode({"vmUuid": vm, "cpuNum": cpu_num, **fields})
        url = "http://127.0.0.1:9/"
        task = Task(task_uuid=task_uuid, command="HotPlugCpu", lane=vm, request=request, callback_url=url, client="::1")
        return self.journal.accept(task)[0]

    def kill(self, task: Task) -> Task:
        """Run a task until the agent is killed after a step; return it as the next agent finds it."""
        self.kill_at = "step:done"
        with pytest.raises(Killed):
            self.executor.run(task)
        (left,) = self.journal.unfinished()
        return left

    def find(self, task_uuid: str) -> Task:
        task = self.journal.find(task_uuid)
        assert task is not None
        return task

    def reply(self, task_uuid: str) -> dict[str, Any]:
        wait_for(lambda: self.find(task_uuid).state == "finished", timeout_s=60, what=f"the end of {task_uuid}")
        return dict(msgspec.json.decode(self.find(task_uuid).reply or b"{}"))

    def hold(self, call: str) -> threading.Event:
        """Hold the next call of libvirt until the event is set."""
        go_on, original = threading.Event(), getattr(self.domain, call)

        def held(*arguments: Any) -> Any:
            setattr(self.domain, call, original)
            assert go_on.wait(60)
            return original(*arguments)

        setattr(self.domain, call, held)
        return go_on


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    assert made.lanes.stop(60)
    made.journal.stop()


def test_who_waits_for_a_goal_of_an_earlier_agent_leaves_the_only_thread_to_it(agent: Agent) -> None:
    left = agent.kill(agent.accept("t1", "vm1", 2))
    for n, spelling in enumerate(SPELLINGS[1:], 3):
        agent.lanes.put(agent.accept(f"t{n}", spelling, n))
    agent.wait_parked("t3", "t4")
    agent.lanes.put(left)
    replies = {name: agent.reply(name) for name in ("t1", "t3", "t4")}
    assert replies["t1"]["outcome"] == "online"
    done = sorted((one for one in replies.values() if one["success"]), key=lambda one: one["cpuNum"])
    assert [one["before"]["cpuNum"] for one in done[1:]] == [one["after"]["cpuNum"] for one in done[:-1]]
    assert done[-1]["cpuNum"] == 4


def test_a_dry_run_waits_for_nobody(agent: Agent) -> None:
    agent.kill(agent.accept("t1", "vm1", 2))
    agent.executor.run(agent.accept("t2", UUID, 3, dryRun=True))
    assert agent.reply("t2")["outcome"] == "planned"


def test_who_waits_for_a_task_that_runs_goes_on_once_it_has_ended_and_other_vms_have_the_thread(agent: Agent) -> None:
    go_on = agent.hold("setVcpusFlags")
    first = threading.Thread(target=agent.executor.run, args=[agent.accept("t1", "vm1", 2)])
    first.start()
    wait_for(lambda: agent.find("t1").goal, timeout_s=60, what="the goal")
    for n in range(3, 6):
        agent.lanes.put(agent.accept(f"t{n}", SPELLINGS[n % 3], n))
    agent.wait_parked("t3", "t4", "t5")
    agent.lanes.put(agent.accept("t9", "another VM", 2))
    assert agent.reply("t9")["errorCode"] == "VM_NOT_FOUND"
    go_on.set()
    first.join()
    assert {agent.reply(f"t{n}")["outcome"] for n in range(3, 6)} <= {"online", "refused"}
    assert agent.domain.live.find("vcpu").get("current") == "5"


def test_one_that_waits_can_be_taken_back_and_its_lane_goes_on(agent: Agent) -> None:
    left = agent.kill(agent.accept("t1", "vm1", 2))
    waits, next_one = agent.accept("t2", UUID, 3), agent.accept("t3", UUID, 4)
    agent.lanes.put(waits)
    agent.lanes.put(next_one)
    agent.wait_parked("t2")
    agent.journal.cancel("t2", b"{}", "refused", then=lambda owed: agent.lanes.withdraw(waits))
    agent.wait_parked("t3")
    agent.lanes.put(left)
    assert agent.reply("t3")["before"]["cpuNum"] == 2


def test_one_whose_goal_can_never_be_pursued_holds_nobody_up(agent: Agent) -> None:
    """Its plugin is gone: it ends without ever having had its VM."""
    left = agent.kill(agent.accept("t1", "vm1", 2))
    agent.lanes.put(agent.accept("t2", UUID, 3))
    agent.wait_parked("t2")
    agent.lanes.put(msgspec.structs.replace(left, command="Gone"))
    assert agent.reply("t1")["errorCode"] == "TASK_UNREADABLE"
    assert agent.reply("t2")["outcome"] == "online"


def task(name: str) -> Task:
    return Task(task_uuid=name, command="C", lane=name, request=b"", callback_url="", client="")


def test_turns_are_taken_once_and_whoever_waits_is_woken_by_what_it_waits_for() -> None:
    woken: list[str] = []
    turns = VmTurns(lambda task: woken.append(task.task_uuid))
    turns.take("vm", task("a"))
    turns.take("vm", task("a"))
    for name in ("b", "c"):
        with pytest.raises(NotYet):
            turns.take("vm", task(name))
    turns.wait_for("a", task("d"))
    turns.leave("b", ended=False)
    assert woken == []
    turns.leave("a", ended=False)
    assert woken == ["b", "c"]
    turns.take("vm", task("c"))
    turns.leave("a", ended=True)
    assert woken == ["b", "c", "d"]


@pytest.mark.parametrize("first", ["woken", "rests"])
def test_a_task_that_is_woken_before_it_rests_runs_again(first: str) -> None:
    runs: list[int] = []
    put_twice = threading.Event()

    def run(one: Task) -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            put_twice.wait()
            if first == "woken":
                lanes.wake(one)
            raise NotYet

    lanes = Lanes(run, workers=1, max_queued=9, max_queued_per_lane=9, max_queued_per_client=9)
    lanes.put(task("a"))
    lanes.put(task("a"))  # it is there already, for the first run does not end before
    put_twice.set()
    if first == "rests":
        wait_for(lambda: runs and not lanes.running() and lanes.depth(), timeout_s=60, what="it to rest")
        assert lanes.stalled_s() == 0.0
        lanes.wake(task("a"))
    wait_for(lambda: len(runs) == 2 and not lanes.depth(), timeout_s=60, what="it to run again")
    lanes.wake(task("a"))
    assert lanes.stop(60)
    assert runs == [0, 1]


def test_a_task_that_is_withdrawn_before_it_rests_leaves_its_place() -> None:
    withdrawn = threading.Event()

    def run(one: Task) -> None:
        if one.task_uuid == "a":
            withdrawn.wait()
            raise NotYet
        ran.set()

    ran = threading.Event()
    lanes = Lanes(run, workers=1, max_queued=9, max_queued_per_lane=2, max_queued_per_client=9)
    lanes.put(task("a"))
    wait_for(lanes.running, timeout_s=60, what="it to run")
    lanes.put(msgspec.structs.replace(task("b"), lane="a"))
    lanes.withdraw(task("a"))
    withdrawn.set()
    assert ran.wait(240)
    assert lanes.stop(60)
    assert lanes.depth() == 0


def test_a_task_that_waits_keeps_its_place() -> None:
    rested = threading.Event()

    def run(_one: Task) -> None:
        rested.set()
        raise NotYet

    lanes = Lanes(run, workers=1, max_queued=9, max_queued_per_lane=1, max_queued_per_client=9)
    lanes.put(task("a"))
    wait_for(lambda: rested.is_set() and not lanes.running(), timeout_s=60, what="it to rest")
    with pytest.raises(AgentError) as refused, lanes.hold_place(task("a")):
        pass
    assert refused.value.code is Code.QUEUE_FULL
    lanes.withdraw(task("a"))
    assert lanes.depth() == 0
    with lanes.hold_place(task("a")):
        pass
    assert lanes.stop(60)
