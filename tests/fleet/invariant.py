"""What must hold whatever was done to a fleet: every accepted task is told with one outcome, and none done twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Command = tuple[str, str, Mapping[str, Any], Mapping[str, Any] | None]


def find_faults(commands: Iterable[Command], killed: frozenset[str]) -> Iterator[str]:
    """The faults of what was told, each a sentence.

    Each command asks for one vCPU more than the one before it of the same VM. `killed` are the agents that were killed:
    the test driver's VMs were in their processes and began again with one vCPU, so that a task that was under way may
    have been refused, and one that came later grows its VM by more than one.
    """
    has: dict[str, int] = {}
    for task, agent, request, told in commands:
        vm, asked = request["vmUuid"], request["cpuNum"]
        before, has[vm] = has.get(vm, 1), asked
        if told is None:
            yield f"{vm}: task {task} was never told"
        elif not told["success"]:
            if agent not in killed:
                yield f"{vm}: task {task} ended as {told.get('errorCode')}: {told['error']}"
        elif told["cpuNum"] != asked:
            yield f"{vm}: task {task} says success and {told['cpuNum']} vCPUs, asked was {asked}"
        elif agent in killed:
            if not told["before"]["cpuNum"] <= before:
                yield f"{vm}: task {task} began with {told['before']['cpuNum']} vCPUs, of which {before} were asked for"
        elif (told["outcome"], told["before"]["cpuNum"]) != ("plugged", before):
            yield f"{vm}: task {task} is {told['outcome']} and began with {told['before']['cpuNum']}, not {before}"
