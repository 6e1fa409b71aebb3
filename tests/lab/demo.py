"""Plays the whole thing once, to be watched: a real guest gets more CPUs and memory while it runs.

    demo -- POST command --> agent -- libvirt, guest agent --> guest
    demo <-- callback ------ agent
    demo -- "what do you see?" ------ second serial port ----> guest     the answers must match

Ends with status 0 only if the guest itself confirms what the agent reported. With `--svg FILE` what it has shown is
drawn there as well: the picture in README.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import ImageError, build_image
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.picture import draw_terminal
from tests.lab.server import ManagementServer

SPEC = GuestSpec(name="demo", vcpus=1, max_vcpus=4, memory_mib=256)
TARGET_CPUS = 3
ADDED_MIB = 256
TARGET_MIB = SPEC.memory_mib + ADDED_MIB
#: Longer than the agent waits for a guest that does nothing: its own word on that is worth more.
CALLBACK_TIMEOUT_S = 100.0
#: The guest's kernel may describe new memory inside that memory, and then gains a little less than was plugged.
LEAST_GAIN = 0.95
MIB = 2**20
#: What a terminal has at least.
WIDTH = 80
ANSI = re.compile(r"\033\[[0-9;]*m")
ACCEPTED = 200

Body = Mapping[str, Any]


class Mismatch(Exception):
    """Something is not as it should be; the text says what was seen and what was expected."""


class Screen:
    """Lines for a person; colour only on a terminal, and not where NO_COLOR is set."""

    def __init__(self) -> None:
        self._has_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        #: What was shown, in colour.
        self.lines: list[str] = []

    def show(self, line: str) -> None:
        """One line, which may be in colour."""
        self.lines.append(line)
        print(line if self._has_colour else ANSI.sub("", line), flush=True)

    def paint(self, text: str, code: str) -> str:
        """The text in a colour, by its ANSI code."""
        return f"\033[{code}m{text}\033[0m"

    def step(self, text: str) -> None:
        """What goes on, for those who wait."""
        first, *others = textwrap.wrap(text, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
        self.show(f"{self.paint('==>', '1;34')} {first}")
        for line in others:
            self.show(f"    {line}")

    def head(self, text: str) -> None:
        """The title of a scene."""
        self.show("")
        self.show(self.paint(text, "1"))

    def row(self, name: str, text: str, code: str = "0") -> None:
        """A fact, in as many lines as it takes."""
        for line in textwrap.wrap(text, WIDTH - 15, break_long_words=False, break_on_hyphens=False) or [""]:
            self.show(f"   {name:<12}{self.paint(line, code)}")
            name = ""


@dataclass(frozen=True)
class Sight:
    """How a guest stands: by libvirt now, by libvirt at the next start, and in the guest's own eyes."""

    cpus: int
    memory_mib: int
    next_cpus: int
    next_memory_mib: int
    guest_cpus: str
    guest_memory_kib: int
    guest_boot_id: str


def look(guest: Guest) -> Sight:
    """Ask libvirt and the guest, past the agent."""
    with guest.domain() as domain:
        cpus = domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE)
        next_cpus = domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    return Sight(
        cpus=cpus,
        memory_mib=read_memory_mib(guest.live_xml()),
        next_cpus=next_cpus,
        next_memory_mib=read_memory_mib(guest.persistent_xml()),
        guest_cpus=guest.cpus_online(),
        guest_memory_kib=guest.mem_total_kib(),
        guest_boot_id=guest.run("cat /proc/sys/kernel/random/boot_id").strip(),
    )


def read_memory_mib(domain_xml: str) -> int:
    """All the memory of a domain, plugged devices included; libvirt writes it in KiB."""
    return int(ElementTree.fromstring(domain_xml).findtext("./memory", "0")) // 1024


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description="Give a guest CPUs and memory while it runs, and ask it.")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw what was shown there as well")
    picture: Path | None = parser.parse_args().svg
    screen = Screen()
    status = run(screen)
    if picture is not None and status == 0:
        picture.write_text(draw_terminal(["\033[1m$\033[0m make demo", *screen.lines], columns=WIDTH))
    return status


