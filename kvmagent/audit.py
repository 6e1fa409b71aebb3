"""The audit trail: one line for each command that was accepted, refused or finished, whatever log level is set.

    audit event=accepted caller=token:zstack client=10.0.0.5 what=HotPlugCpu vm=db-7 uuid=4d6c... task=9f1c ...

`caller` is who they proved to be, `client` the address that they came from; what is not known is left out,
and a value that could be mistaken for two fields is quoted as JSON is. Refusals of clients that
have proved nothing are told one by one up to a number, and then counted: they do not fill the log.
"""

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from kvmagent.logs import Log

log = Log(__name__, always=True)

# Of a network that has proved nothing so many refusals in so many seconds are told one by one, and of so many networks.
_TOLD, _EACH_S, _NETWORKS = 20, 60.0, 1000
_OTHERS = "other addresses"
_NO_TOTALS: Mapping[str, int] = MappingProxyType({})


def audit(
    event: Literal["accepted", "refused", "finished"],
    *,
    caller: str,
    client: str,
    what: str,
    vm: str = "",
    uuid: str = "",
    task: str = "",
    outcome: str,
    error_code: str = "",
    error: str = "",
    totals: Mapping[str, int] = _NO_TOTALS,
) -> None:
    """Write one line. `what` is the command's name, or what was tried; `outcome` a word, of a refusal its code.

    `error_code` and `error` are what an ending tells, `error` also what a refusal says in words; `totals` are those of
    the VM before and after.
    """
    known = {"caller": caller, "client": client, "what": what, "vm": vm, "uuid": uuid, "task": task}
    known |= {"outcome": outcome, "error_code": error_code, "error": error}
    log.info("audit", event=event, **{name: value for name, value in known.items() if value}, **totals)


class Refusals:
    """What clients were refused who have proved nothing. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._seen: Counter[str] = Counter()

    def tell(self, client: str, *, what: str, outcome: str, error: str = "") -> None:
        """Write a line for a refusal, or count it where this network has had enough of them."""
        self.flush()
        with self._lock:
            network = network_of(client)
            if network not in self._seen and len(self._seen) >= _NETWORKS:
                network = _OTHERS
            self._seen[network] += 1
            if self._seen[network] > _TOLD:
                return
        audit("refused", caller="", client=client, what=what, outcome=outcome, error=error)

    def flush(self) -> None:
        """Write a line for each network of which refusals were only counted, once their time is over."""
        with self._lock:
            now = self._clock()
            if now - self._since < _EACH_S:
                return
            seen, self._seen, self._since = self._seen, Counter(), now
        for network, count in seen.items():
            if count > _TOLD:
                log.info("audit", event="refused", client=network, what="more like these", count=count - _TOLD)


def network_of(client: str) -> str:
    """Return whom an address counts for: one host has all of 127.0.0.0/8, and of IPv6 a /64 at least."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if address.is_loopback:
        return "loopback"
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return client
