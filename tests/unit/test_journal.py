"""The journal: nothing accepted is lost, whatever becomes of its file."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.vmname import VmId
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journal import TRANSITIONS, Change, Journal, Left, State, Task
from kvmagent.tasks.journalfile import MIGRATIONS, check_file
from tests.lab.processes import wait_for

OLD_FILE = Path(__file__).with_name("data") / "journal-v0.sql"


def make_task(task_uuid: str, lane: str = "vm1", request: bytes = b"{}") -> Task:
    url = "http://127.0.0.1:9/callback"
    return Task(task_uuid=task_uuid, command="C", lane=lane, request=request, callback_url=url, client="127.0.0.1")


class Running:
    """A journal with what it told; its clock `now` and its agent's own time are set by hand."""

    def __init__(self, path: Path, *, max_bytes: int | None = None, fault: Fault = no_fault) -> None:
        self.accepted: list[str] = []
        self.left: list[Left] = []
        self.now, self.own = 1000.0, 50.0
        self.journal = Journal(
            path,
            on_accepted=lambda task: self.accepted.append(task.task_uuid),
            on_left=self.left.append,
            max_bytes=max_bytes,
            clock=lambda: self.now,
            elapsed=lambda: self.own,
            fault=fault,
        )
        self.journal.start()

    def finish(self, task_uuid: str, *, record_delivery: bool = True) -> None:
        self.journal.accept(make_task(task_uuid))
        self.journal.start_task(task_uuid)
        self.journal.finish(task_uuid, b"{}", "plugged")
        if record_delivery:
            self.journal.record_delivery(task_uuid, "delivered", None)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.own += seconds

    def flush(self) -> None:
        """Wait for what was handed in without waiting."""
        with pytest.raises(AgentError):
            self.journal.owe_again("nobody")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def running(path: Path) -> Iterator[Running]:
    started = Running(path)
    yield started
    started.journal.stop()


class TestAcceptance:
    def test_what_was_accepted_is_on_disk_before_it_is_said(self, running: Running, path: Path) -> None:
        running.journal.accept(make_task("t1"))
        with sqlite3.connect(path) as other:
            assert other.execute("SELECT task_uuid, state FROM tasks").fetchall() == [("t1", "accepted")]
        other.close()

    def test_lanes_are_told_in_the_order_of_acceptance(self, running: Running) -> None:
        with ThreadPoolExecutor(16) as clients:
            stored = list(clients.map(lambda n: running.journal.accept(make_task(f"t{n}"))[0], range(200)))
        by_seq = [task.task_uuid for task in sorted(stored, key=lambda task: task.seq)]
        assert running.accepted == by_seq
        assert [task.task_uuid for task in running.journal.unfinished()] == by_seq

    def test_the_same_task_is_stored_once_however_many_send_it(self, running: Running) -> None:
        with ThreadPoolExecutor(16) as clients:
            stored = list(clients.map(lambda _: running.journal.accept(make_task("t1")), range(50)))
        assert sum(is_new for _, is_new in stored) == 1
        assert [task.task_uuid for task in running.journal.unfinished()] == ["t1"]

    def test_the_same_id_with_another_request_is_a_conflict(self, running: Running) -> None:
        running.journal.accept(make_task("t1"))
        with pytest.raises(AgentError) as caught:
            running.journal.accept(make_task("t1", request=b'{"other": 1}'))
        assert caught.value.code is Code.TASK_CONFLICT

    def test_a_fault_of_who_is_told_does_not_end_the_writer(self, path: Path) -> None:
        def fail(task: Task) -> None:
            raise RuntimeError("a bug")

        journal = Journal(path, on_accepted=fail)
        journal.start()
        assert journal.accept(make_task("t1"))[1]
        assert journal.accept(make_task("t2"))[1]
        journal.stop()


