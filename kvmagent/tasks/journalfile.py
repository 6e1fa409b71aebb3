"""The journal's file: its schema, and whoever writes it, one at a time. The only user of sqlite3.

    write_now    commit it, and all that has gathered, on the caller's own thread
    write_later  hand a change in that nobody waits for: it goes with the next commit, at most LATER_S from now

    a commit     BEGIN, all changes that have gathered, COMMIT (WAL, synchronous=FULL)
                   on disk: `then` of each, in order, then whoever waits for it
                   failed:  a change that may fail is refused at once,
                            one that is to be kept waits in order and is tried again until it is on disk

While one commits, the changes of others gather and share the next commit. A full disk refuses new tasks and holds the
results of running ones; when there is space again the writer goes on by itself. Reads have a connection of their own.

A commit that failed in fsync may be on disk all the same, and is seen only after a crash: a task that was refused then
is carried out once, a result that was tried again is the same one.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmagent.logs import Log, error_fields
from kvmagent.meters import Meters, phase
from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.faults import Fault

log = Log(__name__)

Database = sqlite3.Connection
Row = sqlite3.Row
Change = Callable[[Database], Any]

# MIGRATIONS[n] brings a file of version n to n + 1; a new file takes them all. Never edited, only added to.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE IF NOT EXISTS tasks (
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
        )""",
        "CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state, seq)",
        "CREATE INDEX IF NOT EXISTS tasks_by_lane ON tasks (lane, seq)",
        """CREATE TABLE IF NOT EXISTS steps (
            task_uuid TEXT NOT NULL,
            n INTEGER NOT NULL,
            step BLOB NOT NULL,
            started_at REAL NOT NULL,
            elapsed_ms REAL,
            problem TEXT,
            PRIMARY KEY (task_uuid, n)
        ) WITHOUT ROWID""",
    ),
    (
        # A step's problem was its code alone; a task that goes on after a restart needs the words too.
        "UPDATE steps SET problem = json_object('code', problem, 'message', '', 'remedy', '') WHERE problem NOT NULL",
        # A callback that is asked for again is owed from then on; when the task finished stays what it was.
        "ALTER TABLE tasks ADD COLUMN owed_at REAL",
        "UPDATE tasks SET owed_at = finished_at",
        # Pruning finds the oldest settled tasks without reading the others.
        "CREATE INDEX tasks_settled ON tasks (seq, finished_at) WHERE state IN ('delivered', 'gone', 'given_up')",
    ),
    (
        # Who the client proved to be; of older tasks it is not known.
        "ALTER TABLE tasks ADD COLUMN caller TEXT NOT NULL DEFAULT ''",
    ),
)
# At most so many writes share a commit, so that the first of them does not wait for an endless batch.
_BATCH = 256
# What nobody waits for waits no longer than this for a commit to go with.
LATER_S = 0.02
# After a commit that failed, the next try without anyone asking for it.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
# For each connection; the kernel's own cache has the rest of the file.
_CACHE_KIB = 256
# Errors that lie in one change, and not in the file.
_OWN_ERRORS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
_DAMAGED = "Stop the agent, move the file away (sqlite3's .recover may save its tasks), and start the agent again."


@dataclass(frozen=True)
class _Write:
    """A change on its way; `context` is the log context of who made it."""

    name: str
    change: Change
    keep: bool
    done: Future[Any]
    then: Callable[[Any], None] | None
    context: Context


