"""Completes names of VMs, as the agent has them; a slow or absent agent completes nothing, and says nothing."""

import click
from click.shell_completion import CompletionItem

from kvmagent.cli.ctl.exits import CtlError
from kvmagent.cli.ctl.session import session_of

_TIMEOUT_S = 2.0


def complete_vm(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the VMs whose name or UUID begins with what was typed."""
    try:
        vms = session_of(context).agent.get("vms", timeout_s=_TIMEOUT_S)["vms"]
    except CtlError:
        return []
    names = [str(vm.get("name") or vm["vmUuid"]) for vm in vms]
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
