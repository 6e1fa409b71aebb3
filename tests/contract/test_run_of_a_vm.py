"""What tells one run of a VM from another, and its process from others: on the real libvirt and QEMU."""

import os
import resource
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.qemuprocess import find_pid, read_memlock_bytes
from kvmagent.model.facts import POLICY_NAMESPACE, Policy
from kvmagent.model.steps import SetVcpus
from tests.fakes.agent import carry_out, open_node
from tests.lab.agent import find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.libvirtd import PrivateLibvirtd

ROOT = Path("/")
HOST_UUIDS = ("11111111-1111-4111-8111-111111111112", "21111111-1111-4111-8111-111111111113")
SMALL = """\
<domain type='qemu'>
  <name>small</name>
  <memory unit='MiB'>64</memory>
  <vcpu current='1'>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
</domain>
"""


def test_the_limit_of_locked_memory_is_the_one_that_the_kernel_holds_to() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert read_memlock_bytes(ROOT, os.getpid()) == (2**63 - 1 if hard == resource.RLIM_INFINITY else hard)


@pytest.mark.guest
def test_a_run_ends_with_its_process_and_a_process_is_found_by_its_vm(lab: Any, define: Any, tmp_path: Path) -> None:
    guest = define(GuestSpec(name="runs"))
    with open_node(lab.uri, tmp_path) as node:
        first = node.observe("runs", frozenset())
        assert first.run is not None
        assert first.domain.migrated is False
        assert node.observe("runs", frozenset()).run == first.run

        pid = find_pid(ROOT, first.domain.uuid)
        assert pid is not None
        assert "qemu" in (ROOT / "proc" / str(pid) / "cmdline").read_text()
        assert read_memlock_bytes(ROOT, pid) is not None

        with guest.domain() as domain:
            domain.destroy()
        assert node.observe("runs", frozenset()).run is None
        assert find_pid(ROOT, first.domain.uuid) is None
        guest.start_paused()
        assert node.observe("runs", frozenset()).run not in (None, first.run)


@pytest.mark.guest
def test_what_the_owner_sets_as_metadata_is_read_in_each_definition_and_stays(
    lab: Any, define: Any, tmp_path: Path
) -> None:
    """As virsh metadata --key kvmagent --set sets it, with and without --live and --config."""
    guest = define(GuestSpec(name="owned"))
    live, config = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG

    def set_policy(xml: str, flags: int) -> None:
        with guest.domain() as domain:
            domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, xml, "kvmagent", POLICY_NAMESPACE, flags)

    with open_node(lab.uri, tmp_path) as node:

        def policies() -> tuple[Policy, Policy]:
            facts = node.observe("owned", frozenset())
            return facts.get_live().policy, facts.get_config().policy

        assert policies() == (Policy(), Policy())
        set_policy("<policy maxCpuNum='2' guestOnline='off'/>", live | config)
        allowed = Policy(max_cpu_num=2, guest_online=False)
        assert policies() == (allowed, allowed)
        set_policy("<policy hotplug='off'/>", config)
        assert policies() == (allowed, Policy(hotplug=False))
        # A definition that is changed keeps it, and so does the next start.
        node.perform("owned", SetVcpus(count=2, target="config"))
        with guest.domain() as domain:
            domain.destroy()
        guest.start_paused()
        assert policies() == (Policy(hotplug=False), Policy(hotplug=False))
        refused = carry_out(node, "HotPlugCpu", vmUuid="owned", cpuNum=3)
        assert (refused["outcome"], refused["errorCode"]) == ("refused", "VM_OPTED_OUT")
        set_policy("<policy/>", live | config)
        assert policies() == (Policy(), Policy())


@pytest.mark.guest
def test_a_vm_that_came_by_live_migration_is_known_as_such_until_it_is_powered_off(tmp_path: Path) -> None:
    """Over a pause and restarts of its libvirtd and of the agent; the run is another one on every host."""
    with ExitStack() as stack:
        here, there = (stack.enter_context(make_daemon(uuid)) for uuid in HOST_UUIDS)
        connections = [stack.enter_context(daemon.connect()) for daemon in (here, there)]
        domain = connections[0].defineXML(SMALL)
        domain.create()
        way = {
            libvirt.VIR_MIGRATE_PARAM_URI: f"tcp:127.0.0.1:{find_free_port()}",
            libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: "127.0.0.1",
        }
        domain.migrate3(connections[1], way, libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST)
        there.kill()
        there.start()
        with open_node(there.uri, tmp_path) as node, there.connect() as connection:
            assert node.observe("small", frozenset()).domain.migrated is True
            node.perform("small", SetVcpus(count=2, target="live"))
            assert node.observe("small", frozenset()).domain.migrated is True
            arrived = connection.lookupByName("small")
            arrived.suspend()
            arrived.resume()
            assert node.observe("small", frozenset()).domain.migrated is True
            with open_node(there.uri, tmp_path) as restarted:
                assert restarted.observe("small", frozenset()).domain.migrated is True
            arrived.destroy()
            arrived.create()
            assert node.observe("small", frozenset()).domain.migrated is False
            arrived.destroy()


def make_daemon(host_uuid: str) -> PrivateLibvirtd:
    """A libvirtd that takes itself for another host's: else it would not migrate to its neighbour."""
    daemon = PrivateLibvirtd()
    (conf,) = (daemon.directory / "c" / "libvirt").glob("*d.conf")
    conf.write_text(conf.read_text() + f'host_uuid = "{host_uuid}"\n')
    return daemon
