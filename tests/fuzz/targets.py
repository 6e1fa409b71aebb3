"""What is fuzzed: each target takes bytes from outside, and ends only in ways that its callers know.

Used by hypothesis in the tests, and by the coverage-guided run of `make fuzz`.
"""

import contextlib
from collections.abc import Callable

import msgspec
from lxml import etree

from kvmagent.api.framing import Framing, Request
from kvmagent.api.wire import decode_request, encode, parse_callback_url, parse_task_uuid
from kvmagent.hypervisor.domainxml import is_agent_connected, parse_definition
from kvmagent.model.errors import AgentError
from kvmagent_plugins.vm.requests import HotPlugMemoryRequest

_LIMIT = 4096


def fuzz_wire(data: bytes) -> None:
    """A body is a request that comes out again as it went in, or an AgentError with a remedy."""
    try:
        request = decode_request(data, HotPlugMemoryRequest)
    except AgentError as error:
        _check(error)
    else:
        assert msgspec.json.decode(encode(request), type=HotPlugMemoryRequest) == request
    text = data.decode("latin-1")
    for parse in (parse_task_uuid, parse_callback_url):
        try:
            assert parse(text) == text
        except AgentError as error:
            _check(error)


def fuzz_framing(data: bytes) -> None:
    """However a stream is cut into pieces, the same requests come out, none longer than the limits."""
    assert _frames(data, len(data) or 1) == _frames(data, 1 + len(data) % 7)


def fuzz_domainxml(data: bytes) -> None:
    """XML is a definition, or the error that its docstring names."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_definition, is_agent_connected):
        with contextlib.suppress(ValueError, KeyError, etree.XMLSyntaxError):
            parse(text)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": fuzz_wire,
    "framing": fuzz_framing,
    "domainxml": fuzz_domainxml,
}


def _frames(data: bytes, piece: int) -> list[Request | str]:
    framing, found = Framing(_LIMIT), list[Request | str]()
    try:
        for start in range(0, len(data), piece):
            framing.feed(data[start : start + piece])
            while (request := framing.take()) is not None:
                assert request.path.startswith("/")
                assert len(request.body) <= _LIMIT
                found.append(request)
    except AgentError as error:
        _check(error)
        found.append(error.code)
    return found


def _check(error: AgentError) -> None:
    assert error.message
    assert error.remedy
    assert 400 <= error.status < 500
    encode({"error": error.message, "details": error.details})
