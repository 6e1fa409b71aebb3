"""Delivery: every outcome arrives, in order for each VM, whatever becomes of its receiver."""

import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.backoff import Backoff
from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal, Task, Undelivered
from tests.lab.processes import wait_for
from tests.lab.receivers import KINDS, BadReceiver
from tests.lab.server import Answer, ManagementServer


class Sender:
    """Delivery on a journal of its own; `own` is the agent's own time, set by hand, and `now` the clock."""

    def __init__(
        self,
        directory: Path,
        *,
        timeout_s: float = 1.0,
        callbacks: Any = None,
        backoff: Backoff | None = None,
        **limits: int,
    ) -> None:
        self.now, self.own = 1000.0, 50.0
        self.journal = Journal(
            directory / "journal.sqlite",
            on_accepted=lambda task: None,
            clock=lambda: self.now,
            elapsed=lambda: self.own,
        )
        self.journal.start()
        self.delivery = Delivery(
            self.journal,
            callbacks or CallbackClient([parse_callback_rule("caller")], CallbackSection()),
            timeout_s=timeout_s,
            give_up_s=100.0,
            backoff=backoff or Backoff(0.5, 180.0, jitter=lambda: 0.5),
            **limits,
        )

    def finish(self, task_uuid: str, url: str, vm: str = "vm1", reply: bytes = b'{"success": true}') -> Undelivered:
        self.journal.accept(
            Task(task_uuid=task_uuid, command="C", lane=vm, request=b"{}", callback_url=url, client="127.0.0.1")
        )
        return self.journal.finish(task_uuid, reply, "plugged")

    def send(self, task_uuid: str, url: str, vm: str = "vm1") -> None:
        self.delivery.put(self.finish(task_uuid, url, vm))

    def state(self, task_uuid: str) -> str:
        task = self.journal.find(task_uuid)
        assert task is not None
        return task.state

    def wait(self, task_uuid: str, state: str, timeout_s: float = 10.0) -> None:
        wait_for(lambda: self.state(task_uuid) == state, timeout_s=timeout_s, what=f"{task_uuid} to be {state}")

    def close(self) -> None:
        self.delivery.stop(0.1)
        self.journal.stop()


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Sender]:
    made = Sender(tmp_path)
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[ManagementServer]:
    with ManagementServer() as running:
        yield running


