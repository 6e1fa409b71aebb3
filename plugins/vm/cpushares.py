"""CPU shares that follow the number of vCPUs, if the caller requests it.

libvirt itself gives a plugged vCPU the pinning, the set of host CPUs, the quota and the scheduler that the VM's
definition has for it. Shares alone are of the whole VM, so that each vCPU weighs less the more there are.
Source: libvirt 9.0, qemuProcessSetupVcpu; formatdomain, cputune.
"""

from typing import Literal

import msgspec

from kvmagent.model.command import Affect, Ending
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Facts
from kvmagent.model.guestuse import warning
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep, SetCpuShares, Target

# Source: Linux Documentation/scheduler: the least that the kernel takes.
_LEAST = 2


class PlannedShares(msgspec.Struct, frozen=True, rename="camel"):
    """What one definition's shares are to be."""

    shares: int
    target: Target


def plan_shares(
    facts: Facts, affect: Affect, cpu_num: int, *, scale: bool, direction: Literal["up", "down"]
) -> tuple[PlannedShares, ...]:
    """Return the shares by which each of `cpu_num` vCPUs weighs as much as one does now; none where none are set.

    A definition that is beyond `cpu_num` in that direction already keeps its vCPUs, and its shares.
    """
    if not scale:
        return ()
    return tuple(
        PlannedShares(shares=max(_LEAST, round(own.cpu_shares * cpu_num / own.vcpu_current)), target=target)
        for target, own in _definitions(facts, affect)
        if own.cpu_shares is not None
        and (own.vcpu_current < cpu_num if direction == "up" else own.vcpu_current > cpu_num)
    )


def shares_steps(
    planned: tuple[PlannedShares, ...], facts: Facts, cpu_num: int, failed: frozenset[str]
) -> tuple[AnyStep, ...]:
    """Return what sets the shares of the definitions that have their vCPUs already."""
    definitions = dict(_definitions(facts, "both"))
    steps = (
        SetCpuShares(shares=one.shares, target=one.target)
        for one in planned
        if (own := definitions.get(one.target)) and own.vcpu_current == cpu_num and own.cpu_shares != one.shares
    )
    return tuple(step for step in steps if step.key not in failed)


def are_shares_set(planned: tuple[PlannedShares, ...], facts: Facts) -> bool:
    """Return whether shares of any definition have been brought to what was planned."""
    definitions = dict(_definitions(facts, "both"))
    return any((own := definitions.get(one.target)) and own.cpu_shares == one.shares for one in planned)


def explain_shares(ending: Ending) -> list[Problem]:
    """Say where shares were to follow and there are none."""
    request, before = ending.request, ending.before
    if not request.scale_shares or before is None:
        return []
    if any(own.cpu_shares is not None for _, own in _definitions(before, request.affect)):
        return []
    return [warning(Code.CPU_SHARES_NOT_SET, f"VM {before.domain.name} has no CPU shares set, so none were scaled")]


def _definitions(facts: Facts, affect: Affect) -> list[tuple[Target, Definition]]:
    found: list[tuple[Target, Definition]] = []
    if affect != "config" and facts.domain.live is not None:
        found.append(("live", facts.domain.live))
    if affect != "live" and facts.domain.config is not None:
        found.append(("config", facts.domain.config))
    return found
