"""What a guest says is a claim: whatever bytes come from it are read as typed and bounded, or they are silence."""

from __future__ import annotations

import base64
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvmagent.api.metrics.vms import VmMetrics
from kvmagent.hypervisor.guestagent import GuestAgent
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import Definition, Domain, Facts, Guest, GuestBlock, Host, MemoryDevice
from kvmagent.model.guestuse import find_memory_warnings
from kvmagent.recorder import Recorder
from kvmagent_plugins.vm.guestmemory import find_idle, offline_bytes
from tests.fakes.agent import MIB, carry_out, make_domain, make_guest, make_node
from tests.fakes.libvirt import FakeDomain, FakeGuest, qemu_error
from tests.lab.domainxml import GuestSpec

GIB = 1024 * MIB
FILES = tempfile.TemporaryDirectory(prefix="kvmagent-")
SPEC = GuestSpec(name="vm1", vcpus=1, max_vcpus=4, memory_mib=512, max_memory_mib=4096, slots=4)
# Each question, with what a real agent answers to it.
ASKS: dict[str, tuple[Callable[[GuestAgent], Any], Any]] = {
    "vcpus": (GuestAgent.vcpus, [{"logical-id": 0, "online": True, "can-offline": False}]),
    "online_vcpus": (lambda agent: agent.online_vcpus((1, 2)), 2),
    "offline_vcpus": (lambda agent: agent.offline_vcpus((1, 2)), 1),
    "blocks": (GuestAgent.blocks, [{"phys-index": 0, "online": True, "can-offline": True}]),
    "block_bytes": (lambda agent: agent.block_bytes(512 * MIB, 512 * MIB), {"size": 128 * MIB}),
    "set_blocks": (
        lambda agent: agent.set_blocks((3,), online=True),
        [{"phys-index": 3, "response": "operation-failed", "error-code": 16}],
    ),
    "meminfo": (GuestAgent.meminfo, {"count": 3, "buf-b64": "TWVt", "eof": True}),
    "disabled": (GuestAgent.disabled, {"version": "7.2", "supported_commands": [{"name": "guest-ping", "enabled": 0}]}),
    "os": (GuestAgent.os, {"id": "debian", "kernel-release": "6.1.0", "kernel-version": "#1 SMP"}),
}
# Whole answers, none of which a guest agent gives: as text, or as what is no text at all.
NONSENSE: dict[str, str | bytes] = {
    "an empty text": "",
    "no JSON": "hello",
    "no object": "[]",
    "nothing returned": "{}",
    "a list of empty things": '{"return": [{}]}',
    "half of a block": '{"return": [{"online": true}]}',
    "a string for a number": '{"return": [{"logical-id": "0", "phys-index": "0", "online": true}]}',
    "a number for yes": '{"return": [{"logical-id": 0, "phys-index": 0, "online": 1}]}',
    "an id below zero": '{"return": [{"logical-id": -1, "phys-index": -1, "online": true}]}',
    "an id that is too large": '{"return": [{"logical-id": 99999999, "phys-index": 99999999999, "online": true}]}',
    "a number without end": '{"return": [{"logical-id": 1' + "0" * 5000 + ', "online": true}]}',
    "one twice": '{"return": [{"logical-id": 1, "phys-index": 1, "online": true},'
    ' {"logical-id": 1, "phys-index": 1, "online": false}]}',
    "text that is not UTF-8": b'{"return": "\xff\xfe"}',
    "half a surrogate": '{"return": "\\ud800"}',
    "what Python takes for bytes": '{"return": "\udc80"}',
    "5 MB": '{"return": "' + "x" * (5 * MIB) + '"}',
    "5 MB of blocks": '{"return": [' + ",".join('{"phys-index": 1, "online": true}' for _ in range(170000)) + "]}",
    "depth 1,000,000": '{"return": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
    "depth 1,000,000 aside": '{"aside": ' + "[" * 1_000_000 + "]" * 1_000_000 + ', "return": []}',
    "an error": '{"error": {"class": "GenericError", "desc": "no"}}',
    "null": '{"return": null}',
}
BLOCK_SIZES = [-1, 0, 1, 128, 4096, MIB - 1, MIB // 2, 3 * MIB, 128 * MIB + 1, 8 * GIB, 2**63, 2**64, 2**200]


def make_agent(said: str | bytes) -> GuestAgent:
    def send(domain: Any, request: str, timeout_s: int, flags: int) -> str:
        return said.decode() if isinstance(said, bytes) else said

    return GuestAgent(None, send=send, recorder=Recorder())


def ask_file(said: str) -> dict[str, int]:
    """Return what is made of a /proc/meminfo with this in it."""
    answers = {"guest-file-open": 7, "guest-file-read": {"buf-b64": said}, "guest-file-close": {}}

    def send(domain: Any, request: str, timeout_s: int, flags: int) -> str:
        return json.dumps({"return": answers[json.loads(request)["execute"]]})

    return GuestAgent(None, send=send, recorder=Recorder()).meminfo()


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE.keys())
@pytest.mark.parametrize("ask", [ask for ask, _ in ASKS.values()], ids=ASKS.keys())
def test_nonsense_is_silence_with_a_code_of_its_own(ask: Callable[[GuestAgent], Any], said: str | bytes) -> None:
    with pytest.raises(AgentError) as failure:
        ask(make_agent(said))
    assert failure.value.code is Code.GUEST_AGENT_INVALID
    assert len(failure.value.message) < 400
    assert failure.value.message.isprintable()


