"""The journal: every task from acceptance to delivery. Beside its file the only SQL of the agent.

    accepted -> running -> finished -> delivered | gone | given_up
                 finished: the reply is there and its callback is owed
                 gone: the receiver answered 404; given_up: it took nothing for too long

A task that `accept` returned is on disk. Every later change is kept until it is on disk too, however long the disk
is full: what was accepted may have to wait, and is never lost.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvmagent.meters import Meters
from kvmagent.model.command import Problem
from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journalfile import Database, JournalFile

State = Literal["accepted", "running", "finished", "delivered", "gone", "given_up"]
UNFINISHED: tuple[State, ...] = ("accepted", "running")

# From each state, the states that may follow. A task that was running when the agent died is started once more; one
# that nothing can be done about (its plugin is gone) ends without having run; a settled one is owed again when its
# caller asks for its callback.
TRANSITIONS: dict[State, frozenset[State]] = {
    "accepted": frozenset({"running", "finished"}),
    "running": frozenset({"running", "finished"}),
    "finished": frozenset({"finished", "delivered", "gone", "given_up"}),
    "delivered": frozenset({"finished"}),
    "gone": frozenset({"finished"}),
    "given_up": frozenset({"finished"}),
}
# The words of the index that finds them: SQLite uses it for no other.
_SETTLED = "state IN ('delivered', 'gone', 'given_up')"
# Settled tasks are removed in batches, so that no accept waits long behind one, and not more often than this.
_PRUNE_BATCH, _PRUNE_INTERVAL_S = 200, 10.0
# A caller is not kept waiting longer by a disk that hangs, but for the one whose own thread is at it.
_ACCEPT_WAIT_S = 30.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task as the journal has it. Times are seconds since the epoch; request, goal, before and reply are JSON.

    `recovered`: an earlier agent left it unfinished. Not in the file: it is so of what `unfinished` returns.
    """

    task_uuid: str
    command: str
    lane: str
    request: bytes
    callback_url: str
    client: str
    caller: str = ""
    seq: int = 0
    state: State = "accepted"
    accepted_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    goal: bytes | None = None
    before: bytes | None = None
    reply: bytes | None = None
    outcome: str | None = None
    attempts: int = 0
    delivery_error: str | None = None
    owed_at: float | None = None
    recovered: bool = False

    @property
    def log_fields(self) -> dict[str, str]:
        """What every line carries that is logged while somebody works on the task."""
        return {
            "task": self.task_uuid,
            "vm": self.lane,
            "command": self.command,
            "caller": self.caller or "unknown",
        }


class StepRecord(msgspec.Struct, frozen=True):
    """One step as the journal has it; `elapsed_ms` is None while it runs, or ran when the agent died.

    `step` and `problem` are JSON.
    """

    step: bytes
    started_at: float
    elapsed_ms: float | None
    problem: str | None


class Owed(msgspec.Struct, frozen=True):
    """A callback that is owed since `owed_at`, without its body: what delivery keeps in memory."""

    task_uuid: str
    lane: str
    callback_url: str
    client: str
    owed_at: float


