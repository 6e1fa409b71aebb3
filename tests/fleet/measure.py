"""What one agent costs, by the number of its VMs: python -m tests.fleet.measure [VMS...]

Memory, CPU without and with a scrape, series and bytes of a scrape; what a poll of the page takes and leaves; the
journal and the CPU of a command. Each on an agent of its own with VMs of libvirt's test driver.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.fakes.agent import write_node
from tests.fleet.hosts import cpu_s, read_status
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

READ_S = 600.0
REST_S, SCRAPES, POLLS, COMMANDS = 10.0, 10, 5, 300
PAGE = 100
VMS_JS = Path(__file__).parents[2] / "kvmagent/api/page/vms.js"


def page_fields() -> str:
    """What the status page asks for of each VM."""
    (fields,) = re.findall(r'FIELDS =\s+"([^"]+)"', VMS_JS.read_text())
    return str(fields)


def resident_mib(agent: AgentProcess) -> float:
    """Memory of the agent."""
    return read_status(agent.pid, "VmRSS") / 1024


def used_ms(agent: AgentProcess, do: Callable[[], object], times: int) -> float:
    """CPU of the agent for one time."""
    before = cpu_s(agent.pid)
    for _ in range(times):
        do()
    return 1000 * (cpu_s(agent.pid) - before) / times


def get(agent: AgentProcess, path: str) -> str:
    """Read, however busy the machine is."""
    with closing(agent.connect()) as connection:
        connection.timeout = READ_S
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.status == 200, text
    return text


def read_all(agent: AgentProcess, *, limit: int | None) -> int:
    """Read all VMs as the page does, in one answer or by pages; how many bytes."""
    query, cursor, size = f"/vms?fields={page_fields()}", "", 0
    while True:
        text = get(agent, query + (f"&limit={limit}" if limit else "") + cursor)
        size += len(text)
        following = json.loads(text).get("next")
        if following is None:
            return size
        cursor = f"&cursor={following}"


def start_agent(directory: Path, vms: int, per_vm: str = "all") -> AgentProcess:
    """An agent with so many VMs."""
    place = Path(tempfile.mkdtemp(dir=directory))
    specs = [GuestSpec(name=f"vm{n:04}", max_vcpus=64, agent_channel=False) for n in range(vms)]
    settings = {
        "host": {"memory_overcommit": "100"},
        "metrics": {"per_vm": per_vm, "max_vms": "100000"},
        "log": {"level": "warning"},
    }
    agent = AgentProcess(uri=write_node(place, *specs), settings=settings)
    try:
        agent.start()
    except TimeoutError:  # a thousand VMs on a busy machine
        wait_for(lambda: agent.get("/healthz").status == 200, timeout_s=120, what="the agent to be ready")
    return agent


def measure(directory: Path, vms: int) -> dict[str, float]:
    """The figures of one agent."""
    found: dict[str, float] = {"VMs": vms}
    agent = start_agent(directory, vms)
    try:
        text = get(agent, "/metrics")
        found["memory, MiB"] = resident_mib(agent)
        before = cpu_s(agent.pid)
        time.sleep(REST_S)
        found["CPU at rest, ms/s"] = 1000 * (cpu_s(agent.pid) - before) / REST_S
        found["CPU of a scrape, ms"] = used_ms(agent, lambda: get(agent, "/metrics"), SCRAPES)
        found["series of a scrape"] = len(re.findall(r"^[^#\n]", text, re.MULTILINE))
        found["bytes of a scrape"] = len(text)
        found["bytes of it, compressed"] = len(gzip.compress(text.encode()))
        for limit in (PAGE, None):
            words = f"pages of {limit}" if limit else "one answer"
            former = resident_mib(agent)
            found[f"bytes of /vms as the page reads it, {words}"] = read_all(agent, limit=limit)
            for _ in range(POLLS - 1):
                read_all(agent, limit=limit)
            found[f"memory more after {POLLS} polls, {words}, MiB"] = resident_mib(agent) - former
    finally:
        agent.remove()
    agent = start_agent(directory, vms, "trouble")
    try:
        found["series of a scrape, per_vm = trouble"] = len(
            re.findall(r"^[^#\n]", get(agent, "/metrics"), re.MULTILINE)
        )
    finally:
        agent.remove()
    return found


def measure_commands(directory: Path) -> dict[str, float]:
    """What a command costs: on the disk, in CPU, on the wire."""
    agent = start_agent(directory, 10)
    database = agent.directory / "state/journal.sqlite"
    with ManagementServer() as server:
        try:
            agent.stop()
            before = database.stat().st_size
            agent.start()

            def command(n: int) -> None:
                body = {"vmUuid": f"vm{n % 10:04}", "cpuNum": n // 10 + 2}
                task = new_task_uuid()
                assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200

            def all_of_them() -> None:
                for n in range(COMMANDS):
                    command(n)
                wait_for(lambda: len(server.callbacks()) >= COMMANDS, timeout_s=60, what="the callbacks")

            used = used_ms(agent, all_of_them, 1) / COMMANDS
            size = sum(int(one.headers["content-length"]) for one in server.callbacks()) / COMMANDS
            agent.stop()
            return {
                "CPU of a command, ms": used,
                "journal of a command, bytes": (database.stat().st_size - before) / COMMANDS,
                "body of a callback, bytes": size,
            }
        finally:
            agent.remove()


def main() -> None:
    """Print what is found as it comes, and the table in the end."""
    counts = [int(one) for one in sys.argv[1:]] or [1, 10, 50, 200, 1000]
    columns = []
    with tempfile.TemporaryDirectory(prefix="measure-") as directory:
        commands = measure_commands(Path(directory))
        print(commands, flush=True)
        for count in counts:
            columns.append(measure(Path(directory), count))
            print(columns[-1], flush=True)
    print("\n| figure |" + "".join(f" {column['VMs']:,.0f} VMs |" for column in columns))
    print("|---|" + "---|" * len(columns))
    for name in list(columns[0])[1:]:
        print(f"| {name} |" + "".join(f" {_shown(column[name])} |" for column in columns))
    for name, value in commands.items():
        print(f"| {name} | {_shown(value)} |")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


if __name__ == "__main__":
    main()
