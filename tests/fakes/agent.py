"""The agent's inside on a fake libvirt: everything between an accepted task and its reply, without HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvmagent.api.wire import decode_request, encode
from kvmagent.hypervisor.connection import Connection
from kvmagent.hypervisor.node import Node
from kvmagent.model.command import Command
from kvmagent.settings import CallbackSection
from kvmagent.tasks.callbacks import Callbacks
from kvmagent.tasks.executor import Executor
from kvmagent.tasks.journal import Journal, Task
from kvmagent.tasks.questions import Questions
from kvmagent.tasks.servermemory import ServerMemory
from kvmagent_plugins.vm_plugin import PLUGIN
from tests.fakes.libvirt import FakeConnection, FakeDomain, FakeGuest, send_to_agent
from tests.lab.domainxml import GuestSpec, format_domain
from tests.lab.image import Image

COMMANDS: dict[str, Command] = {command.name: command for command in PLUGIN.commands}
MIB = 1024 * 1024


def make_domain(spec: GuestSpec, guest: FakeGuest | None = None, **options: Any) -> FakeDomain:
    """A fake domain with the XML that the lab gives to a real one."""
    return FakeDomain(format_spec(spec, "qemu"), guest=guest or make_guest(spec), **options)


def format_spec(spec: GuestSpec, virt_type: str) -> str:
    """The lab's domain XML with paths that nothing opens."""
    image = Image(kernel=Path("/boot/kernel"), initramfs=Path("/boot/initramfs"), kernel_release="6.1")
    return format_domain(spec, image, virt_type=virt_type, console_log=Path("/log"), harness=Path("/sock"))


def make_guest(spec: GuestSpec, **options: Any) -> FakeGuest:
    """A guest that has just booted: its CPUs and boot memory online."""
    blocks = dict.fromkeys(range(spec.memory_mib // 128), True)
    return FakeGuest(online_cpus=dict.fromkeys(range(spec.vcpus), True), blocks=blocks, **options)


def make_node(*domains: FakeDomain) -> Node:
    """A Node on these domains."""
    connection = FakeConnection(*domains)
    return Node(Connection("fake", open_libvirt=lambda _uri: connection), send_to_agent=send_to_agent)


@dataclass
class Done:
    """A task that has been carried out: what was recorded before the first step, and what the caller is told."""

    goal: Any
    reply: dict[str, Any]


class FakeAgent:
    """An executor on a journal of its own and on fake domains."""

    def __init__(self, directory: Path, *domains: FakeDomain) -> None:
        self.finished: list[str] = []
        self.journal = Journal(directory / "journal.sqlite", on_accepted=lambda task: None)
        self.journal.start()
        node = make_node(*domains)
        self.executor = Executor(
            node,
            self.journal,
            COMMANDS,
            {},
            Questions(node, ServerMemory(directory / "server.json"), Callbacks((), CallbackSection())),
            on_finished=lambda owed: self.finished.append(owed.task_uuid),
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
