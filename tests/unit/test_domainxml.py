from collections.abc import Callable
from typing import Any

import pytest

from kvmagent.hypervisor.domainxml import find_memory_xml, format_dimm, is_agent_connected, parse_definition
from kvmagent.model.facts import POLICY_NAMESPACE, MemoryDevice, Policy, Vcpu

MIB = 1024 * 1024
# As libvirt 9.0 writes it, cut to what hotplug depends on; the description is a user's own words.
LIVE = """\
<domain type='kvm' id='7'>
  <name>a&lt;b&gt;</name>
  <description>&lt;vcpu&gt;99&lt;/vcpu&gt;</description>
  <maxMemory slots='8' unit='KiB'>4194304</maxMemory>
  <memory unit='KiB'>1703936</memory>
  <currentMemory unit='KiB'>786432</currentMemory>
  <vcpu placement='static' current='2'>4</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='no' hotpluggable='yes'/>
    <vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
  </vcpus>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <features><acpi/></features>
  <cpu><topology sockets='1' dies='1' cores='2' threads='2'/>
    <numa><cell id='0' cpus='0-1,^1,3' memory='262144' unit='KiB'/>
      <cell id='1' cpus='1-2' memory='262144' unit='KiB'/></numa></cpu>
  <devices>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <memballoon model='virtio'/>
    <memory model='dimm'>
      <target><size unit='KiB'>131072</size><node>1</node></target>
      <alias name='ua-x'/><address type='dimm' slot='0' base='0x100000000'/>
    </memory>
    <memory model='virtio-mem'>
      <target><size unit='KiB'>1048576</size><node>0</node><block unit='KiB'>2048</block>
        <requested unit='KiB'>262144</requested><current unit='KiB'>131072</current></target>
      <alias name='ua-v'/>
    </memory>
  </devices>
</domain>"""


def test_what_was_parsed_can_be_shared_because_nobody_can_change_it() -> None:
    assert isinstance(hash(parse_definition(LIVE)), int), "of a part that could be changed there is no hash"


def test_reads_each_fact_and_only_from_its_own_element() -> None:
    definition = parse_definition(LIVE)
    assert (definition.vcpu_current, definition.vcpu_maximum) == (2, 4)
    assert definition.vcpus[1] == Vcpu(id=1, enabled=False, hotpluggable=True)
    assert definition.topology == (1, 1, 2, 2)
    assert (definition.max_memory_bytes, definition.slots, len(definition.devices)) == (4096 * MIB, 8, 2)
    assert [(cell.id, sorted(cell.cpus), cell.memory_bytes) for cell in definition.cells] == [
        (0, [0, 3], 256 * MIB),
        (1, [1, 2], 256 * MIB),
    ]
    assert (definition.total_bytes, definition.boot_bytes, definition.current_bytes) == (
        1664 * MIB,
        512 * MIB,
        768 * MIB,
    )
    assert definition.memory_bytes == (512 + 128 + 128) * MIB
    assert definition.balloon_total_bytes == (512 + 128) * MIB
    assert (definition.acpi, definition.balloon, definition.agent_channel) == (True, True, True)
    assert (definition.machine, definition.arch, definition.hypervisor) == ("pc-q35-7.2", "x86_64", "kvm")
    assert definition.find_device("ua-x") == MemoryDevice(
        model="dimm", size_bytes=128 * MIB, node=1, alias="ua-x", slot=0, base=0x100000000
    )
    assert definition.find_device("dimm0") is None


@pytest.mark.parametrize(
    ("state", "connected"), [("state='connected'", True), ("state='disconnected'", False), ("", False)]
)
def test_tells_whether_the_agent_s_channel_is_open(state: str, connected: bool) -> None:
    assert is_agent_connected(LIVE.replace("state='connected'", state)) is connected


def test_a_vm_without_a_channel_has_no_agent() -> None:
    assert is_agent_connected(LIVE.replace("org.qemu.guest_agent.0", "org.other")) is None


def test_vcpus_that_libvirt_does_not_list_are_the_first_ones_and_fixed() -> None:
    start, end = LIVE.index("  <vcpus>"), LIVE.index("</vcpus>") + len("</vcpus>")
    definition = parse_definition(LIVE[:start] + LIVE[end:])
    assert [(vcpu.enabled, vcpu.hotpluggable) for vcpu in definition.vcpus] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]


@pytest.mark.parametrize("model", ["none", None])
def test_a_balloon_of_model_none_is_no_balloon(model: str | None) -> None:
    balloon = "" if model is None else f"<memballoon model='{model}'/>"
    assert not parse_definition(LIVE.replace("<memballoon model='virtio'/>", balloon)).balloon