def run(screen: Screen) -> int:
    """Run it; the exit status."""
    screen.show(screen.paint("kvmagent demo: more CPUs and memory for a guest that keeps running", "1"))
    began = time.monotonic()
    try:
        play(screen)
    except Mismatch as mismatch:
        screen.head(f"{screen.paint('It does NOT check out:', '1;31')} {mismatch}")
        return 1
    except (ImageError, RuntimeError, TimeoutError) as error:
        screen.head(f"{screen.paint('The demo could not run:', '1;31')} {error}")
        return 1
    except KeyboardInterrupt:
        screen.head("Interrupted; guest, libvirtd and agent are gone.")
        return 130
    screen.step(f"cleaned up; {time.monotonic() - began:.0f} s in all")
    return 0


def play(screen: Screen) -> None:
    """Build the stage, send the commands, compare.

    Raises:
        Mismatch: a command failed, or the guest sees something else than was reported.
    """
    with ExitStack() as stage:
        image = build_image(report=screen.step)
        screen.step(f"guest image: kernel {image.kernel_release}, busybox, qemu-ga")
        lab = stage.enter_context(PrivateLibvirtd())
        screen.step(f"private libvirtd of user {lab.user.pw_name}, apart from the host's own")
        guest = Guest(lab, image, SPEC)
        boot_s = guest.boot()
        screen.step(f"guest booted in {boot_s:.1f} s: {SPEC.vcpus} of {SPEC.max_vcpus} CPUs, {SPEC.memory_mib} MiB")
        agent = stage.enter_context(AgentProcess(uri=lab.uri))
        server = stage.enter_context(ManagementServer())
        screen.step(f"agent {agent.url}, callbacks to {server.url}")
        before = look(guest)
        try:
            send_commands(screen, agent, server, guest)
        except (Mismatch, TimeoutError) as error:
            raise Mismatch(f"{error}\n\nThe end of the agent's log:\n{agent.log()[-3000:]}") from error
        after = look(guest)
        show_table(screen, before, after)
        check_sight(before, after)
        screen.head(screen.paint("It checks out.", "1;32"))
        gained = gained_kib(before, after) // 1024
        screen.show(f"   The guest itself counts {TARGET_CPUS} CPUs online and {gained} MiB more memory than")
        screen.show("   before, in the same boot, and keeps both at its next start.")


def send_commands(screen: Screen, agent: AgentProcess, server: ManagementServer, guest: Guest) -> None:
    """Send the three commands, and hold each callback against what it must say."""
    vm = {"vmUuid": guest.uuid}
    target_bytes = TARGET_MIB * MIB

    def send(title: str, path: str, fields: Body) -> Body:
        screen.head(title)
        return exchange(screen, agent, server, path, {**vm, **fields})

    ready = send(
        "1  Can it grow? (ReadyForHotplug)",
        "/vm/hotplug/ready",
        {"cpuNum": TARGET_CPUS, "memorySize": target_bytes},
    )
    expect("ready", ready.get("ready"), True)
    cpu = send(f"2  {TARGET_CPUS} CPUs (HotPlugCpu)", "/vm/hotplug/cpu", {"cpuNum": TARGET_CPUS})
    expect("outcome", cpu.get("outcome"), "online")
    expect("cpuNum", cpu.get("cpuNum"), TARGET_CPUS)
    memory = send(
        f"3  {ADDED_MIB} MiB more (HotPlugMemory)",
        "/vm/hotplug/memory",
        {"memorySize": target_bytes, "method": "dimm"},
    )
    expect("outcome", memory.get("outcome"), "online")
    expect("memorySize", memory.get("memorySize"), target_bytes)


def exchange(screen: Screen, agent: AgentProcess, server: ManagementServer, path: str, fields: Body) -> Body:
    """Send one command, wait for its callback, show both; the callback's body."""
    task_uuid = new_task_uuid()
    screen.row("request", f"POST {path}  {format_fields(fields)}")
    sent = time.monotonic()
    reply = agent.post(path, fields, task_uuid=task_uuid, callback_url=server.url)
    if reply.status != ACCEPTED:
        raise Mismatch(f"{path} was answered with {reply.status}: {reply.body}")
    screen.row("answer", f"{reply.status} {reply.body.get('state')}  after {(time.monotonic() - sent) * 1000:.0f} ms")
    body: Body = server.wait(task_uuid, CALLBACK_TIMEOUT_S)
    callback = server.callbacks(task_uuid)[0]
    is_good = body.get("success") is True
    verdict = "success" if is_good else f"failure: {body.get('errorCode')}: {body.get('error')}"
    screen.row("callback", f"{verdict}  after {callback.at - sent:.2f} s", "32" if is_good else "31")
    show_reply(screen, body)
    expect("success", body.get("success"), True)
    return body


