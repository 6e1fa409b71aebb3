"""What is done to a fleet, one scene after the other, and the figures of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fleet.hosts import Fleet, Host, cpu_s, read_status
from tests.fleet.invariant import find_faults
from tests.lab.processes import wait_for

# For all outcomes of a scene to come.
OUTCOMES_S = 300.0
POLL_S = 0.1
# Of commands while the server is away.
ROUNDS = 4


class Table:
    """Figures by scene, printed as they come and again at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.faults: list[str] = []
        self._scene = ""

    def begin(self, scene: str) -> None:
        """The figures that follow are of this scene."""
        self._scene = scene
        print(f"== {scene} (load {os.getloadavg()[0]:.1f})", flush=True)

    def add(self, name: str, value: float, unit: str = "") -> None:
        """One figure."""
        text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
        self.rows.append((self._scene, name, f"{text} {unit}".strip()))
        print(f"   {name:<60}{self.rows[-1][2]:>16}", flush=True)

    def __str__(self) -> str:
        lines = ["| scene | figure | value |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {scene} | {name} | {value} |" for scene, name, value in self.rows)])


def play(fleet: Fleet, table: Table, *, seconds: float) -> None:
    """Do all of it; an outage takes `seconds`."""
    start(fleet, table)
    rest(fleet, table, seconds)
    command_all(fleet, table)
    lose_the_server(fleet, table, seconds)
    slow_the_server(fleet, table, seconds)
    kill_a_third(fleet, table)
    renew_certificates(fleet, table)
    ask_all(fleet, table)
    look_at_prometheus(fleet, table)
    check(fleet, table)


def start(fleet: Fleet, table: Table) -> None:
    """Everything is started."""
    table.begin("start")
    began = time.monotonic()
    fleet.start()
    table.add("agents", len(fleet.hosts))
    table.add("VMs", sum(len(host.vms) for host in fleet.hosts))
    table.add("until all are ready, twelve at a time", time.monotonic() - began, "s")


def rest(fleet: Fleet, table: Table, seconds: float) -> None:
    """Nothing is asked; Prometheus scrapes."""
    table.begin("rest")
    scraped = len(fleet.hosts)
    wait_for(lambda: fleet.prometheus.ask("sum(up)") == scraped, timeout_s=90, what="a scrape of every agent")
    before, began = _cpu_of_agents(fleet), time.monotonic()
    threading.Event().wait(seconds / 2)  # it is the time over which the CPU is measured
    used = (_cpu_of_agents(fleet) - before) / (time.monotonic() - began) / len(fleet.hosts)
    table.add("CPU of an agent that is scraped and nothing else", 1000 * used, "ms/s")
    resident = [read_status(host.agent.pid, "VmRSS") / 1024 for host in fleet.hosts]
    table.add("memory of an agent, mean", sum(resident) / len(resident), "MiB")
    table.add("memory of an agent, most", max(resident), "MiB")
    table.add("threads of an agent, most", max(read_status(host.agent.pid, "Threads") for host in fleet.hosts))


def command_all(fleet: Fleet, table: Table) -> None:
    """Each VM of each host has a command, as fast as the server sends them."""
    table.begin("commands over all hosts")
    cpu, began = _cpu_of_agents(fleet), time.monotonic()
    ids = fleet.server.put(fleet.grow())
    _wait_told(fleet)
    took = time.monotonic() - began
    table.add("commands", len(ids))
    table.add("until the last outcome is on the server's disk", took, "s")
    table.add("commands per second, bounded by the server", len(ids) / took)
    table.add("CPU of the agent for a command", 1000 * (_cpu_of_agents(fleet) - cpu) / len(ids), "ms")


def lose_the_server(fleet: Fleet, table: Table, seconds: float) -> None:
    """The server is killed, tasks go on to end, and it comes back."""
    table.begin(f"the server away for {seconds:.0f} s under load")
    fleet.server.kill()
    began, sent = time.monotonic(), 0
    for number in range(ROUNDS):
        # Every other VM: what another server of the pair has on disk and sends meanwhile.
        commands = fleet.grow(every=2)
        fleet.each(lambda one: _send_for_server(fleet, *one), commands)
        sent += len(commands)
        threading.Event().wait(max(0.0, seconds * (number + 1) / ROUNDS - (time.monotonic() - began)))
    wait_for(lambda: _owed(fleet) == sent, timeout_s=OUTCOMES_S, what="the end of all tasks")
    away = time.monotonic() - began
    fleet.server.start()
    back = time.time()
    _wait_told(fleet)
    figures = fleet.server.figures()
    table.add("away in fact", away, "s")
    table.add("undelivered callbacks at the return", sent)
    table.add("until the first callback", figures["firstAt"] - back, "s")
    table.add("until the last callback", figures["lastAt"] - back, "s")
    table.add("most connections with callbacks at once", figures["mostConnections"])
    table.add("most new connections in a second", figures["mostConnectionsPerSecond"])
    table.add("most callbacks in a second", figures["mostCallbacksPerSecond"])
    table.add("copies of callbacks", figures["copies"])


