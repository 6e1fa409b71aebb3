"""Notifies systemd: ready, alive, stopping. Does nothing if systemd did not start the agent.

A datagram to a socket is the whole protocol, so that a library for it would be more than it replaces.
Source: sd_notify(3), systemd.service(5) Type=notify and WatchdogSec=.
"""

import contextlib
import socket

from kvmagent.logs import Log

log = Log(__name__)


class ServiceManager:
    """`address` is NOTIFY_SOCKET of the environment: a path, or an abstract name after an @; empty: nobody listens."""

    def __init__(self, address: str) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self) -> None:
        """The agent takes requests."""
        self._tell("READY=1")

    def feed(self) -> None:
        """The agent makes progress; without this for WatchdogSec, systemd ends it and starts it again."""
        self._tell("WATCHDOG=1")

    def stopping(self, within_s: float) -> None:
        """The agent stops, which may take so long; the watchdog is not fed meanwhile."""
        self._tell(f"STOPPING=1\nWATCHDOG_USEC={round(within_s * 1_000_000)}")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as notify:
            try:
                notify.sendto(state.encode(), self._address)
            except OSError as error:
                log.warning("systemd was not notified", state=state, error=str(error))
