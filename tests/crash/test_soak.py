"""Ten thousand commands leave the agent as they found it."""

import http.client
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tests.crash.conftest import Host, MortalAgent, StartAgent
from tests.lab.processes import wait_for
from tests.lab.server import Callback, ManagementServer

COMMANDS, WARM_UP, CLIENTS = 10_000, 2_000, 8
# How far the clients run ahead of the results, so that no VM's queue is ever full.
AHEAD = 400
MAX_VCPUS = 32


class Counting(ManagementServer):
    """Counts what arrives and keeps none of it: here the receiver must not grow either."""

    def __init__(self) -> None:
        super().__init__()
        self.succeeded: set[str] = set()

    def record(self, path: str, headers: Mapping[str, str], content: bytes) -> Callback:
        callback = super().record(path, headers, content)
        self._callbacks.clear()
        if callback.body["success"]:
            self.succeeded.add(callback.task_uuid)
        return callback


def test_ten_thousand_commands_leave_memory_files_and_threads_as_they_were(make_agent: StartAgent, host: Host) -> None:
    for n in range(CLIENTS):
        host.define(f"soak{n}", max_vcpus=MAX_VCPUS)
    with Counting() as server:
        agent = make_agent(host.uri, settings={"agent": {"keep_tasks": "1000"}, "log": {"level": "warning"}})
        threads, (connections, files) = agent.count("task"), agent.count_files()

        def measure() -> int:
            """Resident memory (KiB), once there is no more of the others than an agent without work has.

            How many lanes were at work at once, each with a libvirt connection that is kept, is chance.
            """
            wait_for(
                lambda: agent.count("task") <= threads, timeout_s=30, what="the threads of lanes and delivery to end"
            )
            wait_for(lambda: agent.count_files()[1] <= files, timeout_s=30, what="files and connections to be closed")
            assert agent.count_files()[0] <= connections + CLIENTS
            return agent.resident_kib()

        send(agent, server, 0, WARM_UP)
        before = measure()
        send(agent, server, WARM_UP, COMMANDS)
        after = measure()
        print(f"memory in KiB: {before} after {WARM_UP} commands, {after} after {COMMANDS}")
        assert after <= before * 1.1, "what is not yet used after the warm-up is less than a tenth"
        assert len(server.succeeded) == COMMANDS
        oldest_kept = f"/tasks/t{COMMANDS - 1001 - CLIENTS}"
        wait_for(lambda: agent.get(oldest_kept).status == 404, timeout_s=20, what="old tasks to be forgotten")


def send(agent: MortalAgent, server: Counting, first: int, end: int) -> None:
    """Send commands and wait for all their results: first those that change a VM, then those that find it done."""

    def run(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=30)
        for number in range(first + client, end, CLIENTS):
            body = {"vmUuid": f"soak{client}", "cpuNum": min(number // CLIENTS + 2, MAX_VCPUS)}
            headers = {"taskuuid": f"t{number}", "callbackurl": server.url, "Content-Type": "application/json"}
            connection.request("POST", "/vm/hotplug/cpu", json.dumps(body), headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            wait_results(number - AHEAD)
        connection.close()

    def wait_results(count: int) -> None:
        wait_for(lambda: len(server.succeeded) > count, timeout_s=60, what=f"{count} results")

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(run, range(CLIENTS)))
    wait_for(lambda: len(server.succeeded) == end, timeout_s=120, what=f"{end} results")
