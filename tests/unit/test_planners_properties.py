"""What holds for the planners whatever the guest, the host and the targets: on the fake libvirt, many times.

The fake goes through the same contract tests as the lab, and the executor is the real one.
"""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent_plugins.vm.vcpus import enabled_ids
from tests.fakes.agent import MIB, carry_out, make_domain, make_guest, make_node
from tests.fakes.libvirt import DEBIAN, FakeDomain, qemu_error
from tests.lab.domainxml import GuestSpec

BLOCK_MIB = 128
SUCCESS = {"online", "plugged", "configured", "unchanged"}

# What the hosts of all examples are read from; gone when the tests end.
FILES = tempfile.TemporaryDirectory(prefix="kvmagent-")


@dataclass
class Vm:
    """A VM with its guest on a host, and the agent's inside to send commands to."""

    domain: FakeDomain
    host: dict[str, int]
    quantum_mib: int = BLOCK_MIB
    tasks: int = field(default=0)

    def __post_init__(self) -> None:
        self.node = make_node(Path(FILES.name), self.domain, **self.host)

    def send(self, command: str, **fields: Any) -> dict[str, Any]:
        self.tasks += 1
        return carry_out(self.node, command, f"t{self.tasks}", vmUuid="vm1", timeoutSec=1, **fields)

    def xml(self) -> tuple[str, str]:
        return self.domain.XMLDesc(0), self.domain.XMLDesc(2)


