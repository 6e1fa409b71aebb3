"""What was asked of a guest and not reached is taken back; what others left so, a plug takes back and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from lxml import etree

from tests.fakes.agent import MIB, FakeAgent, carry_out, make_domain, make_guest, make_node
from tests.fakes.libvirt import FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec
from tests.unit.test_recovery import LOST, Agent, Killed

SPEC = GuestSpec(name="vm1")
LIVE, CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
#: A virtio-mem device of a VM that its owner defined so: without a user alias.
DEVICE = (
    "<memory model='virtio-mem'><target><size unit='MiB'>512</size><node>0</node><block unit='MiB'>2</block>"
    "<requested unit='MiB'>{requested}</requested>{current}</target>{alias}"
    "<address type='pci' domain='0x0000' bus='0x0{bus}' slot='0x00' function='0x0'/></memory>"
)


def without_driver() -> FakeDomain:
    return make_domain(SPEC, make_guest(SPEC, balloon_driver=False))


def balloon_mib(domain: FakeDomain) -> int:
    return int(domain.live.findtext("currentMemory")) // 1024


def requests_mib(domain: FakeDomain) -> list[list[int]]:
    """What is requested of each virtio-mem device, of the running VM and of its definition."""
    return [
        [int(one.text) * {"KiB": 1, "MiB": 1024}[one.get("unit")] // 1024 for one in root.iterfind(".//requested")]
        for root in (domain.live, domain.config)
    ]


def add_two_alike(domain: FakeDomain, live: tuple[int, int], config: tuple[int, int]) -> None:
    for root, requested in ((domain.live, live), (domain.config, config)):
        for n, size_mib in enumerate(requested):
            is_live = root is domain.live
            current = f"<current unit='MiB'>{size_mib}</current>" if is_live else ""
            alias = f"<alias name='virtiomem{n}'/>" if is_live else ""
            xml = DEVICE.format(requested=size_mib, current=current, alias=alias, bus=n + 5)
            device = etree.fromstring(xml)
            for size in device.iterfind("./target/*[@unit='MiB']"):
                size.text, size.attrib["unit"] = str(int(size.text) * 1024), "KiB"
            root.find("devices").append(device)
        root.find("memory").text = str(int(root.findtext("memory")) + 2 * 512 * 1024)


def codes(reply: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in reply["warnings"]]


@pytest.mark.parametrize("killed_at", [None, "step:done@1", "step:begun@2"])
def test_a_shrink_by_balloon_that_nobody_follows_is_not_followed_later_either(
    tmp_path: Path, killed_at: str | None
) -> None:
    agent = Agent(tmp_path, without_driver())
    task = agent.accept("HotUnplugMemory", vmUuid="vm1", memorySize=200 * MIB, timeoutSec=1)
    agent.point = killed_at or ""
    if killed_at:
        with pytest.raises(Killed):
            agent.executor.run(task)
        (task,) = agent.journal.unfinished()
    agent.executor.run(task)
    agent.journal.stop()
    reply = agent.reply()
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "BALLOON_NOT_ANSWERING")
    agent.domain.load_balloon_driver()
    assert balloon_mib(agent.domain) == 256


def test_a_request_that_cannot_be_taken_back_leaves_the_task_partial(tmp_path: Path) -> None:
    domain = without_driver()
    domain.fail_next[f"setMemoryFlags({256 * 1024}, {LIVE})"] = qemu_error(1, "no")
    reply = carry_out(make_node(tmp_path, domain), "HotUnplugMemory", vmUuid="vm1", memorySize=200 * MIB, timeoutSec=1)
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "BALLOON_NOT_ANSWERING")


def lose_libvirt(domain: FakeDomain) -> Callable[[], None]:
    """Have libvirt away until what is returned is called."""
    calls = ("XMLDesc", "memoryStats", "info", "state")
    originals = {name: getattr(domain, name) for name in calls}

    def lost(*_arguments: Any) -> Any:
        raise LOST

    def come_back() -> None:
        for name, original in originals.items():
            setattr(domain, name, original)

    for name in calls:
        setattr(domain, name, lost)
    return come_back


@pytest.mark.parametrize(
    ("command", "fields", "asked"),
    [
        ("HotUnplugMemory", {"memorySize": 200 * MIB}, "200 MiB by balloon"),
        (
            "HotPlugMemory",
            {"memorySize": 512 * MIB, "method": "virtio-mem"},
            "256 MiB of virtio-mem device ua-kvmagent-t1-0",
        ),
    ],
)
def test_a_request_that_libvirt_s_loss_left_behind_is_told_and_the_next_plug_takes_it_back(
    tmp_path: Path, command: str, fields: dict[str, Any], asked: str
) -> None:
    domain = without_driver()
    domain.guest.virtio_mem_limit = 64 * MIB
    agent = FakeAgent(tmp_path, domain)
    come_back: list[Callable[[], None]] = []
    call = "setMemoryFlags" if command == "HotUnplugMemory" else "attachDeviceFlags"
    original = getattr(domain, call)

    def asked_then_lost(*arguments: Any) -> Any:
        setattr(domain, call, original)
        original(*arguments)
        come_back.append(lose_libvirt(domain))

    setattr(domain, call, asked_then_lost)
    reply = agent.run(command, "t1", vmUuid="vm1", timeoutSec=1, **fields).reply
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "LIBVIRT_UNAVAILABLE")
    (told,) = [warning for warning in reply["warnings"] if warning["code"] == "GUEST_STILL_ASKED"]
    assert f"the request for {asked} may still be pending" in told["message"]
    come_back[0]()
    has = 256 * MIB if command == "HotUnplugMemory" else 320 * MIB
    reply = agent.run("HotPlugMemory", "t2", vmUuid="vm1", memorySize=has).reply
    assert reply["success"], reply
    assert "LEFTOVER_TAKEN_BACK" in codes(reply)
    domain.load_balloon_driver()
    assert balloon_mib(domain) == 256
    assert requests_mib(domain) == ([[], []] if command == "HotUnplugMemory" else [[64], [64]])
    agent.stop()


def test_what_cannot_be_taken_back_is_told(tmp_path: Path) -> None:
    domain = without_driver()
    domain.fail_next[f"setMemoryFlags({256 * 1024}, {LIVE})"] = qemu_error(1, "no")
    reply = carry_out(make_node(tmp_path, domain), "HotUnplugMemory", vmUuid="vm1", memorySize=200 * MIB, timeoutSec=1)
    (told,) = [warning for warning in reply["warnings"] if warning["code"] == "GUEST_STILL_ASKED"]
    assert told["message"] == "the request for 200 MiB by balloon is still pending in the guest"


@pytest.mark.parametrize("killed_at", ["step:done@1", "step:begun@2"])
@pytest.mark.parametrize("gone", [{"command": "Gone"}, {"request": b'{"vmUuid":"vm1","memorySize":"no number"}'}])
def test_what_a_task_asked_is_taken_back_though_no_plugin_reads_it_any_longer(
    tmp_path: Path, killed_at: str, gone: dict[str, Any]
) -> None:
    agent = Agent(tmp_path, without_driver())
    task = agent.accept("HotUnplugMemory", vmUuid="vm1", memorySize=200 * MIB, timeoutSec=1)
    agent.point = killed_at
    with pytest.raises(Killed):
        agent.executor.run(task)
    (left,) = agent.journal.unfinished()
    agent.executor.run(msgspec.structs.replace(left, **gone))
    agent.journal.stop()
    reply = agent.reply()
    assert (reply["success"], reply["errorCode"]) == (False, "TASK_UNREADABLE")
    assert (reply["after"]["balloonSize"], reply["recovered"]) == (256 * MIB, True)
    assert "GUEST_STILL_ASKED" not in codes(reply)
    agent.domain.load_balloon_driver()
    assert balloon_mib(agent.domain) == 256


@pytest.mark.parametrize(("total_mib", "outcome"), [(384, "online"), (256, "unchanged")])
@pytest.mark.parametrize("saved", [LIVE, LIVE | CONFIG])
def test_a_plug_takes_back_what_anybody_asked_of_the_balloon_and_says_so(
    tmp_path: Path, total_mib: int, outcome: str, saved: int
) -> None:
    domain = without_driver()
    domain.setMemoryFlags(200 * 1024, saved)
    node = make_node(tmp_path, domain)
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=total_mib * MIB)
    is_saved = bool(saved & CONFIG)
    assert (reply["success"], reply["applied"], reply["aligned"]) == (True, total_mib * MIB, total_mib * MIB)
    assert reply["outcome"] == ("configured" if outcome == "unchanged" and is_saved else outcome)
    (told,) = [warning for warning in reply["warnings"] if warning["code"] == "LEFTOVER_TAKEN_BACK"]
    assert "target was 200 MiB, but it is at 256 MiB" in told["message"]
    domain.load_balloon_driver()
    assert balloon_mib(domain) == total_mib
    assert int(domain.config.findtext("currentMemory")) == total_mib * 1024
    again = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=total_mib * MIB)
    assert (again["outcome"], again["steps"]) == ("unchanged", [])


def test_a_vm_without_a_leftover_is_told_of_none(tmp_path: Path) -> None:
    node = make_node(tmp_path, make_domain(SPEC))
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB)
    assert [step["step"] for step in reply["steps"]] == ["AttachMemory", "OnlineGuestMemory"]
    assert "LEFTOVER_TAKEN_BACK" not in codes(reply)


@pytest.mark.parametrize("limit_mib", [0, 64])
def test_a_virtio_mem_device_is_asked_for_what_it_has_and_the_same_again_succeeds_later(
    tmp_path: Path, limit_mib: int
) -> None:
    domain = make_domain(SPEC)
    domain.guest.virtio_mem_limit = limit_mib * MIB
    node = make_node(tmp_path, domain)
    command = {"vmUuid": "vm1", "memorySize": 512 * MIB, "method": "virtio-mem", "timeoutSec": 1}
    reply = carry_out(node, "HotPlugMemory", "task-1", **command)
    assert (reply["outcome"], reply["errorCode"]) == ("partial", "VIRTIO_MEM_STALLED")
    assert "send the command again" in reply["remedy"]
    assert requests_mib(domain) == [[limit_mib], [limit_mib]]
    domain.guest.virtio_mem_limit = 1 << 60
    reply = carry_out(node, "HotPlugMemory", "task-2", **command)
    assert (reply["outcome"], reply["memorySize"]) == ("online", 512 * MIB)
    assert requests_mib(domain) == [[256], [256]]


def test_a_plug_takes_back_what_anybody_asked_of_virtio_mem(tmp_path: Path) -> None:
    """By dimm, where the guest's driver goes no further; the definition was given the same."""
    domain = make_domain(SPEC)
    add_two_alike(domain, (0, 0), (0, 0))
    domain.guest.virtio_mem_limit = 0
    for root in (domain.live, domain.config):
        root.findall(".//requested")[0].text = str(256 * 1024)
    node = make_node(tmp_path, domain)
    reply = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB, method="dimm", affect="both")
    assert "virtiomem0 had been asked for 256 MiB and is at 0 B" in reply["warnings"][0]["message"]
    assert requests_mib(domain) == [[0, 0], [0, 0]]
    assert reply["after"]["memorySize"] == reply["after"]["configMemorySize"] == 384 * MIB


