"""The journal: every task from acceptance to delivery, in SQLite. The only SQL of the agent.

One writer thread commits what has gathered meanwhile in one transaction (group commit, WAL, synchronous=FULL), so
that a task which `accept` returned is on disk. Reads have a connection of their own.

    accepted -> running -> finished -> delivered | gone | given_up
                 finished: the reply is there and its callback is owed
                 gone: the receiver answered 404; given_up: it took nothing for too long
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvmagent.model.errors import AgentError, Code

log = logging.getLogger(__name__)

State = Literal["accepted", "running", "finished", "delivered", "gone", "given_up"]
UNFINISHED: tuple[State, ...] = ("accepted", "running")

# From each state, the states that may follow. A task that was running when the agent died is started once more;
# a delivered one is owed again when its caller asks for its callback.
TRANSITIONS: dict[State, frozenset[State]] = {
    "accepted": frozenset({"running"}),
    "running": frozenset({"running", "finished"}),
    "finished": frozenset({"finished", "delivered", "gone", "given_up"}),
    "delivered": frozenset({"finished"}),
    "gone": frozenset({"finished"}),
    "given_up": frozenset({"finished"}),
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    task_uuid TEXT NOT NULL UNIQUE,
    command TEXT NOT NULL,
    lane TEXT NOT NULL,
    request BLOB NOT NULL,
    callback_url TEXT NOT NULL,
    client TEXT NOT NULL,
    state TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    goal BLOB,
    before BLOB,
    reply BLOB,
    outcome TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    delivery_error TEXT
);
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state, seq);
CREATE INDEX IF NOT EXISTS tasks_by_lane ON tasks (lane, seq);
CREATE TABLE IF NOT EXISTS steps (
    task_uuid TEXT NOT NULL,
    n INTEGER NOT NULL,
    step BLOB NOT NULL,
    started_at REAL NOT NULL,
    elapsed_ms REAL,
    problem TEXT,
    PRIMARY KEY (task_uuid, n)
) WITHOUT ROWID;
"""
# At most so many writes share a commit, so that the first of them does not wait for an endless batch.
_BATCH = 256

