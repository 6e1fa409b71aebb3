"""Carries a task out: observe, decide, record the goal, perform steps until none is left, judge, finish.

    run(task)
      journal.start_task
      node.open_vm                       the VM, on a connection of its own
      vm.observe                         before
      command.decide         -> goal        an AgentError ends the task, nothing was touched
      check_owner_policy, refuse_growth  of its totals, whatever plugin it is: the owner's limits, the host's memory
      hooks.run_before                   the operator's; they may refuse. Then observe and decide anew
      vm.reserve                         what it adds of the host's memory; free again with the task
      journal.record_goal                on disk before the first step
      command.next_steps     -> steps       none: done
        vm.perform each                  a soft step's failure is a warning, any other ends the task
        vm.observe, next_steps again
      command.rollback_goal  -> goal        after a failure: where to go instead, by the same loop
      withdraw                           requests that the guest did not reach, however the task ended
      command.resumed_goal   -> goal        after an interruption, instead of the decision: what may still be done
      judge, command.reply_fields-> reply   what was proven; a command adds its own fields
      journal.finish                     the result and the undelivered callback
      on_finished(owed)                  delivery
      hooks.run_after                    the operator's; what they do changes nothing

A task that answered `pending` is checked again later: see tasks.pendingremovals.

Whatever is raised on the way, of whatever kind, ends in a reply: a step was performed -> partial, else refused.

A task that was interrupted, because the agent or libvirt died, continues to its recorded goal from the present facts,
on the same VM only. Until it has ended, no other task decides anything about that VM. While libvirt is down it waits,
up to a limit; if the agent is stopped meanwhile, it stays in the journal.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Protocol

import msgspec

from kvmagent.logs import Log, add_context, error_fields, log_context, struct_fields
from kvmagent.model.command import Command, Ending, Goal, Reservation, StepReport, VmRequest, find_unreached
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Facts
from kvmagent.model.host import Progress
from kvmagent.model.hostbudget import find_reservation
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep
from kvmagent.recorder import Recorder, phase
from kvmagent.tasks.alike import Alike
from kvmagent.tasks.decision import decide, find_way_back, plan, resume
from kvmagent.tasks.endings import Ended, Endings, named
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.journal import Change, Journal, Task, Undelivered
from kvmagent.tasks.offlinecpus import OfflineCpus
from kvmagent.tasks.plugincalls import call
from kvmagent.tasks.replies import bare_reply, make_error, make_reply, tell_totals
from kvmagent.tasks.run import GONE, Run, failed_by, read_facts, read_report
from kvmagent.tasks.vmturns import NotYet, VmTurns

log = Log(__name__)

# Rounds of steps after which a plan that still wants more is wrong. A guest that onlines one CPU at a time needs one
# round for each.
_MAX_ROUNDS = 512
# The outcome of a task whose removal the guest has neither done nor refused.
PENDING = "pending"
# Outcomes that leave no mark in a VM's history.
_NO_CHANGE = ("unchanged", "planned")
# The fields of a request that its history shows.
_ASKED = ("cpuNum", "memorySize", "maxCpuNum", "maxMemorySize")
# After these nothing can be undone now: the task goes on from its goal when it can.
_NO_WAY_BACK = (Code.LIBVIRT_UNAVAILABLE, Code.JOURNAL_UNAVAILABLE)
# Between two tries of a task whose connection broke and is there again.
_PAUSE_S = 0.2


class OpenVm(Protocol):
    """What the executor needs of hypervisor.node.OpenVm."""

    @property
    def uuid(self) -> str:
        """The VM's UUID."""

    def observe(self, parts: frozenset[str]) -> Facts:
        """Return what is so now."""

    def perform(self, step: AnyStep) -> str:
        """Perform one step; return its output, mostly empty."""

    def preview(self, step: AnyStep) -> str:
        """Return the output that the step would have, without performing it."""

    def reserve(self, task_uuid: str, reservation: Reservation) -> None:
        """Reserve what of the host's memory a task may bring the VM to."""


