"""A fleet in a box, five agents of it in the gate; and that its limits and its invariant see what they are to see."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from tests.fleet.hosts import Fleet
from tests.fleet.invariant import find_faults
from tests.fleet.limits import AGENT_BYTES, SPARE_BYTES, find_room
from tests.fleet.scenes import Table, play

SCENES = {
    "start",
    "rest",
    "commands over all hosts",
    "the server away for 6 s under load",
    "the server takes 0.1 s for each callback",
    "a third of the agents killed",
    "certificates renewed on all",
    "kvmagentctl --hosts over all",
    "Prometheus",
    "invariant",
}


@pytest.mark.slow
def test_five_agents_lose_nothing_and_do_nothing_twice() -> None:
    table = Table()
    with ExitStack() as stack:
        fleet = Fleet(stack, 5, scrape_s=5)
        play(fleet, table, seconds=6)
    assert not table.faults, "\n".join(table.faults)
    assert {scene for scene, _, _ in table.rows} == SCENES
    figures = {(scene, name): value for scene, name, value in table.rows}
    assert figures["Prometheus", "agents that are up"] == "5"
    assert figures["kvmagentctl --hosts over all", "VMs listed"] == "50"
    assert figures["certificates renewed on all", "agents restarted for it"] == "0"
    assert figures["invariant", "tasks accepted"] == figures["invariant", "tasks reported"]
    # One connection of each agent for its callbacks, whatever happened.
    assert int(figures["the server away for 6 s under load", "most connections with callbacks at once"]) <= 5


def told(before: int, after: int, **changes: Any) -> dict[str, Any]:
    return {"success": True, "outcome": "plugged", "cpuNum": after, "before": {"cpuNum": before}} | changes


def history(length: int, vms: int = 2) -> list[tuple[str, str, dict[str, Any], dict[str, Any] | None]]:
    return [
        (f"task{n}-{vm}", f"agent{vm}", {"vmUuid": f"vm{vm}", "cpuNum": n + 2}, told(n + 1, n + 2))
        for n in range(length)
        for vm in range(vms)
    ]


WRONG: dict[str, Any] = {
    "never told": lambda n: None,
    "told something else": lambda n: told(n + 1, n + 3),
    "done before": lambda n: told(n + 2, n + 2),
    "lost before": lambda n: told(n, n + 2),
    "found done": lambda n: told(n + 1, n + 2, outcome="unchanged"),
    "failed": lambda n: told(n + 1, n + 1, success=False, error="no", errorCode="INTERNAL_ERROR"),
}


@given(strategies.data(), strategies.integers(1, 6), strategies.sampled_from(sorted(WRONG)))
def test_each_fault_is_seen_and_nothing_else(data: strategies.DataObject, length: int, wrong: str) -> None:
    commands = history(length)
    assert not [*find_faults(commands, frozenset())]
    place = data.draw(strategies.integers(0, len(commands) - 1))
    task, agent, request, _ = commands[place]
    commands[place] = (task, agent, request, WRONG[wrong](request["cpuNum"] - 2))
    (fault,) = find_faults(commands, frozenset())
    assert task in fault


def test_an_agent_that_was_killed_may_refuse_and_begin_anew_but_not_be_silent_or_ahead() -> None:
    commands = history(3, vms=1)
    killed = frozenset({"agent0"})
    commands[1] = (*commands[1][:3], WRONG["failed"](1))
    commands[2] = (*commands[2][:3], told(1, 4))
    assert not [*find_faults(commands, killed)]
    commands[1] = (*commands[1][:3], None)
    commands[2] = (*commands[2][:3], told(4, 4))
    assert len([*find_faults(commands, killed)]) == 2


def write_host(root: Path, *, available_kib: int = 2**30, pids: str = "max", threads: int = 10**6) -> Path:
    files = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available_kib} kB\n",
        "proc/sys/kernel/threads-max": f"{threads}\n",
        "proc/sys/kernel/pid_max": "4194304\n",
        "proc/sys/fs/file-nr": "1000 0 100000000\n",
        "sys/fs/cgroup/pids.max": f"{pids}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_scarcest_of_a_machine_says_how_many_agents_it_takes(tmp_path: Path) -> None:
    for_ten = (SPARE_BYTES + 10 * AGENT_BYTES) // 1024
    room = find_room(write_host(tmp_path, available_kib=for_ten))
    assert (room.agents, room.limit) == (10, "memory that is available")
    room = find_room(write_host(tmp_path, available_kib=for_ten, pids="700"))
    assert (room.agents, room.limit) == (3, "sys/fs/cgroup/pids.max")
    assert find_room(write_host(tmp_path, available_kib=1)).agents == 0
    assert find_room(write_host(tmp_path, threads=1)).agents == 0