def show_reply(screen: Screen, body: Body) -> None:
    """The fields of a callback that a person wants to see, those that it has."""
    shown = {name: body[name] for name in ("outcome", "cpuNum", "memorySize", "ready") if body.get(name) is not None}
    screen.row("", format_fields(shown))
    formats: Mapping[str, Callable[[Any], str]] = {
        "headroom": format_fields,
        "steps": lambda steps: ", ".join(f"{step['step']} {step['elapsedMs']:.0f} ms" for step in steps),
        "blockers": lambda blockers: "; ".join(f"{blocker['code']}: {blocker['message']}" for blocker in blockers),
        "warnings": lambda warnings: "; ".join(f"{warning['code']}: {warning['message']}" for warning in warnings),
        "remedy": str,
    }
    for name, form in formats.items():
        if body.get(name):
            screen.row(name, form(body[name]))


def format_fields(fields: Body) -> str:
    """name=value pairs, amounts of memory in MiB."""
    return "  ".join(f"{name}={format_value(name, value)}" for name, value in fields.items())


def format_value(name: str, value: Any) -> str:
    """A field's value for a person."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ",".join(format_value(name, one) for one in value) or "none"
    if isinstance(value, dict):
        return f"({format_fields(value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / MIB:g}MiB" if name.endswith(("Size", "Granularity")) else str(value)


def show_table(screen: Screen, before: Sight, after: Sight) -> None:
    """What libvirt and the guest say, before and after."""
    screen.head("What libvirt and the guest say")
    rows = [
        ("CPUs online", "in the guest", before.guest_cpus, after.guest_cpus),
        ("CPUs", "libvirt, now", str(before.cpus), str(after.cpus)),
        ("CPUs", "libvirt, next start", str(before.next_cpus), str(after.next_cpus)),
        ("MemTotal", "in the guest", f"{before.guest_memory_kib} kB", f"{after.guest_memory_kib} kB"),
        ("memory", "libvirt, now", f"{before.memory_mib} MiB", f"{after.memory_mib} MiB"),
        ("memory", "libvirt, next start", f"{before.next_memory_mib} MiB", f"{after.next_memory_mib} MiB"),
    ]
    screen.show(f"   {'':<12}{'':<20}{'before':>12}{'after':>12}")
    for what, whose, old, new in rows:
        screen.show(f"   {what:<12}{whose:<20}{old:>12}{screen.paint(f'{new:>12}', '1')}")


def check_sight(before: Sight, after: Sight) -> None:
    """Hold what is against what must be.

    Raises:
        Mismatch: with the first difference.
    """
    expect("CPUs online in the guest", after.guest_cpus, f"0-{TARGET_CPUS - 1}")
    expect("CPUs by libvirt", (after.cpus, after.next_cpus), (TARGET_CPUS, TARGET_CPUS))
    expect("MiB by libvirt", (after.memory_mib, after.next_memory_mib), (TARGET_MIB, TARGET_MIB))
    expect("the guest's boot", after.guest_boot_id, before.guest_boot_id)
    gained = gained_kib(before, after)
    if not LEAST_GAIN * ADDED_MIB * 1024 <= gained <= ADDED_MIB * 1024:
        raise Mismatch(f"the guest's MemTotal has grown by {gained} kB, {ADDED_MIB * 1024} kB were plugged")


def gained_kib(before: Sight, after: Sight) -> int:
    """How much memory the guest has gained."""
    return after.guest_memory_kib - before.guest_memory_kib


def expect(what: str, seen: object, expected: object) -> None:
    """Raises: Mismatch: they differ."""
    if seen != expected:
        raise Mismatch(f"{what} is {seen}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
