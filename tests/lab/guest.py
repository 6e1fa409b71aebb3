"""Owns a running guest and the talk with it: what the guest itself sees, apart from what libvirt says of it.

    test -- run("command") --> unix socket --> second serial port --> harness (rootfs/etc/harness) --> sh
    test <-- output, or GuestCommandError -----------------------------------------------------------'

The agent under test has no part in this path, so what it reports can be held against what the guest says.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from xml.etree import ElementTree

import libvirt
import libvirt_qemu

from tests.lab.domainxml import AGENT_PORT, GuestSpec, format_domain
from tests.lab.image import Image
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import LOAD_FACTOR, wait_for

#: 5 to 15 s under TCG on two cores that have nothing else to do; a test run may boot several at once.
BOOT_TIMEOUT_S = 120.0
AGENT_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 2
COMMAND_TIMEOUT_S = 30.0
#: How much later than in the guest a command's limit is up on the host.
ANSWER_GRACE_S = 10.0
KILLED = 128 + 9


class GuestCommandError(Exception):
    """A command in the guest ended with a status other than 0; raised by `Guest.run`."""

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"`{command}` ended with {status} in the guest: {output.strip() or '(no output)'}")
        self.status = status
        self.output = output


class Guest:
    """A guest of the lab, one domain of a PrivateLibvirtd. Methods may be called from several threads.

    Every call to libvirt has a connection of its own, so a guest outlives the death of the daemon.
    """

    def __init__(self, lab: PrivateLibvirtd, image: Image, spec: GuestSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.uuid = ""
        self._lab = lab
        self._console_log = lab.guests_directory / f"{spec.name}.log"
        self._harness = lab.guests_directory / f"{spec.name}.sock"
        self._seen_boots: set[str] = set()
        self._one_command = threading.Lock()
        self._xml = format_domain(
            spec,
            image,
            virt_type=os.environ.get("KVMAGENT_LAB_VIRT", "qemu"),
            console_log=self._console_log,
            harness=self._harness,
        )

    # Life

    def boot(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Define the domain, start it, wait until it is up, its guest agent included; the seconds that took.

        Raises:
            TimeoutError: it did not come up; the text has the end of its console.
        """
        began = time.monotonic()
        self.define()
        self.start()
        self.wait_booted(timeout_s=timeout_s)
        return time.monotonic() - began

    def define(self) -> None:
        """Define the domain as its specification says; it stays off."""
        self.define_persistent(self._xml)

    def start_paused(self) -> None:
        """Start the domain without running the guest: for what libvirt and QEMU answer by themselves."""
        with self.domain() as domain:
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def start(self) -> None:
        """Start the domain as it is defined; returns when QEMU runs, long before the guest is up."""
        with self.domain() as domain:
            domain.create()

    def wait_booted(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until a boot that was not seen before is complete."""
        try:
            boot_id = wait_for(self._find_new_boot, timeout_s=timeout_s, what=f"the boot of {self.name}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; the end of its console:\n{self.console()[-2000:]}") from None
        self._seen_boots.add(boot_id)
        if self.spec.agent_channel:
            self._wait_agent_answers()

    def restart(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Power off and on again: the guest starts from its persistent definition."""
        with self.domain() as domain:
            if domain.isActive():
                domain.destroy()
            domain.create()
        self.wait_booted(timeout_s=timeout_s)

    def reboot(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Reboot from within: the same QEMU, with all that has been plugged into it.

        Observed: with the QEMU 6.2 of Ubuntu 22.04 a q35 guest stays in its firmware, one of machine "pc" comes back.
        """
        self.run_later("reboot -f")
        self.wait_booted(timeout_s=timeout_s)

    def power_off(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Power off from within, and wait until libvirt knows."""
        self.run_later("poweroff -f")
        self.wait_off(timeout_s=timeout_s)

    def wait_off(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Wait until the domain does not run."""
        wait_for(lambda: not self.is_running(), timeout_s=timeout_s, what=f"the end of {self.name}")

    def destroy(self) -> None:
        """Stop the guest and remove its definition, if there are any."""
        with contextlib.suppress(libvirt.libvirtError), self.domain() as domain:
            if domain.isActive():
                domain.destroy()
            domain.undefine()

    # What libvirt says

    @contextlib.contextmanager
    def domain(self) -> Iterator[libvirt.virDomain]:
        """The domain, for a few calls to libvirt that the lab has no method for."""
        with self._lab.connect() as connection:
            yield connection.lookupByName(self.name)

    def is_defined(self) -> bool:
        """Whether libvirt has it, running or not."""
        with self._lab.connect() as connection:
            return self.name in [domain.name() for domain in connection.listAllDomains()]

    def is_running(self) -> bool:
        """Whether the domain is active."""
        with self.domain() as domain:
            return bool(domain.isActive())

    def live_xml(self) -> str:
        """The running domain's XML."""
        with self.domain() as domain:
            return str(domain.XMLDesc(0))

    def persistent_xml(self) -> str:
        """The XML that the next start uses, with what is normally hidden in it."""
        with self.domain() as domain:
            return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))

    def define_persistent(self, xml: str) -> None:
        """Replace the persistent definition."""
        with self._lab.connect() as connection:
            self.uuid = connection.defineXML(xml).UUIDString()

    def is_agent_connected(self) -> bool:
        """Whether libvirt takes the guest agent's channel as connected; a hung agent's is."""
        path = f"./devices/channel/target[@name='{AGENT_PORT}']"
        target = ElementTree.fromstring(self.live_xml()).find(path)
        return target is not None and target.get("state") == "connected"

    # What the guest says

    def run(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a shell command in the guest; its output and errors in one text. One command at a time.

        Raises:
            GuestCommandError: its exit status is not 0.
            TimeoutError: it was killed after `timeout_s` (LOAD_FACTOR times it), or the guest does not answer at all.
        """
        timeout_s *= LOAD_FACTOR
        with self._one_command, self._connect() as harness:
            token = self._request(harness, command, timeout_s)
            status, output = read_answer(harness, token, timeout_s + ANSWER_GRACE_S)
        if status == KILLED:
            raise TimeoutError(f"`{command}` ran in {self.name} for {timeout_s:g} s and was killed: {output}")
        if status != 0:
            raise GuestCommandError(command, status, output)
        return output

    def cpus_online(self) -> str:
        """The CPUs that the guest uses, as a range: "0-2"."""
        return self.run("cat /sys/devices/system/cpu/online").strip()

    def cpus_present(self) -> str:
        """The CPUs that the guest has, in use or not, as a range."""
        return self.run("cat /sys/devices/system/cpu/present").strip()

    def mem_total_kib(self) -> int:
        """The memory that the guest's kernel manages: less than it was given, by what the kernel keeps for itself."""
        return int(self.run("sed -n 's/^MemTotal: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo"))

    def console(self) -> str:
        """What the guest has printed on its console since QEMU was started."""
        try:
            return self._console_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # The guest agent

    def stop_agent(self) -> None:
        """Kill the guest agent, and wait until libvirt knows that it is gone."""
        self.run("agent stop")
        wait_for(lambda: not self.is_agent_connected(), timeout_s=AGENT_TIMEOUT_S, what="the agent to disconnect")

    def start_agent(self) -> None:
        """Start the guest agent, and wait until it answers libvirt."""
        self.run("agent start")
        self._wait_agent_answers()

    def hang_agent(self) -> None:
        """Stop the guest agent in its tracks: to libvirt it stays connected, and does not answer."""
        self.run("agent hang")

    def resume_agent(self) -> None:
        """Let a hung guest agent go on, and wait until it answers libvirt."""
        self.run("agent resume")
        self._wait_agent_answers()

    def _wait_agent_answers(self) -> None:
        def answers() -> bool:
            # Never one of libvirt's own agent calls: with a hung agent they block for good, by default.
            # Observed: libvirt 9.0, getTime, 300 s.
            with contextlib.suppress(libvirt.libvirtError), self.domain() as domain:
                return bool(libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-ping"}', PING_TIMEOUT_S, 0))
            return False

        wait_for(answers, timeout_s=AGENT_TIMEOUT_S, what=f"the guest agent of {self.name}")

    def _find_new_boot(self) -> str | None:
        boots = re.findall(r"^lab: booted (\S+)\r?$", self.console(), re.MULTILINE)
        return next((boot for boot in boots if boot not in self._seen_boots), None)

    # The harness

    def run_later(self, command: str) -> None:
        """Have the guest run a command that it does not live to answer: the answer comes before it runs."""
        self.run(f"(usleep 200000; {command}) &")

    def _connect(self) -> socket.socket:
        harness = socket.socket(socket.AF_UNIX)
        harness.settimeout(ANSWER_GRACE_S)
        harness.connect(str(self._harness))
        return harness

    def _request(self, harness: socket.socket, command: str, timeout_s: float) -> str:
        token = secrets.token_hex(8)
        line = command.replace("\\", "\\\\").replace("\n", "\\n")
        harness.sendall(f"{token} {max(1, round(timeout_s))} {line}\n".encode())
        return token


def read_answer(harness: socket.socket, token: str, timeout_s: float) -> tuple[int, str]:
    """Exit status and output of the command that was sent with `token`.

    Raises:
        TimeoutError: no answer, or the guest went away.
    """
    pattern = re.compile(rf"{token} begin\n(.*)\n{token} end (\d+)\n".encode(), re.DOTALL)
    deadline = time.monotonic() + timeout_s
    received = b""
    while not (match := pattern.search(received)):
        harness.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = harness.recv(65536)
        except TimeoutError:
            raise TimeoutError(f"no answer from the guest in {timeout_s:g} s, after {received!r}") from None
        if not data:
            raise TimeoutError("the guest was switched off before it answered")
        received += data
    return int(match.group(2)), match.group(1).decode(errors="replace")
