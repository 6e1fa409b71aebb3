"""The management server that connected last, kept in a small file.

It is no task: nothing is owed for it, and the last word counts. So it is replaced as a whole, on disk before it is
believed.
"""

import threading
from pathlib import Path

import msgspec

from kvmagent.logs import Log
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.host import ManagementServer
from kvmagent.secretfiles import write_file

log = Log(__name__)


class ManagementServerFile:
    """Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._server: ManagementServer | None = None

    def load(self) -> None:
        """Read what was remembered. A file that cannot be read is logged and ignored: the server connects again."""
        try:
            self._server = msgspec.json.decode(self._path.read_bytes(), type=ManagementServer)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("the saved management server cannot be read", path=self._path, error=str(error))

    def get(self) -> ManagementServer | None:
        """Return the management server that connected last."""
        with self._lock:
            return self._server

    def remember(self, server: ManagementServer) -> None:
        """Remember a server, on disk first.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE, when the state directory cannot be written.
        """
        with self._lock:
            if server == self._server:
                return
            try:
                write_file(self._path, msgspec.json.encode(server))
            except OSError as error:
                raise AgentError(Code.JOURNAL_UNAVAILABLE, f"{self._path}: {error}", expected=False) from error
            self._server = server
        log.info("management server", host_uuid=server.host_uuid, url=server.send_command_url)