class JournalFile:
    """Thread-safe."""

    def __init__(self, path: Path, *, fault: Fault, meters: Meters) -> None:
        self._path = path
        self._meters = meters
        self._fault = fault
        self._changed = threading.Condition()
        self._writes: list[_Write] = []
        self._hurried = False
        self._asleep = False
        self._closed = True
        # Held by whoever commits.
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._busy_since: float | None = None
        self._db: sqlite3.Connection | None = None
        self._read_lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self.failure: str | None = None

    def start(self) -> None:
        """Open the file, check it, bring it to the present schema, and start the writer.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE: it cannot be read or written, is damaged, or a newer agent wrote it.
        """
        try:
            # SQLite gives its -wal and -shm files the mode of this one.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._path.chmod(0o600)
            self._db = self._connect()
            self._check(self._db)
            _migrate(self._db, self._path)
            self._reader = self._connect()
            self._inode, self._size = self._identify()
        except (sqlite3.Error, OSError) as error:
            self._close_db()
            raise self._unavailable(error) from error
        except AgentError:
            self._close_db()
            raise
        self._closed = False
        self._thread.start()

    def stop(self) -> None:
        """Commit what was handed in, once more if need be, then close. What is handed in later is refused."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._read_lock:
            self._close_reader()

    def write_now(
        self,
        name: str,
        change: Change,
        *,
        keep: bool = True,
        then: Callable[[Any], None] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Make a change on the caller's own thread, and return its result once it is on disk.

        A change to be kept is tried until it succeeds or the journal is stopped; another is refused when its commit
        fails. `then` is called on the thread that commits, after the commit and in the order of the changes.

        Raises:
            AgentError: what the change raised; JOURNAL_UNAVAILABLE, when it is not on disk and never will be.
            TimeoutError: others had the turn for so long; it may yet be made.
        """
        with self._changed:
            done = self._hand_in(name, change, keep, then)
        with phase("journal"):
            has_turn = self._turn.acquire(timeout=-1 if timeout_s is None else timeout_s)
            if has_turn:
                try:
                    # What is kept is tried again by the writer, in its time; what is not is told at once.
                    while not done.done() and (self.failure is None or not keep) and self._commit_gathered():
                        pass
                finally:
                    self._turn.release()
            return done.result(timeout_s if has_turn else 0)

    def write_later(
        self, name: str, change: Change, *, keep: bool = True, then: Callable[[Any], None] | None = None
    ) -> None:
        """Hand in a change that nobody waits for. `keep`, `then`: see `write_now`.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE, when the journal is closed.
        """
        with self._changed:
            self._hand_in(name, change, keep, then)
            if self._asleep:
                self._changed.notify_all()

    def read(self, sql: str, values: tuple[Any, ...] = ()) -> list[Row]:
        """Return the rows of a query.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        with self._read_lock:
            try:
                if self._reader is None:
                    self._reader = self._connect()
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                self._close_reader()
                raise self._unavailable(error) from error

    def stalled_s(self) -> float:
        """Return for how long the writer has been at one commit; 0 when it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _hand_in(self, name: str, change: Change, keep: bool, then: Callable[[Any], None] | None) -> Future[Any]:
        """Add to what the next commit takes; under the lock."""
        if self._closed:
            raise AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: closed")
        done: Future[Any] = Future()
        self._writes.append(_Write(name, change, keep, done, then, copy_context()))
        return done

    # -- the writer's thread

    def _run(self) -> None:
        pause_s, closing = _FIRST_PAUSE_S, False
        while not closing:
            closing = self._await_writes(None if self.failure is None else pause_s)
            with self._turn:
                while (is_taken := self._commit_gathered()) and closing and self._writes:
                    pass
            pause_s = _FIRST_PAUSE_S if is_taken else min(pause_s * 2, _LONGEST_PAUSE_S)
        for write in self._writes:
            error = AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: {self.failure}", expected=False)
            write.done.set_exception(error)
        self._close_db()

    def _await_writes(self, pause_s: float | None) -> bool:
        """Wait until there is something to commit, after a failure `pause_s` at most; return whether it is the last."""
        with self._changed:
            is_hurried = self._changed.wait_for(lambda: self._hurried or self._closed, pause_s or LATER_S)
            if pause_s is None and not is_hurried and not self._writes:
                self._asleep = True
                self._changed.wait_for(lambda: self._writes or self._closed or self.failure is not None)
                self._asleep = False
            self._hurried = False
            return self._closed

    # -- commits, of whoever has the turn

    def _commit_gathered(self) -> bool:
        """Commit what has gathered; return whether the file took it."""
        with self._changed:
            batch, self._writes = self._writes[:_BATCH], self._writes[_BATCH:]
            self._hurried = self._hurried or bool(self._writes)
        if not batch and self.failure is None:
            return True
        self._busy_since = started = time.monotonic()
        error = self._commit(batch)
        self._busy_since = None
        if error is None:
            self._meters.committed(time.monotonic() - started, len(batch))
            return True
        with self._changed:
            self._writes = [write for write in batch if write.keep] + self._writes
            self._changed.notify_all()
        for write in batch:
            if not write.keep:
                write.done.set_exception(self._unavailable(error))
        return False

    def _commit(self, batch: list[_Write]) -> Exception | None:
        """Make all changes in one transaction; return why the file would not take them."""
        try:
            outcomes = self._transact(batch)
        except (sqlite3.Error, OSError) as error:
            if self.failure != str(error):
                log.error("journal cannot be written", waiting=len(batch), **error_fields(self._unavailable(error)))
            self.failure = str(error)
            self._close_db()
            return error
        if self.failure is not None:
            log.info("journal can be written again", path=self._path)
            self.failure = None
        for write, result, failure in outcomes:
            if failure is None:
                self._fault(f"journal.{write.name}:committed")
                write.context.run(self._tell, write, result)
        for write, result, failure in outcomes:
            write.done.set_exception(failure) if failure else write.done.set_result(result)
        return None

    def _transact(self, batch: list[_Write]) -> list[tuple[_Write, Any, Exception | None]]:
        if self._db is None:
            self._db = self._connect()
        inode, size = self._identify()
        if inode != self._inode or size < self._size:
            raise sqlite3.DatabaseError("the file was replaced or truncated under the agent")
        self._size = size
        outcomes: list[tuple[_Write, Any, Exception | None]] = []
        self._db.execute("BEGIN IMMEDIATE")
        if self.failure is not None:
            # Proves with nothing else to write that the file can be written again.
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        for write in batch:
            outcomes.append((write, *write.context.run(_attempt, write, self._db)))
            self._fault(f"journal.{write.name}:written")
        self._db.execute("COMMIT")
        return outcomes

    def _tell(self, write: _Write, result: Any) -> None:
        if write.then is not None:
            try:
                write.then(result)
            except Exception as error:
                log.failure("what follows a journal write failed", error, write=write.name)

    # -- the file

    def _connect(self) -> sqlite3.Connection:
        # Opened by URI: a file that is gone must not come back empty.
        db = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"damaged: {verdict}")

    def _identify(self) -> tuple[tuple[int, int], int]:
        """Return what tells this file from another, and its size, which never shrinks."""
        facts = self._path.stat()
        return (facts.st_dev, facts.st_ino), facts.st_size

    def _close_db(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _close_reader(self) -> None:
        if self._reader is not None:
            with contextlib.suppress(sqlite3.Error):
                self._reader.close()
            self._reader = None

    def _unavailable(self, error: Exception) -> AgentError:
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        remedy = _DAMAGED if damaged else None
        return AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: {error}", remedy=remedy, expected=False)


def _attempt(write: _Write, db: Database) -> tuple[Any, Exception | None]:
    """Make one change; return its result, or the error that is its own and no other change's.

    Raises:
        sqlite3.Error: the file would not take it.
    """
    try:
        return write.change(db), None
    except AgentError as error:
        if not error.expected:
            log.error("journal write refused", write=write.name, **error_fields(error))
        return None, error
    except Exception as error:
        if isinstance(error, sqlite3.Error) and not isinstance(error, _OWN_ERRORS):
            raise
        log.failure("journal write failed in a way that nothing expected", error, write=write.name)
        return None, AgentError(Code.INTERNAL_ERROR, f"journal: {write.name}: {error}", expected=False)


def _migrate(db: Database, path: Path) -> None:
    """Bring a file to the present schema, one version at a time, each in one transaction."""
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    if found > len(MIGRATIONS):
        raise AgentError(
            Code.JOURNAL_UNAVAILABLE,
            f"{path}: schema version {found}, this agent knows up to {len(MIGRATIONS)}",
            remedy="Run the newer agent that wrote it, or move the file away.",
        )
    for version, statements in enumerate(MIGRATIONS[found:], start=found + 1):
        db.execute("BEGIN IMMEDIATE")
        for statement in statements:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
        log.info("journal schema", path=path, version=version)