@st.composite
def vms(draw: st.DrawFn) -> Vm:
    vcpus = draw(st.integers(1, 4))
    memory_mib = BLOCK_MIB * draw(st.integers(2, 8))
    spec = GuestSpec(
        name="vm1",
        vcpus=vcpus,
        max_vcpus=vcpus + draw(st.integers(0, 6)),
        memory_mib=memory_mib,
        max_memory_mib=memory_mib + BLOCK_MIB * draw(st.integers(0, 32)),
        slots=draw(st.integers(1, 5)),
        numa_cells=draw(st.integers(1, min(2, vcpus))),
    )
    guest = make_guest(
        spec,
        agent=draw(st.sampled_from(["running", "running", "running", "stopped"])),
        auto_online=draw(st.booleans()),
        available_bytes=draw(st.sampled_from([None, None, 33 * MIB, 36 * MIB, 400 * MIB])),
        os=draw(st.sampled_from([DEBIAN, DEBIAN, {}, {"id": "mswindows", "name": "Windows"}])),
    )
    page_mib = draw(st.sampled_from([None, None, 2, 1024]))
    host = {"available_mib": draw(st.sampled_from([64 * 1024, 64 * 1024, 1024]))}
    domain = make_domain(spec, guest, virt_type=draw(st.sampled_from(["kvm", "qemu"])))
    if page_mib is not None:
        pages = f"<memoryBacking><hugepages><page size='{page_mib}' unit='MiB'/></hugepages></memoryBacking>"
        for root in (domain.live, domain.config):
            root.append(etree.fromstring(pages))
        host |= {"hugepage_mib": page_mib, "free_hugepages": 64 * 1024 // page_mib}
    return Vm(domain, host, quantum_mib=max(BLOCK_MIB, page_mib or 0))


sizes = st.one_of(
    st.integers(1, 40).map(lambda n: n * BLOCK_MIB * MIB),
    st.integers(1 * MIB, 5000 * MIB),
)
commands = st.one_of(
    st.tuples(st.just("HotPlugCpu"), st.fixed_dictionaries({"cpuNum": st.integers(1, 12)})),
    st.tuples(st.just("HotUnplugCpu"), st.fixed_dictionaries({"cpuNum": st.integers(1, 12)})),
    st.tuples(
        st.just("HotPlugMemory"),
        st.fixed_dictionaries(
            {"memorySize": sizes, "method": st.sampled_from(["auto", "dimm", "virtio-mem", "balloon"])},
            optional={"strict": st.booleans(), "dimmSize": st.sampled_from([128 * MIB, 256 * MIB, 1024 * MIB])},
        ),
    ),
    st.tuples(st.just("HotUnplugMemory"), st.fixed_dictionaries({"memorySize": sizes})),
    st.tuples(st.just("HotPlugCpuMemory"), st.fixed_dictionaries({"cpuNum": st.integers(1, 12), "memorySize": sizes})),
)
examples = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


NONSENSE = (
    "", "hello", "{}", '{"return": null}', '{"return": []}', '{"return": [{}]}', '{"return": {}}', '{"return": -1}',
    '{"return": [{"online": true}]}', '{"return": {"size": 128}}', '{"return": {"size": 1125899906842624}}',
    '{"return": [{"logical-id": 0, "online": true}, {"logical-id": 0, "online": true}]}', b'{"return": "\xff"}',
    '{"return": ' + "[" * 3000 + "]" * 3000 + "}",
)  # fmt: skip


@dataclass
class Liar:
    """Answers a command with more than there is, or with nonsense, from its n-th answer on; the rest truly."""

    guest: Any
    kind: str
    at: int

    def __call__(self, n: int, command: str) -> str | bytes | None:
        if n < self.at or self.kind == "honest":
            return None
        if self.kind.startswith("nonsense"):
            return NONSENSE[int(self.kind.split()[1])]
        if self.kind == "more CPUs" and command == "guest-get-vcpus":
            listed = [{"logical-id": n, "online": True, "can-offline": True} for n in range(40)]
            return json.dumps({"return": listed})
        if self.kind == "more blocks" and command == "guest-get-memory-blocks":
            listed = [{"phys-index": n, "online": True, "can-offline": True} for n in range(400)]
            return json.dumps({"return": listed})
        if self.kind == "all offline" and command in ("guest-get-vcpus", "guest-get-memory-blocks"):
            truth = self.guest.answer({"execute": command})
            return json.dumps({"return": [one | {"online": False} for one in truth]})
        if self.kind == "says yes and does nothing" and command.startswith("guest-set-"):
            return json.dumps({"return": 1 if "vcpus" in command else []})
        return None


LIES = ("more CPUs", "more blocks", "all offline", "says yes and does nothing")


@st.composite
def liars(draw: st.DrawFn) -> tuple[Vm, str]:
    """VMs whose guests are slow, broken or lie, and how they do."""
    vm = draw(vms())
    guest = vm.domain.guest
    guest.sees_nothing = draw(st.sampled_from([False, False, True]))
    guest.broken_cpus = draw(st.sampled_from([False, False, True]))
    guest.late_cpus, guest.late_blocks = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    guest.onlines = draw(st.sampled_from([1, 64]))
    guest.balloon_driver = draw(st.booleans())
    guest.virtio_mem_limit = draw(st.sampled_from([0, 130 * MIB, 1 << 60]))
    nonsense = st.integers(0, len(NONSENSE) - 1).map(lambda n: f"nonsense {n}")
    kind = draw(st.just("honest") | st.just("honest") | st.sampled_from(LIES) | nonsense)
    guest.says = Liar(guest, kind, draw(st.integers(0, 12)))
    vm.domain.paused = draw(st.sampled_from([False, False, False, True]))
    return vm, kind


def within(vm: Vm, command: str, part: float, method: str) -> tuple[str, dict[str, Any]]:
    """A command to a total that the VM's definition allows, so that few are refused: between what it has and most."""
    live, fields = vm.domain.live, dict[str, Any]()
    plugs = not command.startswith("HotUnplug")
    if command.endswith(("Cpu", "CpuMemory")):
        most, has = int(live.findtext("vcpu")), int(live.find("vcpu").get("current", live.findtext("vcpu")))
        fields["cpuNum"] = round(has + part * (most - has)) if plugs else max(1, round(has * part))
    if command.endswith("Memory"):
        most, has = int(live.findtext("maxMemory")) // 1024, int(live.findtext("memory")) // 1024
        wanted = has + part * (most - has) if plugs else has * part
        fields["memorySize"] = max(1, round(wanted / BLOCK_MIB)) * BLOCK_MIB * MIB
    return command, fields | ({"method": method} if command == "HotPlugMemory" else {})


aims = st.tuples(
    st.sampled_from(["HotPlugCpu", "HotPlugCpu", "HotPlugMemory", "HotPlugMemory", "HotPlugCpuMemory", "HotUnplugCpu",
                     "HotUnplugMemory"]),
    st.floats(0.1, 1.0),
    st.sampled_from(["auto", "dimm", "virtio-mem", "balloon"]),
)  # fmt: skip


@examples
@given(made=liars(), sequence=st.lists(aims, min_size=1, max_size=4))
def test_nothing_is_online_but_what_the_guest_really_uses(
    made: tuple[Vm, str], sequence: list[tuple[str, float, str]]
) -> None:
    """Whatever the definition, the guest, its lies and the target: a reply says online of what the guest has online."""
    vm, kind = made
    guest = vm.domain.guest
    for aim in sequence:
        command, fields = within(vm, *aim)
        reply = vm.send(command, **fields)
        assert reply["errorCode"] not in ("INTERNAL_ERROR", "NOT_VERIFIED"), reply
        assert reply["outcome"] != "plugged" or reply["warnings"], "what is not proven says why"
        for stage in reply["stages"]:
            has = {"cpu": reply["after"]["cpuNum"], "memory": reply["after"]["memorySize"]}[stage["resource"]]
            assert 0 <= stage["amount"] <= has
        if reply["outcome"] != "online":
            continue
        assert guest.agent == "running"
        if "cpuNum" in fields:
            told = reply["after"]["guestCpuNum"]
            assert told is not None
            assert told <= reply["after"]["cpuNum"] == fields["cpuNum"]
        if kind != "honest":
            continue
        if "cpuNum" in fields:
            assert sum(guest.online_cpus.values()) == reply["after"]["guestCpuNum"]
            assert "Unplug" in command or sum(guest.online_cpus.values()) == fields["cpuNum"]
        if "memorySize" in fields and command in ("HotPlugMemory", "HotPlugCpuMemory"):
            balloon = fields.get("method") == "balloon"
            assert balloon or sum(guest.blocks.values()) * BLOCK_MIB * MIB >= fields["memorySize"]
            assert not balloon or guest.balloon_driver


@examples
@given(vm=vms(), sequence=st.lists(commands, min_size=1, max_size=5))
def test_each_command_reaches_its_target_or_refuses_and_never_exceeds_what_the_vm_has(
    vm: Vm, sequence: list[tuple[str, dict[str, Any]]]
) -> None:
    refuse_wrong_belief(vm, *sequence[0])
    for command, fields in sequence:
        before = vm.xml()
        reply = vm.send(command, **fields)
        assert reply["errorCode"] not in ("INTERNAL_ERROR", "NOT_VERIFIED", "LIBVIRT_REFUSED"), reply
        check_limits(vm)
        if reply["outcome"] == "refused":
            assert vm.xml() == before, reply
            assert reply["error"]
            assert reply["remedy"]
        elif reply["outcome"] in SUCCESS:
            check_reached(vm, command, fields, reply)
            again = vm.send(command, **fields)
            if reply["aligned" if "memorySize" in fields else "cpuNum"] == fields.get("memorySize", reply["cpuNum"]):
                assert again["outcome"] == "unchanged", (reply, again)
                assert again["steps"] == []


def refuse_wrong_belief(vm: Vm, command: str, fields: dict[str, Any]) -> None:
    before = vm.xml()
    field, name = ("expectedCpuNum", "cpuNum") if "cpuNum" in fields else ("expectedMemorySize", "memorySize")
    reply = vm.send(command, **fields, **{field: 8000})
    assert (reply["outcome"], reply["errorCode"], vm.xml()) == ("refused", "NOT_AS_EXPECTED", before)
    # What the refusal tells is what a caller may expect next.
    assert vm.send(command, **fields, **{field: reply["before"][name]}, dryRun=True)["errorCode"] != "NOT_AS_EXPECTED"


def check_limits(vm: Vm) -> None:
    for root in (vm.domain.live, vm.domain.config):
        devices = root.findall("./devices/memory")
        assert len(devices) <= int(root.find("maxMemory").get("slots"))
        assert int(root.findtext("memory")) <= int(root.findtext("maxMemory"))
        assert int(root.find("vcpu").get("current", root.findtext("vcpu"))) <= int(root.findtext("vcpu"))
        for size in root.iterfind("./devices/memory[@model='dimm']/target/size"):
            assert int(size.text) % (vm.quantum_mib * 1024) == 0


def check_reached(vm: Vm, command: str, fields: dict[str, Any], reply: dict[str, Any]) -> None:
    if "cpuNum" in fields:
        assert reply["cpuNum"] == fields["cpuNum"] == reply["after"]["configCpuNum"]
    if "memorySize" in fields:
        assert reply["applied"] == reply["aligned"]
        assert reply["applied"] >= fields["memorySize"]
        if fields.get("strict") or reply["aligned"] == fields["memorySize"]:
            assert reply["applied"] - fields["memorySize"] < 4096
        if command == "HotPlugMemory" and not fields.get("strict"):
            assert reply["applied"] - fields["memorySize"] < vm.quantum_mib * MIB
    assert reply["drift"] == []


@examples
@given(
    vm=vms(),
    cpus=st.none() | st.integers(0, 8),
    blocks=st.none() | st.integers(0, 20),
    where=st.sampled_from(["both", "live", "config"]),
    sequence=st.lists(commands, min_size=1, max_size=3),
)
def test_no_command_brings_a_vm_above_what_its_owner_allows(
    vm: Vm, cpus: int | None, blocks: int | None, where: str, sequence: list[tuple[str, dict[str, Any]]]
) -> None:
    policy = etree.Element(f"{{{POLICY_NAMESPACE}}}policy")
    for name, ceiling in (("maxCpuNum", cpus), ("maxMemorySize", None if blocks is None else blocks * BLOCK_MIB * MIB)):
        if ceiling is not None:
            policy.set(name, str(ceiling))
    for name, root in (("live", vm.domain.live), ("config", vm.domain.config)):
        if where in ("both", name):
            etree.SubElement(root, "metadata").append(copy.deepcopy(policy))
    for command, fields in sequence:
        before = [parse_definition(xml) for xml in vm.xml()]
        vm.send(command, **fields)
        for was, has in zip(before, [parse_definition(xml) for xml in vm.xml()], strict=True):
            assert has.policy == was.policy
            if has.policy.max_cpu_num is not None:
                assert has.vcpu_current <= max(was.vcpu_current, has.policy.max_cpu_num)
            if has.policy.max_memory_bytes is not None:
                assert has.memory_bytes <= max(was.memory_bytes, has.policy.max_memory_bytes)
                usable = [one.current_bytes + one.virtio_mem_bytes for one in (was, has)]
                assert usable[1] <= max(usable[0], has.policy.max_memory_bytes)


@examples
@given(vm=vms(), cpu_num=st.integers(1, 10), blocks=st.integers(0, 20), virtio_mem=st.booleans())
def test_what_grew_shrinks_back_to_where_it_was(vm: Vm, cpu_num: int, blocks: int, virtio_mem: bool) -> None:
    vm.domain.guest.available_bytes = None
    start = vm.send("ReadyForHotplug")["before"]
    target = start["memorySize"] + blocks * BLOCK_MIB * MIB
    method = "virtio-mem" if virtio_mem else "dimm"
    for command, fields, back, shrunk in (
        (
            "HotPlugMemory",
            {"memorySize": target, "method": method},
            "HotUnplugMemory",
            {"memorySize": start["memorySize"]},
        ),
        ("HotPlugCpu", {"cpuNum": cpu_num}, "HotUnplugCpu", {"cpuNum": start["cpuNum"]}),
    ):
        if not vm.send(command, **fields)["success"]:
            continue
        reply = vm.send(back, **shrunk)
        if reply["errorCode"] in ("CPU_REMOVAL_UNSAFE", "GUEST_OS_UNABLE"):
            return
        assert reply["success"], reply
        after = reply["after"]
        for name in ("cpuNum", "configCpuNum", "memorySize", "configMemorySize", "balloonSize"):
            assert after[name] == start[name], name


@st.composite
def half_plugged(draw: st.DrawFn) -> tuple[Vm, dict[str, Any]]:
    """A VM whose vCPUs may have holes, and a plug that fails on the way, in the middle or at the end."""
    spec = GuestSpec(name="vm1", vcpus=draw(st.integers(1, 3)), max_vcpus=8)
    guest = make_guest(
        spec,
        auto_online=draw(st.booleans()),
        agent=draw(st.sampled_from(["running", "running", "running", "stopped"])),
        late_cpus=draw(st.sampled_from([0, 0, 1, 2])),
        sees_nothing=draw(st.sampled_from([False, False, False, True])),
        broken_cpus=draw(st.sampled_from([False, False, False, True])),
        fixed_cpus=frozenset({0, draw(st.integers(0, 7))}),
        onlines=draw(st.sampled_from([1, 64])),
        unplugs=draw(st.sampled_from(["lets go", "lets go", "lets go", "not answering"])),
    )
    domain = make_domain(spec, guest, virt_type=draw(st.sampled_from(["kvm", "kvm", "qemu"])))
    for flags in (1, 2):
        for vcpu in draw(st.sets(st.integers(spec.vcpus, 7), max_size=2)):
            domain.setVcpu(str(vcpu), 1, flags)
    fails = draw(st.sampled_from(["save", *(f"vcpu{n}" for n in range(1, 8))]))
    domain.fail_next[fails] = qemu_error(1, "internal error: the plug failed")
    request = {"cpuNum": draw(st.integers(2, 8)), "affect": draw(st.sampled_from(["both", "live", "config"]))}
    return Vm(domain, {}), request


@examples
@given(
    made=half_plugged(), change=st.none() | st.tuples(st.integers(1, 7), st.sampled_from([1, 2])), at=st.integers(1, 5)
)
def test_an_undo_takes_no_vcpu_that_was_there_before_and_leaves_the_guest_s_other_cpus_alone(
    made: tuple[Vm, dict[str, Any]], change: tuple[int, int] | None, at: int
) -> None:
    """Whatever fails, whatever the guest does, and whoever else switches a vCPU in the moment before a call."""
    vm, request = made
    domain, guest = vm.domain, vm.domain.guest
    before, listed = [enabled_ids(parse_definition(xml)) for xml in vm.xml()], dict(guest.online_cpus)
    called = domain._called

    def change_before(name: str, call: str) -> None:
        domain.calls.append(call)
        if change is not None and len(domain.calls) == at:
            vcpu, flags = change
            domain._called = called  # type: ignore[method-assign]
            has = enabled_ids(parse_definition(domain.XMLDesc(0 if flags == 1 else 2)))
            domain.setVcpu(str(vcpu), int(vcpu not in has), flags)
        domain._fail(name, call)

    domain.calls.clear()
    domain._called = change_before  # type: ignore[method-assign]
    reply = vm.send("HotPlugCpu", **request)
    others = [{change[0]} if change is not None and change[1] == flags else set() for flags in (1, 2)]
    after = [enabled_ids(parse_definition(xml)) for xml in vm.xml()]
    assert reply["errorCode"] != "INTERNAL_ERROR", reply
    for affect, was, has, other in zip(("live", "config"), before, after, others, strict=True):
        # Of the definition fewer may be asked for, by this or by somebody else's change: then that is what there is.
        if affect == "live" or (not other and request["cpuNum"] >= len(was)):
            assert set(was) - other <= set(has), reply
            assert len(has) >= len(was) - len(other)
        if reply["details"].get("undone") and request["affect"] in (affect, "both"):
            assert was == has
    if reply["outcome"] == "refused" and change is None:
        assert after == before
    if change is None:
        assert listed.items() <= guest.online_cpus.items()
