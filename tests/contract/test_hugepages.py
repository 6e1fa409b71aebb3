"""A VM on hugepages, on the real libvirt and QEMU: what is plugged is backed as its guest node is."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmagent.hypervisor.node import Node
from tests.fakes.agent import MIB, carry_out, open_node
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.image import Image
from tests.lab.libvirtd import PrivateLibvirtd

PAGE = 2 * MIB
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
BACKING = "<memoryBacking><hugepages><page size='2' unit='MiB' nodeset='1'/></hugepages></memoryBacking>"


def free_pages() -> int:
    return int((POOL / "free_hugepages").read_text())


@pytest.fixture
def pages() -> Iterator[None]:
    """As many hugepages as 64 MiB of boot memory and one dimm of 128 MiB take."""
    count = POOL / "nr_hugepages"
    before = int(count.read_text())
    try:
        count.write_text(str(before + (64 + 128) * MIB // PAGE))
    except OSError as error:
        pytest.skip(f"this host lends no hugepages: {error}")
    yield
    count.write_text(str(before))


@pytest.fixture
def node(pages: None, image: Image, tmp_path: Path) -> Iterator[Node]:
    """A VM of two guest nodes, started, the second on hugepages."""
    daemon = PrivateLibvirtd()
    mount, conf = daemon.directory / "h", daemon.directory / "c" / "libvirt" / "qemu.conf"
    mount.mkdir()
    conf.write_text(conf.read_text() + f'hugetlbfs_mount = "{mount}"\n')
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "mode=0777", "none", str(mount)], check=True)
    try:
        with daemon:
            guest = Guest(daemon, image, GuestSpec(name="huge", memory_mib=128, numa_cells=2, vcpus=2))
            guest.define()
            guest.define_persistent(guest.persistent_xml().replace("<os>", f"{BACKING}<os>"))
            guest.start_paused()
            with open_node(daemon.uri, tmp_path) as running:
                yield running
            guest.destroy()
            subprocess.run(["umount", str(mount)], check=True)
    finally:
        subprocess.run(["umount", "-q", str(mount)], check=False)


def test_a_dimm_is_backed_as_its_guest_node_is_and_refused_before_where_no_page_is_left(node: Node) -> None:
    live = node.observe("huge", frozenset({"memory"})).get_live()
    assert (live.find_hugepage_bytes(0), live.find_hugepage_bytes(1)) == (None, PAGE)

    before = free_pages()
    reply = carry_out(node, "HotPlugMemory", "normal", vmUuid="huge", memorySize=256 * MIB, node=0, affect="live")
    assert (reply["outcome"], free_pages()) == ("plugged", before), reply
    reply = carry_out(node, "HotPlugMemory", "huge", vmUuid="huge", memorySize=384 * MIB, node=1, affect="live")
    assert (reply["outcome"], free_pages()) == ("plugged", before - 128 * MIB // PAGE), reply
    reply = carry_out(node, "HotPlugMemory", "more", vmUuid="huge", memorySize=512 * MIB, node=1, affect="live")
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "HOST_HUGEPAGES_SHORT"), reply
    assert reply["after"]["memorySize"] == 384 * MIB
