import msgspec
import pytest

from kvmagent.api.wire import decode_request, encode_error, parse_callback_url, parse_task_uuid, parse_traceparent
from kvmagent.model.errors import AgentError, Code
from kvmagent_plugins.vm.requests import HotPlugCpuRequest, HotPlugMemoryRequest


def refusal_of(body: bytes, shape: type[msgspec.Struct] = HotPlugCpuRequest) -> AgentError:
    with pytest.raises(AgentError) as caught:
        decode_request(body, shape)
    return caught.value


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", Code.BAD_JSON),
        (b"{", Code.BAD_JSON),
        (b"{'vmUuid': 'a'}", Code.BAD_JSON),
        (b'{"vmUuid": "\xff"}', Code.BAD_JSON),
        (b'{"vmUuid": "\\ud800", "cpuNum": 2}', Code.BAD_JSON),
        (b'{"vmUuid": "a", "cpuNum": 2, "\\uDFFF": 2}', Code.BAD_JSON),
        (b'{"vmUuid": "a", "cpuNum": 2} x', Code.BAD_JSON),
        (b"[" * 5000, Code.BAD_JSON),
        (b'[{"vmUuid": "a"}]', Code.NOT_AN_OBJECT),
        (b"null", Code.NOT_AN_OBJECT),
        (b'"text"', Code.NOT_AN_OBJECT),
        (b'{"vmUuid": "a", "cpuNum": NaN}', Code.NOT_A_JSON_NUMBER),
        (b'{"vmUuid": "a", "cpuNum": -Infinity}', Code.NOT_A_JSON_NUMBER),
        (b'{"vmUuid": "a", "cpuNum": 2, "cpuNum": 3}', Code.DUPLICATE_KEY),
        (b'{"vmUuid": "a"}', Code.MISSING_FIELD),
        (b'{"cpuNum": 2}', Code.MISSING_FIELD),
        (b'{"vmUuid": "a", "cpuNum": 2, "cpus": 2}', Code.UNKNOWN_FIELD),
        (b'{"vmUuid": "a", "cpuNum": "4"}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": 4.5}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": 4.0}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": true}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": null}', Code.WRONG_TYPE),
        (b'{"vmUuid": 7, "cpuNum": 2}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": 2, "dryRun": 1}', Code.WRONG_TYPE),
        (b'{"vmUuid": "a", "cpuNum": 0}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a", "cpuNum": -1}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a", "cpuNum": 9223372036854775808}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a", "cpuNum": 1' + b"0" * 5000 + b"}", Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a", "cpuNum": 1e999}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "", "cpuNum": 2}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a/../b", "cpuNum": 2}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a\\nb", "cpuNum": 2}', Code.OUT_OF_RANGE),
        (b'{"vmUuid": "a", "cpuNum": 2, "affect": "some"}', Code.OUT_OF_RANGE),
    ],
)
def test_each_bad_body_has_its_code_and_a_remedy(body: bytes, code: Code) -> None:
    error = refusal_of(body)
    assert error.code is code, error.message
    assert error.status == 400
    assert error.remedy
    assert len(error.message) < 300


def test_the_message_shows_what_came_and_what_is_needed() -> None:
    error = refusal_of(b'{"vmUuid": "a", "cpuNum": "4"}')
    assert error.message == 'cpuNum is "4": Expected int, got str'
    assert error.details == {"field": "cpuNum"}
    assert refusal_of(b'{"vmUuid": "a", "memorySize": 9223372036854775808}', HotPlugMemoryRequest).message == (
        "memorySize is 9223372036854775808: Expected int <= 9007199254740991"
    )


def test_a_good_body_is_typed_and_its_defaults_are_the_contract_s() -> None:
    request = decode_request(b'{"vmUuid": "a", "cpuNum": 3}', HotPlugCpuRequest)
    assert (request.vm_uuid, request.cpu_num, request.affect) == ("a", 3, "both")
    assert (request.guest_online, request.dry_run) == (True, False)


@pytest.mark.parametrize("value", ["a", "A-b_9", "x" * 64])
def test_takes_task_ids_of_the_contract(value: str) -> None:
    assert parse_task_uuid(value) == value


@pytest.mark.parametrize("value", ["x" * 65, "a b", "a\n", "é", "a/b", "a;b", "'"])
def test_refuses_other_task_ids(value: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_task_uuid(value)
    assert caught.value.code is Code.BAD_TASK_UUID


@pytest.mark.parametrize("value", [None, ""])
def test_tells_missing_headers_apart(value: str | None) -> None:
    with pytest.raises(AgentError) as caught:
        parse_task_uuid(value)
    assert caught.value.code is Code.MISSING_TASK_UUID
    with pytest.raises(AgentError) as caught:
        parse_callback_url(value)
    assert caught.value.code is Code.MISSING_CALLBACK_URL


@pytest.mark.parametrize("value", ["http://a/", "https://a.b:8443/x?y=1", "http://[::1]:80/cb", "HTTP://a"])
def test_takes_absolute_http_urls(value: str) -> None:
    assert parse_callback_url(value) == value


@pytest.mark.parametrize(
    "value",
    ["ftp://a/", "file:///etc/passwd", "/cb", "a.b/cb", "http://", "http:///x", "http://a:99999/", "http://a:x/",
     "http://a:0/", "http://u:p@a/", "http://a/\r\nX: y", "http://a b/", "http://a/#f", "http://é/",
     "http://a/" + "x" * 3000, "http://[::1/"],
)  # fmt: skip
def test_refuses_other_urls(value: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_callback_url(value)
    assert caught.value.code is Code.BAD_CALLBACK_URL
    assert "p@" not in caught.value.message


def test_a_refusal_has_the_contract_s_fields() -> None:
    body = msgspec.json.decode(encode_error(AgentError(Code.STOPPING, "the agent is stopping")))
    assert body == {
        "success": False,
        "error": "the agent is stopping",
        "errorCode": "STOPPING",
        "remedy": "Send the request again in a few seconds.",
    }


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes-later", True),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nx: y", False),
        ("", False),
        (None, False),
    ],
)
def test_a_trace_is_taken_where_it_can_be_read_and_no_condition(given: str | None, taken: bool) -> None:
    assert parse_traceparent(given) == (given if taken else "")


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff", "\u00ef\u00bb\u00bf", "\ufeff\u00ef\u00bb\u00bf"])
def test_one_byte_order_mark_is_ignored_and_nothing_else_is(mark: str) -> None:
    body = f'{mark}{{"vmUuid": "vm1", "cpuNum": 2}}'.encode()
    if mark == "\ufeff":
        assert decode_request(body, HotPlugCpuRequest).cpu_num == 2
        return
    with pytest.raises(AgentError) as failure:
        decode_request(body, HotPlugCpuRequest)
    assert failure.value.code is Code.BAD_JSON
