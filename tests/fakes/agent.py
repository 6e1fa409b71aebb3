"""The agent's inside on a fake libvirt: everything between an accepted task and its reply, without HTTP."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvmagent.api.wire import decode_request, encode
from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.deviceevents import DeviceEvents
from kvmagent.hypervisor.eventconnection import EventConnection
from kvmagent.hypervisor.node import Node
from kvmagent.hypervisor.qemumemory import AskQemu
from kvmagent.hypervisor.schema import DOMAIN_SCHEMA
from kvmagent.model.command import Command
from kvmagent.model.plans import PlanRequest
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.journal import Change, Journal, Task
from kvmagent.tasks.planner import Planner
from kvmagent_plugins.vm_plugin import PLUGIN
from tests.fakes.libvirt import FakeConnection, FakeDomain, FakeGuest, ask_qemu, send_to_agent
from tests.lab.domainxml import GuestSpec, format_domain
from tests.lab.image import Image

COMMANDS: dict[str, Command] = {command.name: command for command in PLUGIN.commands}
MIB = 1024 * 1024
#: The cgroup of the first VM, where it is named vm1.
VM_CGROUP = "machine.slice/machine-qemu\\x2d1\\x2dvm1.scope/libvirt"
#: A fake domain's, where its XML has none.
UUID = "11111111-2222-3333-4444-555555555555"


# Each has a thread that opens connections.
_leased: list[Connection] = []


def end_nodes() -> None:
    """End the connections of all nodes that `make_node` has made, with their threads."""
    while _leased:
        _leased.pop().stop()


def make_domain(
    spec: GuestSpec, guest: FakeGuest | None = None, *, virt_type: str = "qemu", **options: Any
) -> FakeDomain:
    """A fake domain with the XML that the lab gives to a real one."""
    return FakeDomain(format_spec(spec, virt_type), guest=guest or make_guest(spec), **options)


def make_host(
    directory: Path,
    *,
    available_mib: int = 64 * 1024,
    total_mib: int = 128 * 1024,
    node_free_mib: int = 64 * 1024,
    free_hugepages: int = 0,
    hugepage_mib: int = 2,
    memlock_mib: int | None = None,
    vm_limit_mib: int | None = None,
) -> Path:
    """The kernel's files of a host with one NUMA node, hugepages of one size and 46 physical address bits."""
    page_kib = hugepage_mib * 1024
    node = directory / "sys/devices/system/node/node0"
    # Beside the free ones, those of the VMs that run: 8 GiB, where there are any.
    all_hugepages = free_hugepages + 8192 // hugepage_mib if free_hugepages else 0
    files = {
        directory / "proc/meminfo": f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {available_mib * 1024} kB\n"
        f"Hugepagesize: {page_kib} kB\n",
        directory / "proc/cpuinfo": "address sizes\t: 46 bits physical, 48 bits virtual\n",
        directory / "proc/sys/kernel/random/boot_id": "boot-1\n",
        node / "meminfo": f"Node 0 MemTotal: {total_mib * 1024} kB\nNode 0 MemFree: {node_free_mib * 1024} kB\n",
        node / f"hugepages/hugepages-{page_kib}kB/free_hugepages": f"{free_hugepages}\n",
        node / f"hugepages/hugepages-{page_kib}kB/nr_hugepages": f"{all_hugepages}\n",
        directory / f"sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages": f"{all_hugepages}\n",
    }
    # Nothing of the host that another example had in the same place.
    for tree in ("sys/devices/system/node", "sys/kernel/mm"):
        shutil.rmtree(directory / tree, ignore_errors=True)
    if memlock_mib is not None:
        process = directory / "proc/4711"
        files[process / "cmdline"] = "/usr/bin/qemu-system-x86_64\0-uuid\0" + UUID + "\0"
        limit = f"{memlock_mib * MIB}  bytes\n"
        files[process / "limits"] = f"Limit  Soft Limit  Hard Limit  Units\nMax locked memory  65536  {limit}"
    if vm_limit_mib is not None:
        files[directory / f"sys/fs/cgroup/{VM_CGROUP}/memory.max"] = f"{vm_limit_mib * MIB}\n"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def format_spec(spec: GuestSpec, virt_type: str) -> str:
    """The lab's domain XML with paths that nothing opens."""
    image = Image(kernel=Path("/boot/kernel"), initramfs=Path("/boot/initramfs"), kernel_release="6.1")
    return format_domain(spec, image, virt_type=virt_type, console_log=Path("/log"), harness=Path("/sock"))


def write_node(directory: Path, *specs: GuestSpec, has_uuids: bool = False) -> str:
    """Write a node of libvirt's test driver with these VMs; the URI that opens it.

    Without `has_uuids` the VMs are others, by their UUIDs, for each who opens it.
    """
    file = directory / "node.xml"
    domains = [format_spec(spec, "test") for spec in specs]
    if has_uuids:
        domains = [xml.replace("</name>", f"</name><uuid>{uuid.uuid4()}</uuid>", 1) for xml in domains]
    file.write_text(f"<node>{''.join(domains)}</node>")
    return f"test://{file}"


