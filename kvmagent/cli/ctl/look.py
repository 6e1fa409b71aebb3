"""The looks that are made as the agent's user, in a process of their own: a Finding a line, as JSON. See agentuser."""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from kvmagent.cli.configfile import check_files, read_sources
from kvmagent.cli.ctl.agentuser import Begun
from kvmagent.cli.ctl.configuration import CHECKS
from kvmagent.cli.ctl.findings import Finding
from kvmagent.model.errors import AgentError
from kvmagent.settings import Settings, parse_sources

Check = Callable[[], Iterator[Finding]]


def main(arguments: list[str]) -> int:
    """Look at WHAT by CONFIG, with OVERRIDEs."""
    what, path, *overrides = arguments
    _tell(Begun("configuration"))
    try:
        # From standard input what is to become the configuration: its place may be closed to the agent's user.
        sources = json.load(sys.stdin) if path == "-" else read_sources(Path(path))
        settings = parse_sources(sources, overrides)
    except AgentError as error:
        _tell(Finding("configuration", "wrong", error.message, error.remedy))
        if what == "configuration":
            return 0
        settings = Settings()
    else:
        try:
            if path != "-":
                check_files(Path(path))
            _tell(Finding("configuration", "good", ", ".join(name for name, _ in sources)))
        except AgentError as error:
            _tell(Finding("configuration", "wrong", error.message, error.remedy))
    checks = _start_checks(settings) if what == "configuration" else _host_checks(settings)
    for name, check in checks.items():
        _tell(Begun(name))
        try:
            for finding in check():
                _tell(finding)
        except AgentError as error:
            _tell(Finding(name, "wrong", error.message, error.remedy))
        except Exception as error:  # one look that fails must not take the others away
            _tell(Finding(name, "wrong", f"not examined: {type(error).__name__}: {error}"))
    return 0


def _start_checks(settings: Settings) -> dict[str, Check]:
    """Return whatever stops a start."""

    def make(check: Callable[[Settings], object]) -> Check:
        def run() -> Iterator[Finding]:
            check(settings)
            yield from ()

        return run

    return {name: make(check) for name, check in CHECKS.items()}


def _host_checks(settings: Settings) -> dict[str, Check]:
    """Return what a doctor looks at as the agent's user. libvirt comes last: it may hang."""
    from kvmagent.cli.ctl import doctor, hostchecks

    state_dir, now = Path(settings.agent.state_dir), datetime.now(UTC)
    return {
        "plugins": lambda: doctor.examine_plugins(settings),
        "log": lambda: hostchecks.examine_log(settings.log),
        "state_dir": lambda: hostchecks.examine_state_dir(state_dir),
        "journal": lambda: hostchecks.examine_journal(state_dir),
        "hooks": lambda: hostchecks.examine_hooks(settings.hooks),
        "certificates": lambda: hostchecks.examine_certificates(settings, now),
        "libvirt": lambda: doctor.examine_libvirt(settings.libvirt.uri),
    }


def _tell(one: Begun | Finding) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(one) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
