"""The agents of a fleet, its management server and its Prometheus: processes on loopback, which end with their stack.

Fleet(stack, count)  -> hosts       each an agent over TLS with ten VMs of libvirt's test driver
                     -> server      the management server: its database lasts over kills
                     -> prometheus  scrapes every agent, with the alerts and recording rules that are shipped
"""

from __future__ import annotations

import http.client
import json
import os
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.agent import write_node
from tests.lab.agent import LOOPBACK, AgentProcess, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.pki import Authority
from tests.lab.processes import Guard, wait_for
from tests.lab.promtool import find_prometheus

ROOT = Path(__file__).parents[2]
RULES = ("kvmagent.rules.yml", "kvmagent.recording.yml")
VMS, MAX_VCPUS = 10, 64
# Agents that are started side by side; clients of the server.
AT_ONCE, CLIENTS = 12, 8
START_S = 300.0
# For an answer of the server or Prometheus: the machine is busy with all of them.
ANSWER_S = 600.0


def read_status(pid: int, key: str) -> int:
    """A number of /proc/PID/status."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[key].split()[0])


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Host:
    """One host: its agent, its VMs by name, and whether its agent was killed, which takes its VMs' state with it."""

    def __init__(self, number: int, directory: Path, authority: Authority, client: Path) -> None:
        self.name = f"node{number:03}"
        self.vms = [f"{self.name}-vm{n}" for n in range(VMS)]
        self.was_killed = False
        self._authority = authority
        self.certificate = authority.issue(LOOPBACK, file_name=self.name)
        place = directory / self.name
        place.mkdir()
        specs = [GuestSpec(name=vm, max_vcpus=MAX_VCPUS, agent_channel=False) for vm in self.vms]
        self.agent = AgentProcess(
            uri=write_node(place, *specs),
            tls=authority.client(client),
            settings={
                "security": {"tls_cert": str(self.certificate), "client_ca": str(authority.ca_file)},
                "host": {"memory_overcommit": "100"},
                "log": {"level": "warning"},
            },
        )

    def start(self) -> None:
        """Start the agent; one of many takes longer than one alone."""
        try:
            self.agent.start()
        except TimeoutError:
            wait_for(self.is_healthy, timeout_s=START_S, what=f"{self.name} to be ready")

    def is_healthy(self) -> bool:
        """Whether the agent answers, and says that it is ready."""
        return not self.find_trouble()

    def find_trouble(self) -> str:
        """What an agent that is not ready says, or how it does not answer; empty where it is ready."""
        try:
            reply = self.agent.get("/healthz")
        except (OSError, http.client.HTTPException) as error:
            return f"{self.name}: {error!r}"
        return "" if reply.status == 200 else f"{self.name}: {reply.status} {reply.body['down']}"

    def end(self) -> None:
        """End the agent, with no time to end well: nothing is asked of it any more."""
        if self.agent.is_running():
            self.agent.kill()

    def renew(self) -> None:
        """Give the agent another certificate of the same CA, in the same file."""
        self._authority.issue(LOOPBACK, file_name=self.name)

    def serial(self) -> str:
        """The serial number of the certificate that the agent shows."""
        with closing(self.agent.connect()) as connection:
            connection.connect()
            assert isinstance(connection.sock, ssl.SSLSocket)
            shown = connection.sock.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])


