"""Owns a private libvirt daemon, apart from the host's own: its start, its failures, and its end without a trace.

    PrivateLibvirtd -- child --> libvirtd (an ordinary user's session daemon) --> QEMU of each guest
                                 all its directories and sockets in /tmp/kvl-XXXXXXXX

Run by root, the daemon and its guests are still an ordinary user's: libvirtd started by root is always the system
daemon. The tests and the agent stay who they are, and connect by the socket's path.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import libvirt

from tests.lab.image import cache_directory
from tests.lab.newest import enter
from tests.lab.processes import Guard, stop_child, wait_for

#: The first that the host has. virtqemud is the same driver, where libvirtd is no longer shipped.
DAEMONS = (("libvirtd", "libvirt-sock"), ("virtqemud", "virtqemud-sock"))
ORDINARY_USER = "nobody"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
XDG_DIRECTORIES = {"XDG_RUNTIME_DIR": "r", "XDG_CONFIG_HOME": "c", "XDG_CACHE_HOME": "k"}
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
#: Where a daemon keeps what it found out of each QEMU of the host by running it, in its XDG_CACHE_HOME.
CAPABILITIES = Path("libvirt/qemu/cache/capabilities")

# host_uuid: two daemons of one machine are two hosts to each other, so that a guest can migrate.
# keepalive_interval: a test process that has an event loop registered and not running would be taken for dead.
DAEMON_CONF = """\
auth_unix_rw = "none"
log_outputs = "2:stderr"
keepalive_interval = -1
host_uuid = "{host_uuid}"
"""

# stdio_handler: with its default, libvirtd starts a virtlogd that outlives it by minutes.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
"""


