"""Tries one row: does it start, is it prepared, does it start again?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import libvirt

from kvmagent.hypervisor.node import Node
from tests.fakes.agent import carry_out
from tests.matrix.rows import GIB, Row

#: What prepare is asked for: nothing, and more than any machine has, slots that cost addresses too.
MAXIMA: dict[str, dict[str, int]] = {
    "default": {},
    "large": {"maxCpuNum": 288, "maxMemorySize": 8192 * GIB, "slots": 64},
}


@dataclass(frozen=True)
class Trial:
    """What became of a row with one set of maxima: `refusal` is QEMU's or libvirt's words, where one did not start."""

    row: Row
    maxima: str
    started_before: bool
    refusal: str
    reply: dict[str, Any]

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if not self.started_before:
            return "never started"
        if not self.reply.get("success"):
            return str(self.reply.get("errorCode"))
        return "DOES NOT START" if self.refusal else "starts"


def try_row(connection: libvirt.virConnect, node: Node, row: Row) -> Iterator[Trial]:
    """Try a row with each set of maxima; the domains are gone afterwards."""
    name = f"row-{uuid4().hex[:12]}"
    domain = connection.defineXML(row.format(name))
    refusal = _start(domain)
    domain.undefine()
    if refusal:
        yield Trial(row, "any", started_before=False, refusal=refusal, reply={})
        return
    for maxima, asked in MAXIMA.items():
        domain = connection.defineXML(row.format(name))
        planned = carry_out(node, "ReadyForHotplug", vmUuid=name, prepare=True, dryRun=True, **asked)
        reply = carry_out(node, "ReadyForHotplug", vmUuid=name, prepare=True, **asked)
        assert planned["success"] == reply["success"], (planned, reply)
        refusal = _start(domain)
        domain.undefine()
        yield Trial(row, maxima, started_before=True, refusal=refusal, reply=reply)


def _start(domain: libvirt.virDomain) -> str:
    """Start paused and stop again; return why it did not start."""
    try:
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    except libvirt.libvirtError as error:
        return str(error.get_error_message())
    domain.destroy()
    return ""