KEYS = [
    *("logical-id", "phys-index", "online", "can-offline", "size", "response", "error-code", "buf-b64"),
    *("supported_commands", "name", "enabled", "id", "pretty-name", "kernel-release", "kernel-version", "other"),
]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([128 * MIB, 2**63, -1, "success", "debian"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


def spoil(draw: st.DrawFn, value: Any) -> Any:
    """Return a real answer with something else somewhere in it."""
    if draw(st.integers(0, 3)) == 0:
        return draw(json_values)
    if isinstance(value, list):
        return [spoil(draw, one) for one in value] * draw(st.integers(0, 2))
    if isinstance(value, dict):
        return {key: spoil(draw, one) for key, one in value.items() if draw(st.integers(0, 5))}
    return value


@st.composite
def answers(draw: st.DrawFn) -> str | bytes:
    """Anything: bytes, text, JSON, and real answers of which a part is something else."""
    _, real = draw(st.sampled_from(list(ASKS.values())))
    return draw(
        st.binary(max_size=60)
        | st.text(max_size=60)
        | st.just({"return": spoil(draw, real)}).map(json.dumps)
        | st.builds(lambda value: json.dumps({"return": value}), json_values)
    )


examples = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@examples
@given(said=answers(), name=st.sampled_from(list(ASKS)))
@example(said=json.dumps({"return": {"id": "debian", "pretty-name": "\ud7fc"}}), name="os")
def test_every_answer_is_within_its_bounds_or_is_silence(said: str | bytes, name: str) -> None:
    failure = None
    try:
        told = ASKS[name][0](make_agent(said))
    except AgentError as error:
        failure = error
    if failure is not None:
        assert failure.code is Code.GUEST_AGENT_INVALID
        assert failure.message.isprintable()
        return
    if name == "vcpus":
        assert all(0 <= cpu.id < 65536 and type(cpu.online) is type(cpu.can_offline) is bool for cpu in told)
        assert len({cpu.id for cpu in told}) == len(told)
    elif name in ("online_vcpus", "offline_vcpus"):
        assert 0 <= told <= 2
    elif name == "blocks":
        assert all(0 <= one.index < 2**32 and type(one.online) is type(one.can_offline) is bool for one in told)
        assert len({one.index for one in told}) == len(told)
    elif name == "block_bytes":
        assert MIB <= told <= 4 * GIB
        assert told & (told - 1) == 0
    elif name == "set_blocks":
        assert told.keys() <= {3}
    elif name == "os":
        assert told.name.isprintable()
    msgspec.json.encode(told)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_block_size_that_no_kernel_has_is_not_believed(size: int) -> None:
    with pytest.raises(AgentError, match="guest-get-memory-block-info") as failure:
        make_agent(json.dumps({"return": {"size": size}})).block_bytes(512 * MIB, 4 * GIB)
    assert failure.value.code is Code.GUEST_AGENT_INVALID


def test_a_block_size_that_no_kernel_has_in_such_a_vm_is_not_believed() -> None:
    agent = make_agent(json.dumps({"return": {"size": 2 * GIB}}))
    assert agent.block_bytes(64 * GIB, 2 * GIB) == 2 * GIB
    with pytest.raises(AgentError, match="no kernel has in a VM like this"):
        agent.block_bytes(64 * GIB, GIB)


def test_a_block_size_by_which_the_vm_had_more_blocks_than_can_be_listed_is_not_believed() -> None:
    agent = make_agent(json.dumps({"return": {"size": MIB}}))
    assert agent.block_bytes(64 * GIB, GIB) == MIB
    with pytest.raises(AgentError, match="more than 65536 blocks"):
        agent.block_bytes(65 * GIB, GIB)


@examples
@given(st.text(alphabet="MemTotalAvib: 0123456789kB-\n", max_size=80) | st.text(max_size=40))
@example("MemTotal:  -1 kB\nMemAvailable: 10 kB\n")
@example("MemTotal:  " + "9" * 5000 + " kB\n")
@example("MemTotal:  \u0663 kB\n")
def test_a_meminfo_has_no_number_below_zero_or_beyond_all_memory(text: str) -> None:
    told = ask_file(base64.b64encode(text.encode()).decode())
    assert all(0 <= size < 2**50 for size in told.values())


@pytest.mark.parametrize("said", ["%%%", "TWVt\u00e9", base64.b64encode(b"\xff\xfe").decode()])
def test_a_meminfo_that_is_no_text_is_silence(said: str) -> None:
    with pytest.raises(AgentError, match="guest-file-read") as failure:
        ask_file(said)
    assert failure.value.code is Code.GUEST_AGENT_INVALID


def test_what_a_guest_says_of_an_error_is_bounded_and_cannot_steer_a_terminal() -> None:
    def send(domain: Any, request: str, timeout_s: int, flags: int) -> str:
        raise qemu_error(libvirt.VIR_ERR_INTERNAL_ERROR, "no\x1b[2J" + "x" * 100000)

    with pytest.raises(AgentError) as failure:
        GuestAgent(None, send=send, recorder=Recorder()).vcpus()
    assert failure.value.code is Code.GUEST_AGENT_REFUSED
    assert failure.value.message.startswith("guest-get-vcpus: no?[2J")
    assert len(failure.value.message) < 400


# Through the whole agent: planners, executor, judge, reads and metrics.


def babble(said: str | bytes, *, start: int = 0) -> Callable[[int, str], str | bytes | None]:
    return lambda n, command: said if n >= start else None


def make_babbler(said: str | bytes, *, start: int = 0, **options: Any) -> FakeDomain:
    return make_domain(SPEC, make_guest(SPEC, says=babble(said, start=start), **options), virt_type="kvm")


COMMANDS: dict[str, dict[str, Any]] = {
    "HotPlugCpu": {"cpuNum": 3},
    "HotPlugMemory": {"memorySize": 1024 * MIB},
    "HotPlugCpuMemory": {"cpuNum": 2, "memorySize": 768 * MIB},
}


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE.keys())
@pytest.mark.parametrize("command", COMMANDS)
def test_a_plug_into_a_babbling_guest_goes_on_and_is_plugged(
    command: str, said: str | bytes, start: int, tmp_path: Path
) -> None:
    """From the first answer on, and from each later one."""
    domain = make_babbler(said, start=start)
    reply = carry_out(make_node(tmp_path, domain), command, vmUuid="vm1", timeoutSec=1, **COMMANDS[command])
    assert reply["success"]
    if len(domain.guest.asked) <= start:  # all was done before it began to babble
        assert reply["outcome"] == "online"
    else:
        assert reply["outcome"] == "plugged", reply
        (told,) = [warning for warning in reply["warnings"] if warning["code"] == "GUEST_AGENT_INVALID"]
        assert "qemu-ga" in told["remedy"]
    for field in ("cpuNum", "memorySize"):
        assert reply[field] == COMMANDS[command].get(field, reply["before"][field])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    said=st.lists(answers(), min_size=1, max_size=4),
    start=st.integers(0, 12),
    command=st.sampled_from([*COMMANDS, "HotUnplugMemory", "HotUnplugCpu", "ReadyForHotplug"]),
    auto_online=st.booleans(),
)
def test_whatever_a_guest_says_every_command_is_answered_and_no_plug_is_lost(
    said: list[str | bytes], start: int, command: str, auto_online: bool
) -> None:
    guest = make_guest(
        SPEC,
        auto_online=auto_online,
        says=lambda n, asked: said[(n - start) % len(said)] if n >= start else None,
    )
    node = make_node(Path(FILES.name), make_domain(SPEC, guest, virt_type="kvm"))
    removals = {"HotUnplugMemory": {"memorySize": 512 * MIB}, "HotUnplugCpu": {"cpuNum": 1}, "ReadyForHotplug": {}}
    reply = carry_out(node, command, vmUuid="vm1", timeoutSec=1, **(COMMANDS | removals)[command])
    assert reply["errorCode"] != "INTERNAL_ERROR", reply
    if command == "HotPlugCpu":
        assert reply["cpuNum"] == 3
    if command == "HotPlugMemory" and reply["outcome"] not in ("refused", "partial"):
        assert reply["memorySize"] >= 1024 * MIB


