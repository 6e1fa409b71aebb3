"""The lab keeps its own promises: what the other tests of this directory build on."""

from collections.abc import Callable

import libvirt
import libvirt_qemu
import pytest

from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest, GuestCommandError
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import find_processes, wait_for

pytestmark = pytest.mark.guest

PING = '{"execute":"guest-ping"}'
DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"


@pytest.fixture(scope="module")
def guest(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    return boot_module(GuestSpec(name="lab", machine="pc"))


def block_states(guest: Guest) -> list[str]:
    """The states of the guest's memory blocks of 128 MiB, in the order of their addresses."""
    return guest.run("cat /sys/devices/system/memory/memory*/state").split()


def ping(guest: Guest) -> None:
    with guest.domain() as domain:
        libvirt_qemu.qemuAgentCommand(domain, PING, 2, 0)


def test_runs_commands_in_the_guest_and_tells_how_they_end(guest: Guest) -> None:
    assert guest.cpus_online() == "0"
    assert guest.run("echo out; echo err >&2\nprintf '\\033\\t end'") == "out\nerr\n\033\t end"
    with pytest.raises(GuestCommandError, match="ended with 3 in the guest: why") as caught:
        guest.run("echo why; exit 3")
    assert caught.value.status == 3


def test_answers_again_after_a_command_that_took_too_long(guest: Guest) -> None:
    with pytest.raises(TimeoutError, match="was killed"):
        guest.run("sleep 60", timeout_s=1)
    assert guest.run("echo still here") == "still here\n"


def test_agent_can_be_stopped_hung_and_brought_back(guest: Guest) -> None:
    guest.stop_agent()
    assert not guest.is_agent_connected()
    guest.start_agent()
    ping(guest)
    guest.hang_agent()
    assert guest.is_agent_connected()
    with pytest.raises(libvirt.libvirtError):
        ping(guest)
    guest.resume_agent()
    ping(guest)


def test_guest_outlives_its_daemon_and_a_reboot(guest: Guest, lab: PrivateLibvirtd) -> None:
    qemu_and_daemon = set(find_processes(lab.directory))
    lab.restart()
    assert guest.is_running()
    assert len(qemu_and_daemon & set(find_processes(lab.directory))) == 1
    guest.reboot()
    assert guest.cpus_online() == "0"


@pytest.mark.parametrize(
    ("kernel_args", "state", "gained_kib"),
    [("", "offline", 0), ("memhp_default_state=online", "online", 128 * 1024)],
)
def test_kernel_argument_decides_whether_a_dimm_is_used(
    boot: Callable[[GuestSpec], Guest], kernel_args: str, state: str, gained_kib: int
) -> None:
    guest = boot(GuestSpec(name="dimm", kernel_args=kernel_args))
    before_kib = guest.mem_total_kib()
    with guest.domain() as domain:
        domain.attachDeviceFlags(DIMM, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    states = ["online", "online", state]
    wait_for(lambda: block_states(guest) == states, timeout_s=10, what=f"block states {states}")
    assert guest.mem_total_kib() - before_kib == gained_kib
