"""The audit trail: one line for each command that was accepted, refused or finished, whatever log level is set.

    audit event=accepted caller=token:zstack client=10.0.0.5 what=HotPlugCpu vm=db-7 task=9f1c outcome=accepted

`caller` is who they proved to be, `client` the address that they came from; what is not known is left out,
and a value that could be mistaken for two fields is quoted as JSON is.
"""

import logging
from typing import Literal

from kvmagent.logs import format_fields

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)


def audit(
    event: Literal["accepted", "refused", "finished"],
    *,
    caller: str,
    client: str,
    what: str,
    vm: str = "",
    task: str = "",
    outcome: str,
) -> None:
    """Write one line. `what` is the command's name, or what was tried; `outcome` a word, for a refusal its code."""
    known = {"caller": caller, "client": client, "what": what, "vm": vm, "task": task, "outcome": outcome}
    fields = {name: value for name, value in known.items() if value}
    log.info("audit %s", format_fields(event=event, **fields))
