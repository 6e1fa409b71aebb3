"""Edits a persistent definition to a shape that a planner has decided. Conversion only.

Everything that the shape does not name stays as it is, in its order: metadata, namespaces, comments, passwords.
Source: libvirt formatdomain.
"""

import difflib

from lxml import etree

from kvmagent.model.steps import CellShape, Shape, VirtioMemShape
from kvmagent.model.units import KIB, format_ids

_AGENT_NAME = "org.qemu.guest_agent.0"


def edit_shape(xml: str, shape: Shape) -> str:
    """Return the definition with the shape in it."""
    root = _parse(xml)
    _edit_vcpus(root, shape.vcpu_maximum)
    _edit_cpu(root, shape)
    _edit_max_memory(root, shape)
    if shape.acpi and root.find("./features/acpi") is None:
        features = root.find("./features")
        if features is None:
            features = _insert(root, etree.Element("features"), after=("os", "bootloader_args", "bootloader", "vcpu"))
        _insert(features, etree.Element("acpi"))
    _edit_devices(_get(root, "./devices"))
    if shape.free_page_reporting:
        _get(root, "./devices/memballoon").set("freePageReporting", "on")
    for device in shape.virtio_mems:
        _add_virtio_mem(root, device)
    return _format(root)


def format_diff(xml: str, edited_xml: str) -> str:
    """Return the difference of two definitions as a unified diff; empty where there is none."""
    former, edited = _format(_parse(xml)).splitlines(), _format(_parse(edited_xml)).splitlines()
    return "\n".join(difflib.unified_diff(former, edited, "persistent", "prepared", lineterm="", n=2))


def _edit_vcpus(root: etree._Element, maximum: int) -> None:
    """Raise the maximum; what is enabled stays. A list of single vCPUs has to name them all."""
    vcpu = _get(root, "./vcpu")
    if vcpu.get("current") is None:
        vcpu.set("current", (vcpu.text or "").strip())
    vcpu.text = str(maximum)
    vcpus = root.find("./vcpus")
    if vcpus is not None:
        listed = {int(element.get("id", "-1")) for element in vcpus.iterfind("./vcpu")}
        for number in sorted(set(range(maximum)) - listed):
            _insert(vcpus, etree.Element("vcpu", id=str(number), enabled="no", hotpluggable="yes"))


def _edit_cpu(root: etree._Element, shape: Shape) -> None:
    cpu = root.find("./cpu")
    if cpu is None and shape.topology is None and not shape.cells:
        return
    if cpu is None:
        cpu = _insert(root, etree.Element("cpu"), after=("cputune", "features", "os"))
    if shape.topology is not None:
        _get(cpu, "./topology").set("sockets", str(shape.topology[0]))  # what is inside a socket stays
    numa = cpu.find("./numa")
    for cell in shape.cells:
        if numa is None:
            numa = _insert(cpu, etree.Element("numa"))
        _edit_cell(numa, cell)


def _edit_cell(numa: etree._Element, cell: CellShape) -> None:
    element = next((one for one in numa.iterfind("./cell") if one.get("id") == str(cell.id)), None)
    if element is None:
        element = _insert(numa, etree.Element("cell", id=str(cell.id)))
        element.set("memory", str(cell.memory_bytes // KIB))
        element.set("unit", "KiB")
    if cell.cpus:  # libvirt's schema has no empty list
        element.set("cpus", format_ids(cell.cpus))


def _edit_max_memory(root: etree._Element, shape: Shape) -> None:
    if shape.max_memory_bytes is None:
        return
    max_memory = root.find("./maxMemory")
    if max_memory is None:
        max_memory = etree.Element("maxMemory")
        memory = _get(root, "./memory")
        max_memory.tail = memory.tail
        root.insert(root.index(memory), max_memory)
    max_memory.set("slots", str(shape.slots))
    max_memory.set("unit", "KiB")
    max_memory.text = str(shape.max_memory_bytes // KIB)


def _edit_devices(devices: etree._Element) -> None:
    """A balloon and a guest-agent channel, where there is none; libvirt adds the controllers that they need."""
    for balloon in devices.findall("./memballoon[@model='none']"):
        balloon.set("model", "virtio")
    if devices.find("./memballoon") is None:
        _insert(devices, etree.Element("memballoon", model="virtio"))
    if devices.find(f"./channel/target[@name='{_AGENT_NAME}']") is None:
        channel = etree.Element("channel", type="unix")
        etree.SubElement(channel, "target", type="virtio", name=_AGENT_NAME)
        _insert(devices, channel)


def _add_virtio_mem(root: etree._Element, shape: VirtioMemShape) -> None:
    """Source: libvirt formatdomain; <memory> at the top counts every device's whole size."""
    devices = _get(root, "./devices")
    nodes = {element.findtext("target/node") for element in devices.iterfind("./memory[@model='virtio-mem']")}
    if str(shape.node) in nodes:
        return
    device = etree.Element("memory", model="virtio-mem")
    target = etree.SubElement(device, "target")
    sizes = {"size": shape.size_bytes, "node": None, "block": shape.block_bytes, "requested": 0}
    for name, size_bytes in sizes.items():
        element = etree.SubElement(target, name)
        if size_bytes is None:
            element.text = str(shape.node)
        else:
            element.set("unit", "KiB")
            element.text = str(size_bytes // KIB)
    _insert(devices, device)
    memory = _get(root, "./memory")
    if memory.get("unit", "KiB") == "KiB":  # as libvirt writes it
        memory.text = str(int(memory.text or "0") + shape.size_bytes // KIB)


def _insert(parent: etree._Element, child: etree._Element, *, after: tuple[str, ...] = ()) -> etree._Element:
    """Put a child behind the last of the first kind of `after` that is there, else at the end; indented alike."""
    before = next((found[-1] for name in after if (found := parent.findall(name))), None)
    if before is None and len(parent):
        before = parent[-1]
    if before is not None:
        child.tail = before.tail
        if before is parent[-1] and len(parent) > 1:
            before.tail = parent[-2].tail
        before.addnext(child)
    else:
        child.tail = parent.tail
        parent.append(child)
    return child


def _get(root: etree._Element, path: str) -> etree._Element:
    element = root.find(path)
    if element is None:
        raise ValueError(f"domain XML without {path}")
    return element


def _parse(xml: str) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, strip_cdata=False)
    return etree.fromstring(xml, parser)


def _format(root: etree._Element) -> str:
    return etree.tostring(root, encoding="unicode")
