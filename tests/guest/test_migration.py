"""A guest that was migrated live between two daemons of one host: known as such for the rest of its boot."""

from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from tests.fakes.agent import carry_out, open_node
from tests.lab.agent import find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.guest


def test_the_first_vcpu_goes_alone_over_pauses_and_restarts_of_the_agent(
    boot: Callable[[GuestSpec], Guest], tmp_path: Path
) -> None:
    guest = boot(GuestSpec(name="traveller"))
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    way = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://127.0.0.1:{find_free_port()}"}
    with PrivateLibvirtd() as other, other.connect() as there:
        with guest.domain() as domain:
            domain.migrate3(there, way, flags)
        arrived = there.lookupByName("traveller")
        with open_node(other.uri, tmp_path) as node:
            assert node.observe("traveller", frozenset()).domain.migrated
        arrived.suspend()
        arrived.resume()
        assert arrived.state()[1] == libvirt.VIR_DOMAIN_RUNNING_UNPAUSED, "libvirt has forgotten"
        with open_node(other.uri, tmp_path) as node:
            assert node.observe("traveller", frozenset()).domain.migrated
            reply = carry_out(node, "HotPlugCpu", vmUuid="traveller", cpuNum=3)
            counts = [(step["count"], step["target"]) for step in reply["steps"] if step["step"] == "SetVcpus"]
            assert counts == [(2, "live"), (3, "both")], reply
            assert (reply["outcome"], reply["after"]["guestCpuNum"]) == ("online", 3), reply
            arrived.destroy()
            arrived.create()
            assert not node.observe("traveller", frozenset()).domain.migrated, "another boot"
