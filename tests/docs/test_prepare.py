"""docs/prepare.md on a real libvirt: what it shows is taken, and what it says of the way back is so."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.docs.blocks import ROOT
from tests.fakes.agent import carry_out, open_node
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

PASSWORD = "<graphics type='vnc' port='-1' listen='127.0.0.1' passwd='s3cret'/>"


def test_the_former_definition_is_had_again_by_the_command_that_is_shown(
    lab: PrivateLibvirtd, define: Callable[..., Guest], tmp_path: Path
) -> None:
    spec = GuestSpec(
        name="rolled-back", max_vcpus=1, max_memory_mib=None, numa_cells=0, acpi=False, devices_xml=PASSWORD
    )
    guest = define(spec, running=False)
    former = guest.persistent_xml()
    with open_node(lab.uri, tmp_path) as node:
        reply = carry_out(node, "ReadyForHotplug", vmUuid=spec.name, prepare=True, maxCpuNum=4)
    assert reply["outcome"] == "configured"
    assert "<maxMemory" in guest.persistent_xml()
    (kept,) = (tmp_path / "former-xml").iterdir()
    assert re.fullmatch(r"[0-9a-f-]{36}-\d{8}T\d{6}-\d{6}\.xml", kept.name), "UUID-TIME-NUMBER.xml"
    file, shown = "/var/lib/kvmagent/former-xml/FILE", (ROOT / "docs/prepare.md").read_text()
    assert f"virsh define {file}" in shown
    subprocess.run(["virsh", "--connect", lab.uri, "define", kept], check=True, capture_output=True)
    # libvirt puts controllers where it likes.
    assert sorted(guest.persistent_xml().splitlines()) == sorted(former.splitlines())