class Dead:
    """A port that takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def close(self) -> None:
        self._socket.close()


def delivery_threads() -> int:
    return sum(thread.name.startswith("delivery-") for thread in threading.enumerate())


@pytest.mark.parametrize("status", [200, 202, 204])
def test_any_2xx_is_delivered(sender: Sender, server: ManagementServer, status: int) -> None:
    server.answer = lambda task, attempt: Answer(status=status, body=b"")
    sender.send("t1", f"{server.url}?server=7")
    sender.wait("t1", "delivered")
    (callback,) = server.callbacks("t1")
    assert (callback.path, callback.body) == ("/callback?server=7", {"success": True})
    assert callback.headers["content-type"] == "application/json; charset=utf-8"


def test_404_ends_it(sender: Sender, server: ManagementServer) -> None:
    server.answer = lambda task, attempt: Answer(status=404)
    sender.send("t1", server.url)
    sender.wait("t1", "gone")
    task = sender.journal.find("t1")
    assert task is not None
    assert (task.attempts, task.delivery_error) == (1, "HTTP 404")


@pytest.mark.parametrize(
    "failure",
    [
        Answer(status=500),
        Answer(status=302, headers={"Location": "http://127.0.0.1:9/"}),
        Answer(fault="reset"),
        Answer(fault="half", body=b'{"some": "answer"}'),
        Answer(hang_s=3.0),
    ],
    ids=["500", "302", "reset", "half", "hang"],
)
def test_anything_else_is_sent_again(sender: Sender, server: ManagementServer, failure: Answer) -> None:
    server.answer = lambda task, attempt: failure if attempt < 3 else Answer()
    sender.send("t1", server.url)
    sender.wait("t1", "delivered")
    task = sender.journal.find("t1")
    assert task is not None
    assert task.attempts == len(server.callbacks("t1")) == 3
    assert all(callback.body == {"success": True} for callback in server.callbacks("t1"))


def test_callbacks_of_a_vm_keep_their_order_over_failures(sender: Sender, server: ManagementServer) -> None:
    server.answer = lambda task, attempt: Answer(status=500 if task.endswith("0") and attempt == 1 else 200)
    tasks = [f"{vm}-{n}" for n in range(10) for vm in ("a", "b")]
    for task in tasks:
        sender.send(task, server.url, vm=task[0])
    for task in tasks:
        sender.wait(task, "delivered")
    order = [callback.task_uuid for callback in server.callbacks()]
    for vm in ("a", "b"):
        last_seen = [uuid for n, uuid in enumerate(order) if uuid not in order[n + 1 :] and uuid.startswith(vm)]
        assert last_seen == [f"{vm}-{n}" for n in range(10)]


def test_dead_and_slow_servers_hold_up_no_other(sender: Sender, server: ManagementServer) -> None:
    dead = [Dead() for _ in range(40)]
    for n, other in enumerate(dead):
        sender.send(f"dead{n}", other.url, vm=f"dead{n}")
    # Together they have a part of the threads, for there are others of the same client and host.
    wait_for(lambda: attempted(sender, 40) >= 32, timeout_s=10, what="the dead servers to be found out")
    began = time.monotonic()
    for n in range(50):
        sender.send(f"t{n}", server.url)
    for n in range(50):
        sender.wait(f"t{n}", "delivered")
    assert time.monotonic() - began < 30
    assert delivery_threads() <= 32
    for other in dead:
        other.close()


def attempted(sender: Sender, count: int) -> int:
    tasks = [sender.journal.find(f"dead{n}") for n in range(count)]
    return sum(task is not None and task.attempts > 0 for task in tasks)


def test_a_server_that_is_away_is_not_tried_once_for_each_callback(sender: Sender, server: ManagementServer) -> None:
    server.stop()
    for n in range(200):
        sender.send(f"t{n}", server.url, vm=f"vm{n}")
    wait_for(lambda: total_attempts(sender, 200) >= 3, timeout_s=10, what="three attempts")
    assert total_attempts(sender, 200) < 10
    server.start()
    for n in range(200):
        sender.wait(f"t{n}", "delivered")


def total_attempts(sender: Sender, count: int) -> int:
    tasks = [sender.journal.find(f"t{n}") for n in range(count)]
    return sum(task.attempts for task in tasks if task is not None)


def test_it_is_given_up_after_the_time_limit(sender: Sender, server: ManagementServer) -> None:
    server.answer = lambda task, attempt: Answer(status=500)
    sender.send("t1", server.url)
    server.wait("t1", 10)
    sender.own += 101
    sender.wait("t1", "given_up")


def test_what_is_told_of_its_age_follows_no_step_of_the_clock(sender: Sender, server: ManagementServer) -> None:
    server.stop()
    sender.send("t1", server.url)
    sender.now -= 86400
    sender.own += 5
    (backlog,) = sender.delivery.backlog()
    assert backlog.oldest_s == 5
    sender.now += 30 * 86400
    assert max(one.oldest_s for one in sender.delivery.backlog()) == 5


def test_a_step_of_the_clock_gives_nothing_up(sender: Sender, server: ManagementServer) -> None:
    server.stop()
    for n in range(3):
        sender.send(f"t{n}", server.url, vm=f"vm{n}")
    sender.now += 2 * 86400
    wait_for(lambda: total_attempts(sender, 3) > 0, timeout_s=10, what="an attempt after it")
    sender.now -= 4 * 86400
    server.start()
    for n in range(3):
        sender.wait(f"t{n}", "delivered")


def test_what_is_owed_already_keeps_its_turn_and_what_is_not_is_sent(sender: Sender, server: ManagementServer) -> None:
    server.answer = lambda task, attempt: Answer(status=200, hang_s=0.5)
    owed = [sender.finish(f"t{n}", server.url) for n in range(2)]
    sender.delivery.put(owed[0])
    server.wait("t0", 10)
    sender.delivery.put_missing(owed)
    sender.wait("t1", "delivered")
    assert [callback.task_uuid for callback in server.callbacks()] == ["t0", "t1"]


def test_who_has_just_started_waits_a_moment_that_grows_with_what_is_owed(
    tmp_path: Path, server: ManagementServer
) -> None:
    windows: list[float] = []

    def draw(window_s: float) -> float:
        windows.append(window_s)
        return 0.3

    sender = Sender(tmp_path, backoff=Backoff(0.5, 180.0, 2.0, draw=draw))
    owed = [sender.finish(f"t{n}", server.url, vm=f"vm{n % 3}") for n in range(10)]
    began = time.monotonic()
    sender.delivery.put_missing(owed[:9])
    sender.delivery.put_missing(owed)  # what is known already is waited for no second time
    for n in range(10):
        sender.wait(f"t{n}", "delivered")
    assert windows == [18.0]
    assert time.monotonic() - began >= 0.3
    assert len(server.callbacks()) == 10
    sender.close()


def test_a_server_that_was_away_is_tried_again_the_later_the_more_is_owed(
    tmp_path: Path, server: ManagementServer
) -> None:
    windows: list[float] = []

    def draw(window_s: float) -> float:
        windows.append(window_s)
        return 0.0

    server.stop()
    sender = Sender(tmp_path, backoff=Backoff(0.2, 180.0, 0.01, jitter=lambda: 0.5, draw=draw))
    for n in range(7):
        sender.send(f"t{n}", server.url, vm=f"vm{n}")
    wait_for(lambda: len(windows) >= 3, timeout_s=10, what="three tries")
    assert windows[-1] == pytest.approx(0.07)
    server.start()
    for n in range(7):
        sender.wait(f"t{n}", "delivered")
    sender.close()


def test_all_that_a_silent_server_is_owed_too_long_is_given_up_together(
    sender: Sender, server: ManagementServer
) -> None:
    server.stop()
    for n in range(50):
        sender.send(f"t{n}", server.url, vm=f"vm{n % 7}")
    sender.own += 101
    sender.send("young", server.url, vm="vm0")
    for n in range(50):
        sender.wait(f"t{n}", "given_up")
    server.start()
    sender.wait("young", "delivered")
    assert sender.delivery.owed() == 0


def test_asked_for_again_it_is_sent_at_once_whatever_the_pause(sender: Sender, server: ManagementServer) -> None:
    server.stop()
    sender.send("t1", server.url)
    wait_for(lambda: attempts(sender, "t1") >= 5, timeout_s=20, what="a long pause")
    server.start()
    began = time.monotonic()
    sender.delivery.put(sender.journal.owe_again("t1"))
    sender.wait("t1", "delivered")
    assert time.monotonic() - began < 10
    sender.delivery.put(sender.journal.owe_again("t1"))
    server.wait("t1", 10, attempt=2)


def attempts(sender: Sender, task_uuid: str) -> int:
    task = sender.journal.find(task_uuid)
    return 0 if task is None else task.attempts


@pytest.mark.slow
@pytest.mark.slow
def test_ten_thousand_owed_callbacks_cost_little_memory_and_go_out_in_order(tmp_path: Path) -> None:
    first = Sender(tmp_path)
    server = ManagementServer()
    server.start()
    server.stop()
    reply = b'{"filler": "%s"}' % (b"x" * 4000)

    def finish_all(vm: int) -> None:
        for n in range(vm, 10_000, 100):
            first.finish(f"t{n}", server.url, f"vm{vm}", reply)

    with ThreadPoolExecutor(50) as lanes:
        list(lanes.map(finish_all, range(100)))
    owed = first.journal.owed()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for one in owed:
        first.delivery.put(one)
    # Which VM's first callback is tried while the server is away depends on how fast they came in.
    wait_for(lambda: sum(attempts(first, f"t{vm}") for vm in range(100)) >= 2, timeout_s=10, what="attempts")
    assert first.delivery.owed() == 10_000
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 10_000, f"{grown_kib} KiB for callbacks of 40 MB"
    assert delivery_threads() <= 32
    server.start()
    first.delivery.put(first.journal.owe_again("t0"))
    wait_for(lambda: first.delivery.owed() == 0, timeout_s=120, what="all callbacks")
    order = [int(callback.task_uuid[1:]) for callback in server.callbacks()]
    for vm in range(100):
        mine = [n for n in order if n % 100 == vm]
        assert mine == sorted(mine)
    assert len(set(order)) == 10_000
    first.close()
    server.stop()


def test_no_thread_is_left_after_stop(tmp_path: Path, server: ManagementServer) -> None:
    threads = {thread for thread in threading.enumerate() if not thread.name.startswith("Thread-")}
    made = Sender(tmp_path)
    dead = Dead()
    for n in range(20):
        made.send(f"t{n}", server.url if n % 2 else dead.url, vm=f"vm{n}")
    made.wait("t1", "delivered")
    made.close()
    dead.close()

    def left() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if not t.name.startswith("Thread-")} - threads

    wait_for(lambda: not left(), timeout_s=5, what="threads to end")


class Hanging:
    """Callbacks whose exchanges end when they are let go, whatever their time is."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.closed = 0

    def open(self, url: str, client: str) -> "Hanging":
        return self

    def post(self, url: str, body: bytes | None, headers: object, timeout_s: float) -> tuple[int | None, str]:
        self.go_on.wait(30)
        return 200, "HTTP 200"

    def close(self) -> None:
        self.closed += 1