class Journal:
    """Thread-safe. `on_accepted` is called on the thread that commits, in order of acceptance, after the commit.

    Every method may raise AgentError JOURNAL_UNAVAILABLE: reads when the file cannot be read, `accept` when it cannot
    be written (`cancel` and `owe_again` likewise), the other writes only when the journal is stopped before they were
    on disk.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_accepted: Callable[[Task], None],
        clock: Callable[[], float] = time.time,
        fault: Fault = no_fault,
        meters: Meters | None = None,
    ) -> None:
        self._file = JournalFile(path, fault=fault, meters=meters or Meters())
        self._on_accepted = on_accepted
        self._clock = clock
        self._pruned_at = 0.0

    def start(self) -> None:
        """Open the journal and start its writer.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        self._file.start()

    def stop(self) -> None:
        """Commit what was handed in, then close."""
        self._file.stop()

    def check(self) -> str | None:
        """Return why the last commit failed; None while commits succeed."""
        return self._file.failure

    def stalled_s(self) -> float:
        """Return for how long the writer has been at one commit."""
        return self._file.stalled_s()

    # -- writes: each returns when it is on disk, except where it says otherwise

    def accept(self, task: Task) -> tuple[Task, bool]:
        """Store a new task, or find the one that has its id; return it and whether it is new.

        Raises:
            AgentError: TASK_CONFLICT, when the id belongs to another request; JOURNAL_UNAVAILABLE, at once.
        """

        def tell(stored: tuple[Task, bool]) -> None:
            if stored[1]:
                self._on_accepted(stored[0])

        # Given up it may yet be stored and done; sent again it is the same task.
        with _given_up_in_time("the task"):
            stored: tuple[Task, bool] = self._file.write_now(
                "accept", lambda db: self._accept(db, task), keep=False, then=tell, timeout_s=_ACCEPT_WAIT_S
            )
        return stored

    def start_task(self, task_uuid: str) -> None:
        """accepted -> running; does not wait for the disk: a task that is started again loses nothing."""

        def change(db: Database) -> None:
            _move(db, task_uuid, "running", started_at=self._clock())

        self._file.write_later("start_task", change)

    def record_goal(self, task_uuid: str, goal: bytes, before: bytes, first_step: bytes, n: int = 0) -> None:
        """Store where the task is going, what was so before, and that its first step begins, ahead of that step.

        A task that turns back has another goal after `n` steps.

        Whatever the agent dies of, a task that may have touched its VM has a goal and a step on disk. Raises AgentError
        CANCELLED when the task was taken back before.
        """

        def change(db: Database) -> None:
            _move(db, task_uuid, "running", goal=goal, before=before)
            _start_step(db, task_uuid, n, first_step, self._clock())

        self._file.write_now("record_goal", change)

    def start_step(self, task_uuid: str, n: int, step: bytes, *, wait: bool) -> None:
        """Store that a step begins; waits for the disk only where told to."""
        write = self._file.write_now if wait else self._file.write_later
        write("start_step", lambda db: _start_step(db, task_uuid, n, step, self._clock()))

    def finish_step(self, task_uuid: str, n: int, elapsed_ms: float, problem: Problem | None) -> None:
        """Store that a step ended; does not wait for the disk."""
        words = None if problem is None else msgspec.json.encode(problem).decode()
        sql = "UPDATE steps SET elapsed_ms = ?, problem = ? WHERE task_uuid = ? AND n = ?"
        self._file.write_later("finish_step", lambda db: db.execute(sql, (elapsed_ms, words, task_uuid, n)))

    def finish(self, task_uuid: str, reply: bytes, outcome: str) -> Owed:
        """-> finished: the result, and with it the callback that is owed.

        Raises AgentError CANCELLED when the task was taken back before: it has its result.
        """

        def change(db: Database) -> Owed:
            _refuse_withdrawn(db, task_uuid, reply)
            now = self._clock()
            return _move(db, task_uuid, "finished", reply=reply, outcome=outcome, finished_at=now, owed_at=now)

        owed: Owed = self._file.write_now("finish", change)
        return owed

    def cancel(self, task_uuid: str, reply: bytes, outcome: str, *, then: Callable[[Owed], None]) -> None:
        """-> finished, for a task that has touched nothing yet: it has no goal. Its callback is owed as of any other.

        `then` gets it once it is on disk, also where that comes after the caller was given up. Raises AgentError
        TASK_NOT_CANCELLABLE with what the task is doing; JOURNAL_UNAVAILABLE, at once.
        """

        def change(db: Database) -> Owed:
            row = db.execute("SELECT state, outcome, goal FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
            if row["state"] not in UNFINISHED:
                raise AgentError(
                    Code.TASK_NOT_CANCELLABLE,
                    f"task {task_uuid} has ended: {row['outcome']}",
                    details={"state": row["state"], "outcome": row["outcome"]},
                )
            if row["goal"] is not None:
                sql = "SELECT json_extract(CAST(step AS TEXT), '$.step') FROM steps WHERE task_uuid = ? ORDER BY n DESC"
                (step,) = db.execute(sql, (task_uuid,)).fetchone()
                raise AgentError(
                    Code.TASK_NOT_CANCELLABLE,
                    f"task {task_uuid} has begun to change its VM, it is at {step}",
                    details={"state": row["state"], "step": step},
                )
            now = self._clock()
            return _move(db, task_uuid, "finished", reply=reply, outcome=outcome, finished_at=now, owed_at=now)

        with _given_up_in_time("the withdrawal"):
            self._file.write_now("cancel", change, keep=False, then=then, timeout_s=_ACCEPT_WAIT_S)

    def finish_late(self, task_uuid: str, reply: bytes, outcome: str, *, owed: bool) -> Owed | None:
        """Store a result that came after the answer, in place of it; return the callback, where one is owed.

        Not while the first callback is owed: it would be taken for the second. Raises AgentError TASK_CONFLICT then.
        """

        def change(db: Database) -> Owed | None:
            row = db.execute("SELECT state FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
            if row is None or row["state"] == "finished":
                raise AgentError(Code.TASK_CONFLICT, f"the first callback of task {task_uuid} is still owed")
            now = self._clock()
            values = {"reply": reply, "outcome": outcome, "finished_at": now}
            if owed:
                return _move(db, task_uuid, "finished", **values, owed_at=now, attempts=0, delivery_error=None)
            columns = ", ".join(f"{name} = ?" for name in values)
            db.execute(f"UPDATE tasks SET {columns} WHERE task_uuid = ?", (*values.values(), task_uuid))
            return None

        callback: Owed | None = self._file.write_now("finish_late", change)
        return callback

    def note_refusal(
        self, vm_uuid: str, alias: str, at: float, *, pending: Code, problem: Problem, then: Callable[[list[str]], None]
    ) -> None:
        """Put `problem` in place of `pending` where a task still waits for that VM to let go of that device.

        Does not wait; `then` gets the tasks, on the writer's thread. Steps that began after `at` are another matter.
        """
        sql = (
            "UPDATE steps SET problem = ? WHERE json_extract(problem, '$.code') = ? AND started_at <= ?"
            " AND json_extract(CAST(step AS TEXT), '$.alias') = ? AND task_uuid IN (SELECT task_uuid FROM tasks"
            " WHERE outcome = 'pending' AND json_extract(CAST(before AS TEXT), '$.domain.uuid') = ?)"
            " RETURNING task_uuid"
        )
        values = (msgspec.json.encode(problem).decode(), pending, at, alias, vm_uuid)

        def change(db: Database) -> list[str]:
            return [row["task_uuid"] for row in db.execute(sql, values).fetchall()]

        self._file.write_later("note_refusal", change, then=then)

    def record_attempt(self, task_uuid: str, attempts: int, error: str) -> None:
        """Store a delivery that failed and will be tried again; does not wait; lost while the disk is full."""
        self._file.write_later(
            "record_attempt",
            lambda db: _move(db, task_uuid, "finished", attempts=attempts, delivery_error=error),
            keep=False,
        )

    def settle(self, task_uuid: str, state: State, error: str | None, *, attempts: int | None = None) -> None:
        """finished -> delivered, gone or given_up; does not wait: a callback may arrive twice, not never."""
        values: dict[str, Any] = {"delivery_error": error} | ({} if attempts is None else {"attempts": attempts})
        self._file.write_later("settle", lambda db: _move(db, task_uuid, state, **values))

    def owe_again(self, task_uuid: str) -> Owed:
        """delivered, gone or given_up -> finished: the caller asked for the callback again, from now on."""

        def change(db: Database) -> Owed:
            return _move(db, task_uuid, "finished", attempts=0, delivery_error=None, owed_at=self._clock())

        with _given_up_in_time("the callback"):
            owed: Owed = self._file.write_now("owe_again", change, keep=False, timeout_s=_ACCEPT_WAIT_S)
        return owed

    def prune(self, *, keep_tasks: int, keep_s: float) -> None:
        """Remove the oldest settled tasks above a number, and those above an age; does not wait.

        Cheap to call often. What is unfinished or owed stays, however old.
        """
        now = self._clock()
        if 0 <= now - self._pruned_at < _PRUNE_INTERVAL_S:
            return
        self._pruned_at = now

        def change(db: Database) -> int:
            return _prune(db, keep_tasks, now - keep_s)

        def again(removed: int) -> None:
            if removed == _PRUNE_BATCH:
                with contextlib.suppress(AgentError):  # the journal has been stopped meanwhile
                    self._file.write_later("prune", change, keep=False, then=again)

        self._file.write_later("prune", change, keep=False, then=again)

    # -- reads

    def find(self, task_uuid: str) -> Task | None:
        """Return the task of that id."""
        tasks = self._tasks("task_uuid = ?", (task_uuid,), "seq")
        return tasks[0] if tasks else None

    def unfinished(self) -> list[Task]:
        """Return what an earlier agent left to do, in order of acceptance."""
        return [
            msgspec.structs.replace(task, recovered=True)
            for task in self._tasks("state IN ('accepted', 'running')", (), "seq")
        ]

    def pending(self) -> list[str]:
        """Return the tasks that answered `pending`: what they removed may still leave."""
        return [row["task_uuid"] for row in self._file.read("SELECT task_uuid FROM tasks WHERE outcome = 'pending'")]

    def owed(self) -> list[Owed]:
        """Return the callbacks that are owed, in order of acceptance."""
        columns = ", ".join(Owed.__struct_fields__)
        rows = self._file.read(f"SELECT {columns} FROM tasks WHERE state = 'finished' ORDER BY seq")
        return [Owed(**dict(row)) for row in rows]

    def newest(self, *, state: State | None = None, lane: str | None = None, limit: int) -> list[Task]:
        """Return tasks, newest first."""
        where, values = ["1"], list[Any]()
        for column, value in (("state", state), ("lane", lane)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        return self._tasks(" AND ".join(where), (*values, limit), "seq DESC LIMIT ?")

    def steps(self, task_uuid: str) -> list[StepRecord]:
        """Return the steps of a task in order."""
        sql = "SELECT step, started_at, elapsed_ms, problem FROM steps WHERE task_uuid = ? ORDER BY n"
        return [StepRecord(**dict(row)) for row in self._file.read(sql, (task_uuid,))]

    def _tasks(self, where: str, values: tuple[Any, ...], order: str) -> list[Task]:
        rows = self._file.read(f"SELECT * FROM tasks WHERE {where} ORDER BY {order}", values)
        return [Task(**dict(row)) for row in rows]

    def _accept(self, db: Database, task: Task) -> tuple[Task, bool]:
        now = self._clock()
        cursor = db.execute(
            "INSERT INTO tasks (task_uuid, command, lane, request, callback_url, client, caller, state, accepted_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'accepted', ?) ON CONFLICT (task_uuid) DO NOTHING",
            (task.task_uuid, task.command, task.lane, task.request, task.callback_url, task.client, task.caller, now),
        )
        if not cursor.rowcount:
            row = db.execute("SELECT * FROM tasks WHERE task_uuid = ?", (task.task_uuid,)).fetchone()
            known = Task(**dict(row))
            if (known.command, known.request, known.callback_url) != (task.command, task.request, task.callback_url):
                raise AgentError(
                    Code.TASK_CONFLICT, f"task {task.task_uuid} is a {known.command} with another body or callback URL"
                )
            return known, False
        return msgspec.structs.replace(task, seq=cursor.lastrowid, accepted_at=now), True


@contextlib.contextmanager
def _given_up_in_time(what: str) -> Iterator[None]:
    """Keep no caller waiting longer for a disk that hangs; what was handed in may yet come to be.

    Raises:
        AgentError: JOURNAL_UNAVAILABLE.
    """
    try:
        yield
    except TimeoutError as error:
        message = f"the disk has not taken {what} in {_ACCEPT_WAIT_S:g} s"
        raise AgentError(Code.JOURNAL_UNAVAILABLE, message, expected=False) from error


def _move(db: Database, task_uuid: str, state: State, **values: Any) -> Owed:
    """Change a task's state, as TRANSITIONS allows, and its other columns; return whom it concerns.

    Raises AgentError CANCELLED for a task that is to run and was taken back.
    """
    row = db.execute(_move_sql(state, tuple(values)), (*values.values(), task_uuid)).fetchone()
    if row is None:
        if state == "running":
            _refuse_withdrawn(db, task_uuid)
        row = db.execute("SELECT state FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
        found = "unknown" if row is None else row["state"]
        raise AgentError(Code.INTERNAL_ERROR, f"task {task_uuid} cannot go from {found} to {state}", expected=False)
    return Owed(task_uuid, row["lane"], row["callback_url"], row["client"], row["owed_at"] or 0.0)


@functools.cache
def _move_sql(state: State, columns: tuple[str, ...]) -> str:
    """Return the statement that changes a task to `state`, from where that may be: values of columns, then the id."""
    formers = ", ".join(f"'{former}'" for former, next_states in TRANSITIONS.items() if state in next_states)
    changes = ", ".join([f"state = '{state}'", *(f"{name} = ?" for name in columns)])
    return (
        f"UPDATE tasks SET {changes} WHERE task_uuid = ? AND state IN ({formers})"
        " RETURNING lane, callback_url, client, owed_at"
    )


def _refuse_withdrawn(db: Database, task_uuid: str, reply: bytes | None = None) -> None:
    """Whoever carries a task out finds it unfinished, unless its caller has taken it back.

    Or with its own reply: a commit that failed may have come to disk all the same, and is tried again.
    """
    row = db.execute("SELECT state, reply FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
    if row is not None and row["state"] not in UNFINISHED and row["reply"] != reply:
        raise AgentError(Code.CANCELLED, f"task {task_uuid} was taken back")


def _start_step(db: Database, task_uuid: str, n: int, step: bytes, now: float) -> None:
    sql = "INSERT OR REPLACE INTO steps (task_uuid, n, step, started_at) VALUES (?, ?, ?, ?)"
    db.execute(sql, (task_uuid, n, step, now))


def _prune(db: Database, keep_tasks: int, before: float) -> int:
    sql = f"SELECT seq FROM tasks WHERE {_SETTLED} ORDER BY seq DESC LIMIT 1 OFFSET ?"
    surplus = db.execute(sql, (keep_tasks,)).fetchone()
    sql = f"SELECT seq, task_uuid FROM tasks WHERE {_SETTLED} AND (seq <= ? OR finished_at < ?) ORDER BY seq LIMIT ?"
    old = db.execute(sql, (surplus["seq"] if surplus else 0, before, _PRUNE_BATCH)).fetchall()
    db.executemany("DELETE FROM steps WHERE task_uuid = ?", [(row["task_uuid"],) for row in old])
    db.executemany("DELETE FROM tasks WHERE seq = ?", [(row["seq"],) for row in old])
    return len(old)
