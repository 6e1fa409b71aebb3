"""Assembles the agent: builds every object, and owns the order of start and stop, and the signals.

start   lock, port, journal, libvirt connection, lanes with what was left, delivery with what is owed, HTTP
run     once a second: threads for what waits, old tasks forgotten, the watchdog fed while everything makes progress
stop    new tasks refused, running ones finished, due callbacks sent, HTTP, journal, libvirt connection, lock
"""

import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from kvmagent import __version__
from kvmagent.api.intake import Intake
from kvmagent.api.metrics.events import Metrics
from kvmagent.api.metrics.sampler import Sampler
from kvmagent.api.metrics.state import StateMetrics
from kvmagent.api.metrics.vms import VmMetrics
from kvmagent.api.page import page_routes
from kvmagent.api.planning import Planning
from kvmagent.api.resources import Resources
from kvmagent.api.security import Security
from kvmagent.api.server import Answer, Call, Handler, Route, Server
from kvmagent.api.wire import encode
from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.eventconnection import EventConnection
from kvmagent.hypervisor.host import read_boot_id
from kvmagent.hypervisor.migrations import Migrations
from kvmagent.hypervisor.node import Node
from kvmagent.hypervisor.restartmemory import RestartMemory
from kvmagent.hypervisor.vmevents import VmEvents
from kvmagent.logs import Log, error_fields
from kvmagent.model.command import NO_CALLBACK, Command, Plugin
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import Query
from kvmagent.model.roles import LOCAL
from kvmagent.model.units import parse_amount, parse_count, parse_size
from kvmagent.secretfiles import make_private_directory
from kvmagent.settings import Settings, list_settings, parse_callback_rule, take_reloadable
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.hostqueries import HostQueries
from kvmagent.tasks.journal import JOURNAL, Journal, Left, Task
from kvmagent.tasks.lanes import Lanes
from kvmagent.tasks.managementserver import ManagementServerFile
from kvmagent.tasks.notifications import Notifications
from kvmagent.tasks.ondefine import OWN_ACCESS, Maxima, Preparations
from kvmagent.tasks.pendingremovals import PendingRemovals
from kvmagent.tasks.planner import Planner
from kvmagent.tasks.statedump import dump_state
from kvmagent.tasks.steptimes import StepTimes
from kvmagent.tasks.withdrawal import Withdrawal

log = Log(__name__)

# How long a stopping agent still sends the callbacks that are due.
_LAST_CALLBACKS_S = 5.0
# How long it waits for the report that is under way.
_LAST_REPORT_S = 2.0
# How long closing HTTP, journal and libvirt may take beside that.
_CLOSE_S = 30.0
_TICK_S = 1.0
# Sections whose reload says so itself, and whose values may be long.
_READ_ALONE = ("security", "log")
_STALLED_S = 30.0


class Process(Protocol):
    """What an agent needs of the process that it is in."""

    def tick(self, *, well: bool) -> None:
        """Is called every second with whether everything makes progress."""

    def read_settings(self) -> Settings:
        """Return what the configuration file says now.

        Raises:
            AgentError: BAD_CONFIGURATION.
        """

    def read_log_settings(self) -> None:
        """Log as the configuration file says now.

        Raises:
            AgentError: BAD_CONFIGURATION; what was in force stays.
        """

    def dump_stacks(self) -> None:
        """Write what every thread is at to the log, without a lock."""


