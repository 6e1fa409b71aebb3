"""How the agent starts on what it finds, refuses what it cannot keep, and stops without losing anything."""

import configparser
import http.client
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from kvmagent.agent import Agent
from kvmagent.plugins import load_plugins
from kvmagent.settings import AgentSection, HttpSection, LibvirtSection, SecuritySection, Settings
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journal import Journal, Task
from tests.crash.conftest import Host, StartAgent
from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess, find_command, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for
from tests.lab.server import Answer, ManagementServer

UNIT = Path(__file__).parents[2] / "init.d" / "kvmagent.service"


@pytest.fixture
def node_uri(tmp_path: Path) -> str:
    """libvirt's test driver inside the agent, with one VM."""
    return write_node(tmp_path, GuestSpec(name="vm1", max_vcpus=30))


def send(agent: AgentProcess, server: ManagementServer, task_uuid: str, cpu_num: int = 2) -> int:
    body = {"vmUuid": "vm1", "cpuNum": cpu_num}
    return agent.post("/vm/hotplug/cpu", body, task_uuid=task_uuid, callback_url=server.url).status


class TestStart:
    def test_a_second_agent_on_the_same_state_refuses_to_start(self, node_uri: str, tmp_path: Path) -> None:
        with AgentProcess(uri=node_uri) as first:
            state = f"agent.state_dir={first.directory / 'state'}"
            command = [*find_command(), "--config", str(first.config_file), "--set", f"http.port={find_free_port()}"]
            second = subprocess.run([*command, "--set", state], capture_output=True, text=True, timeout=20, check=False)
            assert second.returncode == 1
            assert f"STATE_DIR_IN_USE: {first.directory / 'state'} is in use by process {first.pid}" in second.stderr
            assert first.get("/healthz").status == 200

    def test_it_refuses_also_where_every_file_but_the_journal_was_removed(self, node_uri: str) -> None:
        with AgentProcess(uri=node_uri) as first:
            for file in (first.directory / "state").iterdir():
                if file.is_file() and not file.name.startswith("journal.sqlite"):
                    file.unlink()
            command = [*find_command(), "--config", str(first.config_file), "--set", f"http.port={find_free_port()}"]
            second = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            assert second.returncode == 1
            assert f"is in use by process {first.pid}" in second.stderr

    def test_a_port_that_is_taken_stops_the_start_before_any_vm_is_touched(
        self, node_uri: str, server: ManagementServer
    ) -> None:
        with AgentProcess(uri=node_uri) as first:
            other = AgentProcess(uri=node_uri)
            try:
                write_task(other, Task(**TASK, request=b'{"vmUuid":"vm1","cpuNum":2}', callback_url=server.url))
                command = [*find_command(), "--config", str(other.config_file), "--set", f"http.port={first.port}"]
                ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
                assert ended.returncode == 1
                assert f"ADDRESS_NOT_FREE: cannot listen on http://127.0.0.1:{first.port}" in ended.stderr
                assert "task started" not in ended.stderr
            finally:
                other.remove()

    @pytest.mark.parametrize(
        ("command", "request_"),
        [("Gone", b'{"vmUuid":"vm1"}'), ("HotPlugCpu", b'{"vmUuid":"vm1","cpuNum":"no number"}')],
        ids=["plugin gone", "request unreadable"],
    )
    def test_a_task_that_cannot_be_read_is_told_and_stops_nothing(
        self, node_uri: str, server: ManagementServer, command: str, request_: bytes
    ) -> None:
        agent = AgentProcess(uri=node_uri)
        try:
            write_task(agent, Task(**TASK | {"command": command}, request=request_, callback_url=server.url))
            agent.start()
            reply = server.wait("left", 10)
            assert (reply["success"], reply["errorCode"], reply["recovered"]) == (False, "TASK_UNREADABLE", True)
            assert send(agent, server, "next") == 200
            assert server.wait("next", 10)["cpuNum"] == 2
        finally:
            agent.remove()

    def test_state_is_the_agent_s_alone(self, node_uri: str) -> None:
        with AgentProcess(uri=node_uri) as agent:
            state = agent.directory / "state"
            assert state.stat().st_mode & 0o777 == 0o700
            assert [file.name for file in state.iterdir() if file.stat().st_mode & 0o077] == []


