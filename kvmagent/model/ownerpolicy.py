"""Checks every command's goal against what the VM's owner allows, so that no plugin has to remember it."""

from collections.abc import Iterator

from kvmagent.model.command import Affect, Goal, Total
from kvmagent.model.errors import AgentError
from kvmagent.model.facts import Definition, Domain, Facts
from kvmagent.model.policy import check_cpu_ceiling, check_memory_ceiling, check_opt_out
from kvmagent.model.reply import Problem
from kvmagent.model.steps import AnyStep, Target


def check_owner_policy(facts: Facts, affect: Affect, goal: Goal, steps: tuple[AnyStep, ...] = ()) -> None:
    """Refuse what the owner of either definition to be changed does not allow: by what was asked for, by the goal's
    totals and by its first steps, for a plugin may change more than what it was asked for.

    Raises:
        AgentError: VM_OPTED_OUT, ABOVE_POLICY.
    """
    changed = frozenset[Target]().union(*(step.changes for step in steps))
    running = affect != "config" or "live" in changed or any(total.live is not None for total in goal.totals)
    persistent = affect != "live" or "config" in changed or any(total.config is not None for total in goal.totals)
    for name, definition in facts.domain.definitions(live=running, config=persistent):
        for problem in (
            *check_opt_out(facts.domain, name, definition),
            *_check_totals(facts.domain, name, definition, goal.totals),
        ):
            raise AgentError(problem.code, problem.message, remedy=problem.remedy, details={"needsRestart": False})


def _check_totals(domain: Domain, name: str, definition: Definition, totals: tuple[Total, ...]) -> Iterator[Problem]:
    """What a resource has already it may keep, whatever direction the goal claims."""
    for total in totals:
        wanted = total.live if name == "running" else total.config
        if wanted is None:
            continue
        if total.resource == "cpu":
            yield from check_cpu_ceiling(domain, name, definition, wanted)
        elif total.resource == "memory" and wanted > definition.memory_bytes:
            yield from check_memory_ceiling(domain, name, definition, wanted)
        elif total.resource == "balloon":
            actual = definition.current_bytes
            if name == "running" and domain.balloon_bytes is not None:
                actual = domain.balloon_bytes
            if wanted > actual:
                yield from check_memory_ceiling(domain, name, definition, wanted + definition.virtio_mem_bytes)
