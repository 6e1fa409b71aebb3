"""What machines do, in one voice; and the most vCPUs of each with a reason that is so."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.checks import find_vcpu_limit
from kvmagent.model.facts import Definition, Host
from kvmagent.model.machines import check_machine, find_largest_block_bytes
from tests.fakes.agent import carry_out, make_domain, make_node
from tests.lab.domainxml import GuestSpec


def define(arch: str, machine: str, *, kind: str = "kvm", memory_mib: int = 1024, inside: str = "") -> Definition:
    return parse_definition(
        f"<domain type='{kind}'><memory unit='MiB'>{memory_mib}</memory><vcpu>4</vcpu>"
        f"<os><type arch='{arch}' machine='{machine}'>hvm</type></os>{inside}</domain>"
    )


@pytest.mark.parametrize("ability", ["plug vCPUs", "unplug vCPUs", "plug dimms", "plug virtio-mem"])
@pytest.mark.parametrize("of", [("i686", "pc"), ("riscv64", "virt"), ("x86_64", "microvm"), ("ppc64", "powernv")])
def test_a_machine_that_does_nothing_is_refused_in_one_voice(of: tuple[str, str], ability: str) -> None:
    (blocker,) = check_machine("running", define(*of), ability)  # type: ignore[arg-type]
    assert blocker.message.startswith(f"the running definition is a {of[1]} of architecture {of[0]}, which ")
    assert blocker.code == "MACHINE_NOT_SUPPORTED"


@pytest.mark.parametrize(
    ("definition", "host", "limit", "word"),
    [
        (define("ppc64le", "pseries"), Host(vcpu_limit=1024), 1024, "the hypervisor gives"),
        (define("ppc64le", "pseries"), Host(), None, ""),
        (define("x86_64", "q35"), Host(vcpu_limit=4096), 255, "<iommu>"),
        (define("x86_64", "q35"), Host(vcpu_limit=4096, adds_iommu=True), 4096, "the hypervisor gives"),
        *(
            (
                define("x86_64", "q35", inside=f"<devices>{iommu}</devices>"),
                Host(vcpu_limit=4096, adds_iommu=True),
                *most,
            )
            for iommu, most in (
                ("<iommu model='intel'/>", (4096, "the hypervisor gives")),
                ("<iommu model='intel'><driver caching_mode='on'/></iommu>", (4096, "the hypervisor gives")),
                ("<iommu model='intel'><driver intremap='on' eim='off'/></iommu>", (255, "<iommu>")),
                ("<iommu model='intel'><driver intremap='off'/></iommu>", (255, "<iommu>")),
                ("<iommu model='virtio'/>", (255, "<iommu>")),
                ("<iommu model='amd'><driver xtsup='off'/></iommu>", (255, "<iommu>")),
                # Source: QEMU hw/i386/amd_iommu.c: without xtsup, which is off by default, an id has 8 bits.
                ("<iommu model='amd'/>", (255, "<iommu>")),
                ("<iommu model='amd'><driver intremap='on'/></iommu>", (255, "<iommu>")),
            )
        ),
        (define("x86_64", "pc"), Host(vcpu_limit=255, adds_iommu=True), 255, "the hypervisor gives"),
        (define("x86_64", "q35", kind="qemu"), Host(vcpu_limit=288), 255, "emulated"),
        (define("x86_64", "q35", kind="qemu"), Host(vcpu_limit=288, adds_iommu=True), 255, "emulated"),
        (
            define("x86_64", "q35", inside="<devices><iommu model='amd'><driver xtsup='on'/></iommu></devices>"),
            Host(vcpu_limit=4096),
            4096,
            "the hypervisor gives",
        ),
    ],
)
def test_the_most_vcpus_come_with_a_reason_that_is_so(
    definition: Definition, host: Host, limit: int | None, word: str
) -> None:
    assert find_vcpu_limit(host, definition)[0] == limit
    assert word in find_vcpu_limit(host, definition)[1]


def test_cores_of_all_clusters_of_a_die_are_counted() -> None:
    cpu = "<cpu><topology sockets='1' dies='1' clusters='2' cores='2' threads='1'/></cpu>"
    assert define("aarch64", "virt", inside=cpu).topology == (1, 1, 4, 1)


@pytest.mark.parametrize(
    ("arch", "machine", "boot_gib", "most_mib"),
    [
        ("x86_64", "q35", 4, 512),
        ("x86_64", "q35", 59, 512),
        ("x86_64", "q35", 64, 2048),
        ("x86_64", "q35", 0.25, 256),
        ("x86_64", "q35", 0.0625, 128),
        ("ppc64le", "pseries", 8, 1024),
        ("ppc64le", "pseries", 0.25, 256),
        ("aarch64", "virt", 4, 1024),
        ("aarch64", "virt", 0.25, 512),
        ("riscv64", "virt", 4, 1024),
        ("s390x", "s390-ccw-virtio", 1000, 1024),
        ("s390x", "s390-ccw-virtio", 1500, 2048),
        ("s390x", "s390-ccw-virtio", 3000, 4096),
        ("s390x", "s390-ccw-virtio", 5000, 8192),
    ],
)
def test_a_guest_is_believed_no_larger_blocks_than_its_kernel_can_have(
    arch: str, machine: str, boot_gib: float, most_mib: int
) -> None:
    """Source: Linux arch/x86/mm/init_64.c, probe_memory_block_size."""
    definition = define(arch, machine, memory_mib=int(boot_gib * 1024))
    assert find_largest_block_bytes(definition) == most_mib << 20


@given(boot_mib=st.integers(256, 64 << 20))
def test_a_guest_on_s390x_is_believed_the_increment_of_its_machine(boot_mib: int) -> None:
    """Source: QEMU hw/s390x/sclp.c, prepare: 1020 increments at most, each a power of two."""
    increment_mib = 1
    while boot_mib // increment_mib > 1020:
        increment_mib *= 2
    definition = define("s390x", "s390-ccw-virtio-4.2", memory_mib=boot_mib)
    assert find_largest_block_bytes(definition) >> 20 == min(boot_mib, max(1024, increment_mib))


def test_a_guest_of_many_tib_is_understood(tmp_path: Path) -> None:
    spec = GuestSpec(name="vm1", memory_mib=5 << 20, arch="s390x", machine="s390-ccw-virtio-4.2", numa_cells=0)
    domain = make_domain(spec, virt_type="kvm")
    domain.guest.block_bytes = 8 << 30
    facts = make_node(tmp_path, domain).observe("vm1", frozenset({"memory"}))
    assert (facts.guest.block_bytes, facts.guest.refused) == (8 << 30, {})


@pytest.mark.parametrize(
    ("max_gib", "slots", "hole_gib", "most_mib"),
    [(1000, 16, None, 2048), (960, 64, None, 2048), (64, 16, 1024, 2048), (512, 16, None, 512)],
)
def test_a_guest_whose_memory_may_lie_at_1_tib_is_believed_larger_blocks(
    max_gib: int, slots: int, hole_gib: int | None, most_mib: int
) -> None:
    """An AMD vCPU has it there where the VM's addresses would reach 1012 GiB. Source: QEMU 7.1 hw/i386/pc.c."""
    inside = f"<maxMemory slots='{slots}' unit='GiB'>{max_gib}</maxMemory>"
    if hole_gib is not None:
        inside += f"<devices><controller type='pci'><pcihole64 unit='GiB'>{hole_gib}</pcihole64></controller></devices>"
    definition = define("x86_64", "pc-q35-7.2", memory_mib=8 * 1024, inside=inside)
    assert find_largest_block_bytes(definition) == most_mib << 20


@pytest.mark.parametrize("block_mib", [1024, 2048, 4096])
def test_no_claim_of_a_guest_makes_its_vm_grow_by_more_than_was_asked(tmp_path: Path, block_mib: int) -> None:
    domain = make_domain(GuestSpec(name="vm1", memory_mib=256))
    domain.guest.block_bytes = block_mib << 20
    reply = carry_out(make_node(tmp_path, domain), "HotPlugMemory", vmUuid="vm1", memorySize=512 << 20)
    assert (reply["outcome"], reply["memorySize"]) == ("plugged", 512 << 20)
    assert "GUEST_AGENT_INVALID" in {warning["code"] for warning in reply["warnings"]}
