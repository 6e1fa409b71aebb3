"""A small file of what the agent remembers about VMs while it restarts, and could do without."""

from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from kvmagent.logs import Log
from kvmagent.secretfiles import write_file

log = Log(__name__)

Entry = TypeVar("Entry")


class VmFile(Generic[Entry]):
    """Entries by the VM's UUID. Its owner sees to it that one thread at a time uses it; `about` is for the log."""

    def __init__(self, path: Path, kind: type[Entry], about: str) -> None:
        self._path = path
        self._decoder = msgspec.json.Decoder(dict[str, kind])  # type: ignore[valid-type]
        self._about = about
        self._has_failed = False

    def load(self) -> dict[str, Entry]:
        """Return what was kept; a file that cannot be read is logged, and begun anew."""
        try:
            entries: dict[str, Entry] = self._decoder.decode(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            log.warning(
                "saved state of VMs cannot be read and is ignored", about=self._about, path=self._path, error=str(error)
            )
            return {}
        return entries

    def save(self, entries: dict[str, Entry]) -> bool:
        """Keep these, and no others; return whether they are on disk. The first of several failures is logged."""
        try:
            write_file(self._path, msgspec.json.encode(entries))
        except OSError as error:
            if not self._has_failed:
                log.warning("state of VMs cannot be saved", about=self._about, path=self._path, error=str(error))
            self._has_failed = True
        else:
            self._has_failed = False
        return not self._has_failed
