"""The agent, assembled: builds every object, owns the order of start and stop, and the signals.

start   journal, libvirt connection, lanes with what the journal left, delivery with what it owes, HTTP
stop    new tasks refused, running ones finished, due callbacks sent, HTTP, journal, libvirt connection
"""

import importlib.metadata
import logging
import os
import signal
import threading
from pathlib import Path

import msgspec

from kvmagent import __version__
from kvmagent.api.intake import Intake
from kvmagent.api.reads import Reads
from kvmagent.api.server import Answer, Call, Handler, Server
from kvmagent.api.wire import encode
from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.node import Node
from kvmagent.model.command import Command, Plugin
from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import Settings
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.journal import UNFINISHED, Journal, Task
from kvmagent.tasks.lanes import Lanes

log = logging.getLogger(__name__)

_PLUGIN_GROUP = "kvmagent.plugins"
# How long a stopping agent still sends the callbacks that are due.
_LAST_CALLBACKS_S = 5.0


def load_plugins(names: tuple[str, ...]) -> list[Plugin]:
    """Return the plugins of these entry points, in order.

    Raises:
        AgentError: BAD_CONFIGURATION, with the plugin's name and why it cannot be had.
    """
    found = {point.name: point for point in importlib.metadata.entry_points(group=_PLUGIN_GROUP)}
    plugins = []
    for name in names:
        if name not in found:
            have = ", ".join(sorted(found)) or "none"
            raise AgentError(
                Code.BAD_CONFIGURATION, f"agent.plugins: no plugin {name!r} is installed; installed: {have}"
            )
        try:
            plugin = found[name].load()
        except Exception as error:
            raise AgentError(Code.BAD_CONFIGURATION, f"agent.plugins: {name!r} cannot be loaded: {error}") from error
        if not isinstance(plugin, Plugin):
            raise AgentError(
                Code.BAD_CONFIGURATION, f"agent.plugins: {name!r} is a {type(plugin).__name__}, not a Plugin"
            )
        plugins.append(plugin)
    return plugins


class Agent:
    """One agent. `start`, then `run_until_signal` or, from another thread, `stop`."""

    def __init__(self, settings: Settings, plugins: list[Plugin]) -> None:
        self._settings = settings
        self._commands = _by_name(plugins)
        self._wake = threading.Event()
        state_dir = Path(settings.agent.state_dir)
        events = DeviceEvents()
        self._connection = Connection(settings.libvirt.uri, register=events.register)
        node = Node(self._connection, events=events, former_xml_dir=state_dir / "former-xml")
        self._journal = Journal(state_dir / "journal.sqlite", on_accepted=self._put)
        self._delivery = Delivery(
            self._journal, timeout_s=settings.callback.timeout_sec, give_up_s=settings.callback.give_up_sec
        )
        self._executor = Executor(node, self._journal, self._commands, on_finished=self._delivery.put)
        self._lanes = Lanes(
            self._executor.run,
            workers=settings.agent.workers,
            max_queued=settings.agent.max_queued,
            max_queued_per_lane=settings.agent.max_queued_per_vm,
        )
        intake = Intake(self._journal, self._lanes, self._delivery)
        reads = Reads(
            node,
            self._journal,
            self._lanes,
            self._delivery,
            self._commands.values(),
            describe_vm=self._describe_vm,
        )
        commands = {("POST", command.path): _accept(intake, command) for command in self._commands.values()}
        self._server = Server(settings.http, settings.security, {**commands, **reads.routes()})

    def start(self) -> None:
        """Start, and take up what the journal left.

        Raises:
            AgentError: BAD_CONFIGURATION; JOURNAL_UNAVAILABLE.
        """
        _make_state_dir(Path(self._settings.agent.state_dir))
        self._journal.start()
        self._connection.start()
        unfinished, owed = self._journal.select(states=UNFINISHED), self._journal.select(states=("finished",))
        for task in unfinished:
            self._lanes.put(task)
        for task in owed:
            self._delivery.put(task)
        self._server.start()
        log.info(
            "agent ready version=%s pid=%d commands=%s unfinished=%d owed=%d",
            __version__,
            os.getpid(),
            ",".join(self._commands),
            len(unfinished),
            len(owed),
        )

    def stop(self) -> None:
        """Refuse new tasks, finish what runs, leave the rest in the journal."""
        log.info("agent stopping running=%d queued=%d", len(self._lanes.running()), self._lanes.depth())
        self._lanes.stop(self._settings.agent.stop_timeout_sec)
        self._delivery.stop(_LAST_CALLBACKS_S)
        self._server.stop()
        self._journal.stop()
        self._connection.stop()
        log.info("agent stopped")

    def run_until_signal(self) -> None:
        """Return when SIGTERM or SIGINT comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._wake.set())
        self._wake.wait()

    def _put(self, task: Task) -> None:
        self._lanes.put(task)

    def _describe_vm(self, vm: str) -> msgspec.Struct:
        """Return what ReadyForHotplug says of a VM: facts, headroom, blockers."""
        command = self._commands.get("ReadyForHotplug")
        if command is None:
            raise AgentError(Code.UNKNOWN_PATH, "no plugin describes VMs")
        return self._executor.ask(command, command.request(vm_uuid=vm))


def _by_name(plugins: list[Plugin]) -> dict[str, Command]:
    commands: dict[str, Command] = {}
    paths: set[str] = set()
    for plugin in plugins:
        for command in plugin.commands:
            if command.name in commands or command.path in paths:
                raise AgentError(
                    Code.BAD_CONFIGURATION, f"plugin {plugin.name!r}: {command.name} at {command.path} is there already"
                )
            commands[command.name] = command
            paths.add(command.path)
    return commands


def _accept(intake: Intake, command: Command) -> Handler:
    def handle(call: Call) -> Answer:
        return Answer(encode(intake.accept(command, call.headers, call.body, call.client)))

    return handle


def _make_state_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(Code.BAD_CONFIGURATION, f"agent.state_dir {path}: {error}") from error