class VmNode(Protocol):
    """What the executor needs of hypervisor.node.Node."""

    def open_vm(self, vm: str) -> AbstractContextManager[OpenVm]:
        """Have a VM for a piece of work."""

    def observe(self, vm: str, parts: frozenset[str]) -> Facts:
        """Return what is so now."""

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for libvirt to be reachable; return whether it is."""

    def recall_reservation(self, task_uuid: str, uuid: str, reservation: Reservation) -> None:
        """Take up what a task of an earlier agent had reserved."""

    def release(self, task_uuid: str) -> None:
        """Free what a task has reserved."""


class Executor:
    """Thread-safe: one call of `run` for each task, on its lane's thread; `wake` resumes tasks that waited.

    `libvirt_wait_s` is how long a task waits for libvirt in all.
    """

    def __init__(
        self,
        node: VmNode,
        journal: Journal,
        commands: dict[str, Command],
        *,
        on_finished: Callable[[Undelivered], None],
        on_pending: Callable[[str], None],
        on_progress: Callable[[Progress], None] = lambda _progress: None,
        wake: Callable[[Task], None] = lambda _task: None,
        hooks: Hooks | None = None,
        libvirt_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        fault: Fault = no_fault,
        recorder: Recorder | None = None,
    ) -> None:
        self._node = node
        self._journal = journal
        self._commands = commands
        self._on_pending = on_pending
        self._on_progress = on_progress
        self._hooks = hooks or Hooks()
        #: How long a task waits in all for a libvirt that is away.
        self.libvirt_wait_s = libvirt_wait_s
        self._clock = clock
        self._fault = fault
        self._endings = Endings(journal, on_finished=on_finished, recorder=recorder or Recorder(), free=node.release)
        self._left = OfflineCpus(journal)
        self._turns = VmTurns(wake)
        self._alike = Alike()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let no task wait for libvirt any longer: what waits stays in the journal for the next start."""
        self._stopping.set()

    def recall(self, task: Task) -> None:
        """Take up what an unfinished task of an earlier agent had reserved, before any task runs."""
        with suppress(AgentError):  # one that cannot be read is told when it runs
            self._recall(task, self._take_up(task))

    def run(self, task: Task) -> None:
        """Carry one task out and record its reply.

        Raises:
            NotYet: another task has its VM; nothing was done, and it is woken when it can begin.
        """
        ended = True
        try:
            self._run(task)
        except NotYet:
            ended = False
            raise
        finally:
            self._turns.leave(task.task_uuid, ended=ended)

    def _run(self, task: Task) -> None:
        with log_context(**task.log_fields):
            if task.outcome == PENDING:
                self._look_late(task)
                return
            started = self._clock()
            log.info("task started", recovered=task.recovered or None)
            ended = self._endings.end(task, self._carry_out, seconds=lambda: self._clock() - started)
            if ended is None:
                return
            if ended.outcome == PENDING:
                self._on_pending(task.task_uuid)
            if ended.hooked:
                self._hooks.run_after(named(task, ended.facts), ended.reply)

    def ask(self, command: Command, request: VmRequest) -> msgspec.Raw:
        """Answer a command that changes nothing, without a task.

        Raises:
            AgentError: when the VM cannot be read.
        """
        facts = self._left.add(self._node.observe(request.vm_uuid, command.observe_guest))
        goal, once = call(command.decide, request, facts, ""), self._alike.once
        ending = Ending(request, goal, before=facts, after=facts, reports=(), error=None, once=once)
        return msgspec.Raw(make_reply(command, ending)[0])

    def _look_late(self, task: Task) -> None:
        """See whether what was pending has come to an end; if so the definition follows, and that is the result.

        The guest gets no request again, and the running VM is not changed: other tasks may have come since.
        """
        try:
            run = self._take_up(task)
            run.late = True
            failed = {word for report in run.reports if report.problem for word in failed_by(report)}
            with self._open_vm(run) as vm:
                self._take_turn(task, run, vm)
                run.after = self._observe(vm, run.command.observe_guest)
                steps = self._find_following(run, frozenset(failed))
                self._perform_round(task, run, vm, steps, failed, set())
                run.after = self._observe(vm, run.command.observe_guest)
            reply, judgement = make_reply(run.command, run.end())
            outcome = judgement.outcome
            if outcome == PENDING:
                return
            owes = bool(getattr(run.request, "late_callback", False))
            totals = tell_totals(judgement)
            made = _find_change(run, outcome, judgement.error, totals)
            owed = self._journal.finish_late(task.task_uuid, reply, outcome, owed=owes, made=made)
        except NotYet:
            raise
        except AgentError as error:
            log.info("pending removal cannot be checked now", **error_fields(error))
            return
        except Exception as error:
            log.failure("pending removal cannot be checked", error)
            return
        ended = Ended(reply, outcome, judgement.error, totals=totals, facts=run.after)
        self._endings.tell_late(task, ended, owed)

    def _find_following(self, run: Run, failed: frozenset[str]) -> tuple[AnyStep, ...]:
        """Return the steps by which the definition follows what has left; none where the VM is off: nothing has."""
        assert run.after is not None
        if run.after.domain.live is None:
            return ()
        return run.plan(failed)

    def _carry_out(self, task: Task) -> Ended:
        """Carry a task out as far as it goes, and say what came of it.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE, when the journal was closed; CANCELLED; STOPPING: the task is left to the
                next start.
            NotYet: another task has the VM.
        """
        try:
            run = self._take_up(task)
        except AgentError as error:
            log.error("task cannot be read", **error_fields(error))
            unread = self._take_up_unread(task, error)
            if unread is None:
                return Ended(*bare_reply(task, error))
            run = unread
        unread_error = run.error
        if run.interrupted:
            log.info("task goes on from its recorded goal", steps=len(run.reports))
            self._recall(task, run)
        try:
            self._pursue_through_outages(task, run)
        except NotYet:
            raise
        except Exception as error:
            run.error = make_error(error)
            if run.error.code in (Code.JOURNAL_UNAVAILABLE, Code.CANCELLED, Code.STOPPING):
                raise run.error from error
        run.error = unread_error or run.error
        if run.error is not None:
            if not run.error.expected:
                log.failure("task failed", run.error, error_code=run.error.code)
            self._look_again(run)
        reply, judgement = make_reply(run.command, run.end(self._alike.once))
        totals = tell_totals(judgement)
        made = _find_change(run, judgement.outcome, judgement.error, totals)
        return Ended(reply, judgement.outcome, judgement.error, run.hooked, totals, made, run.after or run.before)

    def _take_up(self, task: Task) -> Run:
        """Return a task as it was left: a fresh one, or with its goal and the steps that it had come to.

        Raises:
            AgentError: TASK_UNREADABLE, when its plugin was removed or no longer understands it.
        """
        command = self._commands.get(task.command)
        if command is None:
            raise AgentError(Code.TASK_UNREADABLE, f"no plugin declares {task.command}")
        try:
            run = Run(
                command,
                msgspec.json.decode(task.request, type=command.request),
                recovered=task.recovered,
                interrupted=task.goal is not None,
                started=self._clock(),
                hooked=task.goal is not None,
            )
            if task.goal is not None:
                run.goal = msgspec.json.decode(task.goal, type=command.goal)
                run.before = read_facts(task.before)
                run.reports = [read_report(step) for step in self._journal.steps(task.task_uuid, wait=True)]
        except msgspec.MsgspecError as error:
            raise AgentError(Code.TASK_UNREADABLE, f"{task.command}: {error}") from error
        return run

    def _take_up_unread(self, task: Task, error: AgentError) -> Run | None:
        """Return a task that has a goal and no command any longer: it goes no further, and what it asked of its guest
        is taken back. None for one that has no goal, or nothing of which can be read."""
        if task.goal is None:
            return None
        try:
            return Run(
                GONE,
                VmRequest(vm_uuid=task.lane),
                recovered=task.recovered,
                interrupted=True,
                goal=msgspec.json.decode(task.goal, type=Goal),
                before=read_facts(task.before),
                reports=[read_report(step) for step in self._journal.steps(task.task_uuid, wait=True)],
                error=error,
                started=self._clock(),
                hooked=True,
            )
        except msgspec.MsgspecError as unreadable:
            log.error("task cannot be read at all", error=str(unreadable))
            return None

    def _pursue_through_outages(self, task: Task, run: Run) -> None:
        """Pursue the goal; when libvirt is lost on the way, wait for it and go on from what is found then."""
        give_up_at: float | None = None
        while True:
            try:
                with self._open_vm(run) as vm:
                    self._take_turn(task, run, vm)
                    self._pursue(task, run, vm)
                return
            except AgentError as error:
                if error.code is not Code.LIBVIRT_UNAVAILABLE:
                    raise
                now = self._clock()
                if give_up_at is None:
                    give_up_at = now + self.libvirt_wait_s
                run.interrupted = run.goal is not None
                log.warning("libvirt is lost, the task waits", seconds=round(give_up_at - now), **error_fields(error))
                if not self._wait_for_libvirt(give_up_at):
                    raise

    @contextmanager
    def _open_vm(self, run: Run) -> Iterator[OpenVm]:
        """Have the VM: with a goal the very one that the goal was made for, whoever bears its name now.

        Raises:
            AgentError: VM_REPLACED, VM_NOT_FOUND; LIBVIRT_UNAVAILABLE and other libvirt errors.
        """
        uuid = "" if run.goal is None else run.goal.vm
        with ExitStack() as stack:
            try:
                vm = stack.enter_context(self._node.open_vm(uuid or run.request.vm_uuid))
            except AgentError as error:
                if error.code is not Code.VM_NOT_FOUND or not uuid:
                    raise
                vm = stack.enter_context(self._node.open_vm(run.request.vm_uuid))
            if uuid and vm.uuid != uuid:
                raise AgentError(
                    Code.VM_REPLACED,
                    f"the task began with the VM with UUID {uuid}; {run.request.vm_uuid} is now {vm.uuid}",
                )
            yield vm

    def _take_turn(self, task: Task, run: Run, vm: OpenVm) -> None:
        """Have the VM until the task has ended: one VM has one goal at a time, by whatever name its tasks came.

        Who has no goal yet goes after the task whose goal is recorded: one of an earlier agent, not begun again yet.

        Raises:
            NotYet: another task goes first.
        """
        if run.request.dry_run:
            return
        self._turns.take(vm.uuid, task)
        if run.goal is not None and not run.late:
            return
        other = self._journal.find_goal_of(vm.uuid)
        if other in (None, task.task_uuid):
            return
        self._turns.wait_for(other, task)
        if self._journal.find_goal_of(vm.uuid) == other:
            log.info("task waits for another task of its VM", other=other)
            raise NotYet
        self._take_turn(task, run, vm)

    def _wait_for_libvirt(self, until: float) -> bool:
        """Return whether libvirt is back in time.

        Raises:
            AgentError: STOPPING.
        """
        with phase("libvirt"):
            while not self._stopping.wait(_PAUSE_S):
                left_s = until - self._clock()
                if left_s <= 0:
                    return False
                if self._node.wait_connected(min(left_s, 1.0)):
                    return True
        raise AgentError(Code.STOPPING, "the agent stops while the task waits for libvirt")

    def _pursue(self, task: Task, run: Run, vm: OpenVm) -> None:
        fresh = run.goal is None
        if run.goal is not None:
            run.goal = resume(run.command, run.goal)
        steps = self._plan(task, run, vm)
        if run.request.dry_run:
            run.planned, run.preview = steps, "".join(vm.preview(step) for step in steps)
            return
        if steps and fresh:
            assert run.goal is not None
            run.hooked = True
            if self._hooks.run_before(named(task, run.after), run.goal):
                # They take time and may change the host: what was observed before them may be outdated.
                run.goal = None
                steps = self._plan(task, run, vm)
        if steps and fresh:
            self._reserve(task, run, vm)
            self._record_goal(task, run, steps)
        try:
            self._reach_goal(task, run, vm, steps)
        except Exception as error:
            failure = make_error(error)
            if failure.code not in _NO_WAY_BACK:
                self._roll_back(task, run, vm, failure)
                self._cancel_requests(task, run, vm)
            raise
        self._cancel_requests(task, run, vm)

    def _recall(self, task: Task, run: Run) -> None:
        """Have reserved what the recorded goal of a task adds: it was judged when the goal was made."""
        if run.goal is not None and run.goal.reservation is not None:
            self._node.recall_reservation(task.task_uuid, run.goal.vm, run.goal.reservation)

    def _reserve(self, task: Task, run: Run, vm: OpenVm) -> None:
        """Reserve what the goal adds of the host's memory, whatever plugin it is of; it is free again with the task.

        Raises:
            AgentError: HOST_MEMORY_PROMISED, MEMORY_HARD_LIMIT, and nothing was touched.
        """
        assert run.goal is not None
        assert run.after is not None
        reservation = find_reservation(run.goal.totals, run.after)
        if reservation is not None:
            vm.reserve(task.task_uuid, reservation)
            run.goal = msgspec.structs.replace(run.goal, reservation=reservation)

    def _plan(self, task: Task, run: Run, vm: OpenVm) -> tuple[AnyStep, ...]:
        """Look, decide where there is no goal yet, and return the steps towards it."""
        command = run.command
        run.after = self._observe(vm, command.observe_guest | command.observe_first)
        self._note_vm(task, run.after)
        if run.goal is None:
            run.before = run.after
            run.goal, steps = decide(command, run.request, run.after, task.task_uuid)
            return steps
        return run.plan()

    def _reach_goal(self, task: Task, run: Run, vm: OpenVm, steps: tuple[AnyStep, ...]) -> None:
        """Perform the steps, observe and plan again until nothing is left to do; what has no effect is not tried again.

        Raises:
            AgentError: what a step ended in; NOT_VERIFIED, when a change was confirmed and is not there;
                INTERNAL_ERROR, of a plan without end.
        """
        failed: set[str] = set()
        confirmed: set[AnyStep] = set()
        last: tuple[AnyStep, ...] = ()
        for _ in range(_MAX_ROUNDS):
            if steps and steps == last:
                failed |= {step.key for step in steps}
                steps = run.plan(frozenset(failed))
            if not steps:
                return
            _refuse_repetition(confirmed, steps)
            if steps == last:
                message = f"{run.command.name} plans again a step that had no effect"
                raise AgentError(Code.INTERNAL_ERROR, message, expected=False)
            self._perform_round(task, run, vm, steps, failed, confirmed)
            run.after = self._observe(vm, run.command.observe_guest)
            last, steps = steps, run.plan(frozenset(failed))
        raise AgentError(Code.INTERNAL_ERROR, f"not finished after {_MAX_ROUNDS} rounds", expected=False)

    def _perform_round(
        self, task: Task, run: Run, vm: OpenVm, steps: tuple[AnyStep, ...], failed: set[str], confirmed: set[AnyStep]
    ) -> None:
        """Perform steps up to the first that fails: what follows it was planned for its success."""
        for n, step in enumerate(steps):
            if (context := call(run.command.find_progress_context, run.request)) is not None:
                done, left = len(run.reports), len(steps) - n
                percent = 100 * done // (done + left)
                self._on_progress(Progress(task.command, run.request.vm_uuid, percent, type(step).__name__, context))
            try:
                problem = self._perform(task, run, vm, step)
            except AgentError as error:
                if not self._is_done_anyway(run, vm, step, error, frozenset(failed)):
                    raise
                run.reports[-1] = msgspec.structs.replace(run.reports[-1], problem=None)
                return
            if problem is not None:
                failed.update(failed_by(run.reports[-1]))
                return
            if not step.soft:
                confirmed.add(step)

    def _roll_back(self, task: Task, run: Run, vm: OpenVm, error: AgentError) -> None:
        """Go where the command wants to be after this failure, as far as it can be reached.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE, JOURNAL_UNAVAILABLE: the way back is recorded, and taken up later.
        """
        try:
            assert run.after is not None
            seen, run.after = run.after, self._observe(vm, run.command.observe_guest)
            assert run.goal is not None
            goal = find_way_back(run.command, run.goal, seen, run.after, error)
            if goal is None:
                return
            log.info("task rolls back", **error_fields(error))
            run.goal, run.interrupted = goal, True
            if steps := run.plan():
                self._record_goal(task, run, steps)
            self._reach_goal(task, run, vm, steps)
        except Exception as raised:
            failure = make_error(raised)
            if failure.code in _NO_WAY_BACK:
                raise
            if failure.expected:
                log.warning("changes cannot be undone", **error_fields(failure))
            else:
                log.failure("changes cannot be undone", failure, error_code=failure.code)

    def _cancel_requests(self, task: Task, run: Run, vm: OpenVm) -> None:
        """Withdraw requests that the guest did not fulfil: whatever the command, and however it ended.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE, JOURNAL_UNAVAILABLE: the task goes on later.
        """
        if run.goal is None or not any(report.step.asks for report in run.reports):
            return
        try:
            run.after = self._observe(vm, run.command.observe_guest)
            for step in find_unreached(run.goal, run.reports, run.after):
                self._perform(task, run, vm, step)
                run.after = self._observe(vm, run.command.observe_guest)
        except Exception as error:
            failure = make_error(error)
            if failure.code in _NO_WAY_BACK:
                raise
            log.warning("the request to the guest cannot be withdrawn", **error_fields(failure))
            self._look_again(run)

    def _observe(self, vm: OpenVm, parts: frozenset[str]) -> Facts:
        """Return what is so now, with what the agent itself knows of the guest."""
        return self._left.add(vm.observe(parts))

    def _note_vm(self, task: Task, facts: Facts) -> None:
        """Let the task and its lines of the log have its VM's name and UUID, however it was named."""
        domain = facts.domain
        if (domain.uuid, domain.name) != (task.vm_uuid, task.vm_name):
            add_context(vm=domain.name, uuid=domain.uuid)
            self._journal.note_vm(task.task_uuid, domain.uuid, domain.name)

    def _record_goal(self, task: Task, run: Run, steps: tuple[AnyStep, ...]) -> None:
        goal, before = msgspec.json.encode(run.goal), msgspec.json.encode(run.before)
        run.recorded = len(run.reports)
        assert run.after is not None
        self._left.keep(run.after, steps[0])
        self._journal.record_goal(task.task_uuid, goal, before, msgspec.json.encode(steps[0]), run.recorded)

    def _is_done_anyway(self, run: Run, vm: OpenVm, step: AnyStep, error: AgentError, failed: frozenset[str]) -> bool:
        """Return whether a step that failed after an interruption or on the way back has its effect nevertheless.

        A call that was cut off may still be carried out by libvirt after it was looked for, and then its repetition
        is refused: the alias is there already. A definition that could not be saved was changed in libvirt's memory
        alone: on the way back that is undone, though it still cannot be saved.
        """
        if not run.interrupted or error.code is Code.LIBVIRT_UNAVAILABLE:
            return False
        assert run.goal is not None
        facts = self._observe(vm, run.command.observe_guest)
        if step in plan(run.command, run.request, run.goal, facts, failed, before=run.before):
            return False
        log.info("step failed but took effect", step=type(step).__name__, error=error.message)
        return True

    def _perform(self, task: Task, run: Run, vm: OpenVm, step: AnyStep) -> Problem | None:
        """Perform and journal one step; return a soft step's problem.

        Raises:
            AgentError: what a step that is not soft ended in; LIBVIRT_UNAVAILABLE from any.
        """
        n, started, problem, told, cut_off = len(run.reports), self._clock(), None, "", False
        # Nothing is touched that a crash would leave without a trace; the first step came to disk with the goal.
        if run.recorded != n:
            if run.after is not None:
                self._left.keep(run.after, step)
            self._journal.start_step(task.task_uuid, n, msgspec.json.encode(step), wait=n > 0 and not step.soft)
        self._fault("step:begun")
        try:
            told = vm.perform(step)
        except AgentError as error:
            cut_off = error.code is Code.LIBVIRT_UNAVAILABLE
            problem = None if cut_off else Problem.of(error)
            if cut_off or not step.soft:
                raise
        except Exception as error:
            problem = Problem.of(make_error(error))
            raise
        finally:
            ended = self._clock()
            elapsed_ms = None if cut_off else (ended - started) * 1000
            run.reports.append(StepReport(step, elapsed_ms, problem, (ended - run.started) * 1000, told))
            self._fault("step:done")
            if elapsed_ms is None:
                self._journal.cut_step(task.task_uuid, n)
            else:
                self._journal.finish_step(task.task_uuid, n, elapsed_ms, problem)
            _tell_step(run.reports[-1])
        return problem

    def _look_again(self, run: Run) -> None:
        """After a failure only a new observation shows how far it came; unknown is better than stale or another VM."""
        if not run.reports:
            return
        try:
            with self._open_vm(run) as vm:
                run.after = self._observe(vm, run.command.observe_guest)
        except Exception as error:
            log.warning("the VM cannot be read after the failure", **error_fields(make_error(error)))
            run.after = None


