"""docs/management-server: what a server must do, shown by killing it, and the agent, at moments of no choosing."""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import Host, StartAgent
from tests.lab.agent import LOOPBACK, find_free_port
from tests.lab.processes import Guard, wait_for

EXAMPLE = Path(__file__).parents[2] / "docs/management-server/server.py"
ROUNDS, VMS, TASKS = 12, 6, 31
LIFE_S = (0.05, 0.5)


class Example:
    """The example as a process, with a database that lasts."""

    def __init__(self, *options: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="server-"))
        self.port = find_free_port()
        self.log_file = self.directory / "log"
        self._options = options
        self._guard = Guard(self.directory)
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(EXAMPLE), "--database", str(self.directory / "db"), "--port", str(self.port)]
        with self.log_file.open("ab") as log:
            self._child = subprocess.Popen(
                [*command, *self._options], env={**os.environ, "HOME": str(self.directory)}, stdout=log, stderr=log
            )
        wait_for(self._answers, timeout_s=60, what="the server")

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def remove(self) -> None:
        self.kill()
        self._guard.release()

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def outcome(self, task: str) -> Any:
        return self.request("GET", f"/commands/{task}")[1].get("outcome")

    def vms(self) -> dict[str, tuple[int, int]]:
        """What the server made of the outcomes: of each VM its vCPUs, and how many outcomes counted."""
        query = "import sqlite3, json; print(json.dumps(sqlite3.connect('db').execute('SELECT * FROM vms').fetchall()))"
        done = subprocess.run([sys.executable, "-c", query], cwd=self.directory, capture_output=True, check=True)
        return {vm: (cpus, outcomes) for vm, cpus, _memory, outcomes in json.loads(done.stdout)}

    def log(self) -> str:
        return self.log_file.read_text()

    def _answers(self) -> bool:
        assert self._child.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, self.port)) == 0


@pytest.fixture
def example() -> Iterator[Example]:
    running = Example("--ask-again", "2")
    yield running
    running.remove()


class Client(threading.Thread):
    """Asks the server for one vCPU more of its VM, again and again, and sends each command until it has the 202."""

    def __init__(self, vm: str, example: Example, agent_url: str) -> None:
        super().__init__(name=vm)
        self.sent = 0
        self.trouble: BaseException | None = None
        self._example, self._agent_url = example, agent_url
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.is_set() and self.sent < TASKS:
                command = {"agent": self._agent_url, "path": "/vm/hotplug/cpu"}
                request = {"vmUuid": self.name, "cpuNum": self.sent + 2}
                task = f"{self.name}-{self.sent}"
                try:
                    status, _ = self._example.request("PUT", f"/commands/{task}", {**command, "request": request})
                    assert status == 202
                    self.sent += 1
                    while not self._ended.is_set() and self._example.outcome(task) is None:
                        self._ended.wait(0.02)
                except (OSError, http.client.HTTPException):
                    self._ended.wait(0.02)
        except BaseException as error:
            self.trouble = error

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_kills_on_both_sides_lose_no_command_and_no_outcome_and_count_none_twice(
    make_agent: StartAgent, host: Host, example: Example
) -> None:
    agent = make_agent(host.uri)
    clients = [Client(f"shop{number}", example, agent.url) for number in range(VMS)]
    for client in clients:
        host.define(client.name)
        client.start()
    chance, pause = random.Random(7), threading.Event()
    try:
        for number in range(ROUNDS):
            pause.wait(chance.uniform(*LIFE_S))
            # Turn by turn: the one, the other, both.
            if number % 3 != 1:
                agent.kill()
            if number % 3 != 0:
                example.kill()
                example.start()
            if not agent.is_running():
                agent.start()
    finally:
        for client in clients:
            client.end()
    assert [client.trouble for client in clients] == [None] * VMS
    for client in clients:
        assert client.sent > 1
        for number in range(client.sent):
            task = f"{client.name}-{number}"
            reply = wait_for(lambda task=task: example.outcome(task), timeout_s=120, what=f"the outcome of {task}")
            told = (reply["outcome"], reply["before"]["cpuNum"], reply["cpuNum"])
            assert told == ("plugged", number + 1, number + 2), reply
        assert host.vcpus(client.name) == (client.sent + 1,) * 2
    assert example.vms() == {client.name: (client.sent + 1, client.sent) for client in clients}


def test_a_copy_counts_once_an_unknown_task_ends_and_a_late_outcome_is_kept_beside_the_first(
    make_agent: StartAgent, host: Host, example: Example
) -> None:
    agent = make_agent(host.uri)
    asked = {"agent": agent.url, "path": "/vm/hotplug/cpu", "request": {"vmUuid": "vm1", "cpuNum": 2}}
    assert example.request("PUT", "/commands/one", asked)[0] == 202
    first = wait_for(lambda: example.outcome("one"), timeout_s=60, what="an outcome")
    assert example.request("PUT", "/commands/one", asked)[0] == 202
    assert example.request("PUT", "/commands/one", {**asked, "path": "/vm/hotplug/memory"})[0] == 409
    assert example.request("POST", "/outcomes", {**first, "cpuNum": 99}, taskuuid="one")[0] == 200
    assert example.request("POST", "/outcomes", {**first, "late": True}, taskuuid="one")[0] == 200
    assert example.request("POST", "/outcomes", first, taskuuid="never-sent")[0] == 404
    told = example.request("GET", "/commands/one")[1]
    assert (told["outcome"], told["late"]) == (first, {**first, "late": True})
    # The agent tells it again where it is asked again, and the server takes it for the copy that it is.
    url = f"http://{LOOPBACK}:{example.port}/outcomes"
    agent.post(asked["path"], asked["request"], task_uuid="one", callback_url=url)
    wait_for(lambda: example.log().count("one: a copy") >= 2, timeout_s=60, what="the copy")
    assert example.vms() == {"vm1": (2, 2)}


def test_a_request_that_can_never_be_accepted_is_an_outcome(
    make_agent: StartAgent, host: Host, example: Example
) -> None:
    agent = make_agent(host.uri)
    asked = {"agent": agent.url, "path": "/vm/hotplug/cpu", "request": {"vmUuid": "vm1", "cpuNum": 0}}
    assert example.request("PUT", "/commands/bad", asked)[0] == 202
    told = wait_for(lambda: example.outcome("bad"), timeout_s=60, what="the refusal")
    assert (told["success"], told["errorCode"]) == (False, "OUT_OF_RANGE")


def test_what_an_operator_can_mend_is_sent_again_and_told(make_agent: StartAgent, host: Host, example: Example) -> None:
    agent = make_agent(host.uri)
    asked = {"agent": agent.url, "path": "/no/such/plugin", "request": {}}
    assert example.request("PUT", "/commands/lost", asked)[0] == 202
    wait_for(lambda: example.log().count("lost: ") >= 2, timeout_s=60, what="two tries")
    told = example.request("GET", "/commands/lost")[1]
    assert told["outcome"] is None
    assert json.loads(told["trouble"])["errorCode"] == "UNKNOWN_PATH"
    # It does not stand in the way of the next one.
    asked = {"agent": agent.url, "path": "/vm/hotplug/cpu", "request": {"vmUuid": "vm1", "cpuNum": 2}}
    assert example.request("PUT", "/commands/next", asked)[0] == 202
    wait_for(lambda: example.outcome("next"), timeout_s=60, what="the next outcome")
