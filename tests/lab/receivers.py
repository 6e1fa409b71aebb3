"""Receivers of callbacks that are bad in every way that is known: one behaviour each, on as many ports as wanted.

    with BadReceiver("dribbles its answer", ports=32) as receiver:
        ... callbackurl: receiver.urls[0] ...

    KINDS    name -> what one connection does, until its client leaves or the receiver stops

None of them ever takes a callback: what a test finds delivered was not delivered here. Standard library alone, so that
any suite can use it.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType

LOOPBACK = "127.0.0.1"
#: How long a dribbling receiver waits between two bytes.
DRIBBLE_S = 0.2
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"

#: What a receiver does with one connection; returns when it is done with it, or when the event is set.
Behaviour = Callable[[socket.socket, threading.Event], None]


def _read_request(client: socket.socket) -> None:
    client.settimeout(5.0)
    with contextlib.suppress(TimeoutError):
        client.recv(65536)
    client.settimeout(None)


def _dribble(client: socket.socket, stopping: threading.Event, first: bytes, filler: bytes) -> None:
    _read_request(client)
    _go_on_dribbling(client, stopping, first, filler)


def _go_on_dribbling(client: socket.socket, stopping: threading.Event, first: bytes, filler: bytes) -> None:
    client.sendall(first)
    while not stopping.wait(DRIBBLE_S):
        client.sendall(filler)


def _dribble_all(client: socket.socket, stopping: threading.Event) -> None:
    _read_request(client)
    for byte in _HEAD[:-4]:
        client.sendall(bytes([byte]))
        if stopping.wait(DRIBBLE_S / 10):
            return
    _go_on_dribbling(client, stopping, _HEAD[-4:], b" ")


def _repeat(client: socket.socket, stopping: threading.Event, first: bytes, filler: bytes) -> None:
    _read_request(client)
    client.sendall(first)
    while not stopping.is_set():
        client.sendall(filler)


def _reset(client: socket.socket) -> None:
    # With a linger time of 0, closing sends RST.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _say_nothing(client: socket.socket, stopping: threading.Event) -> None:
    _read_request(client)
    stopping.wait()


def _read_nothing(_client: socket.socket, stopping: threading.Event) -> None:
    stopping.wait()


def _reset_at_once(client: socket.socket, _stopping: threading.Event) -> None:
    _reset(client)


def _reset_after_reading(client: socket.socket, _stopping: threading.Event) -> None:
    _read_request(client)
    _reset(client)


def _close_at_once(_client: socket.socket, _stopping: threading.Event) -> None:
    return


def _close_in_the_head(client: socket.socket, _stopping: threading.Event) -> None:
    _read_request(client)
    client.sendall(_HEAD[:20])


def _close_in_the_body(client: socket.socket, _stopping: threading.Event) -> None:
    _read_request(client)
    client.sendall(_HEAD + b"{")


def _speak_no_http(client: socket.socket, stopping: threading.Event) -> None:
    _read_request(client)
    client.sendall(b"220 mail.example ESMTP\r\n")
    stopping.wait(1.0)


def _fail(client: socket.socket, stopping: threading.Event) -> None:
    while not stopping.is_set():
        client.settimeout(0.2)
        try:
            if not client.recv(65536):
                return
        except TimeoutError:
            continue
        client.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n{}")


KINDS: Mapping[str, Behaviour] = MappingProxyType(
    {
        "dribbles its status line": lambda client, stop: _dribble(client, stop, b"HTTP/1.1 200 ", b"O"),
        "dribbles a header": lambda client, stop: _dribble(client, stop, b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        "dribbles its answer": lambda client, stop: _dribble(client, stop, _HEAD, b" "),
        "dribbles its head and its answer": _dribble_all,
        "dribbles 100 Continue": lambda client, stop: _dribble(client, stop, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "sends 100 Continue for ever": lambda client, stop: _repeat(
            client, stop, b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100
        ),
        "sends headers for ever": lambda client, stop: _repeat(client, stop, _HEAD[:17], b"X: x\r\n" * 100),
        "sends a chunked body for ever": lambda client, stop: _repeat(
            client, stop, b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100
        ),
        "says nothing": _say_nothing,
        "reads nothing": _read_nothing,
        "resets at once": _reset_at_once,
        "resets after reading": _reset_after_reading,
        "closes at once": _close_at_once,
        "closes inside the head": _close_in_the_head,
        "closes inside the body": _close_in_the_body,
        "speaks no HTTP": _speak_no_http,
        "fails": _fail,
    }
)


class BadReceiver:
    """Listens on `ports` ports of one address; each connection gets the behaviour of a kind. Threads: any."""

    def __init__(self, kind: str, *, ports: int = 1, address: str = LOOPBACK) -> None:
        self.kind = kind
        self._behave = KINDS[kind]
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._accepted = 0
        self._selector = selectors.DefaultSelector()
        self._listeners = [socket.create_server((address, 0), backlog=128) for _ in range(ports)]
        for listener in self._listeners:
            if kind == "reads nothing":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self._selector.register(listener, selectors.EVENT_READ)
        self.urls = [
            f"http://{address}:{listener.getsockname()[1]}/{kind.replace(' ', '-')}" for listener in self._listeners
        ]
        self._thread = threading.Thread(target=self._accept, name=f"receiver that {kind}", daemon=True)

    def __enter__(self) -> BadReceiver:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def accepted(self) -> int:
        """How many connections came in."""
        with self._lock:
            return self._accepted

    @property
    def open(self) -> int:
        """How many connections are open, as far as the receiver knows."""
        with self._lock:
            return len(self._clients)

    def stop(self) -> None:
        """Close every port and connection."""
        self._stopping.set()
        self._thread.join()
        self._selector.close()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            clients = dict(self._clients)
        for client, thread in clients.items():
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(timeout=0.05):
                listener = key.fileobj
                assert isinstance(listener, socket.socket)
                client, _address = listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,), name="a bad receiver", daemon=True)
                with self._lock:
                    self._accepted += 1
                    self._clients[client] = thread
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._behave(client, self._stopping)
        with self._lock:
            del self._clients[client]
        client.close()
