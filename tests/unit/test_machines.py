"""What machines do, in one voice; and the most vCPUs of each with a reason that is so."""

import pytest

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.checks import find_vcpu_limit
from kvmagent.model.facts import Definition, Host
from kvmagent.model.machines import check_machine


def define(arch: str, machine: str, *, kind: str = "kvm", inside: str = "") -> Definition:
    return parse_definition(
        f"<domain type='{kind}'><memory>1048576</memory><vcpu>4</vcpu>"
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