class TestTransitions:
    def test_every_state_has_its_successors(self) -> None:
        assert set(TRANSITIONS) == set(get_args(State))

    def test_a_settled_task_does_not_run_again(self, running: Running) -> None:
        running.finish("t1")
        running.journal.start_task("t1")
        running.flush()
        task = running.journal.find("t1")
        assert task is not None
        assert task.state == "delivered"

    def test_a_goal_comes_to_disk_with_the_first_step(self, running: Running) -> None:
        running.journal.accept(make_task("t1"))
        running.journal.record_goal("t1", b'{"goal": 1}', b"null", b'{"step": "S"}')
        (task,) = running.journal.unfinished()
        assert (task.state, task.goal, task.recovered) == ("running", b'{"goal": 1}', True)
        (step,) = running.journal.steps("t1")
        assert (step.step, step.elapsed_ms) == (b'{"step": "S"}', None)

    def test_a_callback_that_is_asked_for_again_is_owed_from_then_on(self, running: Running) -> None:
        running.finish("t1")
        running.pass_time(4000.0)
        assert running.journal.owe_again("t1").own_at == 4000.0
        (owed,) = running.journal.owed()
        task = running.journal.find("t1")
        assert task is not None
        assert (owed.task_uuid, owed.own_at, task.finished_at) == ("t1", 4000.0, 1000.0)


class TestPruning:
    def test_the_oldest_above_the_number_are_forgotten_with_their_steps(self, running: Running) -> None:
        for n in range(450):
            running.finish(f"t{n}")
        running.journal.start_step("t0", 0, b"{}", wait=True)
        running.journal.prune(keep_tasks=10, keep_s=1e9, keep_changes_s=1e9)
        wait_for(lambda: len(running.journal.newest(limit=1000)) == 10, timeout_s=5, what="the pruning")
        assert [task.task_uuid for task in running.journal.newest(limit=1000)] == [f"t{n}" for n in range(449, 439, -1)]
        assert running.journal.steps("t0") == []

    def test_what_is_older_than_the_age_is_forgotten(self, running: Running) -> None:
        running.finish("old")
        running.pass_time(1000)
        running.finish("new")
        running.journal.prune(keep_tasks=100, keep_s=500, keep_changes_s=1e9)
        wait_for(lambda: running.journal.find("old") is None, timeout_s=5, what="the pruning")
        assert running.journal.find("new") is not None

    def test_what_is_unfinished_or_owed_stays_however_old(self, running: Running) -> None:
        running.journal.accept(make_task("accepted"))
        running.finish("owed", record_delivery=False)
        running.finish("settled")
        running.now += 1e6
        running.journal.prune(keep_tasks=0, keep_s=0, keep_changes_s=1e9)
        wait_for(lambda: running.journal.find("settled") is None, timeout_s=5, what="the pruning")
        assert [task.task_uuid for task in running.journal.newest(limit=9)] == ["owed", "accepted"]

    def test_where_nothing_is_written_nobody_goes_through_all_entries_again_and_again(self, path: Path) -> None:
        looks: list[str] = []
        running = Running(path, fault=lambda point: looks.append(point) if point == "journal.prune:written" else None)

        def look_for(seconds: int, *, keep_tasks: int = 9) -> int:
            """How often the entries are looked at, by an agent that would look each second."""
            before = len(looks)
            for _ in range(seconds):
                running.pass_time(1)
                running.journal.prune(keep_tasks=keep_tasks, keep_s=5000, keep_changes_s=1e9)
            running.flush()
            return len(looks) - before

        running.finish("t1")
        assert 1 <= look_for(100) <= 2
        assert look_for(300) <= 1, "the one that the flush before is owed"
        running.finish("t2")
        assert look_for(20) >= 1
        assert look_for(20, keep_tasks=1) >= 1, "other limits"
        assert running.journal.find("t1") is None
        for _ in range(10):
            look_for(600)
        assert running.journal.find("t2") is None, "it came of age meanwhile"
        running.journal.stop()


