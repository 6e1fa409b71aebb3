"""Domain XML to facts, and a memory device to XML. Conversion only, no policy.

Source: libvirt formatdomain. Sizes in XML carry a unit; libvirt writes KiB.
"""

from lxml import etree

from kvmagent.model.facts import Definition, MemoryDevice, NumaCell, Vcpu
from kvmagent.model.units import GIB, KIB, MIB

_UNITS = {"b": 1, "bytes": 1, "KiB": KIB, "k": KIB, "MiB": MIB, "M": MIB, "GiB": GIB, "G": GIB, "TiB": 1024 * GIB}
# Far more than any machine type of QEMU takes.
_MAX_CPUS = 65536
_AGENT_CHANNEL = "./devices/channel/target[@type='virtio'][@name='org.qemu.guest_agent.0']"


def parse_definition(xml: str) -> Definition:
    """Return the facts of a domain's XML, live or persistent.

    Raises:
        ValueError: when it is not a domain that libvirt wrote.
    """
    root = _parse(xml)
    current, maximum = _vcpu_counts(root)
    max_memory = root.find("./maxMemory")
    os_type = root.find("./os/type")
    if os_type is None:
        raise ValueError("domain XML without <os><type>")
    balloon = root.find("./devices/memballoon")
    devices = tuple(_parse_device(element) for element in root.iterfind("./devices/memory"))
    total = _size(root.find("./memory"))
    return Definition(
        vcpu_current=current,
        vcpu_maximum=maximum,
        vcpus=_vcpus(root, current, maximum),
        topology=_topology(root),
        total_bytes=total,
        current_bytes=_size(root.find("./currentMemory")) or total,
        max_memory_bytes=None if max_memory is None else _size(max_memory),
        slots=0 if max_memory is None else int(max_memory.get("slots", "0")),
        cells=tuple(_parse_cell(element, n) for n, element in enumerate(root.iterfind("./cpu/numa/cell"))),
        devices=devices,
        acpi=root.find("./features/acpi") is not None,
        balloon=balloon is not None and balloon.get("model") != "none",
        agent_channel=root.find(_AGENT_CHANNEL) is not None,
        machine=os_type.get("machine", ""),
        arch=os_type.get("arch", ""),
        hypervisor=root.get("type", ""),
    )


def is_agent_connected(live_xml: str) -> bool | None:
    """Return whether the guest has opened its agent channel; None where there is no channel."""
    target = _parse(live_xml).find(_AGENT_CHANNEL)
    return None if target is None else target.get("state") == "connected"


def format_dimm(*, alias: str, size_bytes: int, node: int) -> str:
    """Return the XML of a dimm for virDomainAttachDeviceFlags."""
    memory = etree.Element("memory", model="dimm")
    target = etree.SubElement(memory, "target")
    etree.SubElement(target, "size", unit="KiB").text = str(size_bytes // KIB)
    etree.SubElement(target, "node").text = str(node)
    etree.SubElement(memory, "alias", name=alias)
    return etree.tostring(memory, encoding="unicode")


def _parse(xml: str) -> etree._Element:
    # libvirt's XML is trusted to be well-formed, not to be free of what a user wrote into it.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True)
    return etree.fromstring(xml, parser)


def _vcpu_counts(root: etree._Element) -> tuple[int, int]:
    vcpu = root.find("./vcpu")
    if vcpu is None or not vcpu.text:
        raise ValueError("domain XML without <vcpu>")
    maximum = _check_count(int(vcpu.text))
    return int(vcpu.get("current", maximum)), maximum


def _check_count(count: int) -> int:
    """Return a number of CPUs that a machine may have: a list is made of it."""
    if count > _MAX_CPUS:
        raise ValueError(f"domain XML with {count} CPUs")
    return count


def _vcpus(root: etree._Element, current: int, maximum: int) -> tuple[Vcpu, ...]:
    """libvirt writes `<vcpus>` only once single vCPUs differ; before that the first ones are enabled, and fixed."""
    listed = root.findall("./vcpus/vcpu")
    if not listed:
        return tuple(Vcpu(id=n, enabled=n < current, hotpluggable=n >= current) for n in range(maximum))
    return tuple(
        Vcpu(
            id=int(element.get("id", "0")),
            enabled=element.get("enabled") == "yes",
            hotpluggable=element.get("hotpluggable") == "yes",
        )
        for element in listed
    )


def _topology(root: etree._Element) -> tuple[int, int, int, int] | None:
    topology = root.find("./cpu/topology")
    if topology is None:
        return None
    sockets, dies, cores, threads = (int(topology.get(name, "1")) for name in ("sockets", "dies", "cores", "threads"))
    return sockets, dies, cores, threads


def _parse_cell(element: etree._Element, position: int) -> NumaCell:
    unit = _UNITS[element.get("unit", "KiB")]
    return NumaCell(
        id=int(element.get("id", position)),
        cpus=_parse_ids(element.get("cpus", "")),
        memory_bytes=int(element.get("memory", "0")) * unit,
    )


def _parse_ids(text: str) -> frozenset[int]:
    """Return the ids of a libvirt set such as "0-3,^2,8"."""
    ids: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.removeprefix("^").partition("-")
        span = range(int(first), _check_count(int(last or first)) + 1)
        ids = ids - set(span) if part.startswith("^") else ids | set(span)
    return frozenset(ids)


def _parse_device(element: etree._Element) -> MemoryDevice:
    alias, address, node = element.find("./alias"), element.find("./address"), element.findtext("./target/node")
    base = address.get("base") if address is not None else None
    slot = address.get("slot") if address is not None and address.get("type") == "dimm" else None
    requested, current = element.find("./target/requested"), element.find("./target/current")
    return MemoryDevice(
        model=element.get("model", ""),
        size_bytes=_size(element.find("./target/size")),
        node=None if node is None else int(node),
        alias=None if alias is None else alias.get("name"),
        slot=None if slot is None else int(slot, 0),
        base=None if base is None else int(base, 0),
        requested_bytes=None if requested is None else _size(requested),
        current_bytes=None if current is None else _size(current),
    )


def _size(element: etree._Element | None) -> int:
    if element is None or not element.text:
        return 0
    return int(element.text) * _UNITS[element.get("unit", "KiB")]
