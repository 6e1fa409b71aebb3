"""The journal: nothing accepted is lost, whatever becomes of its file."""

import contextlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import TRANSITIONS, Journal, State, Task
from kvmagent.tasks.journalfile import MIGRATIONS
from tests.lab.processes import wait_for

OLD_FILE = Path(__file__).with_name("data") / "journal-v0.sql"


def make_task(task_uuid: str, lane: str = "vm1", request: bytes = b"{}") -> Task:
    url = "http://127.0.0.1:9/callback"
    return Task(task_uuid=task_uuid, command="C", lane=lane, request=request, callback_url=url, client="127.0.0.1")


class Running:
    """A journal with what it told, and a clock that is set by hand."""

    def __init__(self, path: Path) -> None:
        self.accepted: list[str] = []
        self.now = 1000.0
        self.journal = Journal(
            path, on_accepted=lambda task: self.accepted.append(task.task_uuid), clock=lambda: self.now
        )
        self.journal.start()

    def finish(self, task_uuid: str, *, settle: bool = True) -> None:
        self.journal.accept(make_task(task_uuid))
        self.journal.start_task(task_uuid)
        self.journal.finish(task_uuid, b"{}", "plugged")
        if settle:
            self.journal.settle(task_uuid, "delivered", None)

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
        assert running.accepted == ["t1"]

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
        running.now = 5000.0
        assert running.journal.owe_again("t1").owed_at == 5000.0
        (owed,) = running.journal.owed()
        task = running.journal.find("t1")
        assert task is not None
        assert (owed.task_uuid, owed.owed_at, task.finished_at) == ("t1", 5000.0, 1000.0)


class TestPruning:
    def test_the_oldest_above_the_number_are_forgotten_with_their_steps(self, running: Running) -> None:
        for n in range(450):
            running.finish(f"t{n}")
        running.journal.start_step("t0", 0, b"{}", wait=True)
        running.journal.prune(keep_tasks=10, keep_s=1e9)
        wait_for(lambda: len(running.journal.newest(limit=1000)) == 10, timeout_s=5, what="the pruning")
        assert [task.task_uuid for task in running.journal.newest(limit=1000)] == [f"t{n}" for n in range(449, 439, -1)]
        assert running.journal.steps("t0") == []

    def test_what_is_older_than_the_age_is_forgotten(self, running: Running) -> None:
        running.finish("old")
        running.now += 1000
        running.finish("new")
        running.journal.prune(keep_tasks=100, keep_s=500)
        wait_for(lambda: running.journal.find("old") is None, timeout_s=5, what="the pruning")
        assert running.journal.find("new") is not None

    def test_what_is_unfinished_or_owed_stays_however_old(self, running: Running) -> None:
        running.journal.accept(make_task("accepted"))
        running.finish("owed", settle=False)
        running.finish("settled")
        running.now += 1e6
        running.journal.prune(keep_tasks=0, keep_s=0)
        wait_for(lambda: running.journal.find("settled") is None, timeout_s=5, what="the pruning")
        assert [task.task_uuid for task in running.journal.newest(limit=9)] == ["owed", "accepted"]


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
        assert (owed.task_uuid, owed.owed_at) == ("finished", finished.finished_at)
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


def write_old_file(path: Path) -> None:
    with sqlite3.connect(path) as old:
        old.executescript(OLD_FILE.read_text())
    old.close()


def fill(directory: Path) -> None:
    """Leave no space."""
    with (directory / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"\0" * 4096):
            pass


def send_until_refused(journal: Journal) -> tuple[list[str], AgentError]:
    """Accept tasks until the space inside the file is used up, too; what was accepted, and the refusal."""
    accepted: list[str] = []
    for n in range(1000):
        try:
            journal.accept(make_task(f"fill{n}", request=b"x" * 4096))
        except AgentError as error:
            return accepted, error
        accepted.append(f"fill{n}")
    raise AssertionError("never refused")
