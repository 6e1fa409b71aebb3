"""What a request may cost: no more than in proportion to what was sent, and never all of it for one."""

import itertools
import json
import socket
import time
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from kvmagent.api.listener import Listener
from kvmagent.api.security import Security
from kvmagent.api.wire import decode_request, encode_error
from kvmagent.audit import Refusals
from kvmagent.logs import format_fields
from kvmagent.model.command import Command
from kvmagent.model.errors import AgentError, Code
from kvmagent.plugins import load_plugins
from kvmagent.recorder import Recorder
from kvmagent.settings import HttpSection, SecuritySection
from tests.fakes.agent import MIB, carry_out, make_domain, make_node
from tests.lab.domainxml import GuestSpec

LONG = "x" * 1_000_000


class Anything(msgspec.Struct):
    name: str = ""
    deep: list[dict[str, list[str]]] = []


def refusal(body: bytes, shape: type[msgspec.Struct] = Anything) -> AgentError:
    with pytest.raises(AgentError) as caught:
        decode_request(body, shape)
    return caught.value


def test_a_key_twice_among_many_is_found_as_fast_as_the_body_is_read() -> None:
    keys = ", ".join(f'"{n}": 0' for n in range(90_000))
    began = time.monotonic()
    assert refusal(f'{{{keys}, "89999": 1}}'.encode()).code is Code.DUPLICATE_KEY
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "body",
    [{"name": LONG}, {"deep": [{"a": ["b", LONG]}]}, {"deep": [{LONG: []}]}],
    ids=["field", "in a list", "key"],
)
def test_no_string_of_a_request_is_longer_than_a_maximum(body: dict[str, object]) -> None:
    error = refusal(json.dumps(body).encode())
    assert (error.code, error.details["field"]) == (Code.OUT_OF_RANGE, next(iter(body)))
    assert len(error.message) < 200


def test_every_declared_string_has_a_maximum() -> None:
    for plugin in load_plugins(("vm", "host")):
        declared = [*plugin.commands, *plugin.queries]
        for one in declared:
            for field in msgspec.structs.fields(one.request):
                body = {field.encode_name: LONG} | ({"vmUuid": "vm"} if isinstance(one, Command) else {})
                body |= {field.encode_name: LONG}
                assert len(encode_error(refusal(json.dumps(body).encode(), one.request))) < 3000


@pytest.mark.parametrize("body", [{LONG: 1}, {"name": [LONG]}], ids=["unknown field", "wrong type"])
def test_what_a_client_sent_is_repeated_only_in_part(body: dict[str, object]) -> None:
    class Strict(msgspec.Struct, forbid_unknown_fields=True):
        name: str = ""

    error = refusal(json.dumps(body).encode(), Strict)
    assert len(encode_error(error)) < 3000
    assert len(format_fields(error=error.message, remedy=error.remedy)) < 3000


def test_two_addresses_of_one_host_do_not_take_all_connections() -> None:
    http = HttpSection(port=1, max_connections=100, max_connections_per_client=100)
    everybody = Security(SecuritySection(allowed_clients=("0.0.0.0/0", "::/0")))
    listener = Listener(http, everybody, lambda *_: (b"", [], b""), Recorder(), Refusals())

    def enter_all(prefix: str) -> int:
        for n in range(1, 200):
            try:
                listener.enter(*listener.find_share(f"{prefix}{n}"))
            except AgentError:
                return n - 1
        return 200

    assert enter_all("127.0.0.") == 50
    assert enter_all("2001:db8::") == 25
    listener.enter(*listener.find_share("192.0.2.1"))
    listener.leave(listener.find_share("127.0.0.1")[0])


@pytest.mark.parametrize("stays", [True, False])
def test_memory_is_returned_after_a_large_answer_also_if_its_client_leaves(stays: bool) -> None:
    http, large = HttpSection(port=1), (b"200 OK", list[tuple[bytes, bytes]](), bytes(2**24))
    listener = Listener(http, Security(SecuritySection()), lambda *_: large, Recorder(), Refusals(), path="/unused")
    ours, theirs = socket.socketpair()
    connection = listener._connect(ours, "")
    theirs.sendall(b"GET /vms HTTP/1.1\r\nHost: a\r\n\r\n")
    assert connection.communicate()
    assert connection.is_writing
    assert not listener.sent_large
    while stays and connection.is_writing:
        theirs.recv(2**20)
        connection.communicate()
    theirs.close()
    connection.close()
    assert listener.sent_large


def test_one_client_does_not_take_all_memory_for_requests_and_answers() -> None:
    http = HttpSection(port=1, max_body_bytes=2**20)
    listener = Listener(http, Security(SecuritySection()), lambda *_: (b"", [], b""), Recorder(), Refusals())

    def hold_all(key: str) -> int:
        for n in itertools.count():
            try:
                listener.count_partial_bytes(key, 0, http.max_body_bytes)
            except AgentError:
                listener.count_partial_bytes(key, http.max_body_bytes, 0)  # its connection is closed
                return n

    # Half of all, then half of what that leaves, and so on.
    assert [hold_all(f"192.0.2.{n}") for n in range(1, 5)] == [33, 16, 8, 4]
    for _ in range(33):
        listener.count_partial_bytes("192.0.2.1", http.max_body_bytes, 0)
    assert hold_all("192.0.2.5") >= 16


def test_no_list_is_made_of_more_dimms_than_any_vm_can_have(tmp_path: Path) -> None:
    """16 TiB in dimms of one block each: the largest total in such took minutes, and gigabytes of the agent's."""
    node = make_node(tmp_path, make_domain(GuestSpec(name="vm1")))
    plug = {"vmUuid": "vm1", "dimmSize": 128 * MIB}
    carry_out(node, "HotPlugMemory", "t0", memorySize=2**40, **plug)
    tracemalloc.start()
    try:
        reply = carry_out(node, "HotPlugMemory", memorySize=2**44, **plug)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (reply["outcome"], reply["errorCode"]) == ("refused", "SLOTS_EXHAUSTED")
    assert "131070 dimms of 128 MiB" in reply["error"]
    assert peak < 2 * MIB
