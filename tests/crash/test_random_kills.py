"""Killed at moments of no choosing, under many clients, again and again."""

import http.client
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from tests.crash.conftest import Host, MortalAgent, StartAgent
from tests.lab.processes import wait_for
from tests.lab.server import Callback, ManagementServer

ROUNDS, CLIENTS = 100, 16
# How long an agent lives in a round after it said that it is ready, seconds.
LIFE_S = (0.02, 0.6)
# How far a client runs ahead of its results: enough that something is always queued, running and owed.
AHEAD = 6
# libvirt's test driver gives a VM no more; each client therefore has several VMs, one after the other.
MAX_VCPUS, VMS_PER_CLIENT = 32, 24
# Time for a client to look again.
PAUSE_S = 0.01


class Results(ManagementServer):
    """Keeps all results by task, and how many of each client's tasks have one."""

    def __init__(self) -> None:
        super().__init__()
        self.by_task: dict[str, list[Any]] = defaultdict(list)
        self.by_client: Counter[str] = Counter()

    def record(self, path: str, headers: Mapping[str, str], content: bytes) -> Callback:
        callback = super().record(path, headers, content)
        # An agent that is killed while it sends leaves half a callback, which is none.
        if len(content) == int(callback.headers["content-length"]):
            bodies = self.by_task[callback.task_uuid]
            bodies.append(callback.body)
            if len(bodies) == 1:
                self.by_client[callback.task_uuid.partition("-")[0]] += 1
        return callback


class Client(threading.Thread):
    """Gives its VMs one vCPU after the other, and sends again what got no answer, as a management server does."""

    def __init__(self, number: int, agent: MortalAgent, results: Results) -> None:
        super().__init__(name=f"client{number}")
        self.sent = 0
        self.refused: Any = None
        self._agent = agent
        self._results = results
        self._ended = threading.Event()

    def vm(self, number: int) -> str:
        """The VM of the client's task of that number, counted from 0."""
        return f"{self.name}vm{number // (MAX_VCPUS - 1)}"

    def run(self) -> None:
        while not self._ended.is_set() and self.refused is None:
            if self.sent - self._results.by_client[self.name] >= AHEAD or not self._send():
                self._ended.wait(PAUSE_S)

    def end(self) -> None:
        """Send nothing more."""
        self._ended.set()
        self.join()

    def _send(self) -> bool:
        body = {"vmUuid": self.vm(self.sent), "cpuNum": self.sent % (MAX_VCPUS - 1) + 2}
        task_uuid = f"{self.name}-{self.sent}"
        try:
            answer = self._agent.post("/vm/hotplug/cpu", body, task_uuid=task_uuid, callback_url=self._results.url)
        except (OSError, http.client.HTTPException):
            return False
        if answer.status == 200:
            self.sent += 1
        else:
            self.refused = answer
        return True


def test_a_hundred_random_kills_lose_nothing_and_repeat_nothing(make_agent: StartAgent, host: Host) -> None:
    with Results() as results:
        # So many VMs are promised more than this host has; each vCPU counts for what QEMU itself needs.
        agent = make_agent(host.uri, settings={"host": {"memory_overcommit": "100"}})
        clients = [Client(number, agent, results) for number in range(CLIENTS)]
        for client in clients:
            for number in range(VMS_PER_CLIENT):
                host.define(client.vm(number * (MAX_VCPUS - 1)), max_vcpus=MAX_VCPUS)
        for client in clients:
            client.start()
        kill_at_random(agent, clients)
        assert [client.refused for client in clients] == [None] * CLIENTS
        wait_for(
            lambda: all(results.by_client[client.name] == client.sent for client in clients),
            timeout_s=60,
            what="every result",
        )
    for client in clients:
        assert 0 < client.sent < VMS_PER_CLIENT * (MAX_VCPUS - 1)
        for number in range(client.sent):
            check(results.by_task[f"{client.name}-{number}"], number)
        last = client.sent - 1
        assert host.vcpus(client.vm(last)) == (last % (MAX_VCPUS - 1) + 2,) * 2
    recovered = sum("recovered" in bodies[0] for bodies in results.by_task.values())
    assert recovered >= ROUNDS // 2, f"of {len(results.by_task)} tasks only {recovered} lived through a kill"


def kill_at_random(agent: MortalAgent, clients: list[Client]) -> None:
    """Kill the agent and start it again, a hundred times; then the clients end."""
    chance, pause = random.Random(20), threading.Event()
    try:
        for _ in range(ROUNDS):
            pause.wait(chance.uniform(*LIFE_S))
            agent.kill()
            agent.start()
    finally:
        for client in clients:
            client.end()


def check(bodies: list[Any], number: int) -> None:
    """One result, however often it was told: from what the task before it left to one vCPU more."""
    first, *copies = bodies
    for copy in copies:
        differing = {name: (first.get(name), copy.get(name)) for name in {*first, *copy}}
        assert copy == first, {name: pair for name, pair in differing.items() if pair[0] != pair[1]}
    before, after = number % (MAX_VCPUS - 1) + 1, number % (MAX_VCPUS - 1) + 2
    assert (first["outcome"], first["before"]["cpuNum"], first["before"]["configCpuNum"]) == ("plugged", before, before)
    assert (first["cpuNum"], first["after"]["configCpuNum"]) == (after, after)