class TestClocks:
    """The clock may be set by whoever likes; the agent's own time goes on with it."""

    def test_a_step_of_the_clock_forgets_nothing(self, running: Running) -> None:
        running.finish("t1")
        running.now += 10 * 86400
        running.journal.prune(keep_tasks=100, keep_s=86400, keep_changes_s=1e9)
        running.flush()
        assert running.journal.find("t1") is not None
        running.own += 86401
        running.journal.prune(keep_tasks=100, keep_s=86400, keep_changes_s=1e9)
        wait_for(lambda: running.journal.find("t1") is None, timeout_s=5, what="the pruning")

    def test_a_clock_that_was_slow_until_it_was_corrected_forgets_nothing(self, running: Running) -> None:
        running.now -= 10 * 86400
        running.finish("t1")
        running.now += 10 * 86400
        running.journal.prune(keep_tasks=100, keep_s=86400, keep_changes_s=1e9)
        running.flush()
        assert running.journal.find("t1") is not None

    def test_what_is_younger_than_the_age_by_the_clock_stays(self, running: Running) -> None:
        running.finish("t1")
        running.own += 86401
        running.journal.prune(keep_tasks=100, keep_s=86400, keep_changes_s=1e9)
        running.flush()
        assert running.journal.find("t1") is not None

    def test_the_agent_s_own_time_goes_on_after_a_restart(self, path: Path) -> None:
        first = Running(path)
        first.finish("t1")
        first.own += 3600
        first.finish("t2", record_delivery=False)
        first.journal.stop()
        second = Running(path)
        (owed,) = second.journal.owed()
        assert (owed.task_uuid, owed.own_at) == ("t2", 3600.0)
        assert second.journal.own_time() == 3600.0
        second.own += 1
        assert second.journal.own_time() == 3601.0
        second.journal.stop()