# A change to make on the writer's thread, and who waits for it.
_Write = tuple[Callable[[], Any], Future[Any] | None]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task as the journal has it. Times are seconds since the epoch; request, goal, before and reply are JSON."""

    task_uuid: str
    command: str
    lane: str
    request: bytes
    callback_url: str
    client: str
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


class StepRecord(msgspec.Struct, frozen=True):
    """One step as the journal has it; `elapsed_ms` is None while it runs, or ran when the agent died."""

    step: bytes
    started_at: float
    elapsed_ms: float | None
    problem: str | None


class Journal:
    """Thread-safe. `on_accepted` is called on the writer's thread, in order of acceptance, after the commit."""

    def __init__(
        self, path: Path, *, on_accepted: Callable[[Task], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._on_accepted = on_accepted
        self._clock = clock
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._read_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._failure: str | None = None
        self._fresh: list[Task] = []

    def start(self) -> None:
        """Open the journal and start its writer.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        try:
            self._db = self._connect()
            self._db.executescript(_SCHEMA)
            self._reader = self._connect()
        except sqlite3.Error as error:
            raise _unavailable(self._path, error) from error
        self._thread.start()

    def stop(self) -> None:
        """Commit what was handed in, then close."""
        self._writes.put(None)
        self._thread.join()
        with self._read_lock:
            self._reader.close()
        self._db.close()

    def check(self) -> str | None:
        """Return why the last commit failed; None while commits succeed."""
        return self._failure

    # -- writes: each returns when it is on disk, except where it says otherwise

    def accept(self, task: Task) -> tuple[Task, bool]:
        """Store a new task, or find the one that has its id; return it and whether it is new.

        Raises:
            AgentError: TASK_CONFLICT, when the id belongs to another request; JOURNAL_UNAVAILABLE.
        """
        known: tuple[Task, bool] = self._write(lambda: self._accept(task)).result()
        return known

    def start_task(self, task_uuid: str) -> None:
        """accepted -> running; does not wait for the disk: a task that is started again loses nothing."""
        self._write(lambda: self._move(task_uuid, "running", started_at=self._clock()), wait=False)

    def record_goal(self, task_uuid: str, goal: bytes, before: bytes) -> None:
        """Store where the task is going and what was so before, ahead of its first step."""
        self._write(lambda: self._move(task_uuid, "running", goal=goal, before=before)).result()

    def start_step(self, task_uuid: str, n: int, step: bytes) -> None:
        """Store that a step begins; does not wait for the disk."""
        row = (task_uuid, n, step, self._clock())
        sql = "INSERT OR REPLACE INTO steps (task_uuid, n, step, started_at) VALUES (?, ?, ?, ?)"
        self._write(lambda: self._db.execute(sql, row), wait=False)

    def finish_step(self, task_uuid: str, n: int, elapsed_ms: float, problem: str | None) -> None:
        """Store that a step ended; does not wait for the disk."""
        sql = "UPDATE steps SET elapsed_ms = ?, problem = ? WHERE task_uuid = ? AND n = ?"
        self._write(lambda: self._db.execute(sql, (elapsed_ms, problem, task_uuid, n)), wait=False)

    def finish(self, task_uuid: str, reply: bytes, outcome: str) -> None:
        """running -> finished: the result, and with it the callback that is owed."""
        self._write(
            lambda: self._move(task_uuid, "finished", reply=reply, outcome=outcome, finished_at=self._clock())
        ).result()

    def record_attempt(self, task_uuid: str, attempts: int, error: str) -> None:
        """Store a delivery that failed and will be tried again; does not wait for the disk."""
        self._write(lambda: self._move(task_uuid, "finished", attempts=attempts, delivery_error=error), wait=False)

    def settle(self, task_uuid: str, state: State, attempts: int, error: str | None) -> None:
        """finished -> delivered, gone or given_up; does not wait: a callback may arrive twice, not never."""
        self._write(lambda: self._move(task_uuid, state, attempts=attempts, delivery_error=error), wait=False)

    def owe_again(self, task_uuid: str) -> None:
        """delivered, gone or given_up -> finished: the caller asked for the callback again."""
        self._write(lambda: self._move(task_uuid, "finished", attempts=0, delivery_error=None)).result()

    # -- reads

    def find(self, task_uuid: str) -> Task | None:
        """Return the task of that id."""
        rows = self._read("SELECT * FROM tasks WHERE task_uuid = ?", (task_uuid,))
        return rows[0] if rows else None

    def select(self, *, states: Iterable[State] = (), lane: str | None = None, limit: int | None = None) -> list[Task]:
        """Return tasks, in order of acceptance; with a limit the newest ones, newest first."""
        states = tuple(states)
        where, values = ["1"], list[Any](states)
        if states:
            where.append(f"state IN ({', '.join('?' * len(states))})")
        if lane is not None:
            where.append("lane = ?")
            values.append(lane)
        order = "seq" if limit is None else "seq DESC LIMIT ?"
        if limit is not None:
            values.append(limit)
        return self._read(f"SELECT * FROM tasks WHERE {' AND '.join(where)} ORDER BY {order}", tuple(values))

    def steps(self, task_uuid: str) -> list[StepRecord]:
        """Return the steps of a task in order."""
        sql = "SELECT step, started_at, elapsed_ms, problem FROM steps WHERE task_uuid = ? ORDER BY n"
        with self._read_lock:
            return [StepRecord(**dict(row)) for row in self._reader.execute(sql, (task_uuid,))]

    def _read(self, sql: str, values: tuple[Any, ...]) -> list[Task]:
        with self._read_lock:
            return [Task(**dict(row)) for row in self._reader.execute(sql, values)]

    # -- the writer's thread

    def _accept(self, task: Task) -> tuple[Task, bool]:
        row = self._db.execute("SELECT * FROM tasks WHERE task_uuid = ?", (task.task_uuid,)).fetchone()
        if row is not None:
            known = Task(**dict(row))
            if (known.command, known.request, known.callback_url) != (task.command, task.request, task.callback_url):
                raise AgentError(
                    Code.TASK_CONFLICT, f"task {task.task_uuid} is a {known.command} with another body or callback URL"
                )
            return known, False
        now = self._clock()
        cursor = self._db.execute(
            "INSERT INTO tasks (task_uuid, command, lane, request, callback_url, client, state, accepted_at)"
            " VALUES (?, ?, ?, ?, ?, ?, 'accepted', ?)",
            (task.task_uuid, task.command, task.lane, task.request, task.callback_url, task.client, now),
        )
        fresh = msgspec.structs.replace(task, seq=cursor.lastrowid, accepted_at=now)
        self._fresh.append(fresh)
        return fresh, True

    def _move(self, task_uuid: str, state: State, **values: Any) -> None:
        row = self._db.execute("SELECT state FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
        if row is None or state not in TRANSITIONS[row["state"]]:
            found = "unknown" if row is None else row["state"]
            raise AgentError(Code.INTERNAL_ERROR, f"task {task_uuid} cannot go from {found} to {state}", expected=False)
        columns = ", ".join(f"{name} = ?" for name in ("state", *values))
        self._db.execute(f"UPDATE tasks SET {columns} WHERE task_uuid = ?", (state, *values.values(), task_uuid))

    def _write(self, change: Callable[[], Any], *, wait: bool = True) -> Future[Any]:
        done: Future[Any] = Future()
        self._writes.put((change, done if wait else None))
        return done

    def _run(self) -> None:
        while (first := self._writes.get()) is not None:
            batch, more = [first], True
            while more and len(batch) < _BATCH:
                try:
                    following = self._writes.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._writes.put(None)
                    break
                batch.append(following)
            self._commit(batch)

    def _commit(self, batch: list[_Write]) -> None:
        outcomes: list[tuple[Future[Any] | None, Any, Exception | None]] = []
        self._fresh = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for change, done in batch:
                try:
                    outcomes.append((done, change(), None))
                except AgentError as error:
                    if done is None:
                        log.error("journal: %s", error.message)
                    outcomes.append((done, None, error))
            self._db.execute("COMMIT")
            self._failure = None
        except sqlite3.Error as error:
            self._failure = str(error)
            log.error("journal write failed path=%s error=%r", self._path, str(error))
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._fresh = []
            outcomes = [(done, None, _unavailable(self._path, error)) for _, done in batch]
        for task in self._fresh:
            self._on_accepted(task)
        for done, result, failure in outcomes:
            if done is not None:
                done.set_exception(failure) if failure else done.set_result(result)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        return db


def _unavailable(path: Path, error: sqlite3.Error) -> AgentError:
    return AgentError(Code.JOURNAL_UNAVAILABLE, f"{path}: {error}", expected=False)