def slow_the_server(fleet: Fleet, table: Table, seconds: float) -> None:
    """The server takes each callback late; the agents go on to answer."""
    slow_s = seconds / 60
    table.begin(f"the server takes {slow_s:.1f} s for each callback")
    fleet.server.request("PUT", f"/slow/{slow_s}", {})
    began = time.monotonic()
    with _asking(fleet) as asked:
        ids = fleet.server.put(fleet.grow())
        _wait_told(fleet)
    table.add("commands", len(ids))
    table.add("until the last outcome", time.monotonic() - began, "s")
    asked.tell(table)
    table.add("threads of an agent, most", max(read_status(host.agent.pid, "Threads") for host in fleet.hosts))
    fleet.server.request("PUT", "/slow/0", {})


def kill_a_third(fleet: Fleet, table: Table) -> None:
    """A third of the agents is killed under load, and started again as systemd would."""
    table.begin("a third of the agents killed")
    # What agents that die have not answered is asked for again soon, not in an hour.
    fleet.server.kill()
    fleet.server.start(ask_again_s=5.0)
    hosts = fleet.hosts[:: 3 if len(fleet.hosts) > 2 else 1]
    feeder = threading.Thread(target=lambda: fleet.server.put(fleet.grow()))
    feeder.start()
    wait_for(lambda: fleet.server.figures()["callbacks"] >= len(fleet.hosts), timeout_s=60, what="some outcomes")
    began = time.monotonic()
    for host in hosts:
        host.was_killed = True
        host.agent.kill()
    fleet.each(lambda host: host.start(), hosts)
    ready = time.monotonic() - began
    feeder.join()
    _wait_told(fleet)
    table.add("agents killed", len(hosts))
    table.add("until all are ready again, twelve at a time", ready, "s")
    table.add("until the last outcome of all commands", time.monotonic() - began, "s")
    figures = fleet.server.figures()
    table.add("callbacks", figures["callbacks"])
    table.add("copies of callbacks, the same", figures["copies"])
    if figures["differing"]:
        table.faults.append(f"{figures['differing']} tasks were told in two ways")


def renew_certificates(fleet: Fleet, table: Table) -> None:
    """Each agent has a new certificate, by a reload; none is refused meanwhile."""
    table.begin("certificates renewed on all")
    former = fleet.each(lambda host: host.serial())
    pids = [host.agent.pid for host in fleet.hosts]
    began = time.monotonic()
    with _asking(fleet) as asked:
        fleet.each(_renew)
        for host, serial in zip(fleet.hosts, former, strict=True):
            wait_for(lambda h=host, s=serial: h.serial() != s, timeout_s=60, what=f"a new certificate of {host.name}")
    table.add("until the last one shows its new certificate", time.monotonic() - began, "s")
    asked.tell(table)
    table.add("agents restarted for it", sum(a != b.agent.pid for a, b in zip(pids, fleet.hosts, strict=True)))


def _renew(host: Host) -> None:
    host.renew()
    os.kill(host.agent.pid, signal.SIGHUP)


def ask_all(fleet: Fleet, table: Table) -> None:
    """An operator asks all hosts for their VMs, and an agent is gone."""
    table.begin("kvmagentctl --hosts over all")
    file = fleet.directory / "hosts"
    file.write_text("".join(f"{host.name} {host.agent.url}\n" for host in fleet.hosts))
    told, took = _ask_by_ctl(fleet, file)
    table.add("until all VMs are listed", took, "s")
    table.add("VMs listed", len(told["vms"]))
    if len(told["vms"]) != len(fleet.asked) or told.get("failures"):
        table.faults.append(f"kvmagentctl listed {len(told['vms'])} VMs of {len(fleet.asked)}: {told.get('failures')}")
    gone = fleet.hosts[-1]
    gone.agent.stop()
    told, took = _ask_by_ctl(fleet, file)
    table.add("until they are, and one host is gone", took, "s")
    if [failure["host"] for failure in told["failures"]] != [gone.name]:
        table.faults.append(f"kvmagentctl told of {told['failures']}, {gone.name} was gone")
    gone.was_killed = True
    gone.start()


