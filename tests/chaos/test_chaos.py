"""Everything at once, for as long as is wanted: nothing accepted is lost, done twice, or told in two ways.

    make chaos SECONDS=3600 SEED=7

Two minutes in the gate. The seed chooses what is done and in which order; when it meets which task, chance does.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.clients import SPEC, Client, Results, begin, end
from tests.chaos.count import Count
from tests.chaos.monkey import Disk, Monkey
from tests.chaos.shim import Shim, build_shim
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import Image
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.receivers import KINDS, BadReceiver

SECONDS = float(os.environ.get("KVMAGENT_CHAOS_SECONDS", "120"))
SEED = int(os.environ.get("KVMAGENT_CHAOS_SEED", "1"))
CLIENTS = 4
UNIT = Path(__file__).parents[2] / "init.d/kvmagent.service"
# For clients to have their last results and to be counted, once everything is well again.
END_S = 240.0
pytestmark = pytest.mark.guest


def find_memory_limit() -> int:
    """What the unit lets the agent have, in bytes."""
    (gibibytes,) = re.findall(r"^MemoryMax=(\d+)G$", UNIT.read_text(), re.MULTILINE)
    return int(gibibytes) * 2**30


def is_done(agent: AgentProcess) -> bool:
    """Whether nothing waits and nothing runs."""
    health = agent.get("/healthz").body
    return not health["queued"] and not health["running"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is undone in the end."""
    with ExitStack() as stack:
        yield stack


def test_a_client_goes_on_where_libvirtds_answer_was_lost(define: Callable[..., Guest]) -> None:
    guest = define(GuestSpec(name="answered-twice", **SPEC), running=False)
    for do in (begin, begin, end, end):
        do(guest)
    assert not guest.is_defined()


def test_chaos(lab: PrivateLibvirtd, image: Image, tmp_path: Path, stack: ExitStack) -> None:
    count, chance, started = Count(), random.Random(SEED), time.monotonic()
    shim = Shim(build_shim(tmp_path), tmp_path / "control")
    stack.callback(shim.close)
    results = stack.enter_context(Results())
    bad_urls = [stack.enter_context(BadReceiver(kind)).urls[0] for kind in KINDS]
    settings = {
        "agent": {"max_queued_per_vm": "50", "keep_tasks": "500"},
        "callback": {"timeout_sec": "2"},
        "libvirt": {"wait_sec": "120"},
        "log": {"level": "warning"},
    }
    agent = AgentProcess(uri=lab.uri, settings=settings)
    stack.callback(agent.remove)
    agent.environment.update(shim.environment())
    disk = Disk(agent.directory / "state")
    stack.callback(disk.close)
    shim.watch(agent.directory / "state")
    agent.start()
    monkey = Monkey(chance, agent, lab, shim, disk, results, count)
    clients = [
        Client(number, SEED * 1000 + number, agent, results, bad_urls, lambda spec: Guest(lab, image, spec), count)
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        while time.monotonic() - started < SECONDS and not count.faults and not any(one.failure for one in clients):
            time.sleep(chance.uniform(0.2, 1.0))
            monkey.act()
        monkey.heal()
        for client in clients:
            client.end()
        for client in clients:
            client.join(END_S)
        wait_for(lambda: is_done(agent), timeout_s=END_S, what="an end of all tasks")
        count.check_owed(agent.get)
    finally:
        print(f"\n{count.table(time.monotonic() - started, SEED)}")
    for client in clients:
        assert client.failure is None, (client.failure, agent.log()[-6000:])
        assert not client.is_alive(), f"{client.where()}; the log:\n{agent.log()[-6000:]}"
    assert not count.faults, "\n".join(count.faults)
    assert count.results == count.accepted
    assert 0 < count.most_resident_kib * 1024 < find_memory_limit() / 4
