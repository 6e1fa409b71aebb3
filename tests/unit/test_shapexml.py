"""Editing a definition: what the shape names is there afterwards, everything else is as it was and where it was."""

from lxml import etree

from kvmagent.hypervisor.domainxml import parse_definition
from kvmagent.hypervisor.shapexml import edit_shape, format_diff
from kvmagent.model.steps import CellShape, Shape

MIB = 1024 * 1024
SHAPE = Shape(
    vcpu_maximum=4,
    topology=None,
    max_memory_bytes=2048 * MIB,
    slots=16,
    cells=(CellShape(id=0, cpus=(0, 1, 2, 3), memory_bytes=512 * MIB),),
)
BARE = """\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>bare</name>
  <metadata>
    <note:owner xmlns:note='http://example.com/note'>team &lt;blue&gt; <![CDATA[<&>]]></note:owner>
  </metadata>
  <!-- kept -->
  <memory unit='KiB'>524288</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <devices>
    <graphics type='vnc' passwd='s3cret'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-foo'/>
  </qemu:commandline>
</domain>"""


def test_a_bare_definition_gets_all_that_hotplug_needs() -> None:
    definition = parse_definition(edit_shape(BARE, SHAPE))
    assert (definition.vcpu_current, definition.vcpu_maximum) == (1, 4)
    assert (definition.max_memory_bytes, definition.slots) == (2048 * MIB, 16)
    assert [(cell.id, sorted(cell.cpus), cell.memory_bytes) for cell in definition.cells] == [
        (0, [0, 1, 2, 3], 512 * MIB)
    ]
    assert definition.acpi
    assert definition.balloon
    assert definition.agent_channel


def test_everything_else_stays_in_its_place() -> None:
    edited = edit_shape(BARE, SHAPE)
    for kept in ("<!-- kept -->", "s3cret", "<![CDATA[<&>]]>", "team &lt;blue&gt;", '<qemu:arg value="-foo"/>'):
        assert kept in edited
    former, now = ([child.tag for child in etree.fromstring(xml)] for xml in (BARE, edited))
    assert [tag for tag in now if tag in former] == former
    assert [tag for tag in now if tag not in former] == ["maxMemory", "features", "cpu"]


def test_editing_again_changes_nothing() -> None:
    edited = edit_shape(BARE, SHAPE)
    assert edit_shape(edited, SHAPE) == edited
    assert format_diff(edited, edit_shape(edited, SHAPE)) == ""


def test_single_vcpus_are_listed_up_to_the_new_maximum() -> None:
    listed = BARE.replace(
        "<vcpu placement='static'>1</vcpu>",
        "<vcpu current='1'>2</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/>"
        "<vcpu id='1' enabled='no' hotpluggable='yes'/></vcpus>",
    )
    definition = parse_definition(edit_shape(listed, SHAPE))
    assert [(vcpu.id, vcpu.enabled) for vcpu in definition.vcpus] == [(0, True), (1, False), (2, False), (3, False)]
    assert definition.vcpu_current == 1


def test_the_diff_shows_lines_that_changed_and_no_others() -> None:
    diff = format_diff(BARE, edit_shape(BARE, SHAPE))
    changed = [line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert [line.strip("- ") for line in changed] == [
        '<vcpu placement="static">1</vcpu>',
        '<memballoon model="none"/>',
    ]