class Server:
    """The management server as a process, with a database that lasts."""

    def __init__(self, directory: Path, authority: Authority, client: Path) -> None:
        self.directory = directory / "server"
        self.directory.mkdir()
        self.database = self.directory / "db"
        self.port = find_free_port()
        self._tls = [str(authority.ca_file), str(client)]
        self._guard = Guard(self.directory)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def callback_url(self) -> str:
        """Where agents send outcomes."""
        return f"http://{LOOPBACK}:{self.port}/outcomes"

    def start(self, *, ask_again_s: float = 3600.0) -> None:
        """Start it, with what its database has."""
        command = [sys.executable, "-m", "tests.fleet.server", "--database", str(self.database)]
        command += ["--port", str(self.port), "--ask-again", str(ask_again_s), "--tls", *self._tls]
        with (self.directory / "log").open("ab") as log:
            self._child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "HOME": str(self.directory)}, stdout=log, stderr=log
            )
        wait_for(self._answers, timeout_s=30, what="the server")

    def kill(self) -> None:
        """SIGKILL it."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def remove(self) -> None:
        """End it, and remove what it has."""
        self.kill()
        self._guard.release()

    def figures(self) -> dict[str, float]:
        """What it has counted since its start."""
        told: dict[str, float] = json.loads(self.request("GET", "/figures"))
        return told

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """Ask until it is answered, as its clients are to: a request that fails in it has no answer."""

        def ask() -> bytes:
            try:
                return self._ask(method, path, body)
            except (OSError, http.client.HTTPException):
                return b""

        return wait_for(ask, timeout_s=ANSWER_S, what=f"an answer to {method} {path}")

    def _ask(self, method: str, path: str, body: Any = None) -> bytes:
        with closing(http.client.HTTPConnection(LOOPBACK, self.port, timeout=ANSWER_S)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        assert answer.status in (200, 202), (answer.status, content)
        return content

    def put(self, commands: Iterable[tuple[Host, str, int]]) -> list[str]:
        """Hand in commands, each a host, a VM and its total of vCPUs; their ids."""

        def hand_in(own: list[tuple[str, Host, str, int]]) -> None:
            for task, host, vm, count in own:
                request = {"vmUuid": vm, "cpuNum": count}
                body = {"agent": host.agent.url, "path": "/vm/hotplug/cpu", "request": request}
                self.request("PUT", f"/commands/{task}", body)

        # Those of one VM by one client: they keep their order.
        shares: list[list[tuple[str, Host, str, int]]] = [[] for _ in range(CLIENTS)]
        ids = []
        for host, vm, count in commands:
            ids.append(uuid.uuid4().hex)
            shares[hash(vm) % CLIENTS].append((ids[-1], host, vm, count))
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(hand_in, shares))
        return ids

    def note(self, host: Host, vm: str, count: int) -> tuple[str, dict[str, Any]]:
        """Have a command on disk, to be sent by another than this server; its id and its request."""
        task, request = uuid.uuid4().hex, {"vmUuid": vm, "cpuNum": count}
        with self._open() as database:
            new = "INSERT INTO commands (id, agent, path, request, send_at) VALUES (?, ?, '/vm/hotplug/cpu', ?, ?)"
            later = time.time() + 10**6
            database.execute(new, (task, host.agent.url, json.dumps(request), later))
        return task, request

    def waiting(self) -> int:
        """How many commands have no outcome."""
        with self._open() as database:
            return int(database.execute("SELECT count(*) FROM commands WHERE outcome IS NULL").fetchone()[0])

    def commands(self) -> list[tuple[str, str, dict[str, Any], dict[str, Any] | None]]:
        """Every command in order: its id, its agent, its request, its outcome."""
        with self._open() as database:
            rows = database.execute("SELECT id, agent, request, outcome FROM commands ORDER BY rowid").fetchall()
        return [(task, agent, json.loads(request), json.loads(told or "null")) for task, agent, request, told in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.database, timeout=60)) as database, database:
            yield database

    def _answers(self) -> bool:
        assert self._child is not None
        assert self._child.poll() is None, (self.directory / "log").read_text()[-2000:]
        try:
            return bool(self._ask("GET", "/figures"))
        except OSError:
            return False


class Prometheus:
    """A Prometheus of its own, which scrapes agents by their certificates."""

    def __init__(
        self, directory: Path, hosts: Iterable[Host], authority: Authority, client: Path, interval_s: int
    ) -> None:
        self.directory = directory / "prometheus"
        self.directory.mkdir()
        self.port = find_free_port()
        self.interval_s = interval_s
        for name in RULES:
            (self.directory / name).write_text((ROOT / "conf/prometheus" / name).read_text())
        job = {
            "job_name": "kvmagent",
            "scheme": "https",
            "tls_config": {"ca_file": str(authority.ca_file), "cert_file": str(client), "key_file": str(client)},
            "static_configs": [{"targets": [f"{LOOPBACK}:{host.agent.port}" for host in hosts]}],
        }
        interval = f"{self.interval_s}s"
        whole = {
            "global": {"scrape_interval": interval, "evaluation_interval": interval},
            "rule_files": list(RULES),
            "scrape_configs": [job],
        }
        (self.directory / "prometheus.yml").write_text(json.dumps(whole))  # JSON is YAML
        self._guard = Guard(self.directory)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._child is not None
        return self._child.pid

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        command = [str(find_prometheus()), "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        command += [f"--web.listen-address={LOOPBACK}:{self.port}", "--enable-feature=extra-scrape-metrics"]
        with (self.directory / "log").open("ab") as log:
            self._child = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**os.environ, "HOME": str(self.directory)},
                stdout=log,
                stderr=log,
            )
        wait_for(self._is_ready, timeout_s=30, what="Prometheus")

    def remove(self) -> None:
        """End it, and remove what it has."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._guard.release()

    def ask(self, query: str) -> float | None:
        """The one value of a query; None where there is none."""
        told = json.loads(self._get(f"/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
        result = told["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def own(self, name: str) -> float:
        """One of its own metrics."""
        lines = self._get("/metrics").decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def _get(self, path: str) -> bytes:
        with closing(http.client.HTTPConnection(LOOPBACK, self.port, timeout=ANSWER_S)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read()

    def _is_ready(self) -> bool:
        assert self._child is not None
        assert self._child.poll() is None, (self.directory / "log").read_text()[-2000:]
        try:
            return b"Ready" in self._get("/-/ready")
        except OSError:
            return False


class Fleet:
    """All of them; what is started ends with the stack."""

    def __init__(self, stack: ExitStack, count: int, *, scrape_s: int = 15) -> None:
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        authority = Authority(self.directory)
        # Of the management server, Prometheus, and an operator.
        self.authority, self.client = authority, authority.issue("server.example")
        self.hosts: list[Host] = []
        for number in range(count):
            self.hosts.append(Host(number, self.directory, authority, self.client))
            stack.callback(self.hosts[-1].agent.remove)
        self.server = Server(self.directory, authority, self.client)
        stack.callback(self.server.remove)
        self.prometheus = Prometheus(self.directory, self.hosts, authority, self.client, scrape_s)
        stack.callback(self.prometheus.remove)
        stack.callback(lambda: self.each(lambda host: host.end()))
        #: Of each VM the vCPUs that were asked for last.
        self.asked = {vm: 1 for host in self.hosts for vm in host.vms}

    def start(self) -> None:
        """Start all of them."""
        self.each(lambda host: host.start())
        self.server.start()
        self.prometheus.start()

    def each(self, do: Any, hosts: Iterable[Host] | None = None, *, at_once: int = AT_ONCE) -> list[Any]:
        """Do something to hosts, some at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(do, self.hosts if hosts is None else hosts))

    def grow(self, *, every: int = 1) -> list[tuple[Host, str, int]]:
        """The next command of each VM, or of every second: one vCPU more."""
        commands = []
        for host in self.hosts:
            for vm in host.vms[::every]:
                self.asked[vm] += 1
                commands.append((host, vm, self.asked[vm]))
        return commands
