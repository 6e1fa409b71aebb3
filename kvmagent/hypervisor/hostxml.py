"""The compute node in libvirt's XML: its processor model, and what the firmware reports.

Source: libvirt formatcaps.html and formatdomain.html#smbios-system-information, virConnectGetSysinfo.
"""

from kvmagent.hypervisor.domainxml import parse_xml

# What is not said, in the words of those who fill in a firmware.
_NOT_SAID = frozenset({"", "Not Specified", "To Be Filled By O.E.M."})


def parse_cpu_model(capabilities: str) -> str | None:
    """Return libvirt's name of the host's CPU model."""
    return parse_xml(capabilities).findtext("./host/cpu/model")


def parse_sysinfo(xml: str) -> dict[str, str]:
    """Return the entries of the first of each block, by block and name: system_serial, processor_max_speed."""
    found: dict[str, str] = {}
    for block in parse_xml(xml):
        for entry in block.iterfind("./entry"):
            value = (entry.text or "").strip()
            if value not in _NOT_SAID:
                found.setdefault(f"{block.tag}_{entry.get('name')}", value)
    return found
