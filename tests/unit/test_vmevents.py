"""Each of libvirt's events, with each of its details, against what a ZStack server's own agent reports."""

from typing import Any

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.hypervisor.vmevents import VmEvents
from kvmagent.model.host import ManagementServer, VmEvent
from kvmagent_plugins.host.answers import report_event

VM = "0123456789abcdef0123456789abcdef"
SERVER = ManagementServer("h1", "http://127.0.0.1/send", "4.8.0")
# Every event that libvirt has, by its name: a new libvirt may have more.
EVENTS = {
    name: number
    for name, number in vars(libvirt).items()
    if name.startswith("VIR_DOMAIN_EVENT_") and name.count("_") == 3 and isinstance(number, int)
}
DETAILS = range(20)
BY_NAME = {
    "VIR_DOMAIN_EVENT_STARTED": "/kvm/reportvmstart",
    "VIR_DOMAIN_EVENT_SHUTDOWN": "/kvm/reportvmshutdown",
    "VIR_DOMAIN_EVENT_CRASHED": "/kvm/reportvmcrash",
}


class Domain:
    """A domain as an event hands it over: it may only be asked who it is."""

    def __init__(self, name: str = VM) -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def UUIDString(self) -> str:
        return f"uuid of {self._name}"


class Driver:
    """libvirt's side: takes the callbacks, and fires them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[VmEvent] = []
        self._callbacks: dict[int, Any] = {}
        VmEvents(self.events.append, clock=lambda: self.now).register(self)

    def domainEventRegisterAny(self, domain: None, number: int, callback: Any, opaque: None) -> int:
        self._callbacks[number] = callback
        return number

    def lifecycle(self, event: int, detail: int, name: str = VM) -> None:
        self._callbacks[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](self, Domain(name), event, detail, None)

    def reset(self, name: str = VM) -> None:
        self._callbacks[libvirt.VIR_DOMAIN_EVENT_ID_REBOOT](self, Domain(name), None)

    def posted(self) -> list[tuple[str, dict[str, Any]]]:
        return [(report.command_path, report.body) for event in self.events for report in report_event(event, SERVER)]


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_told_as_zstack_s_own_agent_tells_it_and_no_other_is(name: str, detail: int) -> None:
    driver = Driver()
    driver.lifecycle(EVENTS[name], detail)
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)
    posted = driver.posted()
    assert [path for path, _ in posted if not path.endswith("/from/guest")] == (
        [BY_NAME[name]] if name in BY_NAME else []
    )
    assert all(body["vmUuid"] == VM for _, body in posted)


@pytest.mark.parametrize(
    ("detail", "words", "paths"),
    [
        (
            libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST,
            "by guest",
            ["/kvm/reportvmshutdown", "/kvm/reportvmshutdown/from/guest"],
        ),
        (libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST, "by host", ["/kvm/reportvmshutdown"]),
        (libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_FINISHED, "finished", ["/kvm/reportvmshutdown"]),
        (99, "finished", ["/kvm/reportvmshutdown"]),
    ],
)
def test_a_shutdown_says_who_wanted_it(detail: int, words: str, paths: list[str]) -> None:
    driver = Driver()
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, detail)
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
    posted = driver.posted()
    assert [path for path, _ in posted] == paths
    assert posted[0][1] == {"vmUuid": VM, "detail": words}
    assert posted[1:] == [(path, {"vmUuid": VM}) for path in paths[1:]]


def test_one_reset_is_one_reboot_and_the_next_is_another() -> None:
    driver = Driver()
    for after_s in (0.0, 0.01, 0.5):
        driver.now += after_s
        driver.reset()
        driver.reset("f" * 32)
    assert [event.name for event in driver.events] == [VM, "f" * 32]
    driver.now += 11
    driver.reset()
    assert [path for path, _ in driver.posted()].count("/kvm/reportvmreboot") == 3


@given(pauses_s=st.lists(st.floats(min_value=0, max_value=60, allow_nan=False), min_size=1, max_size=30))
def test_a_guest_that_resets_for_ever_is_told_of_again_and_again(pauses_s: list[float]) -> None:
    driver = Driver()
    for pause_s in pauses_s:
        driver.now += pause_s
        driver.reset()
    told = [event for event in driver.events if event.kind == "rebooted"]
    assert 1 <= len(told) <= 1 + sum(pauses_s) / 10


@given(
    fired=st.lists(
        st.tuples(
            st.sampled_from(sorted(EVENTS.values())),
            st.integers(min_value=0, max_value=20),
            st.sampled_from([VM, "f" * 32, "db-7", VM.upper(), f"{VM}0", str(VM[:31])]),
        ),
        max_size=30,
    )
)
def test_no_state_is_ever_reported_and_nothing_of_others_vms(fired: list[tuple[int, int, str]]) -> None:
    driver = Driver()
    for event, detail, name in fired:
        driver.lifecycle(event, detail, name)
        driver.reset(name)
    for path, body in driver.posted():
        assert path != "/kvm/reportvmstate"
        assert "vmState" not in body
        assert body["vmUuid"] in (VM, "f" * 32)
    shutdowns = [body for path, body in driver.posted() if path == "/kvm/reportvmshutdown"]
    assert all(body["detail"] in ("by guest", "by host", "finished") for body in shutdowns)


LIVES_ON = (libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED)


@pytest.mark.parametrize("detail", DETAILS)
def test_the_host_s_end_of_a_qemu_is_a_shutdown_unless_the_vm_lives_on(detail: int) -> None:
    driver = Driver()
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST)
    assert driver.events == [], "the stop says what it was"
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_STOPPED, detail)
    assert [event.kind for event in driver.events] == (["stopped"] if detail in LIVES_ON else ["shutdown", "stopped"])
    driver.lifecycle(libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)
    assert [event.kind for event in driver.events].count("shutdown") == (detail not in LIVES_ON)