TASK = {"task_uuid": "left", "command": "HotPlugCpu", "lane": "vm1", "client": "127.0.0.1"}


def write_task(agent: AgentProcess, task: Task) -> None:
    """Leave a task in the journal, as an earlier agent would."""
    journal = Journal(agent.directory / "state" / "journal.sqlite", on_accepted=lambda _task: None)
    journal.start()
    journal.accept(task)
    journal.stop()


class TestBackpressure:
    def test_above_the_limit_of_a_vm_tasks_are_refused_with_a_time_to_come_back(
        self, make_agent: StartAgent, server: ManagementServer, host: Host
    ) -> None:
        agent = make_agent(host.uri, settings={"agent": {"max_queued_per_vm": "3"}})
        host.pause()
        try:
            statuses = [send(agent, server, f"t{n}", n + 2) for n in range(5)]
            assert statuses == [200, 200, 200, 503, 503]
            assert send(agent, server, "t0", 2) == 200, "a task that is known needs no room"
            response = raw_post(agent, server)
            assert (response.status, response.getheader("Retry-After")) == (503, "5")
        finally:
            host.resume()
        for n in range(3):
            assert server.wait(f"t{n}", 30)["cpuNum"] == n + 2


def raw_post(agent: AgentProcess, server: ManagementServer) -> http.client.HTTPResponse:
    with closing(http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)) as connection:
        headers = {"taskuuid": "more", "callbackurl": server.url, "Content-Type": "application/json"}
        connection.request("POST", "/vm/hotplug/cpu", '{"vmUuid": "vm1", "cpuNum": 9}', headers)
        response = connection.getresponse()
        response.read()
        return response


