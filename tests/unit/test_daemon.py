"""The process of the agent ends when it is told to."""

import threading
import time

from kvmagent.cli.daemon import end_in_time


def test_a_process_that_does_not_stop_is_ended_in_time_although_its_log_hangs_too() -> None:
    ended, go_on = threading.Event(), threading.Event()
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    began = time.monotonic()
    end_in_time(0.2, lambda: bool(go_on.wait(30)) and None, end)
    assert ended.wait(10)
    assert 0.2 <= time.monotonic() - began < 10
    assert statuses == [1]
    go_on.set()
