"""Real plugs: running QEMUs without an operating system, each plug one vCPU or one dimm more, live and persistent.

By turns the bare libvirt calls, on one thread and on one for each VM, and the agent, with one client and with one for
each VM; so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import libvirt

from kvmagent.hypervisor.domainxml import format_dimm
from tests.bench.load import Command
from tests.bench.measures import LIVE_AND_CONFIG, Runs, plug
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import build_image
from tests.lab.libvirtd import PrivateLibvirtd

VMS = 8
ROUNDS = 3
#: Plugs of each VM in each turn.
EACH = 4
MIB = 1 << 20
DIMM = 128 * MIB
BOOT_MIB = 128
#: Four turns a round, one that is profiled, and a few for virsh and a warm-up.
MOST = (4 * ROUNDS + 3) * EACH


@dataclass
class Side:
    """What one side took: milliseconds of each plug, and plugs a second over all turns."""

    took_ms: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)
    count: int = 0
    elapsed_s: float = 0.0

    @property
    def per_s(self) -> float:
        return self.count / self.elapsed_s


@dataclass
class Plugs:
    """The next plug of each VM, by whomever: one counter for the bare calls and for the agent."""

    kind: str
    names: list[str]
    done: int = 0

    def next_round(self, each: int = EACH) -> list[tuple[str, int]]:
        """`each` plugs of each VM, in turn: the VM and the number of its plug, from 1."""
        plugs = [(name, self.done + n) for n in range(1, each + 1) for name in self.names]
        self.done += each
        return plugs

    def command(self, name: str, number: int) -> Command:
        """The plug as the agent is asked for it."""
        if self.kind == "vCPU":
            return plug(name, 1 + number)
        size = BOOT_MIB * MIB + number * DIMM
        body = {"vmUuid": name, "memorySize": size, "method": "dimm", "dimmSize": DIMM}
        return Command("/vm/hotplug/memory", json.dumps(body).encode())

    def call(self, domain: libvirt.virDomain, number: int) -> None:
        """The plug as libvirt is asked for it."""
        if self.kind == "vCPU":
            domain.setVcpusFlags(1 + number, LIVE_AND_CONFIG)
        else:
            domain.attachDeviceFlags(format_dimm(size_bytes=DIMM, node=0, alias=f"ua-bare-{number}"), LIVE_AND_CONFIG)


@dataclass
class Compared:
    """The four sides of a comparison."""

    bare_one: Side = field(default_factory=Side)
    bare_all: Side = field(default_factory=Side)
    agent_one: Side = field(default_factory=Side)
    agent_all: Side = field(default_factory=Side)
    #: Plugs by the agent that are not timed: the warm-up and the turn that is profiled.
    agent_beside: int = 0


@contextmanager
def running_vms() -> Iterator[tuple[PrivateLibvirtd, list[str]]]:
    """A libvirt daemon with VMS running QEMUs."""
    with PrivateLibvirtd() as lab, ExitStack() as stack:
        names = []
        for n in range(VMS):
            room = GuestSpec(
                name=f"bare-{n}",
                max_vcpus=1 + MOST,
                memory_mib=BOOT_MIB,
                max_memory_mib=16384,
                slots=1 + MOST,
                boots=False,
                agent_channel=False,
            )
            guest = Guest(lab, build_image(), room)
            stack.callback(guest.destroy)
            guest.define()
            guest.start()
            names.append(guest.name)
        yield lab, names


def compare(uri: str, names: list[str], kind: str, runs: Runs, profile: AbstractContextManager[None]) -> Compared:
    """ROUNDS rounds over the four sides, then one turn more within `profile`."""
    plugs, found = Plugs(kind, names), Compared()
    runs([plugs.command(*one) for one in plugs.next_round(1)], clients=1, outcome="plugged")
    for _ in range(ROUNDS):
        _call(uri, plugs, found.bare_one, threads=1)
        _command(runs, plugs, found.agent_one, clients=1)
        _call(uri, plugs, found.bare_all, threads=len(names))
        _command(runs, plugs, found.agent_all, clients=len(names))
    with profile:
        _command(runs, plugs, Side(), clients=1)
    found.agent_beside = len(names) * (1 + EACH)
    return found


def _command(runs: Runs, plugs: Plugs, side: Side, *, clients: int) -> None:
    result, _ = runs([plugs.command(*one) for one in plugs.next_round()], clients=clients, outcome="plugged")
    side.took_ms += result.callback_ms
    side.answer_ms += result.answer_ms
    side.count += len(result.callback_ms)
    side.elapsed_s += result.elapsed_s


def _call(uri: str, plugs: Plugs, side: Side, *, threads: int) -> None:
    """The handles are looked up and the connections open beforehand: the bare calls and nothing else."""
    round_ = plugs.next_round()
    with ExitStack() as stack:
        domains = {}
        for name in plugs.names:
            connection = libvirt.open(uri)
            stack.callback(connection.close)
            domains[name] = connection.lookupByName(name)

        def time_each(mine: list[tuple[str, int]]) -> list[float]:
            return [_time_ms(lambda one=one: plugs.call(domains[one[0]], one[1])) for one in mine]

        parts = [round_] if threads == 1 else [[one for one in round_ if one[0] == name] for name in plugs.names]
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            for took in pool.map(time_each, parts):
                side.took_ms += took
            side.elapsed_s += time.perf_counter() - began
    side.count += len(round_)


def _time_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000