def _find_change(run: Run, outcome: str, error: AgentError | None, totals: Mapping[str, int]) -> Change | None:
    """Return what goes to the VM's history: nothing of a task that had nothing to change, or was a dry run."""
    seen = run.after or run.before
    if seen is None or outcome in _NO_CHANGE:
        return None
    request = msgspec.to_builtins(run.request)
    asked = {name: request[name] for name in _ASKED if isinstance(request.get(name), int)}
    return Change(seen.domain.uuid, seen.domain.name, asked, totals, error.code if error else None)


def _tell_step(report: StepReport) -> None:
    """Write how a step ended, with its own fields; one that failed or was cut off is for somebody to look at."""
    problem, cut_off = report.problem, report.elapsed_ms is None
    (log.warning if problem is not None or cut_off else log.info)(
        "step",
        step=type(report.step).__name__,
        ms=None if report.elapsed_ms is None else round(report.elapsed_ms, 1),
        cut_off=cut_off or None,
        problem=problem and problem.code,
        error=problem and problem.message,
        **struct_fields(report.step),
    )


def _refuse_repetition(confirmed: set[AnyStep], steps: tuple[AnyStep, ...]) -> None:
    """A change that libvirt confirmed and that has to be made again was not made: doing it again helps nobody."""
    again = next((step for step in steps if step in confirmed), None)
    if again is not None:
        raise AgentError(
            Code.NOT_VERIFIED,
            f"libvirt confirmed {type(again).__name__}, but the VM does not show it",
            details={"step": msgspec.to_builtins(again)},
            expected=False,
        )