class Agent:
    """One agent. `start`, then `run_until_signal` or, from another thread, `stop`.

    `fault` is called at the points that tasks.faults names. A part that has had work and done none of it for
    `stalled_s` makes no progress.
    """

    def __init__(
        self, settings: Settings, plugins: list[Plugin], *, fault: Fault = no_fault, stalled_s: float = _STALLED_S
    ) -> None:
        self._settings = settings
        self._state_dir = Path(settings.agent.state_dir)
        self._stalled_s = stalled_s
        self._stalls: dict[str, str] = {}
        self._commands, self._queries = _by_name(plugins)
        self._connection = Connection(settings.libvirt.uri)
        self._metrics = metrics = Metrics()
        rules = map(parse_callback_rule, settings.security.allowed_callbacks)
        self._callback_client = CallbackClient(rules, settings.callback)
        self._server_file = ManagementServerFile(self._state_dir / "server.json")
        self._notifications = Notifications(
            plugins, self._server_file.get, self._callback_client, timeout_s=settings.callback.timeout_sec
        )
        definitions = Definitions()
        self._budget = Budget(
            reserve_bytes=settings.host.memory_reserve,
            overcommit=settings.host.memory_overcommit,
            definitions=definitions,
        )
        device_events = DeviceEvents(
            lambda uuid, alias: self._pending.note_refusal(uuid, alias), on_event=self._budget.note_change
        )
        self._migrations = Migrations(self._state_dir / "migrations.json")
        self._restarts = RestartMemory(self._state_dir / "restarts.json")
        node = Node(
            self._connection,
            events=device_events,
            former_xml_dir=self._state_dir / "former-xml",
            recorder=metrics,
            removes_emulated=settings.libvirt.allow_emulated_removal,
            restarts=self._restarts,
            budget=self._budget,
            migrations=self._migrations,
            definitions=definitions,
        )
        self._journal = Journal(
            self._state_dir / JOURNAL,
            on_accepted=self._put,
            on_left=self._take_up,
            max_bytes=settings.agent.keep_bytes,
            fault=fault,
            recorder=metrics,
        )
        self._delivery = Delivery(
            self._journal,
            self._callback_client,
            timeout_s=settings.callback.timeout_sec,
            give_up_s=settings.callback.give_up_sec,
            max_owed=settings.callback.max_undelivered,
            max_owed_per_client=settings.callback.max_undelivered_per_client,
            fault=fault,
            recorder=metrics,
        )
        self._host_queries = HostQueries(
            node,
            self._journal,
            self._queries,
            self._server_file,
            self._callback_client,
            on_finished=self._delivery.put,
            recorder=metrics,
        )
        self._pending = PendingRemovals(self._journal, self._put)
        self._hooks = Hooks(settings.hooks.directory, timeout_s=settings.hooks.timeout_sec)
        self._executor = Executor(
            node,
            self._journal,
            self._commands,
            on_finished=self._delivery.put,
            on_pending=self._pending.add,
            on_progress=self._notifications.tell_progress,
            wake=self._wake,
            hooks=self._hooks,
            libvirt_wait_s=settings.libvirt.wait_sec,
            fault=fault,
            recorder=metrics,
        )
        self._lanes = Lanes(
            self._run,
            workers=settings.agent.workers,
            max_queued=settings.agent.max_queued,
            max_queued_per_lane=settings.agent.max_queued_per_vm,
            max_queued_per_client=settings.agent.max_queued_per_client,
        )
        declared: list[Command | Query] = [*self._commands.values(), *self._queries.values()]
        metrics.declare(declared)
        withdrawal = Withdrawal(
            self._journal,
            self._lanes,
            {one.name: one for one in declared},
            on_finished=self._delivery.put,
            recorder=metrics,
        )
        intake = Intake(
            self._journal,
            self._lanes,
            self._delivery,
            self._callback_client,
            self._host_queries,
            withdrawal,
            node.names,
        )
        self._preparations = self._make_preparations(node, intake) if settings.prepare.on_define else None
        preparations = self._preparations
        vm_events = VmEvents(
            self._notifications.tell_event,
            on_definition=None if preparations is None else preparations.note,
            hear=(self._migrations.hear, self._budget.hear, definitions.hear),
        )
        self._events = EventConnection(
            settings.libvirt.uri,
            (device_events.register, vm_events.register, self._migrations.find),
            on_open=self._note_gap,
            on_gap=self._notifications.tell_gap,
        )
        reads = Resources(
            node,
            self._journal,
            self._lanes,
            self._delivery,
            declared,
            describe_vm=self._describe_vm,
            find_stalls=self._find_stalls,
            metrics=metrics,
        )
        self._state_metrics = state = StateMetrics(
            self._lanes,
            self._delivery,
            self._journal,
            stalled_s=self._stalled_s_of_parts,
            is_connected=lambda: self._connection.wait_connected(0.0),
            certificate_ends=lambda: {
                "security": self._security.certificate_end,
                "callback": self._callback_client.certificate_end,
            },
            memory=node.last_budget,
            max_queued=settings.agent.max_queued,
        )
        self._vm_metrics = vms = VmMetrics(node.read_stats, section=settings.metrics)
        metrics.add(state)
        metrics.add_vms(vms)
        self._sampler = Sampler(node, vms.running, interval_s=settings.metrics.sample_sec)
        posts = {
            ("POST", one.path): Route(_handle(intake, one), one.role, host=isinstance(one, Query)) for one in declared
        }
        planner = Planner(node, self._commands.values(), find_took=StepTimes(self._journal).find)
        own_paths = reads.routes(
            cancel=lambda call: Answer(encode(intake.cancel(call.parts[0], client=call.client, access=call.access))),
            plan=Planning(planner).answer,
        )
        self._security = Security(settings.security)
        self._server = Server(
            settings.http,
            self._security,
            {**posts, **own_paths, **page_routes()},
            opens_tcp=settings.security.opens_tcp,
            recorder=metrics,
        )

    def start(self) -> None:
        """Start, and take up what the journal left.

        Raises:
            AgentError: BAD_CONFIGURATION; ADDRESS_NOT_FREE; STATE_DIR_IN_USE; JOURNAL_UNAVAILABLE.
        """
        try:
            self._start()
        except BaseException:
            self._close()
            raise

    def _start(self) -> None:
        self._security.load()
        self._callback_client.load()
        if hooks := self._hooks.check():
            log.info("hooks found", **hooks)
        make_private_directory(self._state_dir, "agent.state_dir")
        self._journal.lock()
        # A port that is taken is found out before any VM is touched.
        self._server.bind()
        self._journal.start()
        self._server_file.load()
        self._restarts.load()
        self._migrations.load()
        self._notifications.start()
        self._connection.start()
        self._events.start()
        if boot_id := read_boot_id(Path("/")):
            self._journal.forget_runs(boot_id)
        left = Left(self._journal.unfinished(), self._journal.owed())
        for task in left.unfinished:
            self._executor.recall(task)
        self._take_up(left)
        self._pending.start()
        self._server.start()
        self._sampler.start()
        if self._preparations is not None:
            self._preparations.start(left.unfinished)
        log.info(
            "agent ready",
            version=__version__,
            pid=os.getpid(),
            commands=",".join(self._commands),
            unfinished=len(left.unfinished),
            owed=len(left.owed),
        )

    def stop(self) -> None:
        """Refuse new tasks, finish what runs, leave the rest in the journal."""
        log.info("agent stopping", running=len(self._lanes.running()), queued=self._lanes.depth())
        if self._preparations is not None:
            self._preparations.stop()
        self._executor.stop()
        self._lanes.stop(self._settings.agent.stop_timeout_sec)
        self._hooks.stop()
        self._delivery.stop(_LAST_CALLBACKS_S)
        self._close()
        log.info("agent stopped")

    @property
    def stop_within_s(self) -> float:
        """How long `stop` takes at most."""
        return (
            self._settings.agent.stop_timeout_sec + _LAST_CALLBACKS_S + self._settings.callback.timeout_sec + _CLOSE_S
        )

    def run_until_signal(self, process: Process, signals: "queue.SimpleQueue[int]") -> None:
        """Look after the agent until SIGTERM or SIGINT comes. `signals` takes the numbers of what comes in.

        SIGHUP: reads the configuration, certificates and tokens again, and logs which changes need a restart. SIGUSR1,
        SIGUSR2: the state is dumped to the log.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # What a handler may touch: this queue takes an entry even in the middle of its own `get`.
            signal.signal(number, lambda number, _frame: signals.put(number))
        look_at = time.monotonic() + _TICK_S
        while True:
            try:
                asked = signals.get(timeout=max(0.0, look_at - time.monotonic()))
            except queue.Empty:
                look_at = time.monotonic() + _TICK_S
                process.tick(well=self.look_after(process.dump_stacks))
                continue
            if asked in (signal.SIGTERM, signal.SIGINT):
                return
            if asked == signal.SIGHUP:
                self._reload(process)
            else:
                dump_state(self._lanes, self._delivery, self._journal)

    def look_after(self, dump_stacks: Callable[[], None] = lambda: None) -> bool:
        """Do what is to be done every second; return whether everything makes progress.

        Where something does not, what every thread is at is dumped once: the service manager may end the agent soon.
        """
        self._lanes.relieve()
        self._pending.look_after()
        self._delivery.relieve()
        self._server.look_after()
        self._journal.look()
        self._migrations.save()
        agent = self._settings.agent
        self._journal.prune(keep_tasks=agent.keep_tasks, keep_s=agent.keep_sec, keep_changes_s=agent.keep_history_sec)
        stalls = self._find_stalls()
        if stalls.keys() != self._stalls.keys():
            if stalls:
                log.error("parts of the agent are stalled", **stalls)
                dump_stacks()
                dump_state(self._lanes, self._delivery, self._journal)
            else:
                log.info("all parts of the agent make progress again")
        self._stalls = stalls
        return not stalls

    def _reload(self, process: Process) -> None:
        """Read the configuration and its files anew; where something cannot be used, what was in force stays."""
        loads: dict[str, Callable[[], None]] = {
            "limits": lambda: self._take_limits(process.read_settings()),
            "security": lambda: self._security.load(process.read_settings().security),
            "callback": lambda: self._load_callbacks(process.read_settings()),
            "log": process.read_log_settings,
        }
        for section, load in loads.items():
            try:
                load()
            except AgentError as error:
                log.error("section was not changed", section=section, **error_fields(error))
            else:
                log.info("section read", section=section)

    def _take_limits(self, read: Settings) -> None:
        """Apply the limits and ratios of a changed configuration, and log what needs a restart."""
        former = {(section, key): value for section, key, value, _ in list_settings(self._settings)}
        self._settings, waiting = take_reloadable(self._settings, read)
        agent, callback, host = self._settings.agent, self._settings.callback, self._settings.host
        self._lanes.set_limits(
            workers=agent.workers,
            max_queued=agent.max_queued,
            max_queued_per_lane=agent.max_queued_per_vm,
            max_queued_per_client=agent.max_queued_per_client,
        )
        self._state_metrics.max_queued = agent.max_queued
        self._vm_metrics.section = self._settings.metrics
        self._journal.max_bytes = agent.keep_bytes
        self._delivery.set_limits(
            timeout_s=callback.timeout_sec,
            give_up_s=callback.give_up_sec,
            max_owed=callback.max_undelivered,
            max_owed_per_client=callback.max_undelivered_per_client,
        )
        self._budget.set_ratios(reserve_bytes=host.memory_reserve, overcommit=host.memory_overcommit)
        self._executor.libvirt_wait_s = self._settings.libvirt.wait_sec
        self._hooks.timeout_s = self._settings.hooks.timeout_sec
        self._notifications.timeout_s = callback.timeout_sec
        self._server.set_limits(self._settings.http)
        for section, key, value, _ in list_settings(self._settings):
            if section not in _READ_ALONE and value != former[section, key]:
                log.info("setting changed", key=f"{section}.{key}", value=value, former=former[section, key])
        for key in waiting:
            log.warning("setting needs a restart", key=key)

    def _load_callbacks(self, read: Settings) -> None:
        self._callback_client.load(read.callback, map(parse_callback_rule, read.security.allowed_callbacks))

    def _find_stalls(self) -> dict[str, str]:
        """Return the parts that have work and make no progress, and for how long."""
        stalled = self._stalled_s_of_parts()
        return {
            name: f"no progress for {seconds:.0f} s" for name, seconds in stalled.items() if seconds > self._stalled_s
        }

    def _stalled_s_of_parts(self) -> dict[str, float]:
        return {
            "lanes": self._lanes.stalled_s(),
            "writer": self._journal.stalled_s(),
            "delivery": self._delivery.stalled_s(),
        }

    def _close(self) -> None:
        """Undo `_start`, as far as it came."""
        if self._preparations is not None:
            self._preparations.stop()
        self._server.stop()
        self._sampler.stop()
        self._journal.stop()
        self._events.stop()
        self._migrations.save()
        self._connection.stop()
        self._notifications.stop(_LAST_REPORT_S)
        self._journal.unlock()

    def _make_preparations(self, node: Node, intake: Intake) -> Preparations:
        command = next((one for one in self._commands.values() if one.prepares is not None), None)
        if command is None:
            raise AgentError(
                Code.BAD_CONFIGURATION, "prepare.on_define is true, but no plugin of agent.plugins prepares VMs"
            )
        prepare = self._settings.prepare

        def hand_in(command: Command, task_uuid: str, body: bytes) -> None:
            headers = {"taskuuid": task_uuid, "callbackurl": NO_CALLBACK}
            intake.accept(command, headers, body, client=LOCAL, access=OWN_ACCESS)

        return Preparations(
            node,
            command,
            Maxima(parse_amount(prepare.max_cpus, parse_count), parse_amount(prepare.max_memory, parse_size)),
            find_task=self._journal.find,
            hand_in=hand_in,
            recorder=self._metrics,
        )

    def _run(self, task: Task) -> None:
        with self._metrics.timed(task, self._journal.own_time() - task.own_at):
            (self._host_queries if task.command in self._queries else self._executor).run(task)

    def _put(self, task: Task) -> None:
        self._lanes.put(task)

    def _wake(self, task: Task) -> None:
        self._lanes.wake(task)

    def _take_up(self, left: Left) -> None:
        """Give lanes and delivery what they lack of what the journal has."""
        for task in left.unfinished:
            self._lanes.put(task)
        self._delivery.put_missing(left.owed)

    def _note_gap(self) -> None:
        """Take into account that VMs may have changed while no events came."""
        self._budget.note_gap()
        if self._preparations is not None:
            self._preparations.note_all()

    def _describe_vm(self, vm: str) -> msgspec.Raw:
        """Return what ReadyForHotplug says of a VM: facts, headroom, blockers."""
        command = self._commands.get("ReadyForHotplug")
        if command is None:
            raise AgentError(Code.UNKNOWN_PATH, "no plugin describes VMs")
        return self._executor.ask(command, command.request(vm_uuid=vm))


def _by_name(plugins: list[Plugin]) -> tuple[dict[str, Command], dict[str, Query]]:
    commands = {command.name: command for plugin in plugins for command in plugin.commands}
    queries = {query.name: query for plugin in plugins for query in plugin.queries}
    return commands, queries


def _handle(intake: Intake, declared: Command | Query) -> Handler:
    def handle(call: Call) -> Answer:
        if isinstance(declared, Query) and declared.sync:
            return Answer(intake.answer(declared, call.headers, call.body, client=call.client, access=call.access))
        return Answer(encode(intake.accept(declared, call.headers, call.body, client=call.client, access=call.access)))

    return handle