def make_guest(spec: GuestSpec, **options: Any) -> FakeGuest:
    """A guest that has just booted: its CPUs and boot memory online."""
    blocks = dict.fromkeys(range(spec.memory_mib // 128), True)
    return FakeGuest(online_cpus=dict.fromkeys(range(spec.vcpus), True), blocks=blocks, **options)


def make_node(
    directory: Path,
    *domains: FakeDomain,
    uri: str = "fake",
    domain_schema: Path = DOMAIN_SCHEMA,
    removes_emulated: bool = False,
    budget: Budget | None = None,
    connection: FakeConnection | None = None,
    ask: AskQemu = ask_qemu,
    **host: int,
) -> Node:
    """A Node on these domains, or this connection, on a host of `make_host`, whose files are in `directory`/host."""
    fake, events = connection or FakeConnection(*domains), DeviceEvents()
    events.register(fake)
    leased = Connection(uri, open_libvirt=lambda _uri: fake)
    _leased.append(leased)
    return Node(
        leased,
        events=events,
        former_xml_dir=directory / "former-xml",
        send_to_agent=send_to_agent,
        ask_qemu=ask,
        host_root=make_host(directory / "host", **host),
        domain_schema=domain_schema,
        removes_emulated=removes_emulated,
        budget=budget,
    )


@contextmanager
def open_node(uri: str, directory: Path, *, domain_schema: Path = DOMAIN_SCHEMA) -> Iterator[Node]:
    """A Node on a real libvirt, with its events; `domain_schema` is that libvirt's own."""
    events = DeviceEvents()
    connection, event_connection = Connection(uri), EventConnection(uri, (events.register,))
    connection.start()
    event_connection.start()
    try:
        yield Node(connection, events=events, former_xml_dir=directory / "former-xml", domain_schema=domain_schema)
    finally:
        event_connection.stop()
        connection.stop()


@dataclass
class Done:
    """A task that has been carried out: what was recorded before the first step, and what the caller is told."""

    goal: Any
    reply: dict[str, Any]


class FakeAgent:
    """An executor on a journal of its own and on fake domains."""

    def __init__(self, directory: Path, *domains: FakeDomain, hooks: Hooks | None = None, **host: Any) -> None:
        self.finished: list[str] = []
        self.pending: list[str] = []
        #: What the agent's own time runs ahead of the real one, in seconds.
        self.ahead_s = 0.0
        #: What the clock is off, in seconds.
        self.clock_is_off_s = 0.0
        self.journal = Journal(
            directory / "journal.sqlite",
            on_accepted=lambda task: None,
            clock=lambda: time.time() + self.clock_is_off_s,
            elapsed=lambda: time.monotonic() + self.ahead_s,
        )
        self.journal.start()
        self.executor = Executor(
            make_node(directory, *domains, **host),
            self.journal,
            COMMANDS,
            on_finished=lambda owed: self.finished.append(owed.task_uuid),
            on_pending=self.pending.append,
            hooks=hooks,
            libvirt_wait_s=0.0,
        )

    def stop(self) -> None:
        self.journal.stop()

    def run(self, command: str, task_uuid: str = "task-1", **fields: Any) -> Done:
        """Carry one command out; `fields` are the request as the wire has it."""
        request = decode_request(encode(fields), COMMANDS[command].request)
        task, _ = self.journal.accept(
            Task(
                task_uuid=task_uuid,
                command=command,
                lane=fields["vmUuid"],
                request=encode(request),
                callback_url="http://127.0.0.1/",
                client="127.0.0.1",
            )
        )
        self.executor.run(task)
        done = self.journal.find(task_uuid)
        assert done is not None
        assert done.reply is not None
        assert done.state == "finished"
        assert task_uuid in self.finished
        goal = msgspec.json.decode(done.goal) if done.goal else None
        return Done(goal=goal, reply=msgspec.json.decode(done.reply))


class NoJournal:
    """Takes everything and keeps the reply."""

    def start_task(self, *args: Any) -> None: ...
    def find_goal_of(self, vm_uuid: str) -> None: ...
    def find(self, task_uuid: str, *, wait: bool = False) -> None: ...
    def steps(self, task_uuid: str, *, wait: bool = False) -> list[Any]:
        return []

    def record_goal(self, *args: Any) -> None: ...
    def start_step(self, *args: Any, wait: bool) -> None: ...
    def finish_step(self, *args: Any) -> None: ...
    def cut_step(self, *args: Any) -> None: ...
    def keep_left(self, *args: Any, instead: bool = False) -> None: ...
    def find_left(self, vm_uuid: str) -> tuple[None, frozenset[int]]:
        return None, frozenset()

    def note_vm(self, *args: Any) -> None: ...
    def finish(self, task_uuid: str, reply: bytes, outcome: str, made: Change | None = None) -> None:
        self.reply = msgspec.json.decode(reply)


def carry_out(node: Node, command: str, task_uuid: str = "task-1", /, **fields: Any) -> dict[str, Any]:
    """Carry a command out as the agent does, but for the disk; return its reply."""
    journal = NoJournal()
    executor = Executor(
        node,
        journal,  # type: ignore[arg-type]
        COMMANDS,
        on_finished=lambda owed: None,
        on_pending=lambda task: None,
        libvirt_wait_s=0,
    )
    request = encode(decode_request(encode(fields), COMMANDS[command].request))
    executor.run(
        Task(task_uuid=task_uuid, command=command, lane=fields["vmUuid"], request=request, callback_url="", client="")
    )
    return journal.reply


def plan(node: Node, *targets: dict[str, Any], vm: str = "vm1") -> list[dict[str, Any]]:
    """What resizes would mean, as the agent answers it."""
    planner = Planner(node, COMMANDS.values(), find_took=lambda _command, _steps: None)
    request = decode_request(encode({"vmUuid": vm, "targets": targets}), PlanRequest)
    plans: list[dict[str, Any]] = msgspec.to_builtins(planner.plan(request))["plans"]
    return plans
