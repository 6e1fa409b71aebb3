"""The package under a real systemd, with real polkit and the distribution's own libvirtd."""

import json
from collections.abc import Iterator

import pytest

from tests.lab.agent import find_free_port
from tests.lab.booted import Booted
from tests.lab.processes import wait_for
from tests.package.conftest import Made

pytestmark = pytest.mark.guest

UNIT, CONF = "kvmagent.service", "/etc/kvmagent/kvmagent.conf"
DROP_IN = f"/run/systemd/system/{UNIT}.d"
KEEP_CONF = ("-oDpkg::Options::=--force-confdef", "-oDpkg::Options::=--force-confold")


@pytest.fixture(scope="module")
def machine(made: Made) -> Iterator[Booted]:
    """A booted machine with the package, whose agent listens on a port that is free on the host."""
    tree = made.debian.copy("systemd")
    tree.install("systemd-sysv", "dbus", "libpam-systemd", "polkitd", "libvirt-daemon-system")
    with Booted(tree) as booted:
        booted.run("sh", "-c", f"mkdir /etc/kvmagent && printf '[http]\\nport = {find_free_port()}\\n' >{CONF}")
        deb = f"/var/tmp/{tree.take(made.deb).name}"
        booted.run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *KEEP_CONF, deb)
        yield booted


def test_the_installation_starts_the_service_and_its_user_reaches_libvirt(machine: Booted) -> None:
    assert machine.run("systemctl", "is-active", "kvmagent", "libvirtd.socket").split() == ["active", "active"]
    assert machine.run("systemctl", "is-enabled", "kvmagent").strip() == "enabled"
    status = machine.run("cat", f"/proc/{machine.show(UNIT, 'MainPID')}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == machine.run("id", "-u", "kvmagent").strip()
    assert (int(fields["CapEff"], 16), fields["NoNewPrivs"], fields["Seccomp"]) == (0, "1", "2")
    assert health(machine)["ready"] is True


def test_a_reload_keeps_the_process_and_a_restart_is_clean(machine: Booted) -> None:
    before = machine.show(UNIT, "MainPID")
    machine.run("systemctl", "reload", "kvmagent")
    wait_for(lambda: "section=log" in machine.journal(UNIT), timeout_s=20, what="the reload")
    assert machine.show(UNIT, "MainPID") == before
    machine.run("systemctl", "restart", "kvmagent")
    assert machine.show(UNIT, "MainPID") != before
    assert machine.show(UNIT, "NRestarts") == "0"
    assert "agent stopped" in machine.journal(UNIT)


def test_an_agent_that_dies_or_hangs_is_started_again(machine: Booted) -> None:
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", "kvmagent")
    wait_for(lambda: machine.show(UNIT, "NRestarts") == "1", timeout_s=30, what="the restart")
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "active", timeout_s=30, what="the agent")
    # A stopped process feeds no watchdog, and takes no SIGTERM: only systemd can end it.
    machine.run("sh", "-c", f"mkdir -p {DROP_IN} && printf '[Service]\\nWatchdogSec=2\\n' >{DROP_IN}/soon.conf")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "kvmagent")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGSTOP", "kvmagent")
    wait_for(lambda: "watchdog" in machine.journal(UNIT).lower(), timeout_s=30, what="the watchdog")
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "active", timeout_s=60, what="the agent")
    assert health(machine)["ready"] is True


def health(machine: Booted) -> dict[str, object]:
    """What the agent says of itself."""
    told = machine.run("kvmagentctl", "status", "--json")
    return dict(json.loads(told))
