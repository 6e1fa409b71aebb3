"""Many VMs, of one host or of several side by side: vms, ready --all, plan --all. The agents have all state.

ask_hosts         the hosts side by side; of each its VMs one after another
                  a host that fails is told and fails no other; Ctrl-C ends with what is known by then, again at once
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from kvmagent.cli.ctl.client import Agent, Target
from kvmagent.cli.ctl.exits import CtlError, Exit, exit_of
from kvmagent.cli.ctl.hosts import HOSTS_FILE, Host, read_hosts
from kvmagent.cli.ctl.render import render_preparations, render_vms
from kvmagent.cli.ctl.session import Session, session_of, shared_options
from kvmagent.cli.ctl.submit import Submission
from kvmagent.cli.ctl.terminal import BAD, WARN, Terminal, paint, printable
from kvmagent.model import units

_SIDE_BY_SIDE = 16
# Many VMs take their time, each of whose guests is asked.
_VMS_S = 120.0
_LOOK_S = 0.2
# So few VMs or hosts take a moment, in which nobody needs to be told how far they are.
_AT_A_GLANCE = 10
_WATCH_S = 2.0
# From what nobody has to look at to what somebody has to first.
_WORSE = (
    Exit.REACHED,
    Exit.PLUGGED,
    Exit.NOT_READY,
    Exit.PENDING,
    Exit.UNFINISHED,
    Exit.PARTIAL,
    Exit.FAILED,
    Exit.UNREACHABLE,
    Exit.INTERRUPTED,
)

Json = dict[str, Any]


class Progress:
    """How far the hosts have come; whether to go on. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.done = self.known = 0
        self._under_way: list[str] = []

    def expect(self, vms: int) -> None:
        """Note that this many more VMs will be asked."""
        with self._lock:
            self.known += vms

    def each(self, vms: Iterable[Json]) -> Iterable[Json]:
        """Give the VMs one after another, until it is stopped."""
        for vm in vms:
            if self._stopped.is_set():
                return
            name = str(vm.get("name") or vm.get("vmUuid"))
            with self._lock:
                self._under_way.append(name)
            yield vm
            with self._lock:
                self._under_way.remove(name)
                self.done += 1

    def under_way(self) -> list[str]:
        """Return the VMs that are asked about at the moment."""
        with self._lock:
            return sorted(self._under_way)

    def stop(self) -> None:
        """Begin with no VM more."""
        self._stopped.set()


class Answers(NamedTuple):
    """What the hosts answered: of each VM an entry, with its host where there are several.

    `answered`: the hosts that did; `none`: what to say where there is no entry.
    """

    vms: list[Json]
    failures: list[Json]
    statuses: list[Exit]
    answered: list[str]
    none: str = "no VMs"

    @property
    def status(self) -> Exit:
        """The worst of all."""
        return max(self.statuses, key=_WORSE.index, default=Exit.REACHED)


Question = Callable[[Agent, Progress], list[tuple[Json, Exit]]]
View = Callable[[list[Json]], list[str]]
_Future = Future[list[tuple[Json, Exit]]]


