"""`kvmagent`: reads the configuration, starts the agent, runs until a signal stops it."""

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from kvmagent import __version__
from kvmagent.agent import Agent
from kvmagent.api.security import new_token
from kvmagent.cli.configfile import check_files, read_settings
from kvmagent.logs import Log, LogOutput, error_fields
from kvmagent.model.errors import AgentError, Code
from kvmagent.plugins import load_plugins
from kvmagent.settings import DEFAULT_PATH, Settings, sample_conf
from kvmagent.systemd import ServiceManager
from kvmagent.tasks.faults import Fault, no_fault

log = Log(__name__)

_MAX_FILES = 65536
# How long an agent that has to be ended tries to tell so.
_TELL_S = 2.0
# Source: sysexits(3), EX_CONFIG: init.d/kvmagent.service does not try again after it.
_STATUS_FAILED, _STATUS_CONFIGURATION = 1, os.EX_CONFIG
_PASSES = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
# Source: glibc, malloc.h.
_M_ARENA_MAX = -8


def main(arguments: list[str] | None = None, *, fault: Fault = no_fault) -> int:
    """Run the agent; return the exit status. `fault`: see tasks.faults.

    0 stopped; 1 could not start now; 78 cannot start before the configuration is corrected.
    """
    options = _parse_arguments(arguments)
    if options.sample:
        print(sample_conf(), end="")
        return 0
    process = _Process(Path(options.config), options.set)
    # The journal, its companions and a log file are made by libraries that ask for no mode.
    os.umask(0o077)
    _raise_file_limit()
    _share_memory()
    try:
        if options.new_token is not None:
            token, line = new_token(options.new_token)
            print(f"{line}\n{token}")
            return 0
        settings = process.read_settings()
        process.log_output.open(settings.log)
        agent = Agent(settings, load_plugins(settings.agent.plugins), fault=fault)
        agent.start()
        # What is there now stays: looking through it for garbage again and again holds all threads up.
        gc.collect()
        gc.freeze()
    except AgentError as error:
        process.log_output.tell(f"kvmagent: {error.code}: {error.message}", f"kvmagent: remedy: {error.remedy}")
        if process.log_output.is_file:
            log.error("agent cannot start", **error_fields(error))
        return _STATUS_CONFIGURATION if error.code is Code.BAD_CONFIGURATION and not may_pass(error) else _STATUS_FAILED
    process.manager.ready()
    agent.run_until_signal(process, process.signals)
    process.manager.stopping(agent.stop_within_s)
    end_in_time(agent.stop_within_s, process.dump_stacks)
    agent.stop()
    return 0


def may_pass(error: AgentError) -> bool:
    """Return whether a later start may succeed with this configuration: a full disk may have space again."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSES


def end_in_time(seconds: float, dump_stacks: Callable[[], None], end: Callable[[int], None] = os._exit) -> None:
    """End the process after so long, whatever hangs; what the journal has is on disk."""

    def tell() -> None:
        log.error("the agent did not stop in time and was killed", seconds=seconds)
        dump_stacks()

    def end_now() -> None:
        # The log may be what hangs.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(_TELL_S)
        end(1)

    timer = threading.Timer(seconds, end_now)
    timer.daemon = True
    timer.start()


class _Process:
    """What the agent has of its process: signals, the log's output, the configuration file, the service manager."""

    def __init__(self, path: Path, overrides: list[str]) -> None:
        self._path = path
        self._overrides = overrides
        self.signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.log_output = LogOutput()
        self.manager = ServiceManager(os.environ.get("NOTIFY_SOCKET", ""))
        # A crash of a C library leaves the threads' stacks in the log.
        faulthandler.enable(self.log_output.dump_fd)
        # From the start: a reload that comes before the agent looks for signals waits for it, and does not end it.
        signal.signal(signal.SIGHUP, lambda number, _frame: self.signals.put(number))
        # Neither signal ends the agent. A ZStack server sends SIGUSR2 before it restarts an agent that does not answer.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _frame: self.signals.put(number))
            # Before that handler, which needs the main thread: the stacks are written whatever the threads are at.
            faulthandler.register(number, file=self.log_output.dump_fd, all_threads=True, chain=True)

    def read_settings(self) -> Settings:
        """Return what the configuration file says now.

        Raises:
            AgentError: BAD_CONFIGURATION; also where others can change it.
        """
        settings = read_settings(self._path, self._overrides)
        check_files(self._path)
        return settings

    def read_log_settings(self) -> None:
        self.log_output.open(self.read_settings().log)

    def dump_stacks(self) -> None:
        faulthandler.dump_traceback(self.log_output.dump_fd, all_threads=True)

    def tick(self, *, well: bool) -> None:
        self.log_output.follow()
        if well:
            self.manager.feed()


def _share_memory() -> None:
    """Have all threads allocate from one place: else glibc gives each its own, and each keeps what it once needed.

    They hardly wait for each other there: Python lets one run at a time. Source: mallopt(3).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _raise_file_limit() -> None:
    """Raise the limit of descriptors as far as allowed: each connection needs one, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft < wanted:
        with contextlib.suppress(OSError):  # confined: what the service manager gave is what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvmagent", description="Host agent for live CPU and memory hotplug of KVM guests."
    )
    parser.add_argument(
        "--config", metavar="FILE", default=DEFAULT_PATH, help="configuration file (default: %(default)s)"
    )
    parser.add_argument(
        "--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="override one key; may be repeated"
    )
    parser.add_argument("--sample", action="store_true", help="print the configuration with every key and exit")
    parser.add_argument(
        "--new-token",
        metavar="NAME",
        help="print a line for security.tokens_file and, on a second line, the token that it lets in, and exit",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