def facts_of(size_bytes: int, block_bytes: int, blocks: tuple[GuestBlock, ...]) -> Facts:
    live = Definition(
        vcpu_current=1,
        vcpu_maximum=4,
        vcpus=(),
        topology=None,
        total_bytes=size_bytes + 512 * MIB,
        current_bytes=size_bytes + 512 * MIB,
        max_memory_bytes=2 * size_bytes,
        slots=4,
        cells=(),
        devices=(MemoryDevice(model="dimm", size_bytes=size_bytes, node=0, alias="dimm0", base=4 * GIB),),
        acpi=True,
        balloon=True,
        agent_channel=True,
        machine="pc-q35-7.2",
        arch="x86_64",
        hypervisor="kvm",
    )
    domain = Domain(name="vm1", uuid="u1", state="running", live=live, config=live)
    return Facts(domain=domain, guest=Guest(blocks=blocks, block_bytes=block_bytes), host=Host())


def test_no_number_of_a_guest_sizes_what_the_agent_allocates() -> None:
    """128 bytes as the block size of 64 GiB: half a billion blocks."""
    facts = facts_of(64 * GIB, 128, (GuestBlock(0, online=True, can_offline=False),))
    metrics = VmMetrics(lambda: ())
    tracemalloc.start()
    try:
        assert facts.offline_memory_bytes == 64 * GIB
        assert find_idle(facts) == ()
        assert offline_bytes(facts) == 64 * GIB
        assert "64.5 GiB" in find_memory_warnings(facts, asked_online=True)[0].message
        metrics.observed(facts)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@given(
    listed=st.dictionaries(st.integers(0, 60), st.booleans(), max_size=40),
    dimms=st.integers(1, 3).map(lambda n: n * 128 * MIB),
)
def test_what_is_offline_is_what_is_listed_and_not_online_or_plugged_and_not_listed(
    listed: dict[int, bool], dimms: int
) -> None:
    blocks = tuple(GuestBlock(n, online=listed[n], can_offline=True) for n in sorted(listed))
    plugged = set(range(32, 32 + dimms // (128 * MIB)))
    online = {n for n in listed if listed[n]}
    facts = facts_of(dimms, 128 * MIB, blocks)
    assert facts.offline_memory_bytes == len((plugged | set(listed)) - online) * 128 * MIB
    assert find_idle(facts) == tuple(sorted((plugged & set(listed)) - online))
    assert offline_bytes(facts) == len(plugged - online) * 128 * MIB


def test_a_guest_that_is_sane_again_is_believed_again(tmp_path: Path) -> None:
    guest: FakeGuest = make_guest(SPEC)
    guest.says = lambda n, command: '{"return": [{}]}' if n < 5 else None
    node = make_node(tmp_path, make_domain(SPEC, guest, virt_type="kvm"))
    assert carry_out(node, "HotPlugCpu", vmUuid="vm1", cpuNum=2)["outcome"] == "plugged"
    guest.says = lambda n, command: None
    assert carry_out(node, "HotPlugMemory", "t2", vmUuid="vm1", memorySize=1024 * MIB)["outcome"] == "online"