def test_a_receiver_has_one_share_however_it_is_spelled(tmp_path: Path) -> None:
    callbacks = Hanging()
    sender = Sender(tmp_path, callbacks=callbacks)
    urls = ["http://receiver/", "HTTP://Receiver:80/a", "http://receiver.", "http://receiver:/b?c"]
    owed = [sender.finish(f"t{n}", url, vm=f"vm{n}") for n, url in enumerate(urls)]
    sender.delivery.put_missing(owed)
    (known,) = sender.delivery.backlog()
    assert (known.destination, known.owed) == ("http://receiver:80 of 127.0.0.1", len(urls))
    callbacks.go_on.set()
    sender.close()


def test_receivers_of_one_client_on_many_ports_leave_the_others_their_threads(
    tmp_path: Path, server: ManagementServer
) -> None:
    sender = Sender(tmp_path, timeout_s=60.0)
    with BadReceiver("dribbles its answer", ports=64) as bad:
        for n, url in enumerate(bad.urls):
            sender.send(f"bad{n}", url, vm=f"bad{n}")
        wait_for(lambda: bad.open >= 16, timeout_s=5, what="the bad receivers to have their threads")
        began = time.monotonic()
        for n in range(40):
            url = server.url.replace("127.0.0.1", "localhost")
            owed = sender.finish(f"t{n}", url, vm=f"vm{n}")
            sender.delivery.put(msgspec.structs.replace(owed, client="127.0.0.9"))
        for n in range(40):
            sender.wait(f"t{n}", "delivered")
        assert time.monotonic() - began < 30
        assert bad.accepted <= 16
    sender.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bad_receivers_are_tried_again_and_a_good_one_has_its_callbacks(
    tmp_path: Path, server: ManagementServer, kind: str
) -> None:
    sender = Sender(tmp_path, timeout_s=0.5)
    with BadReceiver(kind, ports=32) as bad:
        for n, url in enumerate(bad.urls):
            sender.send(f"bad{n}", url, vm=f"bad{n}")
        for n in range(10):
            sender.send(f"t{n}", server.url, vm=f"vm{n}")
        for n in range(10):
            sender.wait(f"t{n}", "delivered")
        wait_for(lambda: attempts(sender, "bad0") >= 2, timeout_s=20, what="a second attempt")
        assert all(sender.state(f"bad{n}") == "finished" for n in range(32))
    sender.close()


