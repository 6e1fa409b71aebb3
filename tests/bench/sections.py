"""The benchmark's sections: each starts what it needs, measures, reports, and leaves nothing running."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.measures import Runs, growing, p50, p99, plug, time_bare_plugs, time_bare_same, time_virsh
from tests.bench.report import Report
from tests.bench.subject import connect_at_once, domain_name, start_agent, write_node
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import build_image
from tests.lab.libvirtd import PrivateLibvirtd

#: POST to callback, over the bare libvirt call, at the median.
OVERHEAD_MS = 3.0
DOMAINS = 400


def run_test_driver(report: Report) -> None:
    """(a) on libvirt's test driver, whose calls take microseconds: what is measured is the agent itself."""
    report.begin("(a) HotPlugCpu on libvirt's test driver: each command one vCPU more, live and persistent")
    with tempfile.TemporaryDirectory() as directory, start_agent(uri := write_node(Path(directory), DOMAINS)) as agent:
        runs, commands = Runs(agent), growing(DOMAINS, 15 * DOMAINS)
        take = iter(commands)

        def some(count: int) -> list:
            return [next(take) for _ in range(count)]

        bare = time_bare_plugs(uri, DOMAINS, 1000)
        virsh = time_virsh(write_node(Path(directory), 1), domain_name(0), [2] * 20)
        report.add("bare virDomainSetVcpusFlags, median", p50(bare), "ms")
        report.add("virsh setvcpus, median", p50(virsh), "ms")
        runs(some(400), clients=4, outcome="plugged")
        one, one_cpu_ms = runs(some(800), clients=1, outcome="plugged")
        two, _ = runs(some(800), clients=2, outcome="plugged")
        many, many_cpu_ms = runs(some(4000), clients=16, outcome="plugged")
        report.add("one client: POST to callback, median", p50(one.callback_ms), "ms", at_most=p50(bare) + OVERHEAD_MS)
        report.add("one client: POST to callback, p99", p99(one.callback_ms), "ms")
        report.add("one client: immediate answer, median", p50(one.answer_ms), "ms", at_most=3.0)
        report.add("one client: against virsh", p50(one.callback_ms) / p50(virsh), "times")
        report.add("one client: CPU of the agent", one_cpu_ms, "ms")
        report.add("two clients: commands", two.per_s, "/s", at_least=350)
        report.add("two clients: immediate answer, median", p50(two.answer_ms), "ms", at_most=3.0)
        report.add("16 clients: commands", many.per_s, "/s", at_least=400)
        report.add("16 clients: POST to callback, median", p50(many.callback_ms), "ms")
        report.add("16 clients: POST to callback, p99", p99(many.callback_ms), "ms", at_most=100)
        report.add("16 clients: CPU of the agent", many_cpu_ms, "ms")
        connects = connect_at_once(agent.port, 200)
        report.add("200 clients connecting at once: the slowest connect", max(connects), "ms", at_most=900)


def run_real_guest(report: Report) -> None:
    """(a) on a real guest. Its vCPUs cannot be taken away again under emulation, so what is repeated is the command
    for the number that it has: looked at twice as any other, guest agent included, and answered `unchanged`."""
    report.begin("(a) HotPlugCpu on a real guest, repeated with the number of vCPUs that it has")
    with PrivateLibvirtd() as lab:
        guest = Guest(lab, build_image(), GuestSpec(name="bench", vcpus=2))
        try:
            guest.boot()
            with start_agent(lab.uri) as agent:
                runs = Runs(agent)
                bare = time_bare_same(guest, 2, 300)
                virsh = time_virsh(lab.uri, guest.name, [2] * 20)
                report.add("bare virDomainSetVcpusFlags, median", p50(bare), "ms")
                report.add("virsh setvcpus, median", p50(virsh), "ms")
                commands = [plug(guest.name, 2)] * 400
                runs(commands[:50], clients=1, outcome="unchanged")
                one, one_cpu_ms = runs(commands, clients=1, outcome="unchanged")
                many, many_cpu_ms = runs(commands, clients=16, outcome="unchanged")
                report.add("one client: POST to callback, median", p50(one.callback_ms), "ms")
                report.add("one client: immediate answer, median", p50(one.answer_ms), "ms", at_most=3.0)
                report.add("one client: CPU of the agent", one_cpu_ms, "ms")
                report.add("16 clients on this one VM: commands", many.per_s, "/s")
                report.add("16 clients on this one VM: CPU of the agent", many_cpu_ms, "ms")
        finally:
            guest.destroy()


ALL: dict[str, Callable[[Report], None]] = {"test-driver": run_test_driver, "real-guest": run_real_guest}
