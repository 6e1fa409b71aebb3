"""One exchange with a receiver: whatever it does, it ends in time."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import CallbackSection, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient, find_receiver
from tests.lab.pki import Authority
from tests.lab.receivers import KINDS, BadReceiver
from tests.lab.server import ManagementServer

TIMEOUT_S = 0.7
#: What a loaded machine may take beside it.
GRACE_S = 15.0
LARGE = b" " * 2**23


def post(callbacks: CallbackClient, url: str, body: bytes = b"{}") -> tuple[int | None, str, float]:
    """Exchange once; return the status, the words, and how long it took."""
    channel = callbacks.open(url, "127.0.0.1")
    started = time.monotonic()
    status, words = channel.post(url, body, {"taskuuid": "t"}, TIMEOUT_S)
    channel.close()
    return status, words, time.monotonic() - started


@pytest.fixture
def callbacks() -> CallbackClient:
    return CallbackClient([parse_callback_rule("caller")], CallbackSection())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_ends_in_its_time_whatever_the_receiver_does(callbacks: CallbackClient, kind: str) -> None:
    with BadReceiver(kind) as receiver:
        status, words, took_s = post(callbacks, receiver.urls[0], LARGE if kind == "reads nothing" else b"{}")
    assert status is None or status >= 500
    assert words
    assert took_s < TIMEOUT_S + GRACE_S


def test_a_kept_connection_has_the_whole_time_for_each_exchange(callbacks: CallbackClient) -> None:
    with ManagementServer() as server:
        channel = callbacks.open(server.url, "127.0.0.1")
        for n in range(3):
            assert channel.post(server.url, b"{}", {"taskuuid": f"t{n}"}, TIMEOUT_S) == (200, "HTTP 200")
            time.sleep(TIMEOUT_S / 2)
        channel.close()


def test_a_tls_receiver_that_dribbles_ends_in_its_time(tmp_path: Path) -> None:
    own = Authority(tmp_path)
    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(server_ca=str(own.ca_file)))
    callbacks.load()
    answer = itertools.chain([b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"], itertools.repeat(b" "))
    with dribbling(answer, pause_s=0.1, context=own.server(own.issue("127.0.0.1"), clients=False)) as url:
        status, words, took_s = post(callbacks, url)
    assert (status, took_s < TIMEOUT_S + GRACE_S) == (None, True), words


@pytest.mark.parametrize("is_tls", [False, True])
def test_head_and_body_have_the_time_together(tmp_path: Path, *, is_tls: bool) -> None:
    """Each comes in less than the time, read by read and as a whole; both do not."""
    own = Authority(tmp_path)
    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(server_ca=str(own.ca_file)))
    callbacks.load()
    context = own.server(own.issue("127.0.0.1"), clients=False) if is_tls else None
    answer = [b"HTTP/1.1 ", b"200 OK\r\n", b"Content-Length: 4\r\n\r\n", b" ", b" ", b"{", b"}"]
    with dribbling(answer, pause_s=TIMEOUT_S / 4, context=context) as url:
        assert post(callbacks, url)[0] is None
    with dribbling(answer, pause_s=0, context=context) as url:
        channel = callbacks.open(url, "127.0.0.1")
        assert channel.post(url, b"{}", {"taskuuid": "t"}, GRACE_S) == (200, "HTTP 200")
        channel.close()


def test_a_handshake_that_does_not_end_is_given_up_in_time(tmp_path: Path) -> None:
    own = Authority(tmp_path)
    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(server_ca=str(own.ca_file)))
    callbacks.load()
    with BadReceiver("dribbles its answer") as receiver:
        status, words, took_s = post(callbacks, receiver.urls[0].replace("http:", "https:"))
    assert (status, took_s < TIMEOUT_S + GRACE_S) == (None, True), words


class dribbling:  # reads as a statement
    """A receiver that takes its time between the pieces of its answer, over TLS where it has a context."""

    def __init__(self, pieces: Iterable[bytes], *, pause_s: float, context: ssl.SSLContext | None = None) -> None:
        self._pieces, self._pause_s, self._context = pieces, pause_s, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> str:
        self._thread.start()
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}/"

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        with contextlib.suppress(OSError):
            client = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            with client:
                # All of it: a connection that is closed with bytes unread is reset, its answer with it.
                received = b""
                while not received.endswith(b"{}") and (part := client.recv(2**16)):
                    received += part
                for piece in self._pieces:
                    client.sendall(piece)
                    if self._stop.wait(self._pause_s):
                        return


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """A resolver hangs until this is set."""
    event = threading.Event()
    yield event
    event.set()


def test_a_resolver_that_hangs_ends_an_exchange_in_its_time(hanging: threading.Event) -> None:
    def resolve(_host: str) -> list[str]:
        hanging.wait()
        return []

    callbacks = CallbackClient([parse_callback_rule("caller")], CallbackSection(), resolve=resolve)
    status, words, took_s = post(callbacks, "http://slow.example/")
    assert (status, took_s < TIMEOUT_S + GRACE_S) == (None, True), words


def test_names_of_one_client_that_hang_leave_another_client_its_lookups(hanging: threading.Event) -> None:
    def resolve(host: str) -> list[str]:
        if host.startswith("slow"):
            hanging.wait()
        return ["127.0.0.1"]

    callbacks = CallbackClient([parse_callback_rule("127.0.0.1")], CallbackSection(), resolve=resolve)
    askers = [
        threading.Thread(target=callbacks.check, args=(f"http://slow{n}.example/", "192.0.2.1")) for n in range(40)
    ]
    for asker in askers:
        asker.start()
    with ManagementServer() as server:
        url = server.url.replace("127.0.0.1", "quick.example")
        channel = callbacks.open(url, "192.0.2.2")
        assert channel.post(url, b"{}", {"taskuuid": "t"}, 5) == (200, "HTTP 200")
        channel.close()
    for asker in askers:
        asker.join()


def test_an_address_that_takes_no_connection_leaves_the_next_one_its_time() -> None:
    with ManagementServer() as server, socket.socket() as full, socket.socket() as first, socket.socket() as second:
        # On another loopback address, with a queue of connects that is full: no further connect is answered.
        full.bind(("127.0.0.2", server.port))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", server.port))
        callbacks = CallbackClient(
            [parse_callback_rule("127.0.0.0/8")], CallbackSection(), resolve=lambda _: ["127.0.0.2", "127.0.0.1"]
        )
        url = server.url.replace("127.0.0.1", "two.example")
        channel = callbacks.open(url, "127.0.0.1")
        assert channel.post(url, b"{}", {"taskuuid": "t"}, 2) == (200, "HTTP 200")
        channel.close()


class Answering:
    """A receiver whose answers to each request on a connection are given: bytes, and how long it waits between them."""

    def __init__(self, *answers: tuple[bytes | float, ...]) -> None:
        self._answers = answers
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                with client, contextlib.suppress(OSError):
                    for answer in self._answers:
                        head = b""
                        while not head.endswith(b"{}") and (part := client.recv(65536)):
                            head += part
                        for part in answer:
                            time.sleep(part) if isinstance(part, float) else client.sendall(part)

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(60)


TAKEN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
NOT_TAKEN = TAKEN.replace(b"200 OK", b"500 No")
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


def exchange(callbacks: CallbackClient, url: str, times: int = 1) -> list[int | None]:
    channel = callbacks.open(url, "127.0.0.1")
    try:
        return [channel.post(url, b"{}", {"taskuuid": "t"}, 60.0)[0] for _ in range(times)]
    finally:
        channel.close()


def test_an_interim_answer_is_none_and_the_answer_is_no_other_request_s(callbacks: CallbackClient) -> None:
    """Else a callback would count as delivered by the answer that its predecessor got late."""
    with Answering((INTERIM, 0.2, TAKEN), (INTERIM, NOT_TAKEN)) as receiver:
        assert exchange(callbacks, receiver.url, times=2) == [200, 500]


def test_a_connection_that_becomes_another_protocol_s_is_not_used_again(callbacks: CallbackClient) -> None:
    with Answering((b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 0.2, TAKEN), (NOT_TAKEN,)) as receiver:
        assert exchange(callbacks, receiver.url, times=2) == [101, 101]


def test_a_receiver_that_sends_interim_answers_alone_keeps_no_processor(callbacks: CallbackClient) -> None:
    with Answering((INTERIM * 10_000,)) as receiver:
        assert exchange(callbacks, receiver.url) == [None]


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, tuple[str, str, int]]:
    """A URL in any spelling, and where it leads."""
    scheme, usual = draw(st.sampled_from([("http", 80), ("https", 443)]))
    host = draw(st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z0-9]{1,9}){0,3}", fullmatch=True))
    port = draw(st.sampled_from([usual, 8080]))
    ports = [f":{port}", f":0{port}", *(["", ":"] if port == usual else [])]
    shown = f"{scheme}://{host}{draw(st.sampled_from(['', '.']))}"
    cased = "".join(draw(st.sampled_from([one, one.upper()])) for one in shown)
    path = draw(st.sampled_from(["", "/", "/Done?task=1"]))
    return f"{cased}{draw(st.sampled_from(ports))}{path}", (scheme, host, port)


@given(spelling=spellings())
def test_a_receiver_is_the_same_however_it_is_spelled(spelling: tuple[str, tuple[str, str, int]]) -> None:
    url, receiver = spelling
    assert find_receiver(url) == receiver


@given(address=st.ip_addresses(v=6))
def test_an_ipv6_receiver_is_the_same_however_it_is_spelled(address: ipaddress.IPv6Address) -> None:
    spelled = {find_receiver(f"http://[{text}]/") for text in (str(address), address.exploded, str(address).upper())}
    assert spelled == {("http", str(address.ipv4_mapped or address), 80)}


@given(address=st.ip_addresses(v=4))
def test_an_ipv4_receiver_is_the_same_in_a_mapped_address(address: ipaddress.IPv4Address) -> None:
    spelled = {find_receiver(f"http://{text}/") for text in (str(address), f"{address}.", f"[::ffff:{address}]")}
    assert spelled == {("http", str(address), 80)}


@pytest.mark.parametrize("url", ["http://./", "http://.:80/done", "https://..", "http://:80/", "http:///done"])
def test_a_url_without_a_host_leads_nowhere(url: str) -> None:
    with pytest.raises(AgentError) as caught:
        find_receiver(url)
    assert caught.value.code is Code.BAD_CALLBACK_URL


def test_a_connection_that_the_receiver_closes_is_opened_anew(callbacks: CallbackClient) -> None:
    last = TAKEN.replace(b"Length: 2", b"Length: 2\r\nConnection: close")
    with Answering((last, 0.2, NOT_TAKEN)) as receiver:
        assert exchange(callbacks, receiver.url, times=2) == [200, 200]


@pytest.mark.parametrize("head", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
def test_an_answer_that_is_cut_off_is_none(callbacks: CallbackClient, head: bytes) -> None:
    with Answering((b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n2\r\n{}",)) as receiver:
        assert exchange(callbacks, receiver.url) == [None]


def test_a_header_arrives_as_it_is_or_nothing_is_sent(callbacks: CallbackClient) -> None:
    """Whatever a report of a plugin says: it is no other header, and no other request."""
    with ManagementServer() as server:
        channel = callbacks.open(server.url, "127.0.0.1")

        @settings(max_examples=50, deadline=None)
        @given(st.text(max_size=20))
        def check(value: str) -> None:
            before = len(server.callbacks("t"))
            status, _ = channel.post(server.url, b"{}", {"taskuuid": "t", "commandpath": value}, 60.0)
            came = server.callbacks("t")[before:]
            assert status == (200 if came else None)
            if came:
                assert [one.headers["commandpath"] for one in came] == [value.strip(" ")]
                assert came[0].headers["host"] == f"127.0.0.1:{server.port}"

        check()
        channel.close()
