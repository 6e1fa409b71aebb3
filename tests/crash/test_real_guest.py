"""Killed in the middle of memory attaches on a real guest: each dimm is there once, and online in the guest."""

import http.client
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.crash.conftest import MortalAgent, StartAgent, find_dimms
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.server import ManagementServer

MIB = 1024 * 1024
DIMM_MIB = 128
# Around AttachMemory and what the guest then does; the other rounds are at random.
POINTS = [
    "journal.record_goal:committed",
    *(f"step:{when}@{n}" for n in (1, 2) for when in ("begun", "done")),
    "journal.finish:written",
]
ROUNDS = 10

pytestmark = pytest.mark.guest


def test_ten_kills_over_memory_attaches_attach_each_dimm_once(
    lab: Any, boot: Callable[[GuestSpec], Guest], make_agent: StartAgent, server: ManagementServer
) -> None:
    guest = boot(GuestSpec(name="mortal", memory_mib=512, max_memory_mib=8192))
    agent = make_agent(lab.uri)
    chance = random.Random(4)
    for n in range(1, ROUNDS + 1):
        agent.stop()
        fault = POINTS[n - 1] if n <= len(POINTS) else ""
        agent.start_to_die(fault)
        send(agent, server, n)
        if fault:
            agent.wait_killed()
        else:
            threading.Event().wait(chance.uniform(0.0, 0.4))
            agent.kill()
        agent.start()
        reply = server.wait(f"round{n}", 60)
        total = (512 + DIMM_MIB * n) * MIB
        assert (reply["outcome"], reply["memorySize"], reply["after"]["configMemorySize"]) == ("online", total, total)
        assert all(callback.body in (reply, None) for callback in server.callbacks(f"round{n}"))
    expected = [f"ua-kvmagent-round{n}-0" for n in range(1, ROUNDS + 1)]
    assert find_dimms(guest) == (expected, expected)
    assert guest.run("cat /sys/devices/system/memory/memory*/state").split().count("online") == 4 + ROUNDS


def send(agent: MortalAgent, server: ManagementServer, n: int) -> None:
    """Send a round's task. The agent may die over the answer, but not before the task is on disk."""
    body = {"vmUuid": "mortal", "memorySize": (512 + DIMM_MIB * n) * MIB}
    try:
        answer = agent.post("/vm/hotplug/memory", body, task_uuid=f"round{n}", callback_url=server.url)
    except (OSError, http.client.HTTPException):
        return
    assert answer.status == 200
