"""Completes names of VMs and ids of tasks; a slow or absent agent completes nothing, and says nothing."""

from urllib.parse import urlencode

import click
from click.shell_completion import CompletionItem

from kvmagent.cli.ctl.exits import CtlError
from kvmagent.cli.ctl.session import session_of

_TIMEOUT_S = 2.0
_TASKS = 50


def complete_vm(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the VMs whose name or UUID begins with what was typed."""
    try:
        vms = session_of(context).agent.list_vms(fields="name", timeout_s=_TIMEOUT_S)
    except CtlError:
        return []
    names = [str(vm.get("name") or vm["vmUuid"]) for vm in vms]
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def complete_task(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the newest tasks whose id begins with what was typed, each with what it is."""
    query = urlencode({"id": incomplete, "limit": _TASKS})
    try:
        tasks = session_of(context).agent.get("tasks", query=query, timeout_s=_TIMEOUT_S)["tasks"]
    except CtlError:
        return []
    return [
        CompletionItem(task["taskUuid"], help=f"{task['command']} {task['vm']} {task['outcome'] or task['state']}")
        for task in tasks
    ]
