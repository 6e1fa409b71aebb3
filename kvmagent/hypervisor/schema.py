"""libvirt's own schema of a domain, to check a definition without defining it.

libvirt has no call that validates without defining. What its schema lets pass, defining may still refuse.
Source: libvirt virDomainDefineXMLFlags, VIR_DOMAIN_DEFINE_VALIDATE uses the same file.
"""

import functools
from pathlib import Path

from lxml import etree

from kvmagent.model.errors import AgentError, Code

#: Where distributions install it.
DOMAIN_SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def check_definition(xml: str, schema: Path) -> None:
    """Hold a definition against the schema; where that is not installed, nothing is known of it.

    Raises:
        AgentError: DEFINITION_REFUSED.
    """
    validator = _load(schema)
    if validator is None or validator.validate(etree.fromstring(xml)):
        return
    raise AgentError(Code.DEFINITION_REFUSED, f"the prepared VM does not fit libvirt's schema: {validator.error_log}")


def has_schema(schema: Path) -> bool:
    """Return whether the schema is installed."""
    return _load(schema) is not None


@functools.cache  # it is large, and belongs to the libvirt that runs
def _load(schema: Path) -> etree.RelaxNG | None:
    try:
        return etree.RelaxNG(file=str(schema))
    except (OSError, etree.RelaxNGParseError, etree.XMLSyntaxError):
        return None
