"""The journal: every task from acceptance to delivery. Apart from its file, the agent's only SQL.

    accepted -> running -> finished -> delivered | gone | given_up
                 finished: the reply is there and its callback is owed
                 gone: the receiver answered 404; given_up: it took nothing for too long

A task that `accept` returned is on disk. Every later change is kept until it is on disk too, however long the disk
is full: what was accepted may have to wait, and is never lost.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.reply import Problem
from kvmagent.model.units import format_size
from kvmagent.model.vmname import VmId
from kvmagent.recorder import Recorder
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journalfile import Database, JournalFile, Row

#: Its file in the agent's state directory.
JOURNAL = "journal.sqlite"

State = Literal["accepted", "running", "finished", "delivered", "gone", "given_up"]
UNFINISHED: tuple[State, ...] = ("accepted", "running")

# From each state, the states that may follow. A task that was running when the agent died is started once more; one
# that nothing can be done about (its plugin was removed) ends without having run; a settled one is owed again when its
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
SETTLED: tuple[State, ...] = ("delivered", "gone", "given_up")
_SETTLED = f"state IN {SETTLED}"
# Settled tasks are removed in batches, so that no accept waits long behind one, and not more often than this.
_PRUNE_BATCH, _PRUNE_INTERVAL_S = 200, 10.0
# Nor that often where nothing was written since: entries may get older by so much. A look goes through all of them.
# Observed: with 10,000 tasks, 0.3 % of a CPU for a look each 10 s, most of an idle agent's.
_PRUNE_IDLE_S = 600.0
# Where the file is full so many make room at once.
_ROOM_BATCH = 20
# Entries of VMs' histories that are kept: some 40 MB.
_MOST_CHANGES = 100_000
# A caller is not kept waiting longer by a disk that hangs, but for the one whose own thread is at it.
_ACCEPT_WAIT_S = 30.0


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a list tells of a task. Times are seconds since the epoch; of the reply, JSON, it may be a part."""

    task_uuid: str
    command: str
    lane: str
    callback_url: str
    client: str
    caller: str = ""
    seq: int = 0
    state: State = "accepted"
    accepted_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    reply: bytes | None = None
    outcome: str | None = None
    attempts: int = 0
    delivery_error: str | None = None
    vm_uuid: str = ""
    vm_name: str = ""

    @property
    def vm(self) -> str:
        """The VM's name, or as it was named in the request where the VM has not been seen."""
        return self.vm_name or self.lane


class Task(TaskSummary, frozen=True, kw_only=True):
    """One task as the journal has it; request, goal and before are JSON, the reply is whole.

    `own_at` is when it was accepted, or its callback last came to be owed, in the agent's own time. `traceparent`: the
    trace that its caller named, or nothing. `vm_uuid`, `vm_name`: of its VM, empty until that was seen.
    `recovered`: it was left unfinished and is taken up again. Not in the file: it is so of what `unfinished` returns.
    """

    request: bytes
    goal: bytes | None = None
    before: bytes | None = None
    own_at: float = 0.0
    traceparent: str = ""
    recovered: bool = False

    @property
    def log_fields(self) -> dict[str, str]:
        """What every line carries that is logged while somebody works on the task."""
        trace = {"traceparent": self.traceparent} if self.traceparent else {}
        return {
            "task": self.task_uuid,
            "vm": self.vm,
            **({"uuid": self.vm_uuid} if self.vm_uuid else {}),
            "command": self.command,
            "caller": self.caller or "unknown",
            **trace,
        }


class StepRecord(msgspec.Struct, frozen=True):
    """One step as the journal has it; `elapsed_ms` is None while it runs, and of one that was `cut_off`: by the end of
    the agent or by libvirt's. `step` and `problem` are JSON.
    """

    step: bytes
    started_at: float
    elapsed_ms: float | None
    problem: str | None
    cut_off: bool = False


class Change(msgspec.Struct, frozen=True):
    """What a task made of its VM, for the VM's history.

    `asked` are the totals that it asked for, `totals` the VM's numbers before and after, by their names in a log line.
    """

    vm_uuid: str
    vm_name: str
    asked: Mapping[str, int]
    totals: Mapping[str, int]
    error_code: str | None


