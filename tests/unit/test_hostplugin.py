import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.hostfacts import list_vms, read_host_facts
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import HostView, ManagementServer, VmEvent, VmSummary
from kvmagent.tasks.managementserver import ManagementServerFile
from kvmagent_plugins.host.answers import QUERIES, check_states, fact, ping, report_event, report_gap, vm_sync
from kvmagent_plugins.host.messages import HostRequest, VmListRequest
from tests.fakes.libvirt import qemu_error

SERVER = ManagementServer("h1", "http://127.0.0.1/send", "4.8.0")
VM = "0123456789abcdef0123456789abcdef"


CPU = "sys/devices/system/cpu"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2.50GHz\ncpu MHz\t\t: 1200.140\n"
        "cache size\t: 36608 KB\nflags\t\t: fpu vmx ept\n\nprocessor\t: 1\nmodel name\t: Other\n",
        "proc/meminfo": "MemTotal:       1048576 kB\nMemFree:  1 kB\n",
        "proc/stat": "cpu  1 2 3\nbtime 1700000000\nprocesses 7\n",
        "etc/os-release": 'ID=debian\nVERSION_ID="12"\nVERSION="12 (bookworm)"\nVERSION_CODENAME=bookworm\n',
        "sys/class/dmi/id/product_name": "Server 9\n",
        "sys/firmware/dmi/entries/17-0/type": "17",
        "sys/firmware/dmi/entries/17-1/type": "17",
    }
    # Two sockets of two cores of two threads; a level 1 cache of each core, a level 3 of each socket.
    for cpu in range(8):
        socket, core, siblings = cpu // 4, cpu // 2, f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}"
        files |= {
            f"{CPU}/cpu{cpu}/topology/physical_package_id": f"{socket}\n",
            f"{CPU}/cpu{cpu}/topology/core_id": f"{core % 2}\n",
            f"{CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq": f"{3_600_000 + cpu * 1000}\n",
        }
        for index, (level, kind, size, shared) in enumerate(
            [("1", "Data", "32K", siblings), ("1", "Instruction", "32K", siblings), ("2", "Unified", "1M", siblings),
             ("3", "Unified", "16M", f"{socket * 4}-{socket * 4 + 3}")]
        ):  # fmt: skip
            below = f"{CPU}/cpu{cpu}/cache/index{index}"
            files |= {
                f"{below}/level": level,
                f"{below}/type": kind,
                f"{below}/size": size,
                f"{below}/shared_cpu_list": shared,
            }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


class Firm:
    """A connection to the test driver whose libvirt can read the firmware, as a system daemon's can."""

    def __init__(self, connection: libvirt.virConnect) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def getSysinfo(self, flags: int) -> str:
        return (
            "<sysinfo type='smbios'><bios><entry name='vendor'>B &amp; Co</entry></bios><system>"
            "<entry name='serial'>S123</entry><entry name='product'>To Be Filled By O.E.M.</entry></system>"
            "<processor><entry name='max_speed'>2900 MHz</entry></processor>"
            "<processor><entry name='max_speed'>100 MHz</entry></processor></sysinfo>"
        )

    def getCapabilities(self) -> str:
        return "<capabilities><host><cpu><arch>x86_64</arch><model>Icelake-Server</model></cpu></host></capabilities>"


@pytest.fixture
def connection() -> Iterator[libvirt.virConnect]:
    opened = libvirt.open("test:///default")
    yield opened
    opened.close()


def described(connection: Any, root: Path) -> Any:
    """The facts as the wire has them."""
    view = HostView(server=SERVER, host=read_host_facts(connection, root=root), vms=())
    return msgspec.json.decode(msgspec.json.encode(fact(HostRequest(), view)))


def test_a_host_s_facts_are_those_of_zstack_s_own_agent(root: Path, connection: libvirt.virConnect) -> None:
    told = described(Firm(connection), root)
    assert told["uptime"] == time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_700_000_000))
    wanted = {
        "osDistribution": "debian",
        "osVersion": "12",
        "osRelease": "bookworm",
        "hvmCpuFlag": "vmx",
        "eptFlag": "ept",
        "cpuModelName": "Icelake-Server",
        "hostCpuModelName": "Some CPU @ 2.50GHz",
        "cpuGHz": "2.50",
        "cpuSockets": 2,
        "cpuCoresPerSocket": 2,
        "cpuCache": f"{4 * 64},{4 * 1024},{2 * 16 * 1024}",
        "memorySlotsMaximum": "2",
        "systemSerialNumber": "S123",
        "systemProductName": "Server 9",
        "biosVendor": "B & Co",
        "systemUUID": "unknown",
    }
    assert {name: told[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        ("flags\t\t: fpu svm npt\n", {"hvmCpuFlag": "svm"}),
        ("flags\t\t: fpu vmx ept\n", {"hvmCpuFlag": "vmx", "eptFlag": "ept"}),
        ("flags\t\t: fpu ept_ad\n", {}),
        ("", {}),
    ],
)
def test_a_flag_that_the_processor_has_not_is_left_out(
    root: Path, connection: libvirt.virConnect, cpuinfo: str, flags: dict[str, str]
) -> None:
    (root / "proc/cpuinfo").write_text(cpuinfo)
    told = described(connection, root)
    assert {name: told[name] for name in ("hvmCpuFlag", "eptFlag") if name in told} == flags


