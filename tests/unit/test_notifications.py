"""Reports: a server that is bad, or was replaced, keeps nothing."""

import time

from kvmagent.model.command import Plugin
from kvmagent.model.host import ManagementServer, Report
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.notifications import Notifications
from tests.lab.processes import wait_for
from tests.lab.receivers import BadReceiver
from tests.lab.server import ManagementServer as Receiver


def make_report(reason: str, _server: ManagementServer) -> tuple[Report, ...]:
    return (Report(command_path="/gap", body={"reason": reason}),)


class Told:
    """Reports to the server of `url`, which can be replaced."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url
        plugin = Plugin(name="p", commands=(), report_gap=make_report)
        callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection())
        self.reports = Notifications([plugin], self._server, callbacks, timeout_s=timeout_s, idle_s=0.2)
        self.reports.start()

    def _server(self) -> ManagementServer:
        return ManagementServer(host_uuid="h", send_command_url=self.url, client="127.0.0.1")


def test_a_server_that_dribbles_holds_up_reports_to_its_successor_for_one_exchange() -> None:
    with BadReceiver("dribbles its answer") as bad, Receiver() as good:
        told = Told(bad.urls[0], timeout_s=1.0)
        told.reports.tell_gap("one")
        wait_for(lambda: bad.accepted, timeout_s=5, what="the exchange")
        told.url = good.url
        told.reports.tell_gap("two")
        wait_for(lambda: len(good.callbacks()) == 2, timeout_s=5, what="both reports")
        told.reports.stop(1.0)


def test_the_connection_to_a_server_that_was_replaced_is_closed_although_nothing_is_told() -> None:
    with BadReceiver("fails") as old:
        told = Told(old.urls[0], timeout_s=1.0)
        told.reports.tell_gap("one")
        wait_for(lambda: old.open == 1, timeout_s=5, what="a connection")
        told.url = "http://127.0.0.1:1/"
        wait_for(lambda: old.open == 0, timeout_s=10, what="its end")
        told.reports.stop(1.0)


def test_a_server_that_hangs_does_not_keep_the_agent_from_stopping() -> None:
    with BadReceiver("says nothing") as bad:
        told = Told(bad.urls[0], timeout_s=20.0)
        told.reports.tell_gap("one")
        wait_for(lambda: bad.accepted, timeout_s=5, what="the exchange")
        began = time.monotonic()
        told.reports.stop(0.5)
        assert time.monotonic() - began < 10