def test_two_devices_alike_are_told_apart_and_both_definitions_come_to_the_same(tmp_path: Path) -> None:
    domain = make_domain(SPEC)
    add_two_alike(domain, (512, 128), (512, 0))
    node = make_node(tmp_path, domain)
    assert carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=(256 + 768) * MIB)["success"]
    assert requests_mib(domain) == [[512, 256], [512, 256]]
    assert carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=(256 + 1024) * MIB)["success"]
    assert requests_mib(domain) == [[512, 512], [512, 512]]
    again = carry_out(node, "HotPlugMemory", vmUuid="vm1", memorySize=(256 + 1024) * MIB)
    assert (again["outcome"], again["steps"]) == ("unchanged", [])
    assert carry_out(node, "HotUnplugMemory", vmUuid="vm1", memorySize=(256 + 128) * MIB)["success"]
    live, config = requests_mib(domain)
    assert live == config
    assert sum(live) == 128


def test_halves_that_are_apart_grow_to_what_the_running_vm_has(tmp_path: Path) -> None:
    domain = make_domain(SPEC)
    add_two_alike(domain, (0, 128), (0, 0))
    assert carry_out(make_node(tmp_path, domain), "HotPlugMemory", vmUuid="vm1", memorySize=384 * MIB)["success"]
    assert requests_mib(domain) == [[0, 128], [0, 128]]