class ChangeRecord(msgspec.Struct, frozen=True):
    """One entry of a VM's history, which outlives its task; `seq` is the task's, `asked` and `totals` are JSON."""

    seq: int
    task_uuid: str
    vm_uuid: str
    vm_name: str
    command: str
    caller: str
    client: str
    accepted_at: float
    finished_at: float
    outcome: str
    error_code: str | None
    asked: bytes
    totals: bytes


class StepTime(NamedTuple):
    """How long one step of a task took that has reached its goal."""

    task_uuid: str
    command: str
    kind: str
    elapsed_ms: float | None


class Undelivered(msgspec.Struct, frozen=True):
    """A callback that is owed since `own_at` in the agent's own time, without its body: delivery keeps it in memory."""

    task_uuid: str
    lane: str
    callback_url: str
    client: str
    own_at: float


class Left(NamedTuple):
    """What is still to be done: the unfinished tasks and the owed callbacks, in order of acceptance."""

    unfinished: list[Task]
    owed: list[Undelivered]


class Journal:
    """Thread-safe. `on_accepted` is called on the thread that commits, in order of acceptance, after the commit.

    It also gets a known task that is unfinished and was sent again. `on_left` is called after a disk error, with what
    the file has then: it may be more than was told. `max_bytes` is what the file may hold before the oldest settled
    tasks are forgotten, and new ones refused where there are none.

    The agent's own time is what it has spent running, in seconds: no step of the clock changes it, and after a start
    it goes on from the last that the file tells of. What was owed before the start counts from there.

    Every method may raise AgentError JOURNAL_UNAVAILABLE: reads when the file cannot be read, `accept` when it cannot
    be written (`cancel` and `owe_again` likewise), the other writes, and reads that wait, only when the journal is
    stopped before.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_accepted: Callable[[Task], None],
        on_left: Callable[[Left], None] = lambda _left: None,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
        fault: Fault = no_fault,
        recorder: Recorder | None = None,
    ) -> None:
        self._file = JournalFile(
            path, survey=_find_left, on_surveyed=on_left, fault=fault, recorder=recorder or Recorder()
        )
        self._on_accepted = on_accepted
        #: What the file may hold; None: as much as there is room for.
        self.max_bytes = max_bytes
        self._clock = clock
        self._elapsed = elapsed
        # When the agent's own time began, as `elapsed` counts.
        self._own_since = 0.0
        self._pruned_at: float | None = None
        # What the last look went by: the limits, and how many writes there were.
        self._pruned: tuple[int, float, float, int] | None = None
        #: Counts the results that were recorded since the start.
        self.results = 0

    def lock(self) -> None:
        """Keep every other process away until `unlock`.

        Raises:
            AgentError: STATE_DIR_IN_USE; JOURNAL_UNAVAILABLE.
        """
        self._file.lock()

    def unlock(self) -> None:
        """Let others have it; it is stopped."""
        self._file.unlock()

    def start(self) -> None:
        """Open the journal and start its writer.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        self._file.start()
        sql = "SELECT max(own_at) AS at FROM (SELECT own_at FROM tasks UNION ALL SELECT own_at FROM steps)"
        (last,) = self._file.read(sql)
        self._own_since = self._elapsed() - (last["at"] or 0.0)
        self._file.write_later("cut_steps", lambda db: db.execute(_CUT_STEPS))

    def own_time(self) -> float:
        """Return the agent's own time."""
        return self._elapsed() - self._own_since

    def look(self) -> None:
        """Look after the file; to be called every second or so.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE, when the journal is closed.
        """
        self._file.look()

    def stop(self) -> None:
        """Commit what was handed in, then close."""
        self._file.stop()

    def check(self) -> str | None:
        """Return why the last commit failed, or what a task wants to read; None while they succeed."""
        return self._file.find_failure()

    def stalled_s(self) -> float:
        """Return for how long the writer has been at one commit."""
        return self._file.stalled_s()

    # -- writes: each returns when it is on disk, except where it says otherwise

    def accept(
        self, task: Task, *, for_all: bool = False, then: Callable[[], None] = lambda: None
    ) -> tuple[Task, bool]:
        """Store a new task, or find the one that has its id; return it and whether it is new.

        `for_all`: by who may act for all callers. `then` is called once a new one is on disk, before anybody can begin
        with it.

        Raises:
            AgentError: TASK_NOT_YOURS, when the id belongs to another caller's task; TASK_CONFLICT, when it belongs to
                another request; JOURNAL_UNAVAILABLE, at once.
        """

        def tell(stored: tuple[Task, bool]) -> None:
            task, is_new = stored
            if is_new:
                then()
                self._on_accepted(task)
            elif task.state in UNFINISHED:
                self._on_accepted(msgspec.structs.replace(task, recovered=True))

        # Given up it may yet be stored and done; sent again it is the same task.
        with _given_up_in_time("the task"):
            stored: tuple[Task, bool] = self._file.write_now(
                "accept",
                lambda db: self._accept(db, task, for_all=for_all),
                keep=False,
                then=tell,
                timeout_s=_ACCEPT_WAIT_S,
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
            _start_step(db, task_uuid, n, first_step, self._clock(), self.own_time())

        self._file.write_now("record_goal", change)

    def start_step(self, task_uuid: str, n: int, step: bytes, *, wait: bool) -> None:
        """Store that a step begins; waits for the disk only where told to."""
        write = self._file.write_now if wait else self._file.write_later
        now, own = self._clock(), self.own_time()
        write("start_step", lambda db: _start_step(db, task_uuid, n, step, now, own))

    def finish_step(self, task_uuid: str, n: int, elapsed_ms: float, problem: Problem | None) -> None:
        """Store that a step ended; does not wait for the disk."""
        words = None if problem is None else msgspec.json.encode(problem).decode()
        sql = "UPDATE steps SET elapsed_ms = ?, problem = ? WHERE task_uuid = ? AND n = ?"
        self._file.write_later("finish_step", lambda db: db.execute(sql, (elapsed_ms, words, task_uuid, n)))

    def keep_left(self, vm_uuid: str, run: str, cpus: frozenset[int], *, instead: bool = False) -> None:
        """Store which CPUs of its guest the agent has left offline in that run of a VM; those of its other runs go.

        Beside those that are stored, or `instead` of them. Does not wait for the disk: the next change that does has it
        on disk.
        """

        def change(db: Database) -> None:
            db.execute(
                f"DELETE FROM left_cpus WHERE vm_uuid = ? AND {'1' if instead else 'run != ?'}",
                ((vm_uuid,) if instead else (vm_uuid, run)),
            )
            rows = [(vm_uuid, run, cpu) for cpu in cpus]
            db.executemany("INSERT OR IGNORE INTO left_cpus (vm_uuid, run, cpu) VALUES (?, ?, ?)", rows)

        self._file.write_later("keep_left", change)

    def forget_runs(self, boot_id: str) -> None:
        """Forget what was left offline before the host's present boot, with which every run ended; does not wait."""
        sql = "DELETE FROM left_cpus WHERE run NOT LIKE '%@' || ?"
        self._file.write_later("forget_runs", lambda db: db.execute(sql, (boot_id,)))

    def cut_step(self, task_uuid: str, n: int) -> None:
        """Store that a step was cut off, and may have had its effect; does not wait for the disk."""
        sql = "UPDATE steps SET cut_off = 1 WHERE task_uuid = ? AND n = ?"
        self._file.write_later("cut_step", lambda db: db.execute(sql, (task_uuid, n)))

    def note_vm(self, task_uuid: str, vm_uuid: str, vm_name: str) -> None:
        """Store which VM a task is about, now that it was seen; does not wait for the disk."""
        sql = "UPDATE tasks SET vm_uuid = ?, vm_name = ? WHERE task_uuid = ?"
        self._file.write_later("note_vm", lambda db: db.execute(sql, (vm_uuid, vm_name, task_uuid)))

    def finish(self, task_uuid: str, reply: bytes, outcome: str, made: Change | None = None) -> Undelivered:
        """-> finished: the result, with it the callback that is owed, and what it `made` of its VM.

        Raises AgentError CANCELLED when the task was taken back before: it has its result.
        """

        def change(db: Database) -> Undelivered:
            _refuse_withdrawn(db, task_uuid, reply)
            moved = _move(db, task_uuid, "finished", reply=reply, outcome=outcome, finished_at=now, own_at=own_at)
            if made is not None:
                _add_change(db, task_uuid, made)
            return moved

        now, own_at = self._clock(), self.own_time()
        owed: Undelivered = self._file.write_now("finish", change)
        self.results += 1
        return owed

    def cancel(self, task_uuid: str, reply: bytes, outcome: str, *, then: Callable[[Undelivered], None]) -> None:
        """-> finished, for a task that has touched nothing yet: it has no goal. Its callback is owed as of any other.

        `then` gets it once it is on disk, also where that comes after the caller was given up. Raises AgentError
        TASK_NOT_CANCELLABLE with what the task is doing; JOURNAL_UNAVAILABLE, at once.
        """

        def change(db: Database) -> Undelivered:
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
                    f"task {task_uuid} is already changing its VM ({step})",
                    details={"state": row["state"], "step": step},
                )
            return _move(db, task_uuid, "finished", reply=reply, outcome=outcome, finished_at=now, own_at=own_at)

        now, own_at = self._clock(), self.own_time()
        with _given_up_in_time("the withdrawal"):
            self._file.write_now("cancel", change, keep=False, then=then, timeout_s=_ACCEPT_WAIT_S)

    def finish_late(
        self, task_uuid: str, reply: bytes, outcome: str, *, owed: bool, made: Change | None = None
    ) -> Undelivered | None:
        """Store a result that came after the answer, in place of it; return the callback, where one is owed.

        Not while the first callback is owed: it would be taken for the second. Raises AgentError TASK_CONFLICT then.
        """

        def change(db: Database) -> Undelivered | None:
            row = db.execute("SELECT state, reply FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
            # With this reply it is an earlier try, which came to disk all the same.
            if row is None or (row["state"] == "finished" and row["reply"] != reply):
                raise AgentError(Code.TASK_CONFLICT, f"the first callback of task {task_uuid} is not delivered yet")
            values = {"reply": reply, "outcome": outcome, "finished_at": now}
            moved = None
            if owed:
                moved = _move(db, task_uuid, "finished", **values, own_at=own_at, attempts=0, delivery_error=None)
            else:
                columns = ", ".join(f"{name} = ?" for name in values)
                db.execute(f"UPDATE tasks SET {columns} WHERE task_uuid = ?", (*values.values(), task_uuid))
            if made is not None:
                _add_change(db, task_uuid, made)
            return moved

        now, own_at = self._clock(), self.own_time()
        callback: Undelivered | None = self._file.write_now("finish_late", change)
        return callback

    def note_refusal(
        self, vm_uuid: str, alias: str, at: float, *, pending: Code, problem: Problem, then: Callable[[list[str]], None]
    ) -> None:
        """Replace `pending` by `problem` if a task still waits for that VM to release that device.

        Does not wait; `then` gets the tasks, on the writer's thread. Steps that began after `at`, in the agent's own
        time, are another matter.
        """
        sql = (
            "UPDATE steps SET problem = ? WHERE json_extract(problem, '$.code') = ? AND own_at <= ?"
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

    def record_delivery(self, task_uuid: str, state: State, error: str | None, *, attempts: int | None = None) -> None:
        """finished -> delivered, gone or given_up; does not wait: a callback may arrive twice, not never."""
        values: dict[str, Any] = {"delivery_error": error} | ({} if attempts is None else {"attempts": attempts})

        def change(db: Database) -> None:
            row = db.execute("SELECT state FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
            # It is so already where an earlier try came to disk all the same.
            if row is None or row["state"] != state:
                _move(db, task_uuid, state, **values)

        self._file.write_later("settle", change)

    def owe_again(self, task_uuid: str) -> Undelivered:
        """delivered, gone or given_up -> finished: the caller asked for the callback again, from now on."""

        def change(db: Database) -> Undelivered:
            return _move(db, task_uuid, "finished", attempts=0, delivery_error=None, own_at=own_at)

        own_at = self.own_time()
        with _given_up_in_time("the callback"):
            owed: Undelivered = self._file.write_now("owe_again", change, keep=False, timeout_s=_ACCEPT_WAIT_S)
        return owed

    def prune(self, *, keep_tasks: int, keep_s: float, keep_changes_s: float) -> None:
        """Remove the oldest settled tasks above a number, and those above an age; does not wait.

        VMs' histories go by their own age.

        Above an age by the clock and by the agent's own time. Cheap to call often. What is unfinished or owed stays,
        however old.
        """
        now, own = self._clock(), self.own_time()
        is_same = self._pruned == (keep_tasks, keep_s, keep_changes_s, self._file.handed_in)
        interval_s = _PRUNE_IDLE_S if is_same else _PRUNE_INTERVAL_S
        if self._pruned_at is not None and own - self._pruned_at < interval_s:
            return
        self._pruned_at, handed_in = own, self._file.handed_in

        def change(db: Database) -> int:
            _prune_changes(db, now - keep_changes_s, own - keep_changes_s)
            return _prune(db, keep_tasks, now - keep_s, own - keep_s)

        def again(removed: int) -> None:
            if removed == _PRUNE_BATCH:
                with contextlib.suppress(AgentError):  # the journal has been stopped meanwhile
                    self._file.write_later("prune", change, keep=False, then=again)

        self._file.write_later("prune", change, keep=False, then=again)
        self._pruned = keep_tasks, keep_s, keep_changes_s, handed_in + 1

    # -- reads

    def find(self, task_uuid: str, *, wait: bool = False) -> Task | None:
        """Return the task of that id; with `wait` as soon as the file can be read."""
        rows = self._file.read(f"SELECT {_WHOLE} FROM tasks WHERE task_uuid = ?", (task_uuid,), wait=wait)
        return Task(**dict(rows[0])) if rows else None

    def unfinished(self) -> list[Task]:
        """Return what an earlier agent left to do, in order of acceptance."""
        return [_read_unfinished(row) for row in self._file.read(_UNFINISHED)]

    def find_goal_of(self, vm_uuid: str) -> str | None:
        """Return the oldest unfinished task that has recorded a goal for that VM, by whatever name it came.

        It waits until the file can be read.
        """
        sql = (
            "SELECT task_uuid FROM tasks WHERE state = 'running' AND goal IS NOT NULL"
            " AND json_extract(CAST(before AS TEXT), '$.domain.uuid') = ? ORDER BY seq LIMIT 1"
        )
        rows = self._file.read(sql, (vm_uuid,), wait=True)
        return rows[0]["task_uuid"] if rows else None

    def find_left(self, vm_uuid: str) -> tuple[str | None, frozenset[int]]:
        """Return the run of a VM in which CPUs of its guest were left offline, and those."""
        rows = self._file.read("SELECT run, cpu FROM left_cpus WHERE vm_uuid = ?", (vm_uuid,))
        return (rows[0]["run"] if rows else None), frozenset(row["cpu"] for row in rows)

    def pending(self) -> list[str]:
        """Return the tasks that answered `pending`: what they removed may still leave."""
        return [row["task_uuid"] for row in self._file.read("SELECT task_uuid FROM tasks WHERE outcome = 'pending'")]

    def owed(self) -> list[Undelivered]:
        """Return the callbacks that are owed, in order of acceptance."""
        return [Undelivered(**dict(row)) for row in self._file.read(_OWED)]

    def newest(
        self,
        *,
        state: State | None = None,
        vm: VmId | None = None,
        owner: str | None = None,
        caller: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        until: float | None = None,
        prefix: str | None = None,
        before: int | None = None,
        limit: int,
    ) -> list[TaskSummary]:
        """Return tasks, newest first; of each reply what went wrong (error, errorCode, remedy), and no more is read.

        `vm` is found by either of its names, whichever its caller used; a part that is not known is empty. `owner` and
        `caller` are callers, of which both have to fit. `since` and `until` are of the acceptance; `prefix` begins the
        task's id. `before`: accepted before the task with this number (`seq`).
        """
        where, values = ["1"], list[Any]()
        for condition, value in (
            ("state = ?", state),
            ("caller = ?", owner),
            ("caller = ?", caller),
            ("outcome = ?", outcome),
            ("accepted_at >= ?", since),
            ("accepted_at < ?", until),
            ("seq < ?", before),
            # An id has nothing that GLOB takes for a pattern; what was asked for may.
            ("task_uuid GLOB ?", None if prefix is None else f"{_glob_escaped(prefix)}*"),
        ):
            if value is not None:
                where.append(condition)
                values.append(value)
        if vm is not None:
            where.append(f"({_of_vm('tasks')} OR lane IN (?, ?))")
            values += [*_vm_values(vm), vm.name, vm.uuid.replace("-", "")]
        sql = f"SELECT {_SUMMARY} FROM tasks WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"
        return [TaskSummary(**dict(row)) for row in self._file.read(sql, (*values, limit))]

    def changes(self, vm: VmId, *, before: int | None = None, limit: int) -> list[ChangeRecord]:
        """Return what changed a VM, newest first; a part of its names that is not known is empty.

        `before`: before the change with this number (`seq`).
        """
        columns = ", ".join(ChangeRecord.__struct_fields__)
        where, values = _of_vm("changes"), list[Any](_vm_values(vm))
        if before is not None:
            where = f"({where}) AND seq < ?"
            values.append(before)
        sql = f"SELECT {columns} FROM changes WHERE {where} ORDER BY seq DESC LIMIT ?"
        return [ChangeRecord(**dict(row)) for row in self._file.read(sql, (*values, limit))]

    def steps(self, task_uuid: str, *, wait: bool = False) -> list[StepRecord]:
        """Return the steps of a task in order; with `wait` as soon as the file can be read."""
        sql = "SELECT step, started_at, elapsed_ms, problem, cut_off FROM steps WHERE task_uuid = ? ORDER BY n"
        return [
            StepRecord(**dict(row) | {"cut_off": bool(row["cut_off"])})
            for row in self._file.read(sql, (task_uuid,), wait=wait)
        ]

    def recent_steps(self, *, limit: int) -> list[StepTime]:
        """Return the steps, in order, of the newest tasks that reached their goal by some."""
        sql = (
            "SELECT task_uuid, command, json_extract(CAST(step AS TEXT), '$.step') AS kind, elapsed_ms FROM"
            " (SELECT seq, task_uuid, command FROM tasks WHERE outcome IN ('online', 'plugged', 'configured')"
            " ORDER BY seq DESC LIMIT ?) JOIN steps USING (task_uuid) ORDER BY seq DESC, n"
        )
        return [StepTime(*row) for row in self._file.read(sql, (limit,))]

    def _accept(self, db: Database, task: Task, *, for_all: bool) -> tuple[Task, bool]:
        if self.max_bytes is not None and _count_bytes(db) > self.max_bytes:
            _make_room(db, self.max_bytes, task.task_uuid)
        values = {name: getattr(task, name) for name in _GIVEN} | {
            "state": "accepted",
            "accepted_at": self._clock(),
            "own_at": self.own_time(),
        }
        cursor = db.execute(_INSERT, tuple(values.values()))
        if not cursor.rowcount:
            row = db.execute(f"SELECT {_WHOLE} FROM tasks WHERE task_uuid = ?", (task.task_uuid,)).fetchone()
            known = Task(**dict(row))
            if known.caller != task.caller and not for_all:
                raise task_not_yours(task.task_uuid)
            if (known.command, known.request, known.callback_url) != (task.command, task.request, task.callback_url):
                raise AgentError(
                    Code.TASK_CONFLICT, f"task {task.task_uuid} is a {known.command} with another body or callback URL"
                )
            return known, False
        return msgspec.structs.replace(task, seq=cursor.lastrowid, **values), True


# What a caller gives with a task, and what is written of a new one.
_GIVEN = (
    "task_uuid", "command", "lane", "request", "callback_url", "client", "caller", "traceparent", "vm_uuid", "vm_name",
)  # fmt: skip
_INSERT = (
    f"INSERT INTO tasks ({', '.join(_GIVEN)}, state, accepted_at, own_at)"
    f" VALUES ({', '.join('?' * (len(_GIVEN) + 3))}) ON CONFLICT (task_uuid) DO NOTHING"
)
# A file may have columns of which this version knows nothing, or no longer wants to know.
_WHOLE = ", ".join(name for name in Task.__struct_fields__ if name != "recovered")
_UNFINISHED = f"SELECT {_WHOLE} FROM tasks WHERE state IN ('accepted', 'running') ORDER BY seq"
# What ran when an earlier agent ended.
_CUT_STEPS = (
    "UPDATE steps SET cut_off = 1 WHERE elapsed_ms IS NULL AND task_uuid IN"
    " (SELECT task_uuid FROM tasks WHERE state IN ('accepted', 'running'))"
)
_OWED = f"SELECT {', '.join(Undelivered.__struct_fields__)} FROM tasks WHERE state = 'finished' ORDER BY seq"
# json_quote, for what is no text there is told as it is.
_WRONG = ", ".join(
    f"'{name}', json(json_quote(json_extract(CAST(reply AS TEXT), '$.{name}')))"
    for name in ("error", "errorCode", "remedy")
)
_SUMMARY = ", ".join(
    f"CASE WHEN reply NOTNULL THEN CAST(json_object({_WRONG}) AS BLOB) END AS reply" if name == "reply" else name
    for name in TaskSummary.__struct_fields__
)


def _of_vm(table: str) -> str:
    """Return the condition for a VM: its UUID, a name that it had, or the UUIDs that had this name."""
    uuids = f"SELECT vm_uuid FROM {table} WHERE vm_name = ?"
    return f"(vm_uuid != '' AND (vm_uuid = ? OR vm_name = ? OR vm_uuid IN ({uuids})))"


def _vm_values(vm: VmId) -> tuple[str, ...]:
    return vm.uuid, vm.name, vm.name


def _glob_escaped(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def _add_change(db: Database, task_uuid: str, made: Change) -> None:
    """Store what a task made of its VM; a late result takes the place of the first."""
    sql = (
        "INSERT OR REPLACE INTO changes SELECT seq, task_uuid, ?, ?, command, caller, client, accepted_at, finished_at,"
        " own_at, outcome, ?, ?, ? FROM tasks WHERE task_uuid = ?"
    )
    asked, totals = msgspec.json.encode(made.asked), msgspec.json.encode(made.totals)
    db.execute(sql, (made.vm_uuid, made.vm_name, made.error_code, asked, totals, task_uuid))


def _read_unfinished(row: Row) -> Task:
    return Task(**dict(row), recovered=True)


def _find_left(db: Database) -> Left:
    unfinished = [_read_unfinished(row) for row in db.execute(_UNFINISHED)]
    return Left(unfinished, [Undelivered(**dict(row)) for row in db.execute(_OWED)])


def task_not_yours(task_uuid: str) -> AgentError:
    """Return the refusal of what is asked about another caller's task: it says nothing of it."""
    return AgentError(Code.TASK_NOT_YOURS, f"the task id {task_uuid} belongs to another caller")


@contextlib.contextmanager
def _given_up_in_time(what: str) -> Iterator[None]:
    """Keep no caller waiting longer for a disk that hangs; what was handed in may yet come to be.

    Raises:
        AgentError: JOURNAL_UNAVAILABLE.
    """
    try:
        yield
    except TimeoutError as error:
        message = f"{what} could not be written to disk within {_ACCEPT_WAIT_S:g} s"
        raise AgentError(Code.JOURNAL_UNAVAILABLE, message, expected=False) from error


def _move(db: Database, task_uuid: str, state: State, **values: Any) -> Undelivered:
    """Change a task's state, as TRANSITIONS allows, and its other columns; return whom it concerns.

    Raises AgentError CANCELLED for a task that is to run and was cancelled.
    """
    row = db.execute(_move_sql(state, tuple(values)), (*values.values(), task_uuid)).fetchone()
    if row is None:
        if state == "running":
            _refuse_withdrawn(db, task_uuid)
        row = db.execute("SELECT state FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
        found = "unknown" if row is None else row["state"]
        raise AgentError(Code.INTERNAL_ERROR, f"task {task_uuid} cannot go from {found} to {state}", expected=False)
    return Undelivered(task_uuid, row["lane"], row["callback_url"], row["client"], row["own_at"])


@functools.cache
def _move_sql(state: State, columns: tuple[str, ...]) -> str:
    """Return the statement that changes a task to `state`, from where that may be: values of columns, then the id."""
    formers = ", ".join(f"'{former}'" for former, next_states in TRANSITIONS.items() if state in next_states)
    changes = ", ".join([f"state = '{state}'", *(f"{name} = ?" for name in columns)])
    return (
        f"UPDATE tasks SET {changes} WHERE task_uuid = ? AND state IN ({formers})"
        " RETURNING lane, callback_url, client, own_at"
    )


def _refuse_withdrawn(db: Database, task_uuid: str, reply: bytes | None = None) -> None:
    """Raise CANCELLED if the task was cancelled: otherwise whoever carries it out finds it unfinished.

    Or with its own reply: a commit that failed may have come to disk all the same, and is tried again.
    """
    row = db.execute("SELECT state, reply FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone()
    if row is not None and row["state"] not in UNFINISHED and row["reply"] != reply:
        raise AgentError(Code.CANCELLED, f"task {task_uuid} was cancelled")


def _start_step(db: Database, task_uuid: str, n: int, step: bytes, now: float, own: float) -> None:
    sql = "INSERT OR REPLACE INTO steps (task_uuid, n, step, started_at, own_at) VALUES (?, ?, ?, ?, ?)"
    db.execute(sql, (task_uuid, n, step, now, own))


def _count_bytes(db: Database) -> int:
    """Return what the file holds; pages that are free are used again before it grows."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


_FORGET_CHANGES = f"DELETE FROM changes WHERE seq IN (SELECT seq FROM changes ORDER BY seq LIMIT {_ROOM_BATCH})"


def _make_room(db: Database, max_bytes: int, task_uuid: str) -> None:
    """Forget the oldest settled tasks, then the oldest of VMs' histories, until there is room for another task.

    For one that is known already nothing is forgotten.

    Raises:
        AgentError: QUEUE_FULL.
    """
    if db.execute("SELECT 1 FROM tasks WHERE task_uuid = ?", (task_uuid,)).fetchone():
        return
    sql = f"SELECT seq, task_uuid FROM tasks WHERE {_SETTLED} ORDER BY seq LIMIT {_ROOM_BATCH}"
    while (used := _count_bytes(db)) > max_bytes:
        if not _remove(db, db.execute(sql).fetchall()) and not db.execute(_FORGET_CHANGES).rowcount:
            raise AgentError(
                Code.QUEUE_FULL,
                f"unfinished tasks and undelivered results take {format_size(used)} of the journal, the limit is "
                f"{format_size(max_bytes)}",
            )


def _prune(db: Database, keep_tasks: int, before: float, own_before: float) -> int:
    sql = f"SELECT seq FROM tasks WHERE {_SETTLED} ORDER BY seq DESC LIMIT 1 OFFSET ?"
    surplus = db.execute(sql, (keep_tasks,)).fetchone()
    sql = (
        f"SELECT seq, task_uuid FROM tasks WHERE {_SETTLED} AND (seq <= ? OR finished_at < ? AND own_at < ?)"
        " ORDER BY seq LIMIT ?"
    )
    return _remove(db, db.execute(sql, (surplus["seq"] if surplus else 0, before, own_before, _PRUNE_BATCH)).fetchall())


def _prune_changes(db: Database, before: float, own_before: float) -> None:
    """Remove the oldest entries of VMs' histories above an age or a number, a batch of them."""
    sql = (
        "DELETE FROM changes WHERE seq IN (SELECT seq FROM changes WHERE finished_at < ? AND own_at < ?"
        " OR seq <= (SELECT seq FROM changes ORDER BY seq DESC LIMIT 1 OFFSET ?) ORDER BY seq LIMIT ?)"
    )
    db.execute(sql, (before, own_before, _MOST_CHANGES, _PRUNE_BATCH))


def _remove(db: Database, tasks: list[Row]) -> int:
    db.executemany("DELETE FROM steps WHERE task_uuid = ?", [(row["task_uuid"],) for row in tasks])
    db.executemany("DELETE FROM tasks WHERE seq = ?", [(row["seq"],) for row in tasks])
    return len(tasks)
