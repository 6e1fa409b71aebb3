"""Lanes: one task of a VM at a time and in order, and no VM that hangs holds up another."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Task
from kvmagent.tasks.lanes import Lanes
from tests.lab.processes import wait_for


def make_task(lane: str, n: int = 0) -> Task:
    return Task(task_uuid=f"{lane}-{n}", command="C", lane=lane, request=b"", callback_url="", client="")


class Work:
    """What lanes run: records the order, and has tasks of lanes named hang... wait until they are let go."""

    def __init__(self, *, workers: int = 4, max_queued: int = 1000, max_queued_per_lane: int = 1000) -> None:
        self.now = 0.0
        self.done: list[str] = []
        self.let_go = threading.Event()
        self.at_once: dict[str, int] = defaultdict(int)
        self.lanes = Lanes(
            self._run,
            workers=workers,
            max_queued=max_queued,
            max_queued_per_lane=max_queued_per_lane,
            max_queued_per_client=max_queued,
            clock=lambda: self.now,
        )

    def _run(self, task: Task) -> None:
        self.at_once[task.lane] += 1
        assert self.at_once[task.lane] == 1
        if task.lane.startswith("hang"):
            self.let_go.wait(600)
        if task.lane.startswith("fail"):
            raise RuntimeError("a bug")
        self.done.append(task.task_uuid)
        self.at_once[task.lane] -= 1

    def wait_done(self, *task_uuids: str) -> None:
        wait_for(lambda: set(task_uuids) <= set(self.done), timeout_s=10, what=f"{task_uuids}")

    def close(self) -> None:
        self.let_go.set()
        assert self.lanes.stop(10)


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.close()


def test_tasks_of_one_vm_run_in_order_and_one_at_a_time(work: Work) -> None:
    expected = [f"{lane}-{n}" for n in range(50) for lane in ("a", "b", "c")]
    for n in range(50):
        for lane in ("a", "b", "c"):
            work.lanes.put(make_task(lane, n))
    work.wait_done(*expected)
    for lane in ("a", "b", "c"):
        assert [uuid for uuid in work.done if uuid.startswith(lane)] == [f"{lane}-{n}" for n in range(50)]


def test_a_task_that_fails_unexpectedly_ends_only_itself(work: Work) -> None:
    work.lanes.put(make_task("fail"))
    work.lanes.put(make_task("a"))
    work.wait_done("a-0")


def test_vms_that_hang_do_not_use_up_the_workers(work: Work) -> None:
    for n in range(4):
        work.lanes.put(make_task(f"hang{n}"))
    wait_for(lambda: len(work.lanes.running()) == 4, timeout_s=5, what="four hanging VMs")
    work.lanes.put(make_task("a"))
    work.lanes.relieve()
    assert "a" not in work.lanes.running()
    work.now = 60.0
    work.lanes.relieve()
    work.wait_done("a-0")
    wait_for(lambda: "a" not in work.lanes.running(), timeout_s=5, what="its end")
    hanging = {lane: seconds for lane, (_, seconds) in work.lanes.running().items()}
    assert hanging == {f"hang{n}": 60.0 for n in range(4)}


def test_threads_above_the_limit_end_when_what_hung_goes_on(work: Work) -> None:
    for n in range(4):
        work.lanes.put(make_task(f"hang{n}"))
    wait_for(lambda: len(work.lanes.running()) == 4, timeout_s=5, what="four hanging VMs")
    work.now = 60.0
    work.lanes.put(make_task("a"))
    work.wait_done("a-0")
    work.let_go.set()
    work.wait_done(*(f"hang{n}-0" for n in range(4)))
    lanes = [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
    wait_for(lambda: sum(thread.is_alive() for thread in lanes) <= 4, timeout_s=5, what="the surplus thread to end")


def test_limits_hold_for_each_vm_and_in_all() -> None:
    work = Work(workers=1, max_queued=5, max_queued_per_lane=3)
    for n in range(3):
        with work.lanes.hold_place(make_task("hang")):
            work.lanes.put(make_task("hang", n))
    with pytest.raises(AgentError, match="3 tasks of VM hang are unfinished, the limit is 3") as caught:
        work.lanes.hold_place(make_task("hang")).__enter__()
    assert caught.value.code is Code.QUEUE_FULL
    with ExitStack() as held:
        held.enter_context(work.lanes.hold_place(make_task("b")))
        held.enter_context(work.lanes.hold_place(make_task("c")))
        with pytest.raises(AgentError, match="5 tasks are unfinished, the limit is 5"):
            work.lanes.hold_place(make_task("d")).__enter__()
    with work.lanes.hold_place(make_task("d")):
        pass
    work.close()


def test_what_waits_at_stop_is_left_to_the_journal(work: Work) -> None:
    for n in range(3):
        work.lanes.put(make_task("hang", n))
    wait_for(lambda: "hang" in work.lanes.running(), timeout_s=5, what="the first task")
    assert not work.lanes.stop(0.05)
    with pytest.raises(AgentError) as caught:
        work.lanes.check_room()
    assert caught.value.code is Code.STOPPING
    work.let_go.set()
    work.wait_done("hang-0")
    assert work.lanes.stop(5)
    assert work.done == ["hang-0"]


def test_a_stall_is_a_ready_lane_that_nobody_takes(work: Work) -> None:
    for n in range(5):
        work.lanes.put(make_task(f"hang{n}"))
    wait_for(lambda: len(work.lanes.running()) == 4, timeout_s=5, what="four hanging VMs")
    assert work.lanes.stalled_s() == 0.0  # all are at work
    work.now = 60.0
    assert work.lanes.stalled_s() == 60.0  # now one more could be
    work.lanes.relieve()
    wait_for(lambda: work.lanes.stalled_s() == 0.0, timeout_s=5, what="the fifth to be taken")


def test_a_task_that_is_withdrawn_leaves_its_place_and_is_not_run(work: Work) -> None:
    for n in range(3):
        work.lanes.put(make_task("hang", n))
    wait_for(lambda: "hang" in work.lanes.running(), timeout_s=10, what="the first task")
    work.lanes.withdraw(make_task("hang", 1))
    work.lanes.withdraw(make_task("hang", 1))
    assert work.lanes.depth() == 1
    work.let_go.set()
    work.wait_done("hang-0", "hang-2")
    assert "hang-1" not in work.done
    work.lanes.put(make_task("hang", 3))
    work.wait_done("hang-3")


def test_a_lane_that_is_left_empty_is_no_lane() -> None:
    work = Work(workers=1)
    work.lanes.put(make_task("hang"))
    wait_for(lambda: "hang" in work.lanes.running(), timeout_s=10, what="the only worker")
    work.lanes.put(make_task("b"))
    work.lanes.withdraw(make_task("b"))
    assert work.lanes.stalled_s() == 0.0
    work.let_go.set()
    work.lanes.put(make_task("b", 1))
    work.wait_done("hang-0", "b-1")
    assert "b-0" not in work.done
    work.close()


def test_a_task_that_waits_or_runs_is_not_queued_twice(work: Work) -> None:
    for _ in range(2):
        for n in range(2):
            work.lanes.put(make_task("hang", n))
        wait_for(work.lanes.running, timeout_s=5, what="the first to run")
    assert work.lanes.queued() == {"hang": 1}
    work.let_go.set()
    work.wait_done("hang-1")
    work.lanes.put(make_task("hang", 0))
    wait_for(lambda: work.done.count("hang-0") == 2, timeout_s=5, what="it to run again once it has ended")