def test_the_clock_is_nominal_wherever_it_is_told(root: Path, connection: libvirt.virConnect) -> None:
    (root / "proc/cpuinfo").write_text("model name\t: AMD EPYC 7452 32-Core Processor\ncpu MHz\t\t: 1500.000\n")
    assert described(Firm(connection), root)["cpuGHz"] == "2.90"
    assert described(connection, root)["cpuGHz"] == "3.61"
    for file in root.glob(f"{CPU}/cpu*/cpufreq/cpuinfo_max_freq"):
        file.unlink()
    assert described(connection, root)["cpuGHz"] == "unknown"


@given(mhz=st.lists(st.floats(min_value=400, max_value=6000), min_size=2, max_size=4))
def test_no_fact_follows_the_clock_of_the_moment(mhz: list[float]) -> None:
    with tempfile.TemporaryDirectory() as directory, closing(libvirt.open("test:///default")) as connection:
        root = Path(directory)
        (root / "proc").mkdir()
        seen = []
        for now in mhz:
            (root / "proc/cpuinfo").write_text(f"model name\t: X\ncpu MHz\t\t: {now}\n")
            seen.append(described(connection, root))
        assert all(one == seen[0] for one in seen)


def test_centos_7_names_its_release_in_brackets(root: Path, connection: libvirt.virConnect) -> None:
    (root / "etc/os-release").write_text('ID="centos"\nVERSION="7 (Core)"\nVERSION_ID="7"\n')
    assert described(connection, root)["osRelease"] == "Core"


def test_what_the_host_does_not_tell_is_unknown(tmp_path: Path, connection: libvirt.virConnect) -> None:
    host = read_host_facts(connection, root=tmp_path)
    assert (host.cpu_model, host.cpu_mhz, host.os_name, host.up_since) == (None, None, None, None)
    assert host.hvm_flag is None
    assert host.memory_total_bytes > 0
    told = described(connection, tmp_path)
    assert (told["cpuGHz"], told["cpuCache"], told["uptime"]) == ("unknown", "unknown", "unknown")
    assert told["cpuProcessorNum"] > 0


def summary(name: str, state: str) -> VmSummary:
    return VmSummary(name=name, uuid=str(uuid.uuid5(uuid.NAMESPACE_OID, name)), state=state, vcpus=1, memory_bytes=1)


@pytest.mark.parametrize(
    ("state", "name"),
    [("running", "Running"), ("paused", "Paused"), ("pmsuspended", "Paused"), ("crashed", "Crashed"),
     ("other", "NoState")],
)  # fmt: skip
def test_states_have_the_server_s_names(state: str, name: str) -> None:
    view = HostView(vms=(summary(VM, state), summary("somebody else's", "running")))
    assert vm_sync(None, view).states == {VM: name}
    assert check_states(VmListRequest(vm_uuids=[VM, "1" * 32]), view).states == {VM: name, "1" * 32: "Shutdown"}


def test_a_definition_that_is_off_is_no_vm_of_this_host_unless_it_is_asked_for() -> None:
    view = HostView(vms=(summary(VM, "shutoff"), summary("f" * 32, "running")))
    assert vm_sync(None, view).states == {"f" * 32: "Running"}
    assert check_states(VmListRequest(vm_uuids=[VM]), view).states == {VM: "Shutdown"}


def test_a_vm_on_its_way_down_still_has_its_disks() -> None:
    view = HostView(vms=(msgspec.structs.replace(summary(VM, "running"), in_shutdown=True),))
    for reply in (vm_sync(None, view), check_states(VmListRequest(vm_uuids=[VM]), view)):
        assert (reply.states, reply.vm_in_shutdowns) == ({VM: "Running"}, [VM])


