"""JSON in and out. Strict on the way in: what a request means must not depend on who parses it.

Refused beside what is no JSON: NaN and Infinity, a key twice, unknown fields, numbers as strings.
"""

import math
import re
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import msgspec
import simplejson

from kvmagent.logs import cut
from kvmagent.model.command import NO_CALLBACK
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.urls import shown_url

_TASK_UUID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Source: W3C Trace Context, traceparent: version, trace id, parent id, flags; of version 00 nothing follows.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{1,200})?"
)
_MAX_URL = 2048
# What simplejson takes for a byte order mark, too: another one, and the bytes of one that were encoded again.
_MORE_MARKS = ("\ufeff", "\u00ef\u00bb\u00bf")
# What a request's own limits leave open: no string of any field is longer.
_LONGEST_STRING = 4096
# An answer repeats no more than this of what was sent.
_LONGEST_MESSAGE = 1000
# Deeper than any command; past it the parser would run out of stack.
_MAX_DEPTH = 32
# Escapes that may stand for half a character only, which no UTF-8 can hold.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

RequestT = TypeVar("RequestT", bound=msgspec.Struct)


def parse_task_uuid(value: str | None) -> str:
    """Return the taskuuid header.

    Raises:
        AgentError: MISSING_TASK_UUID; BAD_TASK_UUID.
    """
    if not value:
        raise AgentError(Code.MISSING_TASK_UUID, "the request has no taskuuid header")
    if not _TASK_UUID.fullmatch(value):
        raise AgentError(Code.BAD_TASK_UUID, f"taskuuid must be 1 to 64 of A-Za-z0-9-_, got {_shown(value)}")
    return value


def parse_callback_url(value: str | None) -> str:
    """Return the callbackurl header: a URL, or NO_CALLBACK.

    Raises:
        AgentError: MISSING_CALLBACK_URL; BAD_CALLBACK_URL.
    """
    if not value:
        raise AgentError(Code.MISSING_CALLBACK_URL, "the request has no callbackurl header")
    if value == NO_CALLBACK:
        return value
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise AgentError(Code.BAD_CALLBACK_URL, f"callbackurl must be a URL, got {_shown(shown_url(value))}") from error
    plain = value.isascii() and value.isprintable() and " " not in value
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not plain or len(value) > _MAX_URL:
        raise AgentError(
            Code.BAD_CALLBACK_URL, f"callbackurl must be an http or https URL, got {_shown(shown_url(value))}"
        )
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise AgentError(Code.BAD_CALLBACK_URL, "callbackurl contains a user name, a password or a fragment")
    return value


def parse_traceparent(value: str | None) -> str:
    """Return the traceparent header; empty where there is none, or none that can be read: a trace is no condition."""
    found = _TRACEPARENT.fullmatch(value or "")
    return "" if found is None or (found[0].startswith("00-") and len(found[0]) > 55) else found[0]


def decode_request(body: bytes, shape: type[RequestT]) -> RequestT:
    """Return a body as the command's request.

    Raises:
        AgentError: BAD_JSON, NOT_AN_OBJECT, NOT_A_JSON_NUMBER, DUPLICATE_KEY, MISSING_FIELD, UNKNOWN_FIELD,
            WRONG_TYPE, OUT_OF_RANGE.
    """
    value = _parse(body)
    if not isinstance(value, dict):
        raise AgentError(Code.NOT_AN_OBJECT, f"the body is {_json_type(value)}")
    try:
        request = msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        _refuse(str(error), value)
    for name, part in msgspec.to_builtins(request).items():
        _check_lengths(name, part)
    return request


def encode(value: Any) -> bytes:
    """Return a Struct or plain value as JSON."""
    return msgspec.json.encode(value)


def encode_error(error: AgentError) -> bytes:
    """Return the body of a request that was refused at once."""
    body = {
        "success": False,
        "error": cut(error.message, _LONGEST_MESSAGE),
        "errorCode": error.code,
        "remedy": error.remedy,
    }
    details = {
        name: cut(value, _LONGEST_MESSAGE) if isinstance(value, str) else value for name, value in error.details.items()
    }
    return encode(body | ({"details": details} if details else {}))


def _parse(body: bytes) -> Any:
    try:
        # RFC 8259, 8.1: senders must not begin with a byte order mark, and receivers may ignore it.
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AgentError(Code.BAD_JSON, f"the body is not UTF-8: byte {error.start}") from error
    if text.startswith(_MORE_MARKS):
        raise AgentError(
            Code.BAD_JSON, "the body begins with more than one byte order mark, or with one that was encoded twice"
        )
    if _depth(text) > _MAX_DEPTH:
        raise AgentError(Code.BAD_JSON, f"the body is nested deeper than {_MAX_DEPTH}")
    try:
        value = simplejson.loads(
            text, parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
        if _SURROGATE.search(text):
            simplejson.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise AgentError(Code.BAD_JSON, "a string in the body contains a lone surrogate") from error
    except simplejson.JSONDecodeError as error:
        raise AgentError(Code.BAD_JSON, f"the body is not JSON: {error}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise AgentError(Code.OUT_OF_RANGE, f"a number in the body is too long: {error}") from error


def _check_lengths(name: str, value: Any) -> None:
    """Refuse a field in which a string is longer than any may be, however deep it stands."""
    if isinstance(value, str) and len(value) > _LONGEST_STRING:
        message = f"{name} has a string of {len(value)} characters, at most {_LONGEST_STRING} are accepted"
        raise AgentError(Code.OUT_OF_RANGE, message, details={"field": name})
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _check_lengths(name, key)
        _check_lengths(name, part)


def _depth(text: str) -> int:
    """Return how deep brackets nest at most; brackets inside strings make it only stricter."""
    deepest = depth = 0
    for character in re.findall(r"[\[\]{}]", text):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise AgentError(Code.NOT_A_JSON_NUMBER, f"the body contains {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise AgentError(Code.OUT_OF_RANGE, "a number in the body is larger than any field accepts")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise AgentError(Code.DUPLICATE_KEY, f"key {_shown(key)} appears twice in one object")
        unique[key] = value
    return unique


# msgspec tells in words what it found; the words' beginnings are its interface for this. Source: msgspec 0.19 docs,
# "Usage: validation errors"; tests/unit/test_wire.py holds every case.
_CAUSES = (
    ("Object contains unknown field", Code.UNKNOWN_FIELD),
    ("Object missing required field", Code.MISSING_FIELD),
    ("a target needs", Code.MISSING_FIELD),
    ("Expected `int` <=", Code.OUT_OF_RANGE),
    ("Expected `int` >=", Code.OUT_OF_RANGE),
    ("Expected `str` of", Code.OUT_OF_RANGE),
    ("Expected `array` of", Code.OUT_OF_RANGE),
    ("Expected `str` matching", Code.OUT_OF_RANGE),
    ("Invalid enum value", Code.OUT_OF_RANGE),
    ("Integer value out of range", Code.OUT_OF_RANGE),
)


def _refuse(words: str, value: dict[str, Any]) -> NoReturn:
    code = next((code for beginning, code in _CAUSES if words.startswith(beginning)), Code.WRONG_TYPE)
    _, _, path = words.partition("at `$.")
    field = path.rstrip("`")
    message = words.replace(f" - at `$.{field}`", "").replace("`", "")
    if field in value:
        message = f"{field} is {_shown(value[field])}: {message}"
    elif field:
        message = f"{field}: {message}"
    raise AgentError(code, message, details={"field": field} if field else {})


def _shown(value: Any) -> str:
    """Return a caller's value for a message: as JSON, and no longer than a line."""
    text = simplejson.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
