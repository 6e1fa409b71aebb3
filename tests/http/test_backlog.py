"""Many clients that connect at once."""

import select
import socket
from contextlib import ExitStack

from kvmagent.api.security import Security
from kvmagent.api.server import Server
from kvmagent.settings import HttpSection, SecuritySection
from tests.lab.agent import LOOPBACK, find_free_port

CLIENTS = 200
LIMIT_S = 5.0


def test_200_clients_that_connect_at_once_are_all_connected_before_one_is_served() -> None:
    """A connect beyond the backlog is dropped, and tried again by the kernel a second later: with nobody serving it
    would never come about."""
    port = find_free_port()
    server = Server(HttpSection(port=port, socket=""), Security(SecuritySection()), {})
    server.bind()
    with ExitStack() as stack, select.epoll() as poll:
        stack.callback(server.stop)
        for _ in range(CLIENTS):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((LOOPBACK, port))
            poll.register(client.fileno(), select.EPOLLOUT | select.EPOLLONESHOT)
        connected = 0
        while connected < CLIENTS and (events := poll.poll(LIMIT_S)):
            connected += sum(flags == select.EPOLLOUT for _, flags in events)
        assert connected == CLIENTS