@given(
    here=st.dictionaries(
        st.sampled_from([c * 32 for c in "0123456789abcdef"] + ["db-7"]),
        st.tuples(st.sampled_from(["running", "paused", "pmsuspended", "shutoff", "crashed", "other"]), st.booleans()),
    ),
    asked=st.lists(st.sampled_from([c * 32 for c in "0123456789abcdef"] + ["db-7", "no uuid", ""])),
)
def test_no_vm_that_has_a_qemu_is_ever_called_off(here: dict[str, tuple[str, bool]], asked: list[str]) -> None:
    vms = tuple(msgspec.structs.replace(summary(name, state), in_shutdown=down) for name, (state, down) in here.items())
    checked = check_states(VmListRequest(vm_uuids=asked), HostView(vms=vms))
    assert checked.states.keys() == set(asked)
    for vm, state in checked.states.items():
        assert (state == "Shutdown") == (here.get(vm, ("shutoff", False))[0] == "shutoff")
    synced = vm_sync(None, HostView(vms=vms))
    active = {name for name, (state, _) in here.items() if state != "shutoff" and name != "db-7"}
    assert synced.states.keys() == active
    assert "Shutdown" not in synced.states.values()
    assert set(synced.vm_in_shutdowns) == {name for name in active if here[name][1]}


class Listed:
    """A domain of a list, which says the next of its states each time it is asked; None: it is gone."""

    def __init__(self, *states: int | None) -> None:
        self._states = list(states)

    def name(self) -> str:
        return VM

    def UUIDString(self) -> str:
        return str(uuid.UUID(VM))

    def info(self) -> list[int]:
        state = self._states.pop(0)
        if state is None:
            raise qemu_error(libvirt.VIR_ERR_NO_DOMAIN, "gone")
        return [state, 1024, 1024, 1, 0]


class Lister:
    def __init__(self, *domains: Listed) -> None:
        self._domains = domains

    def listAllDomains(self) -> list[Listed]:
        return list(self._domains)


@pytest.mark.parametrize(
    ("states", "settled", "slept_s"),
    [
        ((libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_RUNNING), ["running"], [0.5]),
        ((libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED), ["paused"], [0.5]),
        ((libvirt.VIR_DOMAIN_PAUSED, None), [], [0.5]),
        ((libvirt.VIR_DOMAIN_BLOCKED,), ["running"], []),
        ((libvirt.VIR_DOMAIN_SHUTDOWN,), ["running"], []),
        ((None,), [], []),
    ],
)
def test_a_paused_vm_is_looked_at_again(
    states: tuple[int | None, ...], settled: list[str], slept_s: list[float]
) -> None:
    slept: list[float] = []
    found = list_vms(Lister(Listed(*states)), reread_paused=True, sleep=slept.append)
    assert [vm.state for vm in found] == settled
    assert slept == slept_s
    assert [vm.in_shutdown for vm in found] == [states[-1] == libvirt.VIR_DOMAIN_SHUTDOWN for _ in found]


def test_events_of_vms_that_are_not_the_server_s_are_not_told() -> None:
    assert report_event(VmEvent("build-vm", "u", "started"), SERVER) == ()


def test_before_a_connect_a_ping_leaves_out_who_connected() -> None:
    assert msgspec.json.decode(msgspec.json.encode(ping(HostRequest(), HostView()))) == {"success": True, "error": ""}


def test_a_gap_in_the_events_asks_the_server_to_connect_again() -> None:
    (report,) = report_gap("libvirtd restarted", SERVER)
    assert (report.command_path, report.body["hostUuid"]) == ("/kvm/reconnectme", "h1")


def test_the_server_is_remembered_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    memory = ManagementServerFile(path)
    memory.load()
    assert memory.get() is None
    memory.remember(SERVER)
    assert path.stat().st_mode & 0o777 == 0o600
    again = ManagementServerFile(path)
    again.load()
    assert again.get() == SERVER


@pytest.mark.parametrize("content", [b"", b"{", b'{"host_uuid": 7}'])
def test_a_memory_that_cannot_be_read_is_forgotten_not_fatal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "server.json"
    path.write_bytes(content)
    memory = ManagementServerFile(path)
    memory.load()
    assert memory.get() is None


def test_what_cannot_be_remembered_is_told(tmp_path: Path) -> None:
    with pytest.raises(AgentError) as caught:
        ManagementServerFile(tmp_path / "absent" / "server.json").remember(SERVER)
    assert caught.value.code is Code.JOURNAL_UNAVAILABLE


def test_every_failed_answer_says_so() -> None:
    for query in QUERIES:
        reply = query.fail("libvirt is away")
        assert isinstance(reply, query.reply)
        assert (reply.success, reply.error) == (False, "libvirt is away")
