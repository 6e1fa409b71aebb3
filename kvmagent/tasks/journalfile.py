"""The journal's file: its schema, and its one writer at a time. The only user of sqlite3.

    write_now    commit it, and all that has gathered, on the caller's own thread
    write_later  hand a change in that nobody waits for: it goes with the next commit, or with its own after LATER_S

    a commit     BEGIN, all changes that have gathered, COMMIT (WAL, synchronous=FULL)
                   on disk: `then` of each, in order, then whoever waits for it
                   failed:  a change that may fail is refused at once,
                            one that is to be kept waits in order and is tried again until it is on disk

While one commits, the changes of others gather and share the next commit. A full disk refuses new tasks and holds the
results of running ones; when there is space again the writer goes on by itself. Reads have a connection of their own.

A commit that failed in fsync may be on disk all the same. After a failure the file is therefore surveyed in the first
commit that it takes: what it has then is told to whoever has to know, and may be more than was told before.

The WAL (-wal) is part of the file, and found by its name; like the file, it is recognised by its inode. If somebody
removed it, whoever still has it open brings what it holds into the file, and a new one is begun. "Log" always means
the agent's own log.

One process at a time has the file: the lock is on the file itself, for as long as the process holds it or lives.
"""

import contextlib
import fcntl
import itertools
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmagent.backoff import Backoff
from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError, Code
from kvmagent.recorder import Recorder, phase
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
        # Since when a callback is undelivered, by the clock. Only an older agent reads it; own_at has replaced it.
        "ALTER TABLE tasks ADD COLUMN owed_at REAL",
        "UPDATE tasks SET owed_at = finished_at",
        # Pruning finds the oldest settled tasks without reading the others.
        "CREATE INDEX tasks_settled ON tasks (seq, finished_at) WHERE state IN ('delivered', 'gone', 'given_up')",
    ),
    (
        # Who the client proved to be; of older tasks it is not known.
        "ALTER TABLE tasks ADD COLUMN caller TEXT NOT NULL DEFAULT ''",
    ),
    (
        # The agent's own time, which no step of the clock changes; what is older counts from its beginning.
        "ALTER TABLE tasks ADD COLUMN own_at REAL NOT NULL DEFAULT 0",
        "ALTER TABLE steps ADD COLUMN own_at REAL NOT NULL DEFAULT 0",
    ),
    (
        # Of a step that was cut off nobody knows whether it had its effect: its time and problem are null.
        "ALTER TABLE steps ADD COLUMN cut_off INTEGER NOT NULL DEFAULT 0",
        # The CPUs that the agent itself left offline in a guest, of the VM's present run.
        """CREATE TABLE left_cpus (
            vm_uuid TEXT NOT NULL,
            run TEXT NOT NULL,
            cpu INTEGER NOT NULL,
            PRIMARY KEY (vm_uuid, run, cpu)
        ) WITHOUT ROWID""",
    ),
    (
        # Which of the caller's traces the task is a part of; empty: it named none.
        "ALTER TABLE tasks ADD COLUMN traceparent TEXT NOT NULL DEFAULT ''",
    ),
    (
        # Which VM a task is about, however it was named: empty until the VM was observed.
        "ALTER TABLE tasks ADD COLUMN vm_uuid TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE tasks ADD COLUMN vm_name TEXT NOT NULL DEFAULT ''",
        "UPDATE tasks SET vm_uuid = coalesce(json_extract(CAST(before AS TEXT), '$.domain.uuid'), ''),"
        " vm_name = coalesce(json_extract(CAST(before AS TEXT), '$.domain.name'), '')"
        " WHERE before NOTNULL AND json_valid(CAST(before AS TEXT))",
        "CREATE INDEX tasks_by_vm ON tasks (vm_uuid, seq)",
        "CREATE INDEX tasks_by_vm_name ON tasks (vm_name, seq)",
        # What changed each VM, kept longer than tasks. `seq` is the task's, `asked` and `totals` are JSON.
        """CREATE TABLE changes (
            seq INTEGER PRIMARY KEY,
            task_uuid TEXT NOT NULL,
            vm_uuid TEXT NOT NULL,
            vm_name TEXT NOT NULL,
            command TEXT NOT NULL,
            caller TEXT NOT NULL,
            client TEXT NOT NULL,
            accepted_at REAL NOT NULL,
            finished_at REAL NOT NULL,
            own_at REAL NOT NULL,
            outcome TEXT NOT NULL,
            error_code TEXT,
            asked BLOB NOT NULL,
            totals BLOB NOT NULL
        )""",
        "CREATE INDEX changes_by_vm ON changes (vm_uuid, seq)",
        "CREATE INDEX changes_by_vm_name ON changes (vm_name, seq)",
    ),
)
# At most so many writes share a commit, so that the first of them does not wait for an endless batch.
_BATCH = 256
# What nobody waits for waits so long for another's commit to go with. Counted from when it came: a writer that looked
# every so often made 0.4 commits more for each command, and whoever had something to commit waited behind them.
LATER_S = 0.02
# After a commit that failed, the next try without anyone asking for it.
_BACKOFF = Backoff(0.1, 2.0)
# Of a WAL that is put back, at a time.
_COPY_BYTES = 2**20
# For each connection; the kernel's own cache has the rest of the file.
_CACHE_KIB = 256
# The WAL is cut back to this when it starts anew: one large commit does not keep its space for good.
_LOG_BYTES = 16 * 2**20
# Up to this size a start checks the indexes against the tables too. Observed: 34 MiB take 80 ms, by the quick check 50.
_WHOLE_CHECK_BYTES = 512 * 2**20
# At most so many faults of a damaged file are reported; the first ones say most.
_MOST_FAULTS = 20
# Errors that lie in one change, and not in the file.
_OWN_ERRORS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
_DAMAGED = "Stop the agent, move the file away (sqlite3's .recover may save its tasks), and start the agent again."
_NO_FILE = "Move it away, then: systemctl start kvmagent."
_CUT = (
    "Restart the agent: the newest tasks are lost. Send again, with their taskuuids, those whose results do not come."
)
# The first bytes of a WAL, of either byte order of its checksums. Source: sqlite.org/fileformat2.html, WAL header.
_LOG_MAGICS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")