class TestFullDisk:
    def test_the_agent_refuses_says_so_and_goes_on_when_there_is_space(
        self, small_state: Path, server: ManagementServer, node_uri: str
    ) -> None:
        settings = {"agent": {"state_dir": str(small_state)}}
        with AgentProcess(uri=node_uri, settings=settings) as agent:
            assert send(agent, server, "before") == 200
            server.wait("before", 10)
            with (small_state / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(b"\0" * 4096):
                    pass
            accepted = {f"t{n}" for n in range(200) if send(agent, server, f"t{n}") == 200}
            assert len(accepted) < 200
            body = {"vmUuid": "vm1", "cpuNum": 3}
            refusal = agent.post("/vm/hotplug/cpu", body, task_uuid="no", callback_url=server.url)
            assert (refusal.status, refusal.body["errorCode"]) == (503, "JOURNAL_UNAVAILABLE")
            health = agent.get("/healthz")
            assert (health.status, health.body["down"]) == (503, {"journal": "database or disk is full"})
            (small_state / "ballast").unlink()
            wait_for(lambda: agent.get("/healthz").status == 200, timeout_s=10, what="the journal to go on")
            assert send(agent, server, "after", 4) == 200
            assert server.wait("after", 10)["cpuNum"] == 4
            for task_uuid in accepted:
                assert server.wait(task_uuid, 10)["success"] is True
            assert {callback.task_uuid for callback in server.callbacks()} == {"before", "after", *accepted}


@pytest.fixture
def small_state(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; mounting takes root, which the agent needs too."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


class TestStop:
    def test_what_runs_is_finished_and_what_waits_is_done_after_the_next_start(
        self, make_agent: StartAgent, server: ManagementServer, host: Host
    ) -> None:
        agent = make_agent(host.uri)
        host.pause()
        for n in range(5):
            assert send(agent, server, f"t{n}", n + 2) == 200
        wait_for(lambda: "task=t0" in agent.log(), timeout_s=10, what="the first task to run")
        stopping = threading.Thread(target=agent.stop)
        stopping.start()
        wait_for(lambda: "agent stopping" in agent.log(), timeout_s=10, what="the stop to begin")
        host.resume()
        stopping.join(30)
        agent.start()
        replies = [server.wait(f"t{n}", 30) for n in range(5)]
        assert [reply["cpuNum"] for reply in replies] == [2, 3, 4, 5, 6]
        assert replies[4]["recovered"] is True
        assert host.vcpus("vm1") == (6, 6)

    def test_a_callback_that_is_not_taken_does_not_hold_up_the_stop(
        self, node_uri: str, server: ManagementServer
    ) -> None:
        server.answer = lambda _task, attempt: Answer(status=500)
        with AgentProcess(uri=node_uri) as agent:
            send(agent, server, "t1")
            server.wait("t1", 10)
            assert agent.stop() == 0
            server.answer = lambda _task, attempt: Answer()
            seen = len(server.callbacks("t1"))
            agent.start()
            server.wait("t1", 10, attempt=seen + 1)

    def test_every_thread_ends_and_every_file_is_closed(
        self, node_uri: str, tmp_path: Path, server: ManagementServer
    ) -> None:
        warm_up = start_in_process(node_uri, tmp_path / "first")
        warm_up.stop()
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        agent = start_in_process(node_uri, tmp_path / "second")
        agent.look_after()
        agent.stop()
        wait_for(lambda: not set(threading.enumerate()) - threads, timeout_s=10, what="threads to end")
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files, timeout_s=10, what="files to be closed")


def start_in_process(
    uri: str, state: Path, *, port: int = 0, fault: Fault = no_fault, stalled_s: float = 30.0
) -> Agent:
    settings = Settings(
        agent=AgentSection(state_dir=str(state)),
        http=HttpSection(port=port or find_free_port(), socket=str(state.with_name("agent.sock"))),
        security=SecuritySection(allow_unauthenticated=True, allowed_clients=("127.0.0.1",)),
        libvirt=LibvirtSection(uri=uri),
    )
    agent = Agent(settings, load_plugins(("vm",)), fault=fault, stalled_s=stalled_s)
    agent.start()
    return agent


class TestServiceManager:
    def test_systemd_is_told_when_it_is_ready_that_it_lives_and_that_it_stops(
        self, node_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(20)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            with AgentProcess(uri=node_uri) as agent:
                assert manager.recv(4096) == b"READY=1"
                assert manager.recv(4096) == b"WATCHDOG=1"
                agent.stop()
                while (told := manager.recv(4096)) == b"WATCHDOG=1":
                    pass
                assert told.startswith(b"STOPPING=1\nWATCHDOG_USEC=")

    def test_the_unit_gives_the_stop_its_time_and_restarts_whatever_ended_it(self) -> None:
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.read(UNIT)
        service = dict(unit["Service"])
        assert (service["type"], service["restart"]) == ("notify", "always")
        # Not five times in ten seconds and then never again.
        assert unit["Unit"]["startlimitintervalsec"] == "0"
        agent = Agent(Settings(), load_plugins(("vm",)))
        assert int(service["timeoutstopsec"]) >= agent.stop_within_s
        assert int(service["watchdogsec"]) > 30


class Held:
    """A fault that holds whoever comes to a point until it is let go."""

    def __init__(self, point: str) -> None:
        self._point = point
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __call__(self, name: str) -> None:
        if name == self._point:
            self.reached.set()
            self.let_go.wait(20)


def test_the_watchdog_goes_hungry_while_the_writer_hangs_and_no_longer(
    node_uri: str, tmp_path: Path, server: ManagementServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that hangs, here a writer that is held inside its transaction. What all were at is dumped, once."""
    dumps: list[str] = []
    held = Held("journal.settle:written")
    port = find_free_port()
    agent = start_in_process(node_uri, tmp_path / "state", port=port, fault=held, stalled_s=0.3)
    try:
        assert agent.look_after()
        post_in_process(port, server)
        assert held.reached.wait(10)
        dump = partial(dumps.append, "stacks")
        wait_for(lambda: not agent.look_after(dump), timeout_s=5, what="the watchdog to go hungry")
        assert not agent.look_after(dump)
        assert dumps == ["stacks"]
        assert len([line for line in caplog.messages if line.startswith("dump totals")]) == 1
        held.let_go.set()
        wait_for(agent.look_after, timeout_s=5, what="the watchdog to be fed")
    finally:
        held.let_go.set()
        agent.stop()


def post_in_process(port: int, server: ManagementServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        headers = {"taskuuid": "t1", "callbackurl": server.url, "Content-Type": "application/json"}
        connection.request("POST", "/vm/hotplug/cpu", '{"vmUuid": "vm1", "cpuNum": 2}', headers)
        assert connection.getresponse().status == 200