def make_saved_lower(*, saved_mib: int = 512, config_memory_mib: int = 1024) -> FakeDomain:
    """A VM of 1024 MiB whose balloon holds nothing, and whose next start would be ballooned."""
    domain = make_domain(GuestSpec(name="vm1", memory_mib=1024))
    domain.config.find("currentMemory").text = str(saved_mib * 1024)
    if config_memory_mib != 1024:
        domain.config.find("memory").text = str(config_memory_mib * 1024)
        domain.config.find("./cpu/numa/cell").set("memory", str(config_memory_mib * 1024))
        domain.config.find("./cpu/numa/cell").set("unit", "KiB")
    return domain


@pytest.mark.parametrize("method", ["auto", "dimm", "virtio-mem", "balloon"])
@pytest.mark.parametrize("more_mib", [0, 256])
@pytest.mark.parametrize("command", ["HotPlugMemory", "HotPlugCpuMemory"])
def test_the_next_start_has_the_total_too_and_is_not_ballooned(
    tmp_path: Path, command: str, more_mib: int, method: str
) -> None:
    if (command == "HotPlugCpuMemory" and method != "auto") or (method == "balloon" and more_mib):
        return
    domain = make_saved_lower()
    fields = {"cpuNum": 1} if command == "HotPlugCpuMemory" else {"method": method}
    reply = carry_out(make_node(tmp_path, domain), command, vmUuid="vm1", memorySize=(1024 + more_mib) * MIB, **fields)
    assert (reply["success"], reply["outcome"]) == (True, "online" if more_mib else "configured"), reply
    plugged_mib = 0 if method == "virtio-mem" else more_mib
    assert int(domain.config.findtext("currentMemory")) == (1024 + plugged_mib) * 1024
    again = carry_out(make_node(tmp_path, domain), command, vmUuid="vm1", memorySize=(1024 + more_mib) * MIB, **fields)
    assert again["outcome"] == "unchanged", again


