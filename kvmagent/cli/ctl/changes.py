"""The subcommands that send a command: those that the installed plugins declare."""

from typing import Any

import click

from kvmagent.cli.ctl.declared import More, load_commands, make_body, make_params
from kvmagent.cli.ctl.exits import CtlError, Exit, exit_of
from kvmagent.cli.ctl.render import render_readiness, render_reply
from kvmagent.cli.ctl.session import Session, session_of, shared_options
from kvmagent.cli.ctl.submit import Submission
from kvmagent.cli.ctl.terminal import printable
from kvmagent.cli.ctl.vmnames import complete_vm
from kvmagent.model.command import Command

_READY = "ready"
# The numbers that a reply's first line tells.
_ASKED = {"cpuNum", "memorySize"}
# Where each total stands among a VM's numbers: of the running VM, and of its next start.
_NUMBERS = {"cpu_num": ("cpuNum", "configCpuNum"), "memory_size": ("memorySize", "configMemorySize")}
_TOTALS = (
    "\n\nGive totals. +1 or +2G means that much more than the VM has now; the command is refused if that changes "
    "meanwhile."
)
# What says how to prepare.
_PREPARING = ("max_cpu_num", "max_memory_size", "slots", "free_page_reporting", "memory_device")


def names() -> list[str]:
    """Return the subcommands of all plugins that can be loaded, in the order in which they are declared."""
    return list(load_commands())


def find(name: str) -> click.Command | None:
    """Return the subcommand of that name."""
    command = load_commands().get(name)
    if command is None:
        return None
    return _make_ready(command) if name == _READY else _make(command)


def _make(command: Command) -> click.Command:
    removes = command.subcommand.startswith("unplug")
    adds = command.subcommand.startswith("plug")

    @click.pass_context
    def run(context: click.Context, /, **values: Any) -> int:
        session = session_of(context)
        asked = _ASKED & make_body(command.request, values).keys()
        reply = _send(session, command, _with_totals(session, values))
        return _answer(session, reply, render_reply(printable(reply), removes=removes, asked=asked))

    made = click.Command(
        command.subcommand,
        callback=run,
        params=make_params(command.request, complete_vm=complete_vm, adds=adds),
        help=f"{command.summary}." + (_TOTALS if adds else ""),
    )
    return shared_options(_waiting_options(made))


def _with_totals(session: Session, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with totals in place of what is to be added to what the VM has now.

    They hold for that alone: where the VM has something else by the time that the task runs, it is refused.
    """
    more = {name: value.amount for name, value in values.items() if isinstance(value, More)}
    if not more:
        return values
    now = session.agent.get("vms", values["vm_uuid"]).get("after") or {}
    totals = dict(values)
    for name, amount in more.items():
        live, config = _NUMBERS[name]
        has = now.get(live) if now.get(live) is not None and values.get("affect") != "config" else now.get(config)
        if has is None:
            words = f"the current size of {values['vm_uuid']} is unknown"
            raise CtlError(Exit.FAILED, "NOT_KNOWN", words, f"Run: kvmagentctl ready {values['vm_uuid']}")
        totals[name] = has + amount
        if values.get(f"expected_{name}") is None and now.get(live) is not None and values.get("affect") != "config":
            totals[f"expected_{name}"] = has
    return totals


def _make_ready(command: Command) -> click.Command:
    """Return `ready`: with --prepare it shows what would be changed, and only --apply changes it."""

    @click.pass_context
    def run(context: click.Context, /, diff: bool, apply: bool, dry_run: bool | None, **values: Any) -> int:
        session = session_of(context)
        if apply and dry_run:
            raise click.UsageError("--apply and --dry-run contradict each other", context)
        prepares = bool(values.pop("prepare", None) or diff or apply)
        preparing = [name for name in _PREPARING if values.get(name)]
        if preparing and not prepares:
            raise click.UsageError(
                "--max-cpus, --max-memory, --slots, --memory-device, --free-page-reporting are for --prepare",
                context,
            )
        values |= {"prepare": prepares or None, "dry_run": dry_run or (prepares and not apply) or None}
        reply = _send(session, command, values)
        if "ready" not in reply or not reply["success"]:
            return _answer(session, reply, render_reply(printable(reply)))
        _answer(session, reply, render_readiness(printable(reply), with_diff=diff))
        return Exit.REACHED if reply["ready"] or prepares else Exit.NOT_READY

    made = click.Command(
        command.subcommand,
        callback=run,
        params=make_params(command.request, complete_vm=complete_vm),
        help=f"{command.summary}.\n\n--prepare shows how the persistent definition would be made ready; "
        "--apply changes it. The running VM is never touched. With either, the exit status is 0 even if the VM is not "
        "ready.",
    )
    made.params += [
        click.Option(["--diff"], is_flag=True, help="Show how the XML changes. Implies --prepare."),
        click.Option(["--apply"], is_flag=True, help="Change the persistent definition. Implies --prepare."),
    ]
    return shared_options(_waiting_options(made))


def _waiting_options(command: click.Command) -> click.Command:
    command.params += [
        click.Option(
            ["--wait"],
            type=click.FloatRange(0),
            metavar="SECONDS",
            help="Wait at most this long for the outcome; the task continues in any case. [default: no limit]",
        ),
    ]
    return command


def _send(session: Session, command: Command, values: dict[str, Any]) -> dict[str, Any]:
    """Send a command with the values of its subcommand's options and return its reply."""
    body = make_body(command.request, values)
    return Submission(session.agent, session.terminal).run(command.path, body, wait_s=values["wait"])


def _answer(session: Session, reply: dict[str, Any], lines: list[str]) -> int:
    """Print a reply; one that says what went wrong ends in that."""
    status = session.outcome = exit_of(reply)
    if session.as_json:
        session.terminal.print_json(reply)
        return status
    is_refused = reply.get("outcome") == "refused"
    if not is_refused:
        session.terminal.print(*lines)
    if reply.get("error"):
        raise CtlError(status, reply.get("errorCode") or "FAILED", reply["error"], reply.get("remedy") or "")
    return status
