"""The benchmark's sections: each starts what it needs, measures, reports, and leaves nothing running."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmagent.tasks.journal import Journal, Task
from tests.bench import floor, plugs
from tests.bench.load import Receiver, run_load
from tests.bench.measures import (
    Runs,
    config_changes,
    growing,
    p50,
    p99,
    plug,
    ready,
    time_bare_config,
    time_bare_same,
    time_guest_agent,
    time_virsh,
    unplug,
)
from tests.bench.profile import profiled
from tests.bench.report import Report
from tests.bench.subject import (
    MAX_VCPUS,
    anonymous_mib,
    cpu_s,
    domain_name,
    rss_mib,
    start_agent,
    time_imports,
    time_start,
    write_node,
)
from tests.bench.visible import compare_visible
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import build_image
from tests.lab.libvirtd import PrivateLibvirtd

#: POST to callback on a real guest, over the bare libvirt call and what the guest itself takes to answer.
OVERHEAD_MS = 4.0
PHASE = re.compile(r'^kvmagent_phase_seconds_sum\{[^}]*phase="(\w+)"\} (\S+)$', re.MULTILINE)
PACE_S = 0.01
DOMAINS = 400
IDLE_S = 60.0
OWED = 10_000
#: Defined and never started: what is changed is their persistent definition.
OFF_GUESTS = 16


def run_real_plugs(report: Report) -> None:
    """(a) on running QEMUs, each command one vCPU or one dimm more, beside the bare libvirt calls and the floor."""
    with plugs.running_vms() as (lab, names), start_agent(lab.uri) as agent, ExitStack() as stack:
        floor_port = stack.enter_context(floor.running(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        runs = Runs(agent)
        for kind in ("vCPU", "dimm"):
            report.begin(f"(a) each command one {kind} more, live and persistent, on {plugs.VMS} running QEMUs")
            before = phases(agent)
            profile = profiled(report, f"one {kind} more, one client", agent.pid)
            found = plugs.compare(lab.uri, names, kind, runs, profile)
            bare, one, all_ = p50(found.bare_one.took_ms), found.agent_one, found.agent_all
            report.add("bare call, one thread, median", bare, "ms")
            report.add("one client: POST to callback, median (bare + 4)", p50(one.took_ms), "ms", at_most=bare + 4)
            report.add(f"bare calls on {plugs.VMS} threads", found.bare_all.per_s, "/s")
            least = 0.85 * found.bare_all.per_s
            report.add(f"{plugs.VMS} clients: commands (0.85 of bare)", all_.per_s, "/s", at_least=least)
            report.add(f"{plugs.VMS} clients: POST to callback, p99", p99(all_.took_ms), "ms")
            for phase, seconds in sorted(phases(agent).items()):
                count = one.count + all_.count + found.agent_beside
                report.add(f"of a command, {phase}", (seconds - before.get(phase, 0.0)) * 1000 / count, "ms")
        report.begin("(a) commands that change nothing, on the same VMs")
        same = [plug(name, 1 + plugs.MOST - plugs.EACH) for name in names]
        runs(same, clients=1)
        nothing, _ = runs(same * 40, clients=1, outcome="unchanged")
        least = run_load(floor_port, same * 40, clients=1, run="f")
        report.add("floor: POST to callback, median", p50(least.callback_ms), "ms")
        report.add("floor: immediate answer, median", p50(least.answer_ms), "ms")
        most = p50(least.callback_ms) + 3
        report.add("POST to callback, median (floor + 3)", p50(nothing.callback_ms), "ms", at_most=most)
        most = 2 * p50(least.answer_ms)
        report.add("immediate answer, median (2 times the floor)", p50(nothing.answer_ms), "ms", at_most=most)
        virsh = time_virsh(lab.uri, names[0], [1 + plugs.MOST - plugs.EACH] * 20)
        report.add("virsh setvcpus --live --config, the number it has, median", p50(virsh), "ms")
        with profiled(report, "commands that change nothing", agent.pid):
            runs(same * 60, clients=1)


def phases(agent: AgentProcess) -> dict[str, float]:
    """The seconds that the agent says it spent on commands, by phase."""
    told: dict[str, float] = {}
    for phase, seconds in PHASE.findall(agent.get("/metrics").body):
        told[phase] = told.get(phase, 0.0) + float(seconds)
    return told


def run_real_guest(report: Report) -> None:
    """(a) on a real guest. Its vCPUs cannot be taken away again under emulation. So two things are repeated: the
    command for the number that it has, looked at as any other, guest agent included, and answered `unchanged`; and
    real changes of the persistent definition, up and down in turn."""
    report.begin("(a) HotPlugCpu on a real guest")
    with booted(GuestSpec(name="bench", vcpus=2)) as (lab, guest), start_agent(lab.uri) as agent:
        runs = Runs(agent)
        same, config, answer = time_bare_same(guest, 2, 300), time_bare_config(guest, 300), time_guest_agent(guest, 50)
        report.add("bare virDomainSetVcpusFlags, the number it has, median", p50(same), "ms")
        report.add("bare virDomainSetVcpusFlags, persistent, up and down, median", p50(config), "ms")
        report.add("the guest agent's answer to guest-get-vcpus, median", p50(answer), "ms")
        # A guest that had time to fall asleep answers later, and commands come no faster than this.
        paced = time_guest_agent(guest, 100, pause_s=PACE_S)
        report.add(f"the same, asked every {PACE_S * 1000:.0f} ms, median", p50(paced), "ms")
        report.add("virsh setvcpus --live --config, median", p50(time_virsh(lab.uri, guest.name, [2] * 20)), "ms")
        commands = [plug(guest.name, 2)] * 400
        runs(commands[:50], clients=1)
        one, one_cpu_ms = runs(commands, clients=1, outcome="unchanged")
        report.add(
            "one client, the number it has: POST to callback, median (bare + guest agent + 4)",
            p50(one.callback_ms),
            "ms",
            at_most=p50(same) + p50(paced) + OVERHEAD_MS,
        )
        report.add("one client: immediate answer, median", p50(one.answer_ms), "ms")
        report.add("one client: CPU of the agent for a command", one_cpu_ms, "ms")
        many, many_cpu_ms = runs(commands, clients=16, outcome="unchanged")
        report.add("16 clients on this one VM, in turn: commands", many.per_s, "/s")
        report.add("16 clients: CPU of the agent for a command", many_cpu_ms, "ms")
        runs([unplug(guest.name, 1, "config")], clients=1)
        changes, _ = runs(config_changes([guest.name], 200), clients=1, outcome="configured")
        # Beside the change it asks the guest, before and after: what it says has to be so.
        report.add(
            "one client, persistent, up and down: POST to callback, median (bare + 2 guest agent + 4)",
            p50(changes.callback_ms),
            "ms",
            at_most=p50(config) + 2 * p50(paced) + OVERHEAD_MS,
        )


def run_many_domains(report: Report) -> None:
    """(b): does a command cost more where there are more domains?"""
    report.begin("(b) many domains on libvirt's test driver, one client")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        nodes = {n: write_node(Path(directory), n) for n in (10, 100, 1000)}
        costs: dict[int, list[float]] = {n: [] for n in nodes}
        # In turn, so that what else the machine does falls on all alike.
        for _ in range(5):
            for n, uri in nodes.items():
                costs[n].append(cost_plug(uri, n))
        for n in nodes:
            report.add(f"CPU of the agent for a plug, {n} domains, median of 5", p50(costs[n]), "ms")
        report.add("a plug at 1,000 domains against 10", p50(costs[1000]) / p50(costs[10]), "times", at_most=1.1)
        agent = stack.enter_context(start_agent(nodes[1000]))
        runs, commands = Runs(agent), iter(growing(1000, 1000))
        all_ready, _ = runs([ready(domain_name(n)) for n in range(1000)], clients=16)
        report.add("ReadyForHotplug for each of 1,000 domains, 16 clients", all_ready.elapsed_s, "s")
        plugged, _ = runs([next(commands) for _ in range(1000)], clients=16, outcome="plugged")
        report.add("a plug on each of 1,000 domains, 16 clients", plugged.elapsed_s, "s")
        took = []
        for _ in range(3):
            began = time.perf_counter()
            answer = agent.get("/vms")
            took.append(time.perf_counter() - began)
            if len(answer.body["vms"]) != 1000:
                raise RuntimeError(f"/vms tells of {len(answer.body['vms'])} domains")
        report.add("/vms of 1,000 domains, median of 3", p50(took), "s", at_most=1.0)
        planned = stack.enter_context(start_agent(write_node(Path(directory), 200)))
        report.add("200 VMs planned, 4 targets each, one after another", plan_all(planned, 200), "s")


def cost_plug(uri: str, domains: int) -> float:
    """The CPU milliseconds of an agent for a plug, one after another. Each VM was looked at before, as an agent that
    runs has done; the looks at all of them, one a second, are in it."""
    commands = iter(growing(domains, 10 * (MAX_VCPUS - 1)))
    with start_agent(uri) as agent:
        runs = Runs(agent)
        agent.get("/vms")
        runs([next(commands) for _ in range(30)], clients=1)
        _, cpu_ms = runs(list(commands), clients=1, outcome="plugged")
    return cpu_ms


def plan_all(agent: AgentProcess, count: int) -> float:
    """Plan each VM, as kvmagentctl plan --all does; the seconds."""
    began = time.perf_counter()
    for n in range(count):
        targets = [{"cpuNum": cpus, "memorySize": size} for cpus in (2, 64) for size in (2**30, 2**35)]
        reply = agent.post("/vm/hotplug/plan", {"vmUuid": domain_name(n), "targets": targets})
        if reply.status != 200 or len(reply.body["plans"]) != len(targets):
            raise RuntimeError(f"planning {domain_name(n)}: HTTP {reply.status}: {reply.body}")
    return time.perf_counter() - began


def run_footprint(report: Report) -> None:
    """(c) on a real libvirt daemon: the test driver's domains would be in the agent's own memory."""
    report.begin("(c) memory, idleness, start, on a libvirt daemon with 16 defined domains")
    with PrivateLibvirtd() as lab, ExitStack() as stack:
        guests = [Guest(lab, build_image(), GuestSpec(name=f"off-{n}")) for n in range(OFF_GUESTS)]
        for guest in guests:
            stack.callback(guest.destroy)
            guest.define()
        agent = start_agent(lab.uri)
        stack.callback(agent.remove)
        starts = []
        for _ in range(5):
            starts.append(time_start(agent))
            agent.stop()
        imports = p50([time_imports() for _ in range(5)])
        report.add("import of its libraries, median of 5", imports, "s")
        report.add("start to ready, median of 5 (3 times the import)", p50(starts), "s", at_most=3 * imports)
        agent.start()
        report.add("resident memory at start", rss_mib(agent.pid), "MiB")
        names = [guest.name for guest in guests]
        result, _ = Runs(agent)(config_changes(names, 10_000), clients=16, outcome="configured")
        report.add("10,000 changes of persistent definitions, 16 clients: commands", result.per_s, "/s")
        report.add("resident memory after 10,000 commands", rss_mib(agent.pid), "MiB", at_most=60)
        report.add("of it not pages of files: the agent's own", anonymous_mib(agent.pid), "MiB")
        used_s = cpu_s(agent.pid)
        time.sleep(IDLE_S)
        used_s = cpu_s(agent.pid) - used_s
        report.add(f"idle: CPU over {IDLE_S:.0f} s", 100 * used_s / IDLE_S, "%", at_most=0.5)
        report.add("resident memory after it", rss_mib(agent.pid), "MiB")


def run_owed(report: Report) -> None:
    """(d): an agent starts and finds 10,000 callbacks owed to one server, of 100 VMs."""
    report.begin("(d) delivery of 10,000 owed callbacks")
    with tempfile.TemporaryDirectory() as directory:
        agent = start_agent(write_node(Path(directory), 1))
        receiver = Receiver()
        owe(agent.directory / "state/journal.sqlite", receiver.url, OWED)
        starting = threading.Thread(target=agent.start)
        starting.start()
        try:
            elapsed_s = receiver.take(OWED)
            starting.join()
            report.add("10,000 owed callbacks, from the first connection to the last", elapsed_s, "s")
            report.add("callbacks", OWED / elapsed_s, "/s")
            report.add("resident memory after it", rss_mib(agent.pid), "MiB")
        finally:
            starting.join()
            agent.remove()


def owe(path: Path, url: str, count: int) -> None:
    """Write a journal with so many finished tasks whose callbacks are owed."""
    reply = b'{"success":true,"outcome":"plugged","vmUuid":"vm","cpuNum":2,"steps":[],"warnings":[],"drift":[]}'
    journal = Journal(path, on_accepted=lambda _task: None)
    journal.start()

    def finish(n: int) -> None:
        task = f"d-{n}"
        vm = f"vm-{n % 100}"
        journal.accept(
            Task(task_uuid=task, command="HotPlugCpu", lane=vm, request=b"{}", callback_url=url, client="127.0.0.1")
        )
        journal.finish(task, reply, "plugged")

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(finish, range(count)))
    journal.stop()


def run_visible(report: Report) -> None:
    """(e): until the guest itself says that it uses the vCPU."""
    report.begin("(e) until the guest's kernel has the vCPU online, real guest, by turns")
    by_agent: list[float] = []
    by_script: list[float] = []
    with booted(GuestSpec(name="visible", max_vcpus=9)) as (lab, guest), start_agent(lab.uri) as agent:
        compare_visible(guest, lab.uri, agent, by_agent, by_script)
    report.add("an operator's script of virsh calls, median", p50(by_script), "ms")
    report.add(
        "HotPlugCpu, from the POST, median (0.7 times the script)",
        p50(by_agent),
        "ms",
        at_most=0.7 * p50(by_script),
    )


@contextmanager
def booted(spec: GuestSpec) -> Iterator[tuple[PrivateLibvirtd, Guest]]:
    """A real guest that runs, and its libvirt daemon."""
    with PrivateLibvirtd() as lab:
        guest = Guest(lab, build_image(), spec)
        try:
            guest.boot()
            yield lab, guest
        finally:
            guest.destroy()


ALL: dict[str, Callable[[Report], None]] = {
    "real-plugs": run_real_plugs,
    "real-guest": run_real_guest,
    "many-domains": run_many_domains,
    "footprint": run_footprint,
    "owed": run_owed,
    "visible": run_visible,
}