class PrivateLibvirtd:
    """A session libvirtd in the foreground, as a child in a process group of its own.

    `directory`, `uri` and `user` hold from creation to `stop`, across kill and restart. To be used by one thread.
    `tree` is a directory with a libvirtd and a QEMU that are run in place of the host's; it needs root.
    """

    def __init__(self, tree: Path | None = None) -> None:
        self._tree = tree
        self._program, socket = find_daemon() if tree is None else ("/usr/sbin/libvirtd", "libvirt-sock")
        self.user = pwd.getpwnam(ORDINARY_USER) if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        # Short, and so never in TMPDIR: libvirt adds some 75 characters for the agent's socket, and 107 is the limit.
        self.directory = Path(tempfile.mkdtemp(prefix="kvl-", dir="/tmp"))
        self.uri = f"qemu+unix:///session?socket={self.directory}/r/libvirt/{socket}"
        self.log_file = self.directory / "daemon.log"
        self.guests_directory = self.directory / "g"
        self._child: subprocess.Popen[bytes] | None = None
        self._guard = Guard(self.directory)
        self._write_configuration()

    def __enter__(self) -> PrivateLibvirtd:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the daemon's process is there (it may be paused)."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start the daemon and wait until it accepts connections; guests that an earlier one left are found again.

        Raises:
            RuntimeError: it ended at once; the text has its log.
            TimeoutError: it does not answer.
        """
        assert not self.is_running, "the daemon runs already"
        # Without this, a client that finds no daemon starts one by itself, and nothing of the lab would own it.
        os.environ["LIBVIRT_AUTOSTART"] = "0"
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised: not on stderr as well
        command, is_root = [self._program], os.getuid() == 0 and self._tree is None
        if self._tree is not None:
            user = f"{self.user.pw_uid}:{self.user.pw_gid}"
            command = enter(self._tree, self._program, user=user)
        with self.log_file.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                env=self._environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self.user.pw_uid if is_root else None,
                group=self.user.pw_gid if is_root else None,
                extra_groups=kvm_groups() if is_root else None,
            )
        wait_for(self._is_ready, timeout_s=START_TIMEOUT_S, what=f"{self._program} (log: {self.log_file})")

    def stop(self) -> None:
        """End the daemon and all its guests, and remove the directory. May be called again."""
        if self._child is not None:
            self.resume()
            stop_child(self._child, timeout_s=STOP_TIMEOUT_S)
            self._child = None
            self._keep_capabilities()
        self._guard.release()

    def kill(self) -> None:
        """SIGKILL the daemon alone: its guests live on, until another one finds them, or `stop`."""
        assert self._child is not None
        self._child.kill()
        self._child.wait()

    def restart(self) -> None:
        """Kill the daemon and start it again: the same socket, the same guests."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP the daemon: connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT the daemon."""
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        """What the daemon has said, warnings and errors."""
        return self.log_file.read_text(errors="replace")

    @contextlib.contextmanager
    def connect(self) -> Iterator[libvirt.virConnect]:
        """A connection of its own for a few calls: no earlier failure of the daemon lingers in it."""
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def own(self, path: Path) -> None:
        """Give a file to the user of the daemon and its guests."""
        if os.getuid() == 0:
            shutil.chown(path, self.user.pw_uid, self.user.pw_gid)

    def _take_capabilities(self) -> None:
        """Take what earlier daemons found out of each QEMU; whether it still holds, the daemon sees by itself."""
        kept, own = self._places_of_capabilities()
        own.mkdir(parents=True)
        for file in kept.glob("*.xml"):
            shutil.copyfile(file, own / file.name)

    def _keep_capabilities(self) -> None:
        kept, own = self._places_of_capabilities()
        kept.mkdir(exist_ok=True)
        for file in own.glob("*.xml"):
            content = file.read_bytes()
            # A test's own emulator ends with it.
            if str(self.directory).encode() in content:
                continue
            if not (kept / file.name).exists() or (kept / file.name).read_bytes() != content:
                part = kept / f"{file.name}.{self.directory.name}"
                part.write_bytes(content)
                part.rename(kept / file.name)

    def _places_of_capabilities(self) -> tuple[Path, Path]:
        """Those of all daemons with the same QEMUs, and this one's own."""
        kept = cache_directory() / f"qemus-of-{'host' if self._tree is None else self._tree.name}"
        return kept, self.directory / XDG_DIRECTORIES["XDG_CACHE_HOME"] / CAPABILITIES

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    def _is_ready(self) -> bool:
        assert self._child is not None
        if self._child.poll() is not None:
            raise RuntimeError(f"{self._program} ended with {self._child.returncode}:\n{self.log()}")
        try:
            with self.connect():
                return True
        except libvirt.libvirtError:
            return False

    def _environment(self) -> dict[str, str]:
        directories = {name: str(self.directory / short) for name, short in XDG_DIRECTORIES.items()}
        return {"PATH": SYSTEM_PATH, "HOME": str(self.directory), "LC_ALL": "C", **directories}

    def _write_configuration(self) -> None:
        configuration = self.directory / XDG_DIRECTORIES["XDG_CONFIG_HOME"] / "libvirt"
        configuration.mkdir(parents=True)
        for name in XDG_DIRECTORIES.values():
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)
        self.guests_directory.mkdir()
        self._take_capabilities()
        (configuration / "qemu.conf").write_text(QEMU_CONF)
        (configuration / f"{Path(self._program).name}.conf").write_text(DAEMON_CONF.format(host_uuid=uuid.uuid4()))
        for path in (self.directory, *self.directory.rglob("*")):
            self.own(path)


def find_daemon() -> tuple[str, str]:
    """Path of the daemon's program and name of its socket.

    Raises:
        RuntimeError: the host has none.
    """
    for name, socket in DAEMONS:
        # An ordinary user's PATH has no sbin.
        if program := shutil.which(name, path=SYSTEM_PATH):
            return program, socket
    raise RuntimeError("neither libvirtd nor virtqemud is installed (tests/lab/packages.sh installs libvirtd)")


def kvm_groups() -> list[int]:
    """The group that may use /dev/kvm, where it has one of its own; guests of type 'kvm' need it."""
    kvm = Path("/dev/kvm")
    return [kvm.stat().st_gid] if kvm.exists() and kvm.stat().st_gid != 0 else []
