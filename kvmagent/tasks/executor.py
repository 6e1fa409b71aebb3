"""Carries a task out: observe, decide, record the goal, perform steps until none is left, conclude, finish.

    run(task)
      journal.start_task
      node.observe                       before
      command.decide      -> goal        an AgentError ends the task, nothing was touched
      journal.record_goal                on disk before the first step
      command.advance     -> steps       none: done
        node.perform each                a soft step's failure is a warning, any other ends the task
        node.observe, advance again
      command.retreat     -> goal        after a failure: where to go instead, by the same loop
      command.conclude    -> reply
      journal.finish                     the result and the owed callback
      on_finished(task)                  delivery

A task that was cut off starts again with the goal that it recorded: it goes on from what it finds.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from kvmagent.logs import log_context
from kvmagent.model.command import Command, Ending, Goal, Problem, StepReport, VmRequest
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.steps import AnyStep
from kvmagent.tasks.journal import Journal, Task

log = logging.getLogger(__name__)

# Rounds of steps after which a plan that still wants more is wrong. A guest that onlines one CPU at a time needs one
# round for each.
_MAX_ROUNDS = 512


class VmNode(Protocol):
    """What the executor needs of hypervisor.node.Node."""

    def get_uuid(self, vm: str) -> str:
        """Return the VM's UUID."""

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now."""

    def perform(self, vm: str, step: AnyStep) -> str:
        """Perform one step; return what it has to tell, mostly nothing."""

    def preview(self, vm: str, step: AnyStep) -> str:
        """Return what the step would tell, without performing it."""


@dataclass
class _Run:
    """One task under way: what a reply is made from, as far as it has come."""

    command: Command
    request: VmRequest
    goal: Goal | None = None
    before: Facts | None = None
    after: Facts | None = None
    reports: list[StepReport] = field(default_factory=list)
    error: AgentError | None = None
    planned: tuple[AnyStep, ...] | None = None
    preview: str = ""
    started: float = 0.0

    def end(self) -> Ending:
        return Ending(
            request=self.request,
            goal=self.goal,
            before=self.before,
            after=self.after,
            reports=tuple(self.reports),
            error=self.error,
            planned=self.planned,
            preview=self.preview,
        )


class Executor:
    """Thread-safe: one call of `run` for each task, on its lane's thread."""

    def __init__(
        self,
        node: VmNode,
        journal: Journal,
        commands: dict[str, Command],
        *,
        on_finished: Callable[[Task], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._journal = journal
        self._commands = commands
        self._on_finished = on_finished
        self._clock = clock
        self._locks = _VmLocks()

    def run(self, task: Task) -> None:
        """Carry one task out and record its reply."""
        with log_context(task=task.task_uuid, vm=task.lane, command=task.command):
            started = self._clock()
            log.info("task started")
            self._journal.start_task(task.task_uuid)
            reply, outcome, error = self._carry_out(task)
            self._journal.finish(task.task_uuid, reply, outcome)
            self._on_finished(task)
            log.info(
                "task finished outcome=%s seconds=%.3f%s",
                outcome,
                self._clock() - started,
                f" error_code={error.code} error={error.message!r}" if error else "",
            )

    def ask(self, command: Command, request: VmRequest) -> msgspec.Struct:
        """Answer a command that changes nothing, without a task.

        Raises:
            AgentError: when the VM cannot be read.
        """
        facts = self._node.observe(request.vm_uuid, command.observe_guest)
        goal = command.decide(request, facts, "")
        return command.conclude(Ending(request, goal, before=facts, after=facts, reports=(), error=None))

    def _carry_out(self, task: Task) -> tuple[bytes, str, AgentError | None]:
        """Return the reply as JSON, its outcome, and the error that it tells."""
        command = self._commands.get(task.command)
        if command is None:
            return _bare_reply(AgentError(Code.INTERNAL_ERROR, f"no plugin declares {task.command}", expected=False))
        run = _Run(command, msgspec.json.decode(task.request, type=command.request), started=self._clock())
        try:
            with self._locks.hold(self._node.get_uuid(run.request.vm_uuid)):
                self._pursue(task, run)
        except AgentError as error:
            run.error = error
        except Exception as error:
            run.error = AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False)
            run.error.__cause__ = error
        if run.error is not None:
            if not run.error.expected:
                log.error("task failed error_code=%s", run.error.code, exc_info=run.error)
            self._look_again(run)
        try:
            reply = command.conclude(run.end())
        except Exception as error:
            log.exception("no reply could be made")
            return _bare_reply(AgentError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {error}", expected=False))
        return msgspec.json.encode(reply), str(getattr(reply, "outcome", "")), run.error

    def _pursue(self, task: Task, run: _Run) -> None:
        vm, command = run.request.vm_uuid, run.command
        run.before = run.after = self._node.observe(vm, command.observe_guest)
        if task.goal is not None and task.before is not None:
            run.goal = msgspec.json.decode(task.goal, type=command.goal)
            run.before = msgspec.json.decode(task.before, type=Facts)
            log.info("task goes on from its recorded goal")
        else:
            run.goal = command.decide(run.request, run.after, task.task_uuid)
        steps = command.advance(run.goal, run.after, frozenset())
        if run.request.dry_run:
            run.planned, run.preview = steps, "".join(self._node.preview(vm, step) for step in steps)
            return
        if steps and task.goal is None:
            self._record_goal(task, run)
        try:
            self._reach_goal(task, run)
        except AgentError as error:
            self._retreat(task, run, error)
            raise

    def _reach_goal(self, task: Task, run: _Run) -> None:
        """Plan, perform and look again until nothing is left to do; what has no effect is not tried again.

        Raises:
            AgentError: what a step ended in; NOT_VERIFIED, when a change was confirmed and is not there.
        """
        spent: set[str] = set()
        steps: tuple[AnyStep, ...] = ()
        for _ in range(_MAX_ROUNDS):
            assert run.after is not None
            last, steps = steps, run.command.advance(run.goal, run.after, frozenset(spent))
            if steps and steps == last:
                spent |= {step.key for step in steps}
                steps = run.command.advance(run.goal, run.after, frozenset(spent))
            if not steps:
                return
            self._refuse_repetition(run, steps)
            for step in steps:
                if (problem := self._perform(task, run, step)) is not None:
                    spent |= {step.key, f"{step.key} {problem.code}"}
                    break  # what follows it was planned for its success
            run.after = self._node.observe(run.request.vm_uuid, run.command.observe_guest)
        raise AgentError(Code.INTERNAL_ERROR, f"still not done after {_MAX_ROUNDS} rounds", expected=False)

    def _refuse_repetition(self, run: _Run, steps: tuple[AnyStep, ...]) -> None:
        """A change that libvirt confirmed and that has to be made again was not made: doing it again helps nobody."""
        done = {report.step for report in run.reports if not report.step.soft}
        again = next((step for step in steps if step in done), None)
        if again is not None:
            raise AgentError(
                Code.NOT_VERIFIED,
                f"libvirt confirmed {type(again).__name__}, and the VM does not show it",
                details={"step": msgspec.to_builtins(again)},
                expected=False,
            )

    def _retreat(self, task: Task, run: _Run, error: AgentError) -> None:
        """Go where the command wants to be after this failure, as far as it can be reached."""
        try:
            run.after = facts = self._node.observe(run.request.vm_uuid, run.command.observe_guest)
            goal = run.command.retreat(run.goal, facts, error)
            if goal is None:
                return
            log.info("task retreats error_code=%s error=%r", error.code, error.message)
            run.goal = goal
            self._record_goal(task, run)
            self._reach_goal(task, run)
        except AgentError as failure:
            log.warning("task cannot retreat error_code=%s error=%r", failure.code, failure.message)

    def _record_goal(self, task: Task, run: _Run) -> None:
        self._journal.record_goal(task.task_uuid, msgspec.json.encode(run.goal), msgspec.json.encode(run.before))

    def _perform(self, task: Task, run: _Run, step: AnyStep) -> Problem | None:
        """Perform and journal one step; return a soft step's problem.

        Raises:
            AgentError: what a step that is not soft ended in.
        """
        n, started, problem, told = len(run.reports), self._clock(), None, ""
        self._journal.start_step(task.task_uuid, n, msgspec.json.encode(step))
        try:
            told = self._node.perform(run.request.vm_uuid, step)
        except AgentError as error:
            problem = Problem(code=error.code, message=error.message, remedy=error.remedy)
            if not step.soft:
                raise
        finally:
            ended = self._clock()
            elapsed_ms = (ended - started) * 1000
            run.reports.append(StepReport(step, elapsed_ms, problem, (ended - run.started) * 1000, told))
            self._journal.finish_step(task.task_uuid, n, elapsed_ms, problem.code if problem else None)
            log.info(
                "step step=%s ms=%.1f%s",
                type(step).__name__,
                elapsed_ms,
                f" problem={problem.code} message={problem.message!r}" if problem else "",
            )
        return problem

    def _look_again(self, run: _Run) -> None:
        """After a failure only a fresh look tells how far it came; unknown is better than stale."""
        if not run.reports:
            return
        try:
            run.after = self._node.observe(run.request.vm_uuid, run.command.observe_guest)
        except AgentError as error:
            log.warning("the VM cannot be read after the failure error=%r", error.message)
            run.after = None


class _VmLocks:
    """One lock for each VM that is worked on: two names of one VM are two lanes, and still one VM."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, threading.Lock] = {}
        self._users: Counter[str] = Counter()

    @contextmanager
    def hold(self, uuid: str) -> Iterator[None]:
        with self._lock:
            lock = self._held.setdefault(uuid, threading.Lock())
            self._users[uuid] += 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                self._users[uuid] -= 1
                if not self._users[uuid]:
                    del self._users[uuid], self._held[uuid]


def _bare_reply(error: AgentError) -> tuple[bytes, str, AgentError]:
    """Return a reply for a task whose command can make none."""
    fields: dict[str, Any] = {
        "success": False,
        "error": error.message,
        "errorCode": error.code,
        "remedy": error.remedy,
        "outcome": "refused",
    }
    return msgspec.json.encode(fields), "refused", error
