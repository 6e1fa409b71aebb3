"""Definitions as people have them: rows of a matrix, each with one value of every dimension.

Nothing in them boots: QEMU is started paused, which is when it refuses what it cannot be.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

MIB, GIB = 1024 * 1024, 1024 * 1024 * 1024

CPUS = {
    "default": "",
    "qemu64": "<model>qemu64</model>",
    "max": "",
    "host-model": "",
    "Skylake-Client": "<model fallback='allow'>Skylake-Client</model>",
    "EPYC": "<model fallback='allow'>EPYC</model>",
    "pentium": "<model fallback='allow'>pentium</model>",
    "pentium3": "<model fallback='allow'>pentium3</model>",
    "kvm32": "<model fallback='allow'>kvm32</model>",
    "qemu32": "<model fallback='allow'>qemu32</model>",
    "36 bits": "<model>qemu64</model><maxphysaddr mode='emulate' bits='36'/>",
    "42 bits": "<model>qemu64</model><maxphysaddr mode='emulate' bits='42'/>",
}
_MODES = {"max": "mode='maximum'", "host-model": "mode='host-model'", "default": ""}
#: sockets, dies, cores, threads
TOPOLOGIES: dict[str, tuple[int, int, int, int] | None] = {
    "none": None,
    "1x1x6x1": (1, 1, 6, 1),
    "1x1x5x1": (1, 1, 5, 1),
    "1x1x3x2": (1, 1, 3, 2),
    "1x2x3x2": (1, 2, 3, 2),
    "2x3x1x2": (2, 3, 1, 2),
    "1x4x2x1": (1, 4, 2, 1),
    "2x1x4x2": (2, 1, 4, 2),
    "6x1x1x1": (6, 1, 1, 1),
}
CELLS = ("none", "one", "two", "memory-only", "three")
HOLES = (None, 1, 512)
IOMMUS = ("none", "intel", "virtio")
#: libvirt 9.0 knows no AMD IOMMU, and QEMU 7.2 emulating no eim: these are for newer ones.
NEWER_IOMMUS = ("amd", "amd xtsup", "intel eim")
_IOMMU_DRIVERS = {
    "amd xtsup": "<driver intremap='on' xtsup='on'/>",
    "intel eim": "<driver intremap='on' eim='on'/>",
}
#: What a definition without maxMemory has, MiB; an odd one too.
MEMORIES = (512, 777, 3 * 1024)


@dataclass(frozen=True)
class Row:
    """One definition: values of the dimensions by their names."""

    machine: str
    cpu: str = "default"
    topology: str = "none"
    cells: str = "none"
    hole_gib: int | None = None
    iommu: str = "none"
    memory_mib: int = 512
    listed_vcpus: bool = False
    max_memory_gib: int | None = None

    def __str__(self) -> str:
        default = Row(self.machine)
        other = [
            f"{one.name}={getattr(self, one.name)}"
            for one in fields(self)
            if getattr(self, one.name) != getattr(default, one.name)
        ]
        return " ".join([self.machine, *other])

    @property
    def is_old(self) -> bool:
        """Whether the machine type is of a QEMU that took no memory while it ran."""
        number = self.machine.removeprefix("pc-i440fx-").partition(".")
        return self.machine.startswith("pc-i440fx-") and (int(number[0]), int(number[2])) < (2, 1)

    @property
    def vcpus(self) -> int:
        """How many vCPUs the definition has."""
        topology = TOPOLOGIES[self.topology]
        return 6 if topology is None else topology[0] * topology[1] * topology[2] * topology[3]

    def format(self, name: str) -> str:
        """The domain XML."""
        is_q35 = "q35" in self.machine
        parts = [
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>{self.memory_mib}</memory>",
            "" if self.max_memory_gib is None else f"<maxMemory slots='4' unit='GiB'>{self.max_memory_gib}</maxMemory>",
            self._format_vcpus(),
            f"<os><type arch='x86_64' machine='{self.machine}'>hvm</type></os>",
            "<features><acpi/>" + ("<ioapic driver='qemu'/>" if "intel" in self.iommu else "") + "</features>",
            self._format_cpu(),
            "<devices><controller type='usb' model='none'/>",
            f"<controller type='pci' index='0' model='pci{'e' if is_q35 else ''}-root'>"
            f"<pcihole64 unit='GiB'>{self.hole_gib}</pcihole64></controller>"
            if self.hole_gib is not None
            else "",
            self._format_iommu(),
            "</devices></domain>",
        ]
        return "".join(parts)

    def _format_iommu(self) -> str:
        if self.iommu == "none":
            return ""
        model = self.iommu.partition(" ")[0]
        return f"<iommu model='{model}'>{_IOMMU_DRIVERS.get(self.iommu, '')}</iommu>"

    def _format_vcpus(self) -> str:
        if not self.listed_vcpus:
            return f"<vcpu>{self.vcpus}</vcpu>"
        listed = "".join(
            f"<vcpu id='{n}' enabled='{'yes' if n != 1 else 'no'}' hotpluggable='{'yes' if n else 'no'}'/>"
            for n in range(self.vcpus)
        )
        return f"<vcpu current='{self.vcpus - 1}'>{self.vcpus}</vcpu><vcpus>{listed}</vcpus>"

    def _format_cpu(self) -> str:
        topology, inside = TOPOLOGIES[self.topology], CPUS[self.cpu]
        if topology is not None:
            names = ("sockets", "dies", "cores", "threads")
            inside += "<topology " + " ".join(f"{name}='{n}'" for name, n in zip(names, topology, strict=True)) + "/>"
        cells = {
            "none": [],
            "one": [range(self.vcpus)],
            "two": [range(self.vcpus // 2), range(self.vcpus // 2, self.vcpus)],
            "memory-only": [range(self.vcpus), range(0)],
            "three": [range(1), range(1, 2), range(2, self.vcpus)],
        }[self.cells]
        if cells:
            share = self.memory_mib // len(cells)
            sizes = [share] * (len(cells) - 1) + [self.memory_mib - share * (len(cells) - 1)]
            inside += "<numa>" + "".join(map(_format_cell, range(len(cells)), cells, sizes)) + "</numa>"
        mode = _MODES.get(self.cpu, "mode='custom' match='exact'")
        return f"<cpu {mode}>{inside}</cpu>" if inside or self.cpu in ("max", "host-model") else ""


def _format_cell(number: int, cpus: range, memory_mib: int) -> str:
    listed = f" cpus='{cpus.start}-{cpus.stop - 1}'" if len(cpus) else ""
    return f"<cell id='{number}'{listed} memory='{memory_mib}' unit='MiB'/>"


def list_machines() -> list[str]:
    """Every PC that the QEMU of this host has, but those that no prepare is for."""
    printed = subprocess.run(["qemu-system-x86_64", "-machine", "help"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in printed.stdout.splitlines()[1:] if line.strip()]
    return sorted(name for name in names if name in ("pc", "q35") or name.startswith(("pc-i440fx-", "pc-q35-")))


def gate_rows(machines: list[str]) -> list[Row]:
    """Every machine type once, the other dimensions turning at their own paces, and rows that are known to be hard."""
    rows = [Row(machine, **_turn(n, machine)) for n, machine in enumerate(machines)]  # type: ignore[arg-type]
    q35 = Row("q35")
    return [
        *rows,
        Row("q35"),
        Row("pc"),
        replace(q35, cpu="kvm32"),
        replace(q35, cpu="pentium"),
        replace(q35, cpu="36 bits"),
        replace(q35, cpu="42 bits"),
        replace(q35, hole_gib=512, cpu="max"),
        replace(q35, topology="1x1x6x1", iommu="intel"),
        replace(q35, topology="1x2x3x2", cells="two"),
        replace(q35, topology="2x3x1x2", cells="two", listed_vcpus=True),
        replace(q35, topology="1x4x2x1", iommu="intel"),
        replace(q35, cells="memory-only"),
        replace(q35, cells="memory-only", listed_vcpus=True, topology="1x1x3x2"),
        replace(q35, cells="one", max_memory_gib=900),
        replace(q35, cells="one", max_memory_gib=16, cpu="kvm32"),
        Row("pc", memory_mib=3 * 1024, cpu="qemu32", cells="two"),
    ]


def _turn(n: int, machine: str) -> dict[str, object]:
    cpus, topologies = list(CPUS), list(TOPOLOGIES)
    return {
        "cpu": cpus[n % len(cpus)],
        "topology": topologies[n % len(topologies)],
        "cells": CELLS[n % len(CELLS)],
        # 512 GiB are more than 36 bits address.
        "hole_gib": HOLES[n // 2 % (2 if cpus[n % len(cpus)] == "36 bits" else len(HOLES))],
        "iommu": IOMMUS[n % len(IOMMUS)] if machine == "q35" or machine >= "pc-q35-4" else "none",
        "memory_mib": MEMORIES[n // 3 % len(MEMORIES)],
        "listed_vcpus": n % 4 == 3,
    }


def all_rows(machines: list[str]) -> Iterator[Row]:
    """The product of all dimensions on machine types of each generation, and what the gate has."""
    yield from gate_rows(machines)
    generations = [name for name in ("pc-i440fx-2.1", "pc", "pc-q35-2.4", "q35") if name in machines]
    for machine, cpu, topology, cells, hole, listed in itertools.product(
        generations, CPUS, TOPOLOGIES, CELLS, HOLES, (False, True)
    ):
        yield Row(machine, cpu, topology, cells, hole, listed_vcpus=listed)
    for iommu, cpu, topology, cells in itertools.product(IOMMUS[1:], CPUS, TOPOLOGIES, CELLS):
        yield Row("q35", cpu, topology, cells, iommu=iommu)


def newest_gate_rows() -> list[Row]:
    """Each IOMMU that newer libvirt has, on definitions that are hard for it."""
    q35 = Row("q35", iommu="amd xtsup")
    return [
        Row("q35", iommu="amd"),
        replace(q35, cpu="EPYC", topology="1x1x6x1"),
        replace(q35, cpu="max", topology="2x3x1x2", cells="two", hole_gib=512),
        replace(q35, topology="1x1x3x2", cells="memory-only", listed_vcpus=True),
        Row("q35", iommu="intel eim", topology="1x2x3x2"),
        Row("q35", iommu="intel eim", cpu="EPYC", cells="two"),
    ]


def newest_rows() -> Iterator[Row]:
    """What the newest QEMU is tried with: each of those IOMMUs with every CPU, topology and kind of cells."""
    yield from newest_gate_rows()
    for iommu, cpu, topology, cells in itertools.product(NEWER_IOMMUS, CPUS, TOPOLOGIES, CELLS):
        yield Row("q35", cpu, topology, cells, iommu=iommu)