def policy_of(xml: str) -> Policy:
    metadata = f"<metadata><o:other xmlns:o='urn:other' hotplug='off'/>{xml}</metadata>"
    return parse_definition(LIVE.replace("<os>", metadata + "<os>").replace("NS", POLICY_NAMESPACE)).policy


def test_a_vm_whose_owner_says_nothing_is_free() -> None:
    assert parse_definition(LIVE).policy == policy_of("") == policy_of("<policy xmlns='NS'/>") == Policy()


def test_reads_what_the_owner_allows() -> None:
    assert policy_of("<k:policy xmlns:k='NS' hotplug='off' guestOnline='on'/>") == Policy(hotplug=False)
    assert policy_of("<k:policy xmlns:k='NS' maxCpuNum='8' maxMemorySize='17179869184' guestOnline='off'/>") == Policy(
        guest_online=False, max_cpu_num=8, max_memory_bytes=16 * 1024 * MIB
    )


@pytest.mark.parametrize("value", ["", "no", "false", "OFF", "0", " off"])
def test_a_switch_that_cannot_be_read_is_off_and_told(value: str) -> None:
    policy = policy_of(f"<policy xmlns='NS' hotplug='{value}' guestOnline='{value}'/>")
    assert (policy.hotplug, policy.guest_online, len(policy.mistakes)) == (False, False, 2)
    assert repr(value) in policy.mistakes[0]


@pytest.mark.parametrize("value", ["", "8 GiB", "-1", "1e3", "1_0", "\u0663", str(2**53), "9" * 5000])
def test_a_ceiling_that_cannot_be_read_is_zero_and_told(value: str) -> None:
    policy = policy_of(f"<policy xmlns='NS' maxCpuNum='{value}' maxMemorySize='{value}'/>")
    assert (policy.max_cpu_num, policy.max_memory_bytes, len(policy.mistakes)) == (0, 0, 2)
    assert all(len(words) < 120 for words in policy.mistakes)


@pytest.mark.parametrize(
    "xml",
    [
        "<policy xmlns='NS' maxCpus='8'/>",
        "<policies xmlns='NS'/>",
        "<policy xmlns='NS'/><policy xmlns='NS'/>",
        "<policy xmlns='NS'>hotplug=off</policy>",
        "<policy xmlns='NS'><hotplug>off</hotplug></policy>",
    ],
)
def test_a_policy_of_another_shape_allows_nothing_and_is_told(xml: str) -> None:
    policy = policy_of(xml)
    assert (policy.hotplug, policy.guest_online) == (False, False)
    assert policy.mistakes


def test_opens_no_entity_and_no_file() -> None:
    hostile = "<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>" + LIVE.replace(">hvm<", ">&e;<")
    assert "root:" not in repr(parse_definition(hostile))


@pytest.mark.parametrize("xml", ["<domain/>", "<domain><vcpu/></domain>", "<domain><vcpu>1</vcpu></domain>"])
def test_refuses_what_libvirt_did_not_write(xml: str) -> None:
    with pytest.raises(ValueError, match="without"):
        parse_definition(xml)


def test_writes_a_dimm_with_every_value_escaped() -> None:
    assert format_dimm(alias="ua-a'<\">", size_bytes=128 * MIB, node=1) == (
        '<memory model="dimm"><target><size unit="KiB">131072</size><node>1</node></target>'
        '<alias name="ua-a\'&lt;&quot;&gt;"/></memory>'
    )


@pytest.mark.parametrize(
    ("model", "address", "place"),
    [
        ("dimm", "<address type='dimm' slot='{}'/>", lambda n: {"slot": n}),
        (
            "virtio-mem",
            "<address type='pci' domain='0x0000' bus='0x0{}' slot='0x00' function='0x0'/>",
            lambda n: {"address": f"pci domain=0x0 bus={n:#x} slot=0x0 function=0x0"},
        ),
    ],
)
def test_two_devices_of_one_size_on_one_node_are_told_apart_by_their_place(
    model: str, address: str, place: Callable[[int], dict[str, Any]]
) -> None:
    """The running VM has libvirt's own aliases, its persistent definition has none."""
    device = f"<memory model='{model}'><target><size unit='KiB'>131072</size><node>0</node></target>{address}</memory>"
    xml = f"<domain><devices>{device.format(3)}{device.format(1)}</devices></domain>"
    for n in (1, 3):
        found = find_memory_xml(xml, model=model, alias=f"{model}0", node=0, size_bytes=128 * MIB, **place(n))
        assert found == device.format(n).replace("'", '"')
    assert find_memory_xml(xml, model=model, alias=None, node=0, size_bytes=128 * MIB, **place(2)) is None
