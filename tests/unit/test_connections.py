"""Which connections no worker has, and the end of waiting for them."""

import socket
import threading

from kvmagent.api.connections import Connections


def test_a_stop_waits_for_no_look_at_those_that_waited_too_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = Connections(listening, refuse, refuse, idle_s=10)
        running = threading.Thread(target=connections.run, args=(3600.0,), daemon=True)
        running.start()
        stopping = threading.Thread(target=connections.stop, daemon=True)
        stopping.start()
        for thread in (stopping, running):
            thread.join(60)
            assert not thread.is_alive()
        connections.close()


def refuse(*_given: object) -> None:
    raise AssertionError("nobody comes")