def _ask_by_ctl(fleet: Fleet, file: Path) -> tuple[Any, float]:
    script = Path(sys.executable).with_name("kvmagentctl")
    command = [str(script), "vms", "--hosts", str(file), "--json", "--ca", str(fleet.authority.ca_file)]
    command += ["--cert", str(fleet.client), "--key", str(fleet.client)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, check=False)
    took = time.monotonic() - began
    assert done.stdout, done.stderr
    return json.loads(done.stdout), took


def look_at_prometheus(fleet: Fleet, table: Table) -> None:
    """What the fleet is to Prometheus."""
    table.begin("Prometheus")
    ask, hosts = fleet.prometheus.ask, len(fleet.hosts)
    wait_for(lambda: ask("sum(up)") == hosts, timeout_s=90, what="a scrape of every agent")
    wait_for(lambda: ask("job:kvmagent_vms_running:sum") == len(fleet.asked), timeout_s=90, what="the sum of all VMs")
    table.add("agents that are up", ask("sum(up)") or 0)
    table.add("series", fleet.prometheus.own("prometheus_tsdb_head_series"))
    table.add("series of an agent in a scrape, mean", ask("avg(scrape_samples_scraped)") or 0)
    table.add("bytes of a scrape, mean", ask("avg(scrape_body_size_bytes)") or 0, "bytes")
    table.add("time of a scrape, mean", 1000 * (ask("avg(scrape_duration_seconds)") or 0), "ms")
    table.add("time of a scrape, most", 1000 * (ask("max(scrape_duration_seconds)") or 0), "ms")
    samples = ask("sum(scrape_samples_scraped)") or 0
    table.add("samples per second", samples / fleet.prometheus.interval_s)
    table.add("its memory", read_status(fleet.prometheus.pid, "VmRSS") / 1024, "MiB")


def check(fleet: Fleet, table: Table) -> None:
    """The invariant, over all that was asked."""
    table.begin("invariant")
    commands = fleet.server.commands()
    killed = frozenset(host.agent.url for host in fleet.hosts if host.was_killed)
    faults = [*find_faults(commands, killed)]
    table.add("tasks accepted", len(commands))
    table.add("tasks reported", sum(told is not None for *_, told in commands))
    table.faults += faults
    table.add("faults", len(table.faults))


def _send_for_server(fleet: Fleet, host: Host, vm: str, count: int) -> None:
    task, request = fleet.server.note(host, vm, count)
    url = fleet.server.callback_url
    answer = host.agent.post("/vm/hotplug/cpu", request, task_uuid=task, callback_url=url)
    assert answer.status == 200, answer


def _wait_told(fleet: Fleet) -> None:
    """Wait until every command has its outcome on the server's disk."""
    wait_for(lambda: _rest() or not fleet.server.waiting(), timeout_s=OUTCOMES_S, what="all outcomes")


def _rest() -> None:
    time.sleep(POLL_S)  # the server writes to the database that is looked at


@dataclass
class _Asked:
    """What came of the requests: the slowest good answer, and what came in place of one."""

    slowest_s: float = 0.0
    troubles: list[str] = field(default_factory=list)

    def tell(self, table: Table) -> None:
        """Its rows, and what was not as it is to be: an agent answers whatever its server or its files do."""
        table.add("slowest answer of an agent to /healthz meanwhile", self.slowest_s, "s")
        table.add("requests without a good answer", len(self.troubles))
        table.faults += self.troubles


@contextmanager
def _asking(fleet: Fleet) -> Iterator[_Asked]:
    """Ask agents for their health, one after another."""
    ended, asked = threading.Event(), _Asked()

    def ask() -> None:
        number = 0
        while not ended.wait(0.05):
            began = time.monotonic()
            trouble = fleet.hosts[number % len(fleet.hosts)].find_trouble()
            if trouble:
                asked.troubles.append(trouble)
            else:
                asked.slowest_s = max(asked.slowest_s, time.monotonic() - began)
            number += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield asked
    finally:
        ended.set()
        thread.join()


def _cpu_of_agents(fleet: Fleet) -> float:
    return sum(cpu_s(host.agent.pid) for host in fleet.hosts)


def _owed(fleet: Fleet) -> int:
    return sum(fleet.each(lambda host: host.agent.get("/healthz").body["owedCallbacks"]))
