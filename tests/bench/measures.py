"""What is measured. Each function measures one thing, and its docstring says what is in the number and what is not."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence

import libvirt
import libvirt_qemu

from tests.bench.load import Command, Result, run_load
from tests.bench.subject import MAX_VCPUS, cpu_s, domain_name
from tests.lab.agent import AgentProcess
from tests.lab.guest import Guest

LIVE_AND_CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG


def plug(vm: str, count: int, affect: str = "both") -> Command:
    """HotPlugCpu of a VM."""
    return Command("/vm/hotplug/cpu", json.dumps({"vmUuid": vm, "cpuNum": count, "affect": affect}).encode())


def unplug(vm: str, count: int, affect: str = "both") -> Command:
    """HotUnplugCpu of a VM."""
    return Command("/vm/hotunplug/cpu", json.dumps({"vmUuid": vm, "cpuNum": count, "affect": affect}).encode())


def ready(vm: str) -> Command:
    """ReadyForHotplug of a VM."""
    return Command("/vm/hotplug/ready", json.dumps({"vmUuid": vm}).encode())


def config_changes(vms: Sequence[str], count: int) -> list[Command]:
    """So many changes of persistent definitions, each a real one: up by HotPlugCpu, down by HotUnplugCpu, in turn."""
    rounds = range(-(-count // len(vms)))
    pairs = ((vm, n) for n in rounds for vm in vms)
    return [unplug(vm, 1, "config") if n % 2 else plug(vm, 2, "config") for vm, n in pairs][:count]


def growing(domains: int, count: int) -> list[Command]:
    """So many HotPlugCpu, each of which gives a domain of a test node one vCPU more: round after round over all.

    Raises:
        ValueError: the domains have not room for so many.
    """
    steps = [(n, vcpus) for vcpus in range(2, MAX_VCPUS + 1) for n in range(domains)]
    if len(steps) < count:
        raise ValueError(f"{domains} domains take {len(steps)} plugs")
    return [plug(domain_name(n), vcpus) for n, vcpus in steps[:count]]


class Runs:
    """Runs of commands against one agent, each with the CPU time that the agent used for one of them."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self._ids = iter(range(1, 1 << 30))

    def __call__(self, commands: list[Command], *, clients: int, outcome: str | None = None) -> tuple[Result, float]:
        """Return what came of it, and the agent's CPU milliseconds for each command.

        Raises:
            RuntimeError: a callback said something else than `outcome`: then something else was measured.
        """
        before = cpu_s(self._agent.pid)
        result = run_load(self._agent.port, commands, clients=clients, run=f"{next(self._ids):x}")
        used_ms = (cpu_s(self._agent.pid) - before) * 1000 / len(commands)
        if outcome is not None and set(result.outcomes) != {outcome}:
            raise RuntimeError(f"the callbacks should all say {outcome!r}: {dict(result.outcomes)}")
        return result, used_ms


def time_bare_same(guest: Guest, count: int, times: int) -> list[float]:
    """The milliseconds of virDomainSetVcpusFlags, live and persistent, with the number of vCPUs that the guest has."""
    with guest.domain() as domain:
        return [_time_ms(lambda: domain.setVcpusFlags(count, LIVE_AND_CONFIG)) for _ in range(times)]


def time_bare_config(guest: Guest, times: int) -> list[float]:
    """The milliseconds of virDomainSetVcpusFlags on the persistent definition, up and down in turn."""
    with guest.domain() as domain:
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE
        return [_time_ms(lambda n=n: domain.setVcpusFlags(1 + n % 2, flags)) for n in range(1, times + 1)]


def time_guest_agent(guest: Guest, times: int, *, pause_s: float = 0.0) -> list[float]:
    """The milliseconds of the guest agent's answer to guest-get-vcpus, through libvirt; with a pause before each."""
    question = '{"execute":"guest-get-vcpus"}'
    took = []
    with guest.domain() as domain:
        for _ in range(times):
            time.sleep(pause_s)
            took.append(_time_ms(lambda: libvirt_qemu.qemuAgentCommand(domain, question, 5, 0)))
    return took


def time_virsh(uri: str, name: str, counts: Iterable[int]) -> list[float]:
    """The milliseconds of one `virsh setvcpus NAME COUNT --live --config` after another, each a process of its own."""
    return [
        _time_ms(
            lambda c=count: subprocess.run(
                ["virsh", "-q", "-c", uri, "setvcpus", name, str(c), "--live", "--config"], check=True
            )
        )
        for count in counts
    ]


def _time_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def p50(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def p99(values: list[float]) -> float:
    """What 99 of 100 are below."""
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]
