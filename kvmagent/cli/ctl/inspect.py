"""The subcommands that change nothing: they read the agent, the host or the configuration."""

import math
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote, urlencode

import click
import msgspec

from kvmagent.cli.ctl.declared import VM_NAME
from kvmagent.cli.ctl.exits import CtlError, Exit
from kvmagent.cli.ctl.render import (
    render_change,
    render_history,
    render_reclaimable,
    render_status,
    render_task,
    render_tasks,
    view_cancelled,
)
from kvmagent.cli.ctl.session import Session, session_of, shared_options
from kvmagent.cli.ctl.terminal import GOOD, WARN, paint, printable
from kvmagent.cli.ctl.vmnames import complete_task, complete_vm
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.reply import Outcome
from kvmagent.settings import DEFAULT_PATH, Settings, sample_conf

_TASK_STATES = ("accepted", "running", "finished", "delivered", "gone", "given_up")
# Many VMs take their time, each of whose guests is asked.
_VMS_S = 120.0
_FOLLOW_S = 0.5
_CHECK_S = 60.0
_FOLLOWED = 200
# One more than are told.
_AMBIGUOUS = 4
_AGO = re.compile(r"(?P<number>[0-9]+)(?P<unit>[smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Moment(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on alone
    """A moment, by how long ago it is or by its date and time in UTC, as seconds since the epoch."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds, or end with what is wrong."""
        if isinstance(value, float):
            return value
        if ago := _AGO.fullmatch(value):
            return math.floor(time.time()) - int(ago["number"]) * _SECONDS[ago["unit"]]
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time: write 2h, 3d, 2026-11-27 or 2026-11-27T03:00", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


MOMENT = Moment()
_CONFIG_OPTION = click.option(
    "--config", metavar="FILE", default=DEFAULT_PATH, show_default=True, help="The agent's configuration."
)


@click.command()
@click.pass_context
def status(context: click.Context) -> int:
    """Show whether the agent is ready, and what it is doing."""
    session = session_of(context)
    health = session.agent.get("healthz")
    _print(session, health, lambda body: render_status(session.agent.url, body))
    return Exit.REACHED if health["ready"] else Exit.NOT_READY


@click.command()
@click.option(
    "--dry-run",
    is_flag=True,
    required=True,
    help="Required: the command only shows what could be removed, and removes nothing.",
)
@click.pass_context
def reclaim(context: click.Context, dry_run: bool) -> None:
    """Show how much memory VMs could give back to the host.

    It is memory that their guests do not use. UNUSED is what the guest reports as available. REMOVABLE BY lists each
    way, with what it could give back on its own. To take memory back, use `kvmagentctl unplug-memory VM TOTAL`.
    """
    session = session_of(context)
    answer = session.agent.get("host", "reclaimable", timeout_s=_VMS_S)
    _print(session, answer, render_reclaimable)


@click.command()
@click.option("--vm", help="Only tasks of one VM, by its name or UUID.", shell_complete=complete_vm)
@click.option("--state", type=click.Choice(_TASK_STATES), help="Only tasks in this state.")
@click.option(
    "--outcome",
    type=click.Choice(get_args(Outcome)),
    metavar="OUTCOME",
    help=f"Only tasks with this outcome: {', '.join(get_args(Outcome))}.",
)
@click.option("--caller", help="Only tasks of this caller, as GET /whoami names it.")
@click.option(
    "--since", type=MOMENT, help="Only tasks accepted since then: 2h, 3d, 2026-11-27, 2026-11-27T03:00 (UTC)."
)
@click.option("--until", type=MOMENT, help="Only tasks accepted before then.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Maximum number of tasks.")
@click.option("--follow", "-f", is_flag=True, help="Print a line for each change of state, until Ctrl-C.")
@click.pass_context
def tasks(context: click.Context, /, state: str | None, limit: int, follow: bool, **chosen: Any) -> None:
    """List the newest tasks, or follow them with --follow.

    With --json, --follow prints one task per line.
    """
    session = session_of(context)
    query = {name: value for name, value in {**chosen, "state": state}.items() if value is not None}

    def read(number: int) -> list[dict[str, Any]]:
        found = session.agent.get("tasks", query=urlencode({**query, "limit": number}))["tasks"]
        return list(found)

    if follow and (state or chosen["outcome"]):
        raise click.UsageError("--follow shows every change of state: it takes no --state or --outcome", context)
    if follow:
        _follow(session, read, limit)
        return
    _print(
        session,
        {"tasks": read(limit)},
        lambda body: render_tasks(body["tasks"], time.time(), wide=session.is_wide, chosen=bool(query)),
        names=lambda body: [task["taskUuid"] for task in body["tasks"]],
    )


def _follow(session: Session, read: Callable[[int], list[dict[str, Any]]], limit: int) -> None:
    """Print the newest tasks, oldest first, then each one whenever it has changed since the last look."""
    known: dict[str, tuple[Any, ...]] = {}
    newest_at, is_away = 0.0, False
    while True:
        try:
            seen, is_away = read(_FOLLOWED), False
        except CtlError as error:
            if error.status is not Exit.UNREACHABLE or not known:
                raise
            if not is_away:
                session.terminal.tell(paint(f"kvmagentctl: {error.message}; waiting for it", WARN))
            is_away = True
            time.sleep(_FOLLOW_S)
            continue
        # A task that is new to us and older than what we saw has only moved up, where others were forgotten.
        changed = [
            task
            for task in (seen if known else seen[:limit])
            if known.get(task["taskUuid"], () if task["acceptedAt"] > newest_at else _version(task)) != _version(task)
        ]
        for task in reversed(changed):
            if session.as_json:
                session.terminal.print_json(task, indent=None)
            else:
                session.terminal.print(render_change(printable(task), time.strftime("%H:%M:%S")))
        known = {task["taskUuid"]: _version(task) for task in seen}
        newest_at = max([newest_at, *(task["acceptedAt"] for task in seen)])
        time.sleep(_FOLLOW_S)


def _version(task: dict[str, Any]) -> tuple[Any, ...]:
    return task["state"], task["outcome"], task["finishedAt"], task["delivery"]["attempts"]


@click.command()
@click.argument("task_id", metavar="ID", shell_complete=complete_task)
@click.pass_context
def task(context: click.Context, task_id: str) -> None:
    """Show a task: request, steps, reply, callback.

    The beginning of its id is enough if no other id begins with it.
    """
    session = session_of(context)
    found = _ask_by_beginning(session, task_id, lambda task_uuid: session.agent.get("tasks", task_uuid))
    _print(session, found, lambda body: render_task(body, time.time()))


@click.command()
@click.argument("task_id", metavar="ID", shell_complete=complete_task)
@click.pass_context
def cancel(context: click.Context, task_id: str) -> None:
    """Cancel a task that has not changed its VM yet.

    The task ends as refused, with the code CANCELLED. A change that has begun is never stopped halfway: the answer
    says how far it is.
    """
    session = session_of(context)

    def take_back(task_uuid: str) -> Any:
        return session.agent.ask(f"/tasks/{quote(task_uuid, safe='')}/cancel", {})

    cancelled = _ask_by_beginning(session, task_id, take_back)
    session.outcome = Exit.REACHED
    _print(session, cancelled, view_cancelled, names=lambda body: [body["taskUuid"]])


@click.command()
@click.argument("vm", type=VM_NAME, shell_complete=complete_vm)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Maximum number of entries.")
@click.pass_context
def log(context: click.Context, vm: str, limit: int) -> None:
    """Show who changed a VM, when, how, and with what outcome.

    The newest change comes first. Entries are kept for agent.keep_history_sec (400 days), their tasks for
    agent.keep_sec (7 days).
    """
    session = session_of(context)
    body = session.agent.get("vms", vm, "history", query=urlencode({"limit": limit}))
    _print(
        session,
        body,
        lambda shown: render_history(shown["changes"], time.time(), wide=session.is_wide),
        names=lambda shown: [change["taskUuid"] for change in shown["changes"]],
    )


def _ask_by_beginning(session: Session, beginning: str, ask: Callable[[str], Any]) -> Any:
    """Ask about the task of that id, or else about the one whose id begins so.

    Raises:
        CtlError: there is none, or there are several; nothing was named, as by a variable of a script that is not set.
    """
    if not beginning.strip():
        raise CtlError(Exit.USAGE, "USAGE", "the id of the task is empty", "kvmagentctl tasks lists tasks.")
    try:
        return ask(beginning)
    except CtlError as error:
        if error.code != Code.UNKNOWN_TASK:
            raise
        found = session.agent.get("tasks", query=urlencode({"id": beginning, "limit": _AMBIGUOUS}))["tasks"]
        ids = [str(one["taskUuid"]) for one in found]
        if not ids:
            raise
    if len(ids) > 1:
        several = ", ".join(ids[: _AMBIGUOUS - 1]) + (" and others" if len(ids) == _AMBIGUOUS else "")
        words = f"several tasks begin with {beginning}: {several}"
        raise CtlError(Exit.USAGE, "AMBIGUOUS_TASK", words, "Give more of the id.")
    return ask(ids[0])


@click.command()
@click.pass_context
def openapi(context: click.Context) -> None:
    """Print the agent's OpenAPI document."""
    session = session_of(context)
    session.terminal.print_json(session.agent.get("openapi.json"))


@click.command()
@_CONFIG_OPTION
@click.pass_context
def doctor(context: click.Context, config: str) -> int:
    """Check this host, and give a remedy for each problem.

    Run it as root on the host itself: it then checks as the agent's user, and says so.
    """
    from kvmagent.cli.ctl.doctor import examine
    from kvmagent.cli.ctl.findings import is_healthy, render_findings

    session = session_of(context)
    findings = examine(Path(config), session.asked_for)
    body = {"healthy": is_healthy(findings), "findings": msgspec.to_builtins(findings)}
    _print(session, body, lambda _: render_findings(findings))
    return Exit.REACHED if body["healthy"] else Exit.NOT_READY


@click.command()
@_CONFIG_OPTION
@click.option("--sample", is_flag=True, help="Print a configuration with every key, its meaning and its default.")
@click.option("--check", is_flag=True, help="Check the file, and the plugins and certificates that it names.")
@click.option(
    "--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help="Override one key; may be repeated."
)
@click.pass_context
def config(context: click.Context, config: str, sample: bool, check: bool, overrides: tuple[str, ...]) -> None:
    """Show or check the agent's configuration.

    It reads the file on this host and does not contact the agent. --sample prints a file with every key.
    """
    from kvmagent.cli.configfile import check_files, read_settings, read_sources
    from kvmagent.cli.ctl.agentuser import find_identity, look_as
    from kvmagent.cli.ctl.configuration import render_settings
    from kvmagent.cli.ctl.findings import Finding

    session = session_of(context)
    if sample:
        _print(session, msgspec.to_builtins(Settings()), lambda _: sample_conf().splitlines())
        return
    if check:
        # One that is not in its place yet need not be where the agent's user can read it: Ansible's validate.
        identity = find_identity()
        sources = None if config == DEFAULT_PATH else read_sources(Path(config).absolute())
        place = config if sources is None else "-"
        found = look_as(identity, "configuration", [place, *overrides], timeout_s=_CHECK_S, sources=sources)
        faults = [one for one in found if one.level == "wrong"]
        if sources is not None:
            try:
                # Until it is in its place it may be his who writes it there.
                check_files(Path(config).absolute(), user_id=os.stat(config).st_uid)
            except AgentError as error:
                faults.append(Finding("configuration", "wrong", error.message, error.remedy))
        if faults:
            raise CtlError(
                Exit.FAILED,
                "BAD_CONFIGURATION",
                "; ".join(one.message for one in faults),
                " ".join(dict.fromkeys(one.remedy for one in faults)),
            )
        seen = f", as {identity.name} sees it" if identity else ""
        body = {"success": True, "file": config}
        _print(session, body, lambda _: [f"{found[0].message}: {paint('good', GOOD)}{seen}"])
        return
    settings = read_settings(Path(config), overrides)
    _print(session, msgspec.to_builtins(settings), lambda _: render_settings(settings))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    For one bash session: source <(kvmagentctl completion bash)
    """
    from click.shell_completion import get_completion_class

    name = context.find_root().info_name or "kvmagentctl"
    found = get_completion_class(shell)
    assert found is not None
    script = found(context.find_root().command, {}, name, f"_{name.upper()}_COMPLETE")
    # Not `source()`: for bash that runs bash to look at its version, which is not to be expected where packages
    # are built. Source: click shell_completion.BashComplete.
    text = script.source_template % script.source_vars()
    session = session_of(context)
    _print(session, {"shell": shell, "script": text}, lambda _: text.splitlines())


def _print(session: Session, body: Any, view: Any, *, names: Callable[[Any], list[str]] | None = None) -> None:
    if session.as_json:
        session.terminal.print_json(body)
    elif session.output == "name":
        if names is None:
            raise click.UsageError("-o name is for lists: vms, tasks, log")
        session.terminal.print(*names(printable(body)))
    else:
        session.terminal.print(*view(printable(body)))


COMMANDS = {
    command.name or "": shared_options(command)
    for command in (status, reclaim, tasks, task, cancel, log, doctor, config, openapi, completion)
}