def hosts_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --hosts to a subcommand."""
    return click.option(
        "--hosts",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help=f"Ask the agents of several hosts. {HOSTS_FILE}",
    )(command)


def ask_hosts(session: Session, hosts_file: str | None, question: Question, view: View) -> Answers:
    """Return what the agents answer: this session's alone, or those of a file of hosts, side by side.

    `view` is how it will be shown.
    """
    if hosts_file is None:
        progress = Progress()
        answers = Answers([], [], [], [])
        _ask_side_by_side(session, {Host("", ""): session.agent}, question, view, progress, answers)
        if answers.failures and isinstance(error := answers.failures[0]["raised"], CtlError):
            raise error
        return answers
    answers = Answers([], [], [], [])
    hosts = read_hosts(Path(hosts_file), session.conf)
    agents, names = _connect(session, hosts, answers)
    _ask_side_by_side(session, agents, question, view, Progress(), answers)
    for told in (answers.vms, answers.failures):
        told += [{**one, "host": name} for name, first in names for one in told if one["host"] == first]
    for failure in answers.failures:
        failure.pop("raised")
    answers.vms.sort(key=lambda vm: (vm["host"], str(vm.get("name") or vm.get("vmUuid"))))
    return answers


def _connect(
    session: Session, hosts: Iterable[Host], answers: Answers
) -> tuple[dict[Host, Agent], dict[tuple[str, str], None]]:
    """Return the agents of hosts; and of those that are one agent, asked by one caller, each other name and the first.

    Credentials that cannot be used fail their own host alone.

    Raises:
        CtlError: no host can be asked; a URL is none, which is a mistake in the file.
    """
    agents: dict[Host, Agent] = {}
    names: dict[tuple[str, str], None] = {}
    known: dict[Target, str] = {}
    for host in hosts:
        target = Target(**session.target_of(host.name, host.url))
        first = known.setdefault(replace(target, url=target.url.rstrip("/")), host.name)
        if first != host.name:
            names[host.name, first] = None
        else:
            try:
                agents[host] = session.connect(target)
            except CtlError as error:
                if error.code != "BAD_CREDENTIALS":
                    raise
                answers.failures.append({"host": host.name, **error.body(), "raised": error})
                answers.statuses.append(Exit.UNREACHABLE)
    if answers.failures and not agents:
        raise answers.failures[0]["raised"]
    return agents, names


def _ask_side_by_side(
    session: Session,
    agents: dict[Host, Agent],
    question: Question,
    view: View,
    progress: Progress,
    answers: Answers,
) -> None:
    asked: dict[_Future, Host] = {Future(): host for host in agents}
    work = queue.SimpleQueue[tuple[_Future, Agent]]()
    for future, agent in zip(asked, agents.values(), strict=True):
        work.put((future, agent))
    for _ in range(min(_SIDE_BY_SIDE, len(agents))):
        # Daemons: whoever presses Ctrl-C twice waits for no agent that hangs.
        threading.Thread(target=_answer, args=(work, question, view, progress), daemon=True).start()
    open_futures = set(asked)
    try:
        while open_futures:
            open_futures = wait(open_futures, timeout=_LOOK_S, return_when=FIRST_COMPLETED).not_done
            if open_futures and max(len(asked), progress.known) > _AT_A_GLANCE:
                _show(session.terminal, len(asked) - len(open_futures), len(asked), progress)
    except KeyboardInterrupt:
        progress.stop()
        for future in asked:
            future.cancel()
        answers.statuses.append(Exit.INTERRUPTED)
        with suppress(KeyboardInterrupt):
            if left := progress.under_way():
                words = f"interrupted: waiting for {', '.join(left)}; Ctrl-C again does not wait"
                session.terminal.tell(printable(f"kvmagentctl: {words}"))
            wait(future for future in asked if not future.cancelled())
        words = f"interrupted: {progress.done} of {max(progress.known, progress.done)} VMs"
        if left := progress.under_way():
            words += f"; not finished: {', '.join(left)}; a task that was sent continues"
        session.terminal.tell(printable(f"kvmagentctl: {words}"))
    finally:
        session.terminal.clear()
    for future, host in asked.items():
        if future.cancelled() or not future.done():
            continue
        try:
            found = future.result()
        except CtlError as error:
            answers.failures.append({"host": host.name, **error.body(), "raised": error})
            answers.statuses.append(error.status)
            continue
        answers.answered.append(host.name)
        for vm, status in found:
            answers.vms.append({"host": host.name, **vm} if host.name else vm)
            answers.statuses.append(status)


def _answer(
    work: "queue.SimpleQueue[tuple[_Future, Agent]]", question: Question, view: View, progress: Progress
) -> None:
    while not work.empty():
        try:
            future, agent = work.get_nowait()
        except queue.Empty:
            return
        if future.set_running_or_notify_cancel():
            try:
                found = question(agent, progress)
                # What cannot be shown of one agent hides no other.
                view(printable([{"host": "", **vm} for vm, _ in found]))
                future.set_result(found)
            except CtlError as error:
                future.set_exception(error)
            except Exception as error:
                future.set_exception(agent.not_understood(f"{type(error).__name__}: {error}"))
            except BaseException as error:
                future.set_exception(error)


def ask_each(vms: list[Json], progress: Progress, ask: Callable[[Json], tuple[Json, Exit]]) -> list[tuple[Json, Exit]]:
    """Ask an agent about each of its VMs. A failure is shown with its VM; a silent agent is not asked again."""
    answered: list[tuple[Json, Exit]] = []
    gone: CtlError | None = None
    progress.expect(len(vms))
    for vm in progress.each(vms):
        failure = gone and CtlError(
            gone.status, "NOT_ASKED", f"its agent no longer answers: {gone.message}", gone.remedy
        )
        if failure is None:
            try:
                answered.append(ask(vm))
                continue
            except CtlError as error:
                failure = error
                gone = error if error.status is Exit.UNREACHABLE else None
        answered.append(({"vmUuid": vm["vmUuid"], "name": vm.get("name"), **failure.body()}, failure.status))
    return answered


def _show(terminal: Terminal, done: int, hosts: int, progress: Progress) -> None:
    words = f"  {progress.done} of {progress.known} VMs" if progress.known else "  asking"
    terminal.show(f"{words}, {done} of {hosts} hosts" if hosts > 1 else words)


def _tell_failures(terminal: Terminal, failures: Iterable[Json]) -> None:
    for one in failures:
        words = printable(f"{one['host']}: {one['errorCode']}: {one['error']}; remedy: {one['remedy']}")
        terminal.tell(f"{paint('kvmagentctl', BAD)}: {words}")


def print_answers(session: Session, answers: Answers, view: View) -> Exit:
    """Print what the hosts answered, whole, and return the worst of their statuses."""
    _tell_failures(session.terminal, answers.failures)
    if session.output == "name":
        names = [str(vm.get("name") or vm.get("vmUuid")) for vm in answers.vms]
        session.terminal.print(*printable(sorted(names)))
        return answers.status
    if session.as_json:
        body = _body(answers)
        if Exit.INTERRUPTED in answers.statuses:
            body["interrupted"] = True
        session.terminal.print_json(body)
    else:
        session.terminal.print(*_lines(answers, view))
    return answers.status


def _body(answers: Answers) -> Json:
    has_hosts = answers.failures or any("host" in vm for vm in answers.vms)
    return {"vms": answers.vms, **({"failures": answers.failures} if has_hosts else {})}


def _lines(answers: Answers, view: View) -> list[str]:
    """Return the VMs as a view shows them, or in words why there are none: a host that failed may have some."""
    if answers.vms:
        return view(printable(answers.vms))
    if Exit.INTERRUPTED in answers.statuses:
        return []
    if answers.failures:
        return [f"{answers.none} on the hosts that answered" if answers.answered else "no host answered"]
    return [answers.none]


# -- subcommands


@click.command()
@click.option(
    "--pending-restart", is_flag=True, help="Only VMs that must be powered off and on for a change to take effect."
)
@click.option("--not-ready", is_flag=True, help="Only VMs that cannot grow, although they are below their maximum.")
@click.option("--watch", is_flag=True, help="Refresh every two seconds, until Ctrl-C.")
@hosts_option
@click.pass_context
def vms(context: click.Context, pending_restart: bool, not_ready: bool, watch: bool, hosts: str | None) -> int:
    """List all VMs, and whether they are ready for hotplug.

    GUEST is what the guest says it uses; MAX is what the VM can grow to without a restart. HOTPLUG names
    the first blocker; `kvmagentctl ready VM` lists all of them.
    """
    session = session_of(context)

    def question(agent: Agent, progress: Progress) -> list[tuple[Json, Exit]]:
        found = agent.list_vms(timeout_s=_VMS_S)
        progress.expect(len(found))
        return [(vm, Exit.REACHED) for vm in progress.each(found)]

    view = partial(render_vms, wide=session.is_wide)

    def ask() -> Answers:
        answers = ask_hosts(session, hosts, question, view)
        return _choose(answers, pending_restart=pending_restart, not_ready=not_ready) if answers.vms else answers

    if watch:
        _watch(session, ask, view)
    return print_answers(session, ask(), view)


def _choose(answers: Answers, *, pending_restart: bool, not_ready: bool) -> Answers:
    """Return the answers with the VMs that pass the filters, and what is true of all VMs if none does."""
    chosen = [
        vm
        for vm in answers.vms
        if (vm.get("restartRequired") or not pending_restart)
        and (not not_ready or not (vm.get("ready") or vm.get("atMaximum")))
    ]
    count = len(answers.vms)
    if pending_restart and not_ready:
        none = "no VM matches both options"
    elif pending_restart:
        none = "the only VM needs no restart" if count == 1 else f"none of {count} VMs needs a restart"
    else:
        ready = "the only VM is ready or at its maximum"
        none = ready if count == 1 else f"all {count} VMs are ready or at their maximum"
    return answers._replace(vms=chosen, none=none)


def _watch(session: Session, ask: Callable[[], Answers], view: View) -> NoReturn:
    """Show the VMs again and again; an agent that is away is waited for. Where nobody looks only changes are shown.

    Hosts that failed are told below their table, which takes the place of what was there.

    Raises:
        CtlError: the first look fails.
    """
    terminal, shown, told, is_away = session.terminal, None, list[Json](), False
    while True:
        try:
            answers, is_away = ask(), False
        except CtlError as error:
            if shown is None or error.status is not Exit.UNREACHABLE:
                raise
            if not is_away:
                terminal.tell(paint(f"kvmagentctl: {error.message}; waiting for it", WARN))
            is_away = True
        else:
            if answers.status is Exit.INTERRUPTED:
                raise KeyboardInterrupt
            is_drawn = terminal.is_watched and not session.as_json
            found: Any = _body(answers) if session.as_json else _lines(answers, view)
            if is_drawn or (found != shown and not session.as_json):
                terminal.redraw(*found)
            elif found != shown:
                terminal.print_json(found, indent=None)
            if is_drawn or answers.failures != told:
                _tell_failures(terminal, answers.failures)
            shown, told = found, answers.failures
        time.sleep(_WATCH_S)


def parse_amount(text: str, parse: Callable[[str], int]) -> Callable[[int], int]:
    """Return what makes an amount of what a VM has.

    Raises:
        click.UsageError: it is none.
    """
    try:
        return units.parse_amount(text, parse).of
    except ValueError as error:
        raise click.UsageError(f"{text}: {error}") from None


def make_ready(ready: click.Command) -> click.Command:
    """Return `ready` with --all and --hosts; without them it is what it was."""
    one_vm = ready.callback
    assert one_vm is not None

    def run(**values: Any) -> Any:
        context = click.get_current_context()
        hosts, every = values.pop("hosts"), values.pop("all")
        if not every and hosts is None:
            if values["vm_uuid"] is None:
                raise click.UsageError("Missing argument 'VM', or --all.", context)
            for name, own in own_types.items():
                if values[name] is not None:
                    values[name] = own.convert(values[name])
            return one_vm(**values)
        if values["vm_uuid"] is not None:
            raise click.UsageError("--all and --hosts are for all VMs: leave the VM out", context)
        return _ready_all(session_of(context), hosts, values, own_types)

    own_types: dict[str, _OwnType] = {}
    for param in ready.params:
        if param.name == "vm_uuid":
            param.required = False
        if param.name in ("max_cpu_num", "max_memory_size"):
            own_types[param.name] = _OwnType(param, param.type)
            param.type = click.STRING
    ready.callback = run
    ready.params += [
        click.Option(
            ["--all"],
            is_flag=True,
            help="All VMs. --max-cpus x4 means four times what each has; --max-memory likewise.",
        ),
        click.Option(
            ["--hosts"],
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help=f"All VMs of several hosts. {HOSTS_FILE}",
        ),
    ]
    return ready


class _OwnType(NamedTuple):
    """An option that takes x4 too where it is for all VMs, and what it takes else."""

    param: click.Parameter
    type: "click.ParamType[Any]"

    def convert(self, text: str) -> int:
        """Return the number, or end with what is wrong with the option."""
        return int(self.type.convert(text, self.param, click.get_current_context()))


def _ready_all(session: Session, hosts: str | None, values: Json, types: dict[str, _OwnType]) -> int:
    apply, diff = bool(values["apply"]), bool(values["diff"])
    prepares = bool(values.get("prepare") or diff or apply)
    maxima: dict[str, Callable[[int], int]] = {}
    for name in types:
        if (text := values.get(name)) is not None:
            if not prepares:
                raise click.UsageError("--max-cpus and --max-memory are for --prepare")
            maxima[name] = parse_amount(text, types[name].convert)

    def prepare(agent: Agent, vm: Json) -> tuple[Json, Exit]:
        has = vm.get("after") or {}
        body: Json = {"vmUuid": vm["vmUuid"], "prepare": True, "dryRun": not apply}
        for name, field, wire in (
            ("max_cpu_num", "configCpuNum", "maxCpuNum"),
            ("max_memory_size", "configMemorySize", "maxMemorySize"),
        ):
            if name in maxima and has.get(field) is not None:
                body[wire] = maxima[name](has[field])
        reply = Submission(agent, _Silent()).run("/vm/hotplug/ready", body, wait_s=values.get("wait"))
        return {**reply, "name": reply.get("name") or vm.get("name")}, exit_of(reply)

    def question(agent: Agent, progress: Progress) -> list[tuple[Json, Exit]]:
        found = agent.list_vms(timeout_s=_VMS_S)
        if prepares:
            return ask_each(found, progress, partial(prepare, agent))
        progress.expect(len(found))
        return [
            (vm, Exit.REACHED if vm.get("ready") or vm.get("atMaximum") else Exit.NOT_READY)
            for vm in progress.each(found)
        ]

    view: View = partial(render_preparations, with_diff=diff) if prepares else render_vms
    answers = ask_hosts(session, hosts, question, view)
    if apply:
        session.outcome = answers.status
    return print_answers(session, answers, view)


class _Silent(Terminal):
    """Where many tasks go on at once, their single steps are not shown."""

    @property
    def shows_progress(self) -> bool:
        return False

    def tell(self, line: str) -> None:
        return


VMS = shared_options(vms)
