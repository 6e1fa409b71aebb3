"""libvirt's XML of a VM without anything that may be a password. Conversion only.

libvirt shows no password to a read-only connection, but in places that it does not know to hold one.
"""

import re

from lxml import etree

from kvmagent.hypervisor.domainxml import parse_xml
from kvmagent.model.facts import POLICY_NAMESPACE
from kvmagent.model.urls import shown_line

_HIDDEN = "hidden"
# Elements whose text libvirt takes for what it says it is. Any other's may be anything: a kernel's command line, the
# files of a fwcfg, a cookie, what an owner wrote.
_KNOWN_TEXT = frozenset({
    "name", "uuid", "genid", "memory", "currentMemory", "maxMemory", "vcpu", "iothreads", "iothreadids", "shares",
    "period", "quota", "global_period", "global_quota", "emulator_period", "emulator_quota", "iothread_period",
    "iothread_quota", "hard_limit", "soft_limit", "swap_hard_limit", "min_guarantee", "weight", "partition", "type",
    "loader", "nvram", "kernel", "initrd", "dtb", "emulator", "model", "vendor", "product", "on_poweroff",
    "on_reboot", "on_crash", "on_lockfailure", "label", "baselabel", "imagelabel", "size", "requested", "current",
    "block", "node", "nodemask", "pagesize", "total_bytes_sec", "read_bytes_sec", "write_bytes_sec",
    "total_iops_sec", "read_iops_sec", "write_iops_sec", "path", "cbitpos", "reducedPhysBits", "policy",
})  # fmt: skip
_WORDS = r"(?:pass|pwd|secret|token|key|psk|cookie|credential|auth)"
_SECRET_NAME = re.compile(rf"{_WORDS}|^query$", re.IGNORECASE)
# A query, an option that says so, a URL's user and password, QEMU's JSON.
# Of a line of a log an option with its value. QEMU prints an option that it does not take whole.
# Observed: QEMU 7.2, "-object secret,id=x,data=S3CRET,foo=1: Invalid parameter 'foo'".
_SECRET_OPTION = re.compile(
    rf"""((?:{_WORDS}[\w-]*|\b(?:data|string|value))["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,"'&]+)""", re.IGNORECASE
)
_SECRET_VALUE = re.compile(rf"\?|{_WORDS}\w*=|//[^/]*@|^json:", re.IGNORECASE)


def shown_definition(xml: str) -> str:
    """Return a definition without what may be a password, and without the metadata of others.

    Raises:
        ValueError: when it is no XML.
    """
    root = parse_xml(xml)
    for one in [*root.iter()]:
        if not isinstance(one.tag, str):
            one.text = _HIDDEN
        elif one.tag == "metadata":
            _keep_policies(one)
        else:
            _hide(one)
    return etree.tostring(root, encoding="unicode") + "\n"


def shown_log(text: str) -> str:
    """Return lines of libvirt's log without what may be a password."""
    return _SECRET_OPTION.sub(rf"\1{_HIDDEN}", shown_line(text))


def _keep_policies(metadata: etree._Element) -> None:
    """Leave the limits that the VM's owner has for the agent."""
    for one in [*metadata]:
        if one.tag != f"{{{POLICY_NAMESPACE}}}policy":
            metadata.remove(one)
    metadata.text = _HIDDEN


def _hide(one: etree._Element) -> None:
    name = etree.QName(one)
    if name.namespace and name.namespace != POLICY_NAMESPACE:
        # A hypervisor's own: command lines, environments, properties.
        one.clear()
        one.text = _HIDDEN
        return
    # Of the owner's limits not what stands between them.
    if one.text and one.text.strip() and (one.tag not in _KNOWN_TEXT or _SECRET_VALUE.search(one.text)):
        one.text = _HIDDEN
    if one.tail and one.tail.strip():
        one.tail = _HIDDEN
    for key, value in ((str(key), str(value)) for key, value in one.items()):
        if key.startswith("{") or _SECRET_NAME.search(key) or _SECRET_VALUE.search(value):
            one.set(key, _HIDDEN)
