"""The load: clients that keep their connections, and the receiver of their callbacks, in one thread on one selector.

    client: POST command -> answer ----.
    receiver: callback  ---------------+--> both are there: the client's next command

Built to cost little beside what it measures, about a tenth of a millisecond a command: requests are made beforehand,
answers and callbacks are looked at only as far as framing, status and outcome need it. Times are of the monotonic
clock: from just before the POST is written until its answer, or its callback, has been read to the last byte.
"""

from __future__ import annotations

import multiprocessing
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

LOOPBACK = "127.0.0.1"
#: Nothing that is measured takes so long; a lost callback must not hang the benchmark.
SILENCE_S = 60.0
_BACKLOG = 1024
_TAKEN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TASK = re.compile(rb"\r\ntaskuuid: *[0-9a-f]+-([0-9]+)", re.IGNORECASE)
_OUTCOME = re.compile(rb'"outcome": ?"([a-z]+)"')


@dataclass(frozen=True)
class Command:
    """One command as it is sent: its path and its JSON body."""

    path: str
    body: bytes


@dataclass
class Result:
    """What came of a run: for each command the milliseconds to its answer and to its callback; the run's seconds.

    `outcomes` counts the callbacks by what they say. `connections` is how many callback connections were opened.
    """

    elapsed_s: float
    answer_ms: list[float]
    callback_ms: list[float]
    outcomes: Counter[str] = field(default_factory=Counter)
    connections: int = 0

    @property
    def per_s(self) -> float:
        """Commands a second, from the first POST to the last callback."""
        return len(self.callback_ms) / self.elapsed_s


def run_load(port: int, commands: Sequence[Command], *, clients: int, run: str) -> Result:
    """Send the commands by so many clients, each one at a time, in a process of its own; return what came of it.

    `run` is hexadecimal, and makes the task ids of this run different from those of another.

    Raises:
        RuntimeError: an answer was not 200, or a connection ended.
        TimeoutError: no answer and no callback for SILENCE_S.
    """
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_generate, (port, commands, clients, run))


class Receiver:
    """Takes callbacks on the thread that calls `take`; listens from the beginning."""

    def __init__(self) -> None:
        self._load = _Load(0, [], "0")

    @property
    def url(self) -> str:
        """Where callbacks go."""
        return self._load.url

    def take(self, count: int) -> float:
        """Take the callbacks of so many tasks; return the seconds from the first connection to the last callback.

        Raises:
            TimeoutError: none came for SILENCE_S.
        """
        return self._load.take(count)


def _generate(port: int, commands: Sequence[Command], clients: int, run: str) -> Result:
    return _Load(port, commands, run).go(clients)


@dataclass
class _Peer:
    """One connection: a client's, with the number of its command under way, or one that callbacks come over."""

    socket: socket.socket
    is_client: bool
    received: bytes = b""
    command: int = -1
    has_answer: bool = True
    has_callback: bool = True


class _Load:
    def __init__(self, port: int, commands: Sequence[Command], run: str) -> None:
        self._port = port
        self._listener = socket.create_server((LOOPBACK, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._peers: dict[int, _Peer] = {}
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}/callback"
        self._requests = [_format_request(port, command, f"{run}-{n}", self.url) for n, command in enumerate(commands)]
        self._sent_at = [0.0] * len(commands)
        self._waiting: dict[int, _Peer] = {}
        self._others: set[bytes] = set()
        self._next = 0
        self._done = 0
        self._result = Result(0.0, [0.0] * len(commands), [0.0] * len(commands))

    def go(self, clients: int) -> Result:
        peers = [self._add(socket.create_connection((LOOPBACK, self._port)), is_client=True) for _ in range(clients)]
        began = time.perf_counter()
        for peer in peers:
            self._send_next(peer)
        while self._done < len(self._requests):
            self._wait(self._done, len(self._requests))
        self._result.elapsed_s = time.perf_counter() - began
        self._close()
        return self._result

    def take(self, count: int) -> float:
        began: float | None = None
        while len(self._others) < count:
            self._wait(len(self._others), count)
            began = began or time.perf_counter()
        self._close()
        return time.perf_counter() - (began or 0.0)

    def _wait(self, done: int, wanted: int) -> None:
        events = self._poll.poll(SILENCE_S)
        if not events:
            raise TimeoutError(f"{done} of {wanted} callbacks came, then none for {SILENCE_S} s")
        for number, _ in events:
            if number == self._listener.fileno():
                self._result.connections += 1
                self._add(self._listener.accept()[0], is_client=False)
            else:
                self._receive(self._peers[number])

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.socket.close()
        self._listener.close()

    def _add(self, connection: socket.socket, *, is_client: bool) -> _Peer:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = self._peers[connection.fileno()] = _Peer(connection, is_client)
        self._poll.register(connection.fileno(), select.EPOLLIN)
        return peer

    def _send_next(self, peer: _Peer) -> None:
        if self._next == len(self._requests):
            return
        peer.command, peer.has_answer, peer.has_callback = self._next, False, False
        self._next += 1
        self._waiting[peer.command] = peer
        self._sent_at[peer.command] = time.perf_counter()
        peer.socket.sendall(self._requests[peer.command])

    def _receive(self, peer: _Peer) -> None:
        data = peer.socket.recv(65536)
        now = time.perf_counter()
        if not data:
            if peer.is_client and self._done < len(self._requests):
                raise RuntimeError("the agent closed a client's connection")
            self._poll.unregister(peer.socket.fileno())
            del self._peers[peer.socket.fileno()]
            peer.socket.close()
            return
        peer.received += data
        while (message := _take_message(peer)) is not None:
            self._take_answer(peer, message, now) if peer.is_client else self._take_callback(peer, message, now)

    def _take_answer(self, peer: _Peer, answer: bytes, now: float) -> None:
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"command {peer.command} was answered {answer.decode(errors='replace')}")
        self._result.answer_ms[peer.command] = (now - self._sent_at[peer.command]) * 1000
        peer.has_answer = True
        self._go_on(peer)

    def _take_callback(self, peer: _Peer, callback: bytes, now: float) -> None:
        peer.socket.sendall(_TAKEN)
        task, outcome = _TASK.search(callback), _OUTCOME.search(callback)
        client = self._waiting.pop(int(task[1]), None) if task else None
        if client is None:
            self._others.add(task[1] if task else b"")
            return  # the second copy of one that was sent twice, or of a task of another run
        self._result.callback_ms[client.command] = (now - self._sent_at[client.command]) * 1000
        self._result.outcomes[outcome[1].decode() if outcome else "none"] += 1
        self._done += 1
        client.has_callback = True
        self._go_on(client)

    def _go_on(self, client: _Peer) -> None:
        if client.has_answer and client.has_callback:
            self._send_next(client)


def _take_message(peer: _Peer) -> bytes | None:
    """Return the next whole message of a connection; every one has a Content-Length, or no body."""
    end = peer.received.find(b"\r\n\r\n")
    if end < 0:
        return None
    length = _LENGTH.search(peer.received, 0, end)
    whole = end + 4 + (int(length[1]) if length else 0)
    if len(peer.received) < whole:
        return None
    message, peer.received = peer.received[:whole], peer.received[whole:]
    return message


def _format_request(port: int, command: Command, task_uuid: str, callback_url: str) -> bytes:
    head = (
        f"POST {command.path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(command.body)}\r\ntaskuuid: {task_uuid}\r\ncallbackurl: {callback_url}\r\n\r\n"
    )
    return head.encode() + command.body