class _LostLogError(sqlite3.DatabaseError):
    """Raised when the WAL was truncated and what it held is lost: only a restart begins a new one."""


@dataclass(frozen=True)
class _Write:
    """A change on its way; `context` is the log context of who made it, `due_at` when it waits no longer."""

    name: str
    change: Change
    keep: bool
    done: Future[Any]
    then: Callable[[Any], None] | None
    context: Context
    due_at: float


def check_is_file(path: Path) -> None:
    """Refuse what is no file in a journal's place, a link to a device for example, before anything of it is changed.

    Raises:
        AgentError: JOURNAL_UNAVAILABLE.
        OSError: there is nothing, or it cannot be looked at.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise AgentError(Code.JOURNAL_UNAVAILABLE, f"{path} is not a file", remedy=_NO_FILE, expected=False)


def check_file(path: Path) -> list[str]:
    """Check a journal wholly, also while an agent uses it, and change nothing; return what is wrong with it.

    Raises:
        AgentError: JOURNAL_UNAVAILABLE, when it cannot be read, or a newer agent wrote it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            _read_version(db, path)
            return _find_damage(db, f"integrity_check({_MOST_FAULTS})")
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise AgentError(Code.JOURNAL_UNAVAILABLE, f"{path}: {error}") from error
        return [str(error)]