def test_an_exchange_over_its_time_counts_as_stalled_and_does_not_keep_the_agent(tmp_path: Path) -> None:
    hanging = Hanging()
    sender = Sender(tmp_path, timeout_s=0.2, callbacks=hanging)
    sender.send("t1", "http://127.0.0.1:1/")
    wait_for(lambda: sender.delivery.stalled_s() > 0.3, timeout_s=5, what="the stall to be told")
    began = time.monotonic()
    sender.delivery.stop(0.1)
    assert time.monotonic() - began < 20
    hanging.go_on.set()
    wait_for(lambda: not delivery_threads(), timeout_s=5, what="the thread to end")
    assert sender.delivery.stalled_s() == 0.0
    sender.journal.stop()


def test_a_client_that_takes_no_callbacks_gets_no_more_tasks_and_others_do(tmp_path: Path) -> None:
    sender = Sender(tmp_path, max_owed_per_client=3, max_owed=5)
    url = "http://127.0.0.1:1/"

    def owe(task: str, client: str) -> None:
        sender.delivery.put(msgspec.structs.replace(sender.finish(task, url, vm=task), client=client))

    for n in range(3):
        sender.delivery.check_room("127.0.0.1")
        owe(f"a{n}", "127.0.0.1")
    with pytest.raises(AgentError) as caught:
        sender.delivery.check_room("127.0.0.1")
    assert caught.value.code is Code.QUEUE_FULL
    assert "3 callbacks" in caught.value.message
    for n in range(2):
        sender.delivery.check_room("127.0.0.2")
        owe(f"b{n}", "127.0.0.2")
    with pytest.raises(AgentError):
        sender.delivery.check_room("127.0.0.3")
    sender.close()
