"""`plan`: what resizes would mean, as a grid for one VM, or for all VMs of one or several hosts."""

import itertools
from collections.abc import Callable
from typing import Any

import click

from kvmagent.cli.ctl.client import Agent
from kvmagent.cli.ctl.declared import VM_NAME
from kvmagent.cli.ctl.exits import Exit
from kvmagent.cli.ctl.fleet import Json, Progress, ask_each, ask_hosts, hosts_option, parse_amount, print_answers
from kvmagent.cli.ctl.render import render_plan, render_plans
from kvmagent.cli.ctl.session import session_of, shared_options
from kvmagent.cli.ctl.terminal import printable
from kvmagent.cli.ctl.vmnames import complete_vm
from kvmagent.model.plans import MOST_TARGETS
from kvmagent.model.units import parse_count, parse_size

PATH = "/vm/hotplug/plan"
_VMS_S = 120.0


@click.command()
@click.argument("vm", type=VM_NAME, required=False, shell_complete=complete_vm)
@click.option("--cpus", metavar="N,N...", help="Totals of vCPUs; x2 is twice what the VM has.")
@click.option("--memory", metavar="SIZE,SIZE...", help="Totals of memory; x2 is twice what the VM has.")
@click.option("--method", type=click.Choice(["auto", "dimm", "virtio-mem", "balloon"]), help="How memory is added.")
@click.option("--node", type=click.IntRange(0), metavar="NUMBER", help="Guest NUMA node that gets the memory.")
@click.option("--affect", type=click.Choice(["both", "live", "config"]), help="Which definition would change.")
@click.option("--all", "every", is_flag=True, help="All VMs.")
@hosts_option
@click.pass_context
def plan(
    context: click.Context,
    /,
    vm: str | None,
    cpus: str | None,
    memory: str | None,
    every: bool,
    hosts: str | None,
    **fields: Any,
) -> int:
    """Show which sizes a VM can have now or after a restart.

    With --cpus and --memory, each combination is planned. Nothing is changed or reserved.
    """
    session = session_of(context)
    many = every or hosts is not None
    if (vm is None) is not many:
        raise click.UsageError("name one VM, or --all" if vm is None else "--all and --hosts are for all VMs", context)
    cpu_totals = _parse(cpus, parse_count)
    sizes = _parse(memory, parse_size)
    if not cpu_totals and not sizes:
        raise click.UsageError("--cpus, --memory or both are needed", context)
    count = (len(cpu_totals) or 1) * (len(sizes) or 1)
    if count > MOST_TARGETS:
        raise click.UsageError(f"{count} targets given, at most {MOST_TARGETS} can be planned at once", context)

    def ask(agent: Agent, known: Json) -> Json:
        targets = make_targets(known.get("after") or {}, cpu_totals, sizes, fields)
        reply = dict(agent.ask(PATH, {"vmUuid": known["vmUuid"], "targets": targets}))
        if len(reply["plans"]) != len(targets):
            raise ValueError(f"{len(reply['plans'])} plans for {len(targets)} targets")
        return reply

    if vm is not None:
        reply = ask(session.agent, {**session.agent.get("vms", vm), "vmUuid": vm})
        if session.as_json:
            session.terminal.print_json(reply)
        else:
            session.terminal.print(*render_plan(printable(reply)))
        return Exit.REACHED

    def question(agent: Agent, progress: Progress) -> list[tuple[Json, Exit]]:
        found = agent.list_vms(fields="name,after", timeout_s=_VMS_S)
        return ask_each(found, progress, lambda vm: (ask(agent, vm), Exit.REACHED))

    return print_answers(session, ask_hosts(session, hosts, question, render_plans), render_plans)


def make_targets(
    has: Json, cpus: list[Callable[[int], int]], sizes: list[Callable[[int], int]], fields: Json
) -> list[Json]:
    """Return each pair of totals, or each total where there is one kind; `fields` are those of all of them."""
    cpu_num = has.get("cpuNum") or has.get("configCpuNum") or 1
    memory_size = has.get("memorySize") or has.get("configMemorySize") or 1
    numbers: list[int | None] = [make(cpu_num) for make in cpus] if cpus else [None]
    totals: list[int | None] = [make(memory_size) for make in sizes] if sizes else [None]
    targets = []
    for size, number in itertools.product(totals, numbers):
        target = {"cpuNum": number, "memorySize": size, "affect": fields["affect"]}
        if size is not None:
            target |= {"method": fields["method"], "node": fields["node"]}
        targets.append({name: value for name, value in target.items() if value is not None})
    return targets


def _parse(text: str | None, parse: Callable[[str], int]) -> list[Callable[[int], int]]:
    return [parse_amount(one.strip(), parse) for one in (text or "").split(",") if one.strip()]


PLAN = shared_options(plan)