class JournalFile:
    """Thread-safe. `survey` looks at the file after a failure, as a change does; `on_surveyed` gets what it returns."""

    def __init__(
        self, path: Path, *, survey: Change, on_surveyed: Callable[[Any], None], fault: Fault, recorder: Recorder
    ) -> None:
        self._path = path
        self._log_path = path.with_name(f"{path.name}-wal")
        self._survey, self._on_surveyed = survey, on_surveyed
        self._lock_fd: int | None = None
        # The WAL that was open last, by a descriptor of our own too: while SQLite has it closed after an error, nobody
        # else would have what is in it. None once SQLite has taken it away in good order.
        self._log_lock = threading.Lock()
        self._log_fd: int | None = None
        self._log_inode: tuple[int, int] | None = None
        # After the last commit. Only SQLite may make it smaller.
        self._log_bytes = 0
        self._has_lost_log = False
        self._recorder = recorder
        self._fault = fault
        self._changed = threading.Condition()
        self._writes: list[_Write] = []
        #: Counts the changes that were handed in.
        self.handed_in = 0
        self._asleep = False
        self._closed = True
        # Held by whoever commits.
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._busy_since: float | None = None
        self._db: sqlite3.Connection | None = None
        self._read_lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        #: Why the last commit failed.
        self.failure: str | None = None
        # Why reads fail that are waited for, by thread.
        self._unread: dict[int, str] = {}

    def find_failure(self) -> str | None:
        """Return why the file cannot be written, or read."""
        return self.failure or next(iter(list(self._unread.values())), None)

    def lock(self) -> None:
        """Keep every other process away from the file until `unlock`, or the end of this one.

        Raises:
            AgentError: STATE_DIR_IN_USE; JOURNAL_UNAVAILABLE.
        """
        try:
            # SQLite's own locks are of another kind. They end when any descriptor of the file is closed: this one
            # is opened before all of SQLite's and closed after them.
            descriptor = self._open()
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _find_holder(os.fstat(descriptor).st_ino)
            os.close(descriptor)
            raise AgentError(Code.STATE_DIR_IN_USE, f"{self._path.parent} is in use by process {holder}") from error
        self._lock_fd = descriptor

    def unlock(self) -> None:
        """Let others have the file; it is stopped."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def start(self) -> None:
        """Open the file, check it, bring it to the present schema, and start the writer.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE: it cannot be read or written, is damaged, or a newer agent wrote it.
        """
        try:
            # SQLite gives its -wal and -shm files the mode of this one.
            os.close(self._open())
            self._tell_of_a_missing_log()
            self._db = self._connect()
            self._check(self._db)
            _migrate(self._db, self._path)
            self._reader = self._connect()
            self._inode, self._size = self._identify()
            self._watch_log()
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
        self._drop_log()

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

    def read(self, sql: str, values: tuple[Any, ...] = (), *, wait: bool = False) -> list[Row]:
        """Return the rows of a query; with `wait` not before the file can be read, unless it is closed.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        try:
            return self._read(sql, values)
        except AgentError as error:
            if not wait:
                raise
            return self._read_later(sql, values, error)

    def _read_later(self, sql: str, values: tuple[Any, ...], failure: AgentError) -> list[Row]:
        """Try a read that failed again until it succeeds, as a write that is to be kept.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE: it is closed.
        """
        log.error("journal cannot be read", **error_fields(failure))
        try:
            for failures in itertools.count(1):
                self._unread[threading.get_ident()] = failure.message
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, _BACKOFF.pause_s(failures)):
                        break
                try:
                    return self._read(sql, values)
                except AgentError as error:
                    failure = error
        finally:
            del self._unread[threading.get_ident()]
        raise failure

    def _read(self, sql: str, values: tuple[Any, ...]) -> list[Row]:
        with self._read_lock:
            try:
                if self._reader is None:
                    if not self._has_log():
                        raise sqlite3.OperationalError("its WAL was removed and is being restored")
                    self._reader = self._connect()
                rows = self._reader.execute(sql, values).fetchall()
                if self._closed:  # read late: nobody else would close it
                    self._close_reader()
                if self._log_inode is None:  # nobody had the file: this is the WAL that is open now
                    self._watch_log()
                return rows
            except (sqlite3.Error, OSError) as error:
                self._close_reader()
                raise self._unavailable(error) from error

    def look(self) -> None:
        """Restore a removed WAL at once, and not only with the next change. To be called every second or so.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE, when the journal is closed.
        """
        if self.failure is None and (not self._has_log() or self._is_log_cut()):
            self.write_later("look", lambda db: None, keep=False)

    def stalled_s(self) -> float:
        """Return for how long the writer has been at one commit; 0 when it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _hand_in(self, name: str, change: Change, keep: bool, then: Callable[[Any], None] | None) -> Future[Any]:
        """Add to what the next commit takes; under the lock."""
        if self._closed:
            raise AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: closed")
        done: Future[Any] = Future()
        self.handed_in += 1
        self._writes.append(_Write(name, change, keep, done, then, copy_context(), time.monotonic() + LATER_S))
        return done

    # -- the writer's thread

    def _run(self) -> None:
        failures, closing = 0, False
        while not closing:
            closing = self._await_writes(None if self.failure is None else _BACKOFF.pause_s(failures or 1))
            with self._turn:
                while (is_taken := self._commit_gathered()) and closing and self._writes:
                    pass
            failures = 0 if is_taken else failures + 1
        for write in self._writes:
            error = AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: {self.failure}", expected=False)
            write.done.set_exception(error)
        self._close_db()

    def _await_writes(self, pause_s: float | None) -> bool:
        """Wait until a change has waited long enough, after a failure for `pause_s`; return whether it is the last."""
        with self._changed:
            if pause_s is not None:
                self._changed.wait_for(lambda: self._closed, pause_s)
            while self.failure is None and not self._closed:
                if not self._writes:
                    self._asleep = True
                    self._changed.wait()
                    self._asleep = False
                elif (left_s := self._writes[0].due_at - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                else:
                    break
            return self._closed

    # -- commits, of whoever has the turn

    def _commit_gathered(self) -> bool:
        """Commit what has gathered; return whether the file took it."""
        with self._changed:
            batch, self._writes = self._writes[:_BATCH], self._writes[_BATCH:]
        if not batch and self.failure is None:
            return True
        self._busy_since = started = time.monotonic()
        error = self._commit(batch)
        self._busy_since = None
        if error is None:
            self._recorder.committed(time.monotonic() - started, len(batch))
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
        if self.failure is not None:
            done: Future[Any] = Future()
            survey = _Write("survey", self._survey, False, done, self._on_surveyed, copy_context(), time.monotonic())
            batch = [*batch, survey]
        try:
            outcomes = self._transact(batch)
        except (sqlite3.Error, OSError) as error:
            if self.failure != str(error):
                log.error("journal cannot be written", waiting=len(batch), **error_fields(self._unavailable(error)))
            self.failure = str(error)
            self._close_db()
            return error
        except Exception as error:
            # Nobody foresaw it, and trying again would end alike: none of these changes is made; waiters get the error.
            log.failure("journal changes are not made", error, waiting=len(batch))
            self._close_db()
            for write in batch:
                write.done.set_exception(error)
            return None
        if self.failure is not None:
            log.info("journal can be written again", path=self._path)
            self.failure = None
        settled: list[tuple[_Write, Any, Exception | None]] = []
        for write, result, failure in outcomes:
            try:
                if failure is None:
                    self._fault(f"journal.{write.name}:committed")
                    write.context.run(self._tell, write, result)
            except Exception as error:
                failure = error
            settled.append((write, result, failure))
        for write, result, failure in settled:
            write.done.set_exception(failure) if failure else write.done.set_result(result)
        return None

    def _transact(self, batch: list[_Write]) -> list[tuple[_Write, Any, Exception | None]]:
        self._refuse_another_file()
        if not self._has_log():
            self._mend_log()
        self._refuse_a_cut_log()
        if self._db is None:
            self._db = self._connect()
        outcomes: list[tuple[_Write, Any, Exception | None]] = []
        self._db.execute("BEGIN IMMEDIATE")
        if self.failure is not None:
            # Proves with nothing else to write that the file can be written again.
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        for write in batch:
            outcomes.append((write, *write.context.run(_attempt, write, self._db)))
            self._fault(f"journal.{write.name}:written")
        if self._log_inode is None:
            self._watch_log()
        self._db.execute("COMMIT")
        # What went to a file that nobody will find again is not reported as stored.
        self._refuse_another_file()
        if not self._has_log():
            self._mend_log()
        self._measure_log()
        return outcomes

    def _tell(self, write: _Write, result: Any) -> None:
        if write.then is not None:
            try:
                write.then(result)
            except Exception as error:
                log.failure("action after a journal write failed", error, write=write.name)

    # -- the file

    def _connect(self) -> sqlite3.Connection:
        # Opened by URI: a file that was removed must not come back empty.
        db = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        is_small = self._path.stat().st_size <= _WHOLE_CHECK_BYTES
        if found := _find_damage(db, "integrity_check(1)" if is_small else "quick_check(1)"):
            raise sqlite3.DatabaseError(f"damaged: {found[0]}")

    def _tell_of_a_missing_log(self) -> None:
        """Log it if the WAL was removed and the agent was killed before it could restore it: nobody has it open now.

        SQLite removes the WAL first and then its index (-shm): an index without a WAL is not its doing.
        """
        if self._log_path.with_name(f"{self._path.name}-shm").exists() and not self._log_path.exists():
            log.error("journal's WAL is missing", lost="the newest tasks", path=self._log_path)

    def _refuse_another_file(self) -> None:
        inode, size = self._identify()
        if inode != self._inode or size < self._size:
            raise sqlite3.DatabaseError("the file was replaced or truncated while the agent ran")
        self._size = size

    def _refuse_a_cut_log(self) -> None:
        """Refuse a WAL that somebody else truncated, unless all that it held is in the file: then a checkpoint did it.

        SQLite would write behind the gap, and find nothing of it after the next start.
        """
        if self._is_log_cut() and not self._has_lost_log:
            self._has_lost_log = True
            self._db = self._db or self._connect()
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._has_lost_log = False
        if self._has_lost_log:
            raise _LostLogError("its WAL was truncated while the agent ran")

    def _is_log_cut(self) -> bool:
        with self._log_lock, contextlib.suppress(OSError):  # a disk that does not tell is found out by SQLite
            return self._log_fd is not None and os.fstat(self._log_fd).st_size < self._log_bytes
        return False

    def _measure_log(self) -> None:
        """Note how large the WAL is after a commit, which began with its header if it wrote anything."""
        with self._log_lock, contextlib.suppress(OSError):
            if self._log_fd is None:
                return
            self._log_bytes = os.fstat(self._log_fd).st_size
            self._has_lost_log = self._log_bytes > 0 and os.pread(self._log_fd, 4, 0) not in _LOG_MAGICS
        if self._has_lost_log:
            raise _LostLogError("its WAL was truncated during a commit")

    def _has_log(self) -> bool:
        """Return whether the open WAL is the one that is found by its name; true also if none is open."""
        return self._log_inode is None or self._log_inode == _find_inode(self._log_path)

    def _mend_log(self) -> None:
        """Bring what the lost WAL holds into the file, and begin a new one.

        It is still whole for whoever has it open. What lies in its place by now is another's, and goes: SQLite removes
        the WAL by its name when the last connection is closed. Where none is open, after an error, it is put back.
        """
        with self._read_lock:
            if self._db is not None:
                self._close_reader()
                self._reader, self._db = self._db, None
            if self._reader is not None:
                # Kept open until it has succeeded: nobody else has that log.
                (is_busy, _, _) = self._reader.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if is_busy:
                    raise sqlite3.OperationalError("its WAL was removed, and another process has the file open")
                self._close_reader()
                self._drop_log()
            else:
                self._restore_log()
        log.error("journal's WAL was removed while the agent ran, and has been restored", path=self._log_path)

    def _restore_log(self) -> None:
        assert self._log_fd is not None
        whole = self._log_path.with_name(f"{self._log_path.name}.restored")
        with open(whole, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as target:
            for at in range(0, os.fstat(self._log_fd).st_size, _COPY_BYTES):
                target.write(os.pread(self._log_fd, _COPY_BYTES, at))
            target.flush()
            os.fsync(target.fileno())
        whole.replace(self._log_path)
        self._watch_log()

    def _watch_log(self) -> None:
        with self._log_lock:
            self._let_log_go()
            with contextlib.suppress(FileNotFoundError):
                self._log_fd = os.open(self._log_path, os.O_RDONLY)
                facts = os.fstat(self._log_fd)
                self._log_inode, self._log_bytes = (facts.st_dev, facts.st_ino), facts.st_size

    def _drop_log(self) -> None:
        with self._log_lock:
            self._let_log_go()

    def _let_log_go(self) -> None:
        if self._log_fd is not None:
            os.close(self._log_fd)
        self._log_bytes = 0
        self._log_fd = self._log_inode = None

    def _identify(self) -> tuple[tuple[int, int], int]:
        """Return what identifies this file, and its size, which never shrinks."""
        facts = self._path.stat()
        return (facts.st_dev, facts.st_ino), facts.st_size

    def _close_db(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            self._close(db)

    def _close_reader(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            self._close(reader)

    def _close(self, db: sqlite3.Connection) -> None:
        """Close a connection. The last one takes the WAL away once all that it holds is in the file.

        A WAL that stays after that is still needed, as is one that somebody removed before.
        """
        was_there = self._has_log()
        with contextlib.suppress(sqlite3.Error):
            db.close()
        if self._db is None and self._reader is None and was_there and _is_gone(self._log_path):
            self._drop_log()

    def _open(self) -> int:
        """Open the file for its owner alone, made if it does not exist; return the descriptor.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE: something else is in its place, as a link to a device is.
            OSError: it cannot be opened.
        """
        with contextlib.suppress(FileNotFoundError):
            check_is_file(self._path)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        return descriptor

    def _unavailable(self, error: Exception) -> AgentError:
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        remedy = _CUT if isinstance(error, _LostLogError) else _DAMAGED if damaged else None
        return AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: {error}", remedy=remedy, expected=False)


def _find_damage(db: Database, pragma: str) -> list[str]:
    rows = db.execute(f"PRAGMA {pragma}").fetchall()
    return [row[0] for row in rows if row[0] != "ok"]


def _read_version(db: Database, path: Path) -> int:
    """Return the version of a file's schema.

    Raises:
        AgentError: JOURNAL_UNAVAILABLE: a newer agent wrote it.
    """
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    if found > len(MIGRATIONS):
        raise AgentError(
            Code.JOURNAL_UNAVAILABLE,
            f"{path}: schema version {found}, this agent knows up to {len(MIGRATIONS)}",
            remedy="Run the newer agent version that wrote it, or move the file away.",
        )
    return found


def _find_inode(path: Path) -> tuple[int, int] | None:
    """Return what a name leads to; None where it leads nowhere, whatever keeps it from that."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _is_gone(path: Path) -> bool:
    """Return whether nothing has that name; not so where that cannot be found out."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _find_holder(inode: int) -> str:
    """Return the process that has the lock on a file.

    Source: proc(5), /proc/locks: "1: FLOCK  ADVISORY  WRITE 358 08:01:1234 0 EOF". The device is left out: some file
    systems show another there than to stat(2).
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                return words[4]
    return "unknown"


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
        log.failure("journal write failed with an unexpected error", error, write=write.name)
        return None, AgentError(Code.INTERNAL_ERROR, f"journal: {write.name}: {error}", expected=False)


def _migrate(db: Database, path: Path) -> None:
    """Bring a file to the present schema, one version at a time, each in one transaction."""
    found = _read_version(db, path)
    for version, statements in enumerate(MIGRATIONS[found:], start=found + 1):
        db.execute("BEGIN IMMEDIATE")
        for statement in statements:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
        log.info("journal schema", path=path, version=version)
