"""Owns a haproxy with the configuration that is shipped, between a server and the two agents of a node."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from tests.lab.agent import find_free_port
from tests.lab.processes import Guard, stop_child, wait_for

SHIPPED = Path(__file__).parents[2] / "conf/zstack/haproxy.cfg"
PROGRAM = "/usr/sbin/haproxy"
START_TIMEOUT_S, STOP_TIMEOUT_S = 20.0, 10.0
SERVERS_FILE = "/etc/haproxy/zstack-servers"


class Haproxy:
    """The shipped front with ports of its own. Only where it listens and logs, and where its files are, is another.

    `servers` are the addresses that may pass, `token` the one that kvmagent knows it by.
    """

    def __init__(self, *, kvmagent: int, original: int, token: str, servers: str = "127.0.0.1") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="haproxy-"))
        self.port = find_free_port()
        self.config = self.directory / "haproxy.cfg"
        self._log = self.directory / "log"
        self._token = token
        self._guard = Guard(self.directory)
        self._child: subprocess.Popen[bytes] | None = None
        (self.directory / "zstack-servers").write_text(f"{servers}\n")
        self.config.write_text(self._adapt(SHIPPED.read_text(), kvmagent, original))

    def __enter__(self) -> Haproxy:
        environment = {**os.environ, "HOME": str(self.directory), "KVMAGENT_TOKEN": self._token}
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [PROGRAM, "-db", "-f", str(self.config)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self._listens, timeout_s=START_TIMEOUT_S, what="haproxy to listen")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            stop_child(self._child, timeout_s=STOP_TIMEOUT_S)
        self._guard.release()

    @property
    def url(self) -> str:
        """Where a server sends its commands."""
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it has logged: a line for each request."""
        return self._log.read_text(errors="replace")

    def _adapt(self, text: str, kvmagent: int, original: int) -> str:
        changes = {
            "bind :7072": f"bind 127.0.0.1:{self.port}",
            "127.0.0.1:7071\n": f"127.0.0.1:{kvmagent}\n",
            "127.0.0.1:7070\n": f"127.0.0.1:{original}\n",
            "log /dev/log local0": "log stdout format raw local0",
            f"-f {SERVERS_FILE}": f"-f {self.directory}/zstack-servers",
        }
        if os.getuid() != 0:  # only root can become another user
            changes |= {"    user haproxy\n": "", "    group haproxy\n": ""}
        for shipped, here in changes.items():
            assert text.count(shipped) == 1, shipped
            text = text.replace(shipped, here)
        return text

    def _listens(self) -> bool:
        assert self._child is not None
        if self._child.poll() is not None:
            raise RuntimeError(f"haproxy ended with {self._child.returncode}:\n{self.log()}")
        shown = Path("/proc/net/tcp").read_text()
        return re.search(rf":{self.port:04X} 00000000:0000 0A ", shown) is not None