def test_the_next_start_is_ballooned_no_less_where_it_was_left_alone(tmp_path: Path) -> None:
    domain = make_saved_lower()
    reply = carry_out(make_node(tmp_path, domain), "HotPlugMemory", vmUuid="vm1", memorySize=1024 * MIB, affect="live")
    assert reply["outcome"] == "unchanged"
    assert domain.config.findtext("currentMemory") == str(512 * 1024)


def test_a_definition_of_an_odd_size_is_ballooned_no_further_than_it_allows(tmp_path: Path) -> None:
    """libvirt rounds it up at the start, and allows no balloon above what is written."""
    domain = make_saved_lower(config_memory_mib=1023)
    domain.config.find("memory").text = str(1023 * 1024 + 512)
    domain.config.find("./cpu/numa/cell").set("memory", str(1023 * 1024 + 512))
    reply = carry_out(make_node(tmp_path, domain), "HotPlugMemory", vmUuid="vm1", memorySize=1024 * MIB)
    assert (reply["success"], reply["outcome"]) == (True, "configured"), reply
    assert domain.config.findtext("currentMemory") == str(1023 * 1024 + 512)


def test_a_definition_of_less_memory_is_ballooned_no_further_than_it_has(tmp_path: Path) -> None:
    domain = make_saved_lower(saved_mib=256, config_memory_mib=768)
    reply = carry_out(make_node(tmp_path, domain), "HotPlugMemory", vmUuid="vm1", memorySize=1024 * MIB)
    assert reply["success"], reply
    assert domain.config.findtext("currentMemory") == str(1024 * 1024)


def test_the_way_back_of_both_has_the_next_start_as_it_was(tmp_path: Path) -> None:
    domain = make_saved_lower()
    domain.fail_next["setVcpusFlags"] = qemu_error(1, "no")
    fields = {"cpuNum": 2, "memorySize": 1280 * MIB}
    reply = carry_out(make_node(tmp_path, domain), "HotPlugCpuMemory", vmUuid="vm1", **fields)
    assert (reply["outcome"], reply["details"]) == ("refused", {"undone": True}), reply
    assert domain.config.findtext("currentMemory") == str(512 * 1024)
