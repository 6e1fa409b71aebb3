"""An agent that can be killed at named points, and VMs that outlive it."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import libvirt
import pytest
from lxml import etree

from tests.lab.agent import AgentProcess, Settings
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer

VM = """\
<domain type='test'>
  <name>{name}</name>
  <memory>262144</memory>
  <currentMemory>131072</currentMemory>
  <vcpu current='1'>{max_vcpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices><memballoon model='virtio'/></devices>
</domain>
"""
CONFIG_XML = libvirt.VIR_DOMAIN_XML_INACTIVE
SIGKILLED = -9

StartAgent = Callable[..., "MortalAgent"]


class MortalAgent(AgentProcess):
    """An agent that ends at a named point, and comes back on the same state and port."""

    def start_to_die(self, fault: str) -> None:
        """Start it again, to be killed at this point; empty: it lives."""
        os.environ["KVMAGENT_FAULT"] = fault
        try:
            self.start()
        finally:
            del os.environ["KVMAGENT_FAULT"]

    def wait_killed(self, timeout_s: float = 20.0) -> None:
        """Wait for the fault to strike."""
        assert self._child is not None
        assert self._child.wait(timeout_s) == SIGKILLED, self.log()[-4000:]

    def resident_kib(self) -> int:
        """Resident memory."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0])

    def count(self, what: str) -> int:
        """How many entries a directory of /proc/PID has: "task" for threads, "fd" for open files."""
        return len(list(Path(f"/proc/{self.pid}/{what}").iterdir()))

    def count_files(self) -> tuple[int, int]:
        """How many libvirt connections are open, and how many files beside them.

        A connection is a socket and an eventfd; libvirt's event loop has an eventfd, too.
        """
        links = [os.readlink(file) for file in Path(f"/proc/{self.pid}/fd").iterdir()]
        connections = links.count("anon_inode:[eventfd]")
        return connections, len(links) - 2 * connections


def find_dimms(guest: Guest) -> tuple[list[str], list[str]]:
    """The aliases of the dimms that tasks gave to the running VM, and to its persistent definition."""
    pattern = r"<alias name='(ua-kvmagent-[^']+)'"
    return re.findall(pattern, guest.live_xml()), re.findall(pattern, guest.persistent_xml())


class Host:
    """libvirt's test driver inside a daemon of its own: unlike in the agent's process, its VMs outlive the agent."""

    def __init__(self, daemon: PrivateLibvirtd) -> None:
        self.uri = daemon.uri.replace("qemu+unix:///session", "test+unix:///default")
        self.pause, self.resume = daemon.pause, daemon.resume
        # The driver's state lives as long as somebody is connected, an agent that was killed a moment ago included; and
        # for good where that was killed while libvirtd, which was paused, had still to take its connection.
        try:
            wait_for(self._connect_anew, timeout_s=5, what="a driver without VMs of another test")
        except TimeoutError:
            daemon.restart()
            assert self._connect_anew()

    def _connect_anew(self) -> bool:
        self._connection = libvirt.open(self.uri)
        if [domain.name() for domain in self._connection.listAllDomains()] == ["test"]:
            return True
        self._connection.close()
        return False

    def define(self, name: str, *, max_vcpus: int = 64) -> None:
        """Start a VM with one vCPU."""
        self._connection.defineXML(VM.format(name=name, max_vcpus=max_vcpus)).create()

    def vcpus(self, name: str) -> tuple[int, int]:
        """The vCPUs of the running VM and of its persistent definition."""
        domain = self._connection.lookupByName(name)
        return domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE), domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    def uuid(self, name: str) -> str:
        """A VM's UUID."""
        return str(self._connection.lookupByName(name).UUIDString())

    def balloon(self, name: str) -> tuple[int, int]:
        """What the balloon leaves of the running VM's memory, and of its persistent definition's, in bytes."""
        domain = self._connection.lookupByName(name)
        texts = (etree.fromstring(domain.XMLDesc(flags)).findtext("currentMemory") for flags in (0, CONFIG_XML))
        live, config = (int(text or 0) * 1024 for text in texts)
        return live, config

    def close(self) -> None:
        """Let go of the driver; its VMs are gone once the agent is, too."""
        self._connection.close()


@pytest.fixture
def host(lab: PrivateLibvirtd) -> Iterator[Host]:
    """A host with a VM named vm1."""
    running = Host(lab)
    running.define("vm1")
    yield running
    running.close()


@pytest.fixture
def server() -> Iterator[ManagementServer]:
    """The management server that takes the callbacks."""
    with ManagementServer() as running:
        yield running


@pytest.fixture
def make_agent() -> Iterator[StartAgent]:
    """Make an agent that is killed at `fault` (none: it lives) and start it; `settings` as AgentProcess takes them."""
    with ExitStack() as agents:

        def make(
            uri: str,
            *,
            fault: str = "",
            settings: Settings | None = None,
            environment: Mapping[str, str] | None = None,
        ) -> MortalAgent:
            command = [sys.executable, str(Path(__file__).with_name("mortal_agent.py"))]
            agent = MortalAgent(uri=uri, settings=settings, command=command)
            agent.environment.update(environment or {})
            agents.callback(agent.remove)
            agent.start_to_die(fault)
            return agent

        yield make