class TestRoom:
    """The file has a size; what is asked and answered is of any."""

    MAX_BYTES = 2**20

    def test_the_oldest_settled_make_room_for_new_ones(self, path: Path) -> None:
        running = Running(path, max_bytes=self.MAX_BYTES)
        for n in range(40):
            running.journal.accept(make_task(f"t{n}", request=b"x" * 100_000))
            running.journal.finish(f"t{n}", b"{}", "plugged")
            running.journal.record_delivery(f"t{n}", "delivered", None)
        assert path.stat().st_size < self.MAX_BYTES + 30 * 100_000
        assert running.journal.find("t0") is None
        assert running.journal.find("t39") is not None
        running.journal.stop()

    def test_histories_make_room_too_and_refuse_no_task(self, path: Path) -> None:
        running = Running(path, max_bytes=self.MAX_BYTES)
        made = Change("u" * 36, "n" * 20_000, {"cpuNum": 2}, {"cpuNumAfter": 2}, None)
        for n in range(100):
            assert running.journal.accept(make_task(f"t{n}"))[1]
            running.journal.finish(f"t{n}", b"{}", "plugged", made)
            running.journal.record_delivery(f"t{n}", "delivered", None)
        told = running.journal.changes(VmId("u" * 36, ""), limit=1000)
        assert 0 < len(told) < 100
        assert told[0].task_uuid == "t99", "the oldest are forgotten"
        running.journal.stop()

    def test_histories_go_by_their_own_age(self, running: Running) -> None:
        running.journal.accept(make_task("t1"))
        running.journal.finish("t1", b"{}", "plugged", Change("u1", "db-7", {}, {}, None))
        running.journal.record_delivery("t1", "delivered", None)
        for passed, left in ((90.0, 1), (20.0, 0)):
            running.pass_time(passed)
            running.journal.prune(keep_tasks=0, keep_s=0, keep_changes_s=100.0)
            running.flush()
            assert len(running.journal.changes(VmId("", "db-7"), limit=9)) == left
        assert running.journal.find("t1") is None

    def test_what_is_unfinished_or_owed_makes_none_and_new_ones_are_refused(self, path: Path) -> None:
        running = Running(path, max_bytes=self.MAX_BYTES)
        _, refused = send_until_refused(running.journal, size=100_000)
        assert refused.code is Code.QUEUE_FULL
        assert "the limit is 1 MiB" in refused.message
        kept = [task.task_uuid for task in running.journal.unfinished()]
        assert kept == running.accepted == [f"fill{n}" for n in range(len(kept))]
        assert not running.journal.accept(make_task("fill0", request=b"x" * 100_000))[1]
        running.journal.finish("fill0", b"{}", "plugged")
        running.journal.record_delivery("fill0", "delivered", None)
        running.flush()
        assert running.journal.accept(make_task("after"))[1]
        assert running.journal.find("fill0") is None
        running.journal.stop()

    def test_a_list_of_large_tasks_is_small(self, running: Running) -> None:
        reply = msgspec.json.encode({"error": "no", "errorCode": "X", "remedy": {"a": 1}, "steps": ["y" * 100_000]})
        for n in range(20):
            running.journal.accept(make_task(f"t{n}", request=b"x" * 1_000_000))
            running.journal.record_goal(f"t{n}", b"g" * 100_000, b"b" * 100_000, b"{}")
        running.journal.finish("t0", reply, "refused")
        tracemalloc.start()
        listed = running.journal.newest(limit=1000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000
        assert [task.task_uuid for task in listed] == [f"t{n}" for n in range(19, -1, -1)]
        assert msgspec.json.decode(listed[-1].reply or b"") == {"error": "no", "errorCode": "X", "remedy": {"a": 1}}
        assert listed[0].reply is None


class Breaking:
    """A disk that fails from the first commit with one of these changes on, until it is mended."""

    def __init__(self, *changes: str) -> None:
        self._points = {f"journal.{change}:written" for change in changes}
        self._broken = False

    def __call__(self, point: str) -> None:
        self._broken = self._broken or point in self._points
        if self._broken and point.endswith(":written"):
            raise OSError("the disk is broken")

    def mend(self) -> None:
        self._points = set()
        self._broken = False


class TestAfterAnError:
    """A commit that failed may be on disk all the same: here another connection puts there what it did."""

    def test_a_task_that_is_there_although_it_was_refused_is_told(self, path: Path) -> None:
        disk = Breaking("accept")
        running = Running(path, fault=disk)
        with pytest.raises(AgentError):
            running.journal.accept(make_task("t1"))
        write(path, "INSERT INTO tasks (task_uuid, command, lane, request, callback_url, client, state, accepted_at)"
              " VALUES ('t1', 'C', 'vm1', '{}', 'http://127.0.0.1:9/', '127.0.0.1', 'accepted', 1)")  # fmt: skip
        disk.mend()
        wait_for(lambda: running.left, timeout_s=10, what="the journal to go on")
        (left,) = running.left
        assert [(task.task_uuid, task.recovered) for task in left.unfinished] == [("t1", True)]
        running.journal.stop()

    def test_callbacks_that_are_owed_there_are_told(self, path: Path) -> None:
        disk = Breaking("owe_again")
        running = Running(path, fault=disk)
        running.finish("t1")
        running.journal.accept(make_task("t2"))
        with pytest.raises(AgentError):
            running.journal.owe_again("t1")
        write(path, "UPDATE tasks SET state = 'finished'")
        disk.mend()
        wait_for(lambda: running.left, timeout_s=10, what="the journal to go on")
        assert [owed.task_uuid for owed in running.left[0].owed] == ["t1", "t2"]
        running.journal.stop()

    def test_a_late_result_that_came_to_disk_by_a_commit_that_failed_is_told_as_stored(self, path: Path) -> None:
        disk = Breaking("finish_late")
        running = Running(path, fault=disk)
        running.finish("t1")
        running.flush()
        with ThreadPoolExecutor(1) as other:
            late = other.submit(running.journal.finish_late, "t1", b'{"late":true}', "online", owed=True)
            wait_for(running.journal.check, timeout_s=5, what="the disk to fail")
            write(path, "UPDATE tasks SET state = 'finished', reply = CAST('{\"late\":true}' AS BLOB)")
            disk.mend()
            owed = late.result(10)
        assert owed is not None
        assert owed.task_uuid == "t1"
        running.journal.stop()

    def test_a_settlement_that_came_to_disk_by_a_commit_that_failed_is_no_error(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        disk = Breaking("settle")
        running = Running(path, fault=disk)
        running.finish("t1")
        wait_for(running.journal.check, timeout_s=5, what="the disk to fail")
        write(path, "UPDATE tasks SET state = 'delivered'")
        disk.mend()
        wait_for(lambda: running.left, timeout_s=10, what="the journal to go on")
        assert "journal write refused" not in caplog.text
        running.journal.stop()


class TestLog:
    """The log (-wal) has what was committed last; it may be taken away under the agent too."""

    @pytest.mark.parametrize("loss", ["removed", "replaced", "removed with -shm"])
    def test_what_it_had_is_not_lost_and_the_journal_goes_on(self, path: Path, loss: str) -> None:
        running = Running(path)
        log = path.with_name("journal.sqlite-wal")
        running.journal.accept(make_task("t1"))
        assert log.stat().st_size > 0
        if loss == "replaced":
            log.rename(path.with_name("gone"))
            log.write_bytes(path.with_name("gone").read_bytes()[:-1000])
        else:
            log.unlink()
        if loss.endswith("-shm"):
            path.with_name("journal.sqlite-shm").unlink()
        running.journal.accept(make_task("t2"))
        assert read_copy(path) == ["t1", "t2"]
        running.journal.accept(make_task("t3"))
        assert read_copy(path) == ["t1", "t2", "t3"]
        assert [task.task_uuid for task in running.journal.unfinished()] == ["t1", "t2", "t3"]
        running.journal.stop()

    def test_it_is_mended_without_a_new_task(self, path: Path) -> None:
        running = Running(path)
        running.journal.accept(make_task("t1"))
        path.with_name("journal.sqlite-wal").unlink()
        running.journal.look()
        wait_for(path.with_name("journal.sqlite-wal").exists, timeout_s=5, what="a new log")
        assert read_copy(path) == ["t1"]
        running.journal.stop()

    def test_it_does_not_stay_large(self, path: Path) -> None:
        running = Running(path)
        running.journal.accept(make_task("t1", request=b"x" * 40_000_000))
        log = path.with_name("journal.sqlite-wal")
        assert log.stat().st_size > 40_000_000
        for n in range(20):
            running.journal.accept(make_task(f"small{n}"))
        assert log.stat().st_size < 20_000_000
        running.journal.stop()

    @pytest.mark.parametrize("left", [0, 5000])
    def test_nothing_is_accepted_onto_one_that_was_truncated(self, path: Path, left: int) -> None:
        running = Running(path)
        running.journal.accept(make_task("t1"))
        os.truncate(path.with_name("journal.sqlite-wal"), left)
        running.journal.look()
        wait_for(running.journal.check, timeout_s=10, what="what is wrong with it")
        for _ in range(3):
            with pytest.raises(AgentError, match=r"truncated|I/O") as caught:
                running.journal.accept(make_task("t2"))
            assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        assert "Restart the agent" in caught.value.remedy
        running.journal.stop()
        # What the remedy says: the agent restarted, and all sent again with their taskuuids.
        again = Running(path)
        for task_uuid in ("t1", "t2"):
            assert again.journal.accept(make_task(task_uuid))[0].state == "accepted"
        assert again.journal.check() is None
        assert [task.task_uuid for task in again.journal.unfinished()] == ["t1", "t2"]
        again.journal.stop()

    def test_one_that_is_truncated_while_a_commit_is_under_way_takes_nothing(self, path: Path) -> None:
        running = Running(path, fault=lambda point: cut() if point == "journal.accept:written" else None)

        def cut() -> None:
            if running.accepted:
                os.truncate(path.with_name("journal.sqlite-wal"), 0)

        running.journal.accept(make_task("t1"))
        for _ in range(2):
            with pytest.raises(AgentError, match="truncated") as caught:
                running.journal.accept(make_task("t2"))
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        assert running.accepted == ["t1"]
        running.journal.stop()

    def test_a_checkpoint_of_another_process_truncates_it_and_nothing_is_lost(self, path: Path) -> None:
        running = Running(path)
        running.journal.accept(make_task("t1"))
        write(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.with_name("journal.sqlite-wal").stat().st_size == 0
        running.journal.look()
        running.journal.accept(make_task("t2"))
        assert running.journal.check() is None
        assert read_copy(path) == ["t1", "t2"]
        running.journal.stop()

    @pytest.mark.parametrize("thing", ["nothing", "a file", "a link to itself"])
    def test_its_directory_may_be_away_for_a_while(self, path: Path, thing: str) -> None:
        state, aside = path.parent / "state", path.parent / "aside"
        state.mkdir()
        running = Running(state / "journal.sqlite")
        running.journal.accept(make_task("t1"))
        state.rename(aside)
        if thing == "a file":
            state.write_text("")
        elif thing == "a link to itself":
            state.symlink_to(state.name)
        with ThreadPoolExecutor(1) as other:
            finished = other.submit(running.journal.finish, "t1", b"{}", "plugged")
            wait_for(running.journal.check, timeout_s=10, what="the failure")
            running.journal.look()
            with pytest.raises(AgentError) as caught:
                running.journal.accept(make_task("t2"))
            assert caught.value.code is Code.JOURNAL_UNAVAILABLE
            if thing != "nothing":
                state.unlink()
            aside.rename(state)
            assert finished.result(30).task_uuid == "t1"
        running.journal.accept(make_task("t2"))
        assert [task.task_uuid for task in running.journal.unfinished()] == ["t2"]
        running.journal.stop()


class TestLock:
    def test_a_second_one_is_refused_and_told_who_has_it(self, path: Path) -> None:
        first, second = (Journal(path, on_accepted=lambda task: None) for _ in range(2))
        first.lock()
        with pytest.raises(AgentError, match=f"is in use by process {os.getpid()}") as caught:
            second.lock()
        assert caught.value.code is Code.STATE_DIR_IN_USE
        first.start()
        first.stop()
        with pytest.raises(AgentError):
            second.lock()
        first.unlock()
        second.lock()
        second.unlock()


class TestFile:
    def test_only_its_owner_may_read_it(self, running: Running, path: Path) -> None:
        running.journal.accept(make_task("t1"))
        for file in path.parent.glob("journal.sqlite*"):
            assert file.stat().st_mode & 0o777 == 0o600, file

    def test_a_file_of_the_first_schema_is_brought_to_the_present_one(self, path: Path) -> None:
        write_old_file(path)
        started = Running(path)
        journal = started.journal
        assert [(task.task_uuid, task.state) for task in journal.unfinished()] == [
            ("accepted", "accepted"),
            ("running", "running"),
        ]
        (owed,) = journal.owed()
        finished = journal.find("finished")
        assert finished is not None
        assert (owed.task_uuid, owed.own_at) == ("finished", 0.0)
        first, second = journal.steps("running")
        assert first.problem == '{"code":"GUEST_CPU_OFFLINE","message":"","remedy":""}'
        assert (second.problem, second.elapsed_ms) == (None, None)
        journal.owe_again("delivered")
        journal.stop()
        with sqlite3.connect(path) as other:
            assert other.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        other.close()

    def test_an_old_file_and_a_new_one_have_the_same_schema(self, tmp_path: Path) -> None:
        write_old_file(tmp_path / "old.sqlite")
        schemas = []
        for name in ("old.sqlite", "new.sqlite"):
            Running(tmp_path / name).journal.stop()
            with sqlite3.connect(tmp_path / name) as other:
                rows = other.execute("SELECT type, name FROM sqlite_schema ORDER BY name").fetchall()
                schemas.append((rows, other.execute("PRAGMA table_info(tasks)").fetchall()))
            other.close()
        assert schemas[0] == schemas[1]

    def test_a_file_of_a_newer_agent_stops_the_start(self, path: Path) -> None:
        with sqlite3.connect(path) as other:
            other.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        other.close()
        with pytest.raises(AgentError, match=rf"version {len(MIGRATIONS) + 1}, this agent knows") as caught:
            Running(path)
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE

    @pytest.mark.parametrize("damage", ["no database", "overwritten page"])
    def test_a_damaged_file_stops_the_start_and_says_what_to_do(self, path: Path, damage: str) -> None:
        if damage == "no database":
            path.write_bytes(b"not a database" * 500)
        else:
            started = Running(path)
            for n in range(50):
                started.finish(f"t{n}")
            started.journal.stop()
            with path.open("r+b") as file:
                file.seek(2 * 4096)
                file.write(os.urandom(4096))
        with pytest.raises(AgentError) as caught:
            Running(path)
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        assert "move the file away" in caught.value.remedy

    def test_an_index_that_does_not_fit_its_table_stops_the_start_and_is_told_by_a_check(self, path: Path) -> None:
        started = Running(path)
        for n in range(5):
            started.finish(f"task-{n}")
        started.journal.stop()
        assert check_file(path) == []
        content = path.read_bytes()
        # The id is in its row and in the index of ids: in the index, which comes first, it becomes another.
        path.write_bytes(content.replace(b"task-3", b"task-X", 1))
        assert any("index" in fault for fault in check_file(path)), check_file(path)
        with pytest.raises(AgentError, match="damaged: ") as caught:
            Running(path)
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE

    @pytest.mark.parametrize("loss", ["removed", "replaced", "truncated"])
    def test_a_file_that_is_taken_away_under_the_agent_refuses_new_tasks(
        self, running: Running, path: Path, loss: str
    ) -> None:
        running.journal.accept(make_task("t1"))
        if loss == "truncated":
            os.truncate(path, 0)
        else:
            path.rename(path.with_name("gone"))
            if loss == "replaced":
                path.write_bytes(b"")
        with pytest.raises(AgentError) as caught:
            running.journal.accept(make_task("t2"))
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        assert running.accepted == ["t1"]
        assert running.journal.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a directory", "a pipe", "a link to a device", "a link to a directory"])
def test_what_is_no_file_is_refused_and_left_as_it_is(path: Path, what: str) -> None:
    match what:
        case "a directory":
            path.mkdir(mode=0o755)
        case "a pipe":
            os.mkfifo(path, 0o644)
        case "a link to a device":
            path.symlink_to("/dev/null")
        case _:
            path.symlink_to(path.parent)
    before = path.stat().st_mode
    journal = Journal(path, on_accepted=lambda _task: None)
    for begin in (journal.lock, journal.start):
        with pytest.raises(AgentError, match="is not a file") as caught:
            begin()
        assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        assert "Move it away" in caught.value.remedy
    assert path.stat().st_mode == before


def test_what_is_read_after_the_stop_leaves_no_file_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", on_accepted=lambda _task: None)
    journal.start()
    journal.stop()
    before = os.listdir("/proc/self/fd")
    assert journal.find("t1") is None
    assert os.listdir("/proc/self/fd") == before


def test_an_index_that_somebody_truncates_ends_the_agent_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite maps it, and the kernel ends who reads behind the end of a mapped file; a start makes it anew."""
    code = """
import os, sys
from pathlib import Path
from kvmagent.tasks.journal import Journal
from tests.unit.test_journal import make_task
journal = Journal(Path(sys.argv[1]), on_accepted=lambda task: None)
journal.start()
for n in range(3):
    assert journal.accept(make_task(f"t{n}"))[1]
os.truncate(f"{sys.argv[1]}-shm", 0)
journal.accept(make_task("t3"))
"""
    path, root = tmp_path / "journal.sqlite", Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGBUS, done.stderr.decode()
    started = Running(path)
    assert [task.task_uuid for task in started.journal.unfinished()][:3] == ["t0", "t1", "t2"]
    assert started.journal.accept(make_task("after"))[1]
    started.journal.stop()


class TestFullDisk:
    """These mount a small file system and so run as root, as the agent does."""

    def test_new_tasks_are_refused_at_once_and_taken_again_when_there_is_space(self, small_disk: Path) -> None:
        started = Running(small_disk / "journal.sqlite")
        fill(small_disk)
        accepted, refused = send_until_refused(started.journal)
        assert "full" in refused.message
        assert started.journal.check() == "database or disk is full"
        (small_disk / "ballast").unlink()
        wait_for(lambda: started.journal.check() is None, timeout_s=10, what="the journal to go on by itself")
        assert started.journal.accept(make_task("after"))[1]
        assert [task.task_uuid for task in started.journal.unfinished()] == [*accepted, "after"]
        assert started.accepted == [*accepted, "after"]
        started.journal.stop()

    def test_a_result_waits_for_space_and_is_not_lost(self, small_disk: Path) -> None:
        started = Running(small_disk / "journal.sqlite")
        started.journal.accept(make_task("t1"))
        fill(small_disk)
        send_until_refused(started.journal)
        finishing = threading.Thread(target=started.journal.finish, args=("t1", b"x" * 8192, "plugged"))
        finishing.start()
        finishing.join(0.5)
        assert finishing.is_alive()
        (small_disk / "ballast").unlink()
        finishing.join(10)
        assert not finishing.is_alive()
        assert [owed.task_uuid for owed in started.journal.owed()] == ["t1"]
        started.journal.stop()

    def test_a_stop_does_not_wait_for_space(self, small_disk: Path) -> None:
        started = Running(small_disk / "journal.sqlite")
        started.journal.accept(make_task("t1"))
        fill(small_disk)
        send_until_refused(started.journal)
        failures: list[AgentError] = []

        def finish() -> None:
            try:
                started.journal.finish("t1", b"x" * 8192, "plugged")
            except AgentError as error:
                failures.append(error)

        finishing = threading.Thread(target=finish)
        finishing.start()
        started.journal.stop()
        finishing.join(10)
        assert [error.code for error in failures] == [Code.JOURNAL_UNAVAILABLE]

    def test_a_file_system_that_turns_read_only_refuses_new_tasks(self, small_disk: Path) -> None:
        started = Running(small_disk / "journal.sqlite")
        mount = ["mount", "-o", "remount,ro", str(small_disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            # A file open for writing keeps the file system writable; the directory then is made so.
            subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
        try:
            with pytest.raises(AgentError) as caught:
                Running(small_disk / "journal.sqlite")
            assert caught.value.code is Code.JOURNAL_UNAVAILABLE
        finally:
            subprocess.run(["umount", str(small_disk)], check=True)
            started.journal.stop()


def write(path: Path, sql: str) -> None:
    """Change the file as nobody told the journal."""
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(sql)


def read_copy(path: Path) -> list[str]:
    """The tasks that would be found if the agent were killed now: in a copy of the file and its log."""
    directory = path.with_name("copy")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        if path.with_name(name).exists():
            shutil.copy(path.with_name(name), directory)
    with contextlib.closing(sqlite3.connect(directory / path.name)) as other:
        return [row[0] for row in other.execute("SELECT task_uuid FROM tasks ORDER BY seq")]


def write_old_file(path: Path) -> None:
    with sqlite3.connect(path) as old:
        old.executescript(OLD_FILE.read_text())
    old.close()


def fill(directory: Path) -> None:
    """Leave no space."""
    with (directory / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"\0" * 4096):
            pass


def send_until_refused(journal: Journal, *, size: int = 4096) -> tuple[list[str], AgentError]:
    """Accept tasks until the space inside the file is used up, too; what was accepted, and the refusal."""
    accepted: list[str] = []
    for n in range(1000):
        try:
            journal.accept(make_task(f"fill{n}", request=b"x" * size))
        except AgentError as error:
            return accepted, error
        accepted.append(f"fill{n}")
    raise AssertionError("never refused")
