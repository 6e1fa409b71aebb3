"""Reports: one that the server is slow to take holds up those about the same VM alone, which stay in order."""

import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.model.command import Plugin
from kvmagent.model.host import ManagementServer, Progress, Report, VmEvent
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.notifications import Notifications
from tests.lab.processes import wait_for
from tests.lab.server import Answer
from tests.lab.server import ManagementServer as Receiver
from tests.unit.test_hostqueries import returning
from tests.unit.test_rogues import MISDEEDS

LIMIT_S = 20.0


def tell(event: VmEvent, _server: ManagementServer) -> tuple[Report, ...]:
    return (
        Report(f"/{event.kind}", {"vmUuid": event.name, "number": event.uuid}, optional=event.detail == "optional"),
    )


class Told:
    """Reports to a server that can be replaced; an event's number is in its uuid."""

    def __init__(self, url: str) -> None:
        self.url = url
        plugin = Plugin(name="p", commands=(), report_event=tell)
        callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection())
        self.reports = Notifications([plugin], self._server, callbacks, timeout_s=LIMIT_S)
        self.reports.start()

    def event(self, vm: str, number: int, detail: str = "") -> None:
        self.reports.tell_event(VmEvent(vm, str(number), "started", detail))

    def _server(self) -> ManagementServer:
        return ManagementServer(host_uuid="h", send_command_url=self.url, client="127.0.0.1")


def came(receiver: Receiver) -> list[tuple[str, str]]:
    return [(one.body["vmUuid"], one.body["number"]) for one in receiver.callbacks()]


def test_a_report_that_is_not_taken_holds_up_its_own_vm_alone() -> None:
    with Receiver() as receiver:
        told = Told(receiver.url)
        receiver.answer = lambda _task, _attempt: Answer(hang_s=LIMIT_S) if len(receiver.callbacks()) == 1 else Answer()
        told.event("a", 1)
        wait_for(lambda: came(receiver) == [("a", "1")], timeout_s=5, what="the first report")
        began = time.monotonic()
        told.event("a", 2)
        told.event("b", 3)
        wait_for(lambda: ("b", "3") in came(receiver), timeout_s=5, what="the other VM's report")
        assert ("a", "2") not in came(receiver)
        began = time.monotonic()
        told.reports.stop(0.5)
        assert time.monotonic() - began < 10


def test_a_server_that_has_just_connected_is_told_while_the_former_one_hangs() -> None:
    with Receiver() as former, Receiver() as new:
        told = Told(former.url)
        former.answer = lambda _task, _attempt: Answer(hang_s=LIMIT_S)
        told.event("a", 1)
        wait_for(lambda: came(former), timeout_s=5, what="the exchange with the former server")
        told.url = new.url
        told.event("b", 2)
        wait_for(lambda: came(new) == [("b", "2")], timeout_s=5, what="the new server's report")
        told.reports.stop(0.0)


@settings(max_examples=15, deadline=None)
@given(vms=st.lists(st.sampled_from("abcdef"), max_size=40))
def test_each_vm_s_reports_come_once_and_in_order(vms: list[str]) -> None:
    with Receiver() as receiver:
        told = Told(receiver.url)
        wanted: dict[str, list[str]] = defaultdict(list)
        for number, vm in enumerate(vms):
            told.event(vm, number)
            wanted[vm].append(str(number))
        wait_for(lambda: len(came(receiver)) >= len(vms), timeout_s=LIMIT_S, what="all reports")
        told.reports.stop(LIMIT_S)
        got: dict[str, list[str]] = defaultdict(list)
        for vm, sent in came(receiver):
            got[vm].append(sent)
        assert got == wanted


def test_a_report_that_the_server_has_no_handler_for_is_no_failure() -> None:
    with Receiver(lambda _task, _attempt: Answer(status=404)) as receiver:
        told = Told(receiver.url)
        told.event("a", 1, "optional")
        told.event("a", 2)
        wait_for(lambda: came(receiver).count(("a", "2")) == 3, timeout_s=LIMIT_S, what="the tries of the other")
        told.reports.stop(LIMIT_S)
        assert came(receiver).count(("a", "1")) == 1


REPORT_MISDEEDS = {
    **MISDEEDS,
    "makes no reports": returning((1, None)),
    "makes one of no path": returning((Report(7, {}),)),  # type: ignore[arg-type]
    "makes one that is no JSON": returning((Report("/x", {"vmUuid": "a", "x": object()}),)),
    "makes one of no object": returning((Report("/x", []),)),  # type: ignore[arg-type]
    "makes one of a VM that is none": returning((Report("/x", {"vmUuid": ["a"]}),)),
}


@pytest.mark.parametrize("misdeed", REPORT_MISDEEDS)
def test_a_plugin_whose_reports_cannot_be_made_ends_no_task_and_keeps_nobody_else_s(misdeed: str) -> None:
    with Receiver() as receiver:
        bad = REPORT_MISDEEDS[misdeed]
        plugins = [
            Plugin(name="bad", commands=(), report_event=bad, report_gap=bad, report_progress=bad),
            Plugin(name="good", commands=(), report_event=tell),
        ]
        server = ManagementServer(host_uuid="h", send_command_url=receiver.url, client="127.0.0.1")
        callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection())
        reports = Notifications(plugins, lambda: server, callbacks, timeout_s=LIMIT_S)
        reports.start()
        for number in range(6):
            reports.tell_progress(Progress("HotPlugCpu", "a", 10, "SetVcpus", {}))
            reports.tell_gap("why")
            reports.tell_event(VmEvent("b", str(number), "started"))
        wait_for(
            lambda: (
                [one.body.get("number") for one in receiver.callbacks() if one.body.get("vmUuid") == "b"]
                == [str(number) for number in range(6)]
            ),
            timeout_s=60,
            what="the reports of the other plugin",
        )
        reports.stop(5)
