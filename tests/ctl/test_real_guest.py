"""kvmagentctl against a real guest: what an operator does to a VM, and what the guest then has."""

import json
from collections.abc import Callable

import pytest

from tests.ctl.ctl import Ctl, interrupt
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.guest


def test_an_operator_looks_plugs_prepares_and_follows(boot: Callable[[GuestSpec], Guest], lab: PrivateLibvirtd) -> None:
    guest = boot(GuestSpec(name="db-7"))
    with AgentProcess(uri=lab.uri) as agent:
        ctl = Ctl({"KVMAGENT_URL": agent.url})
        row = ctl("vms").out.splitlines()[1].split()
        assert (row[0], row[1], row[2:5], row[-1]) == ("db-7", "running", ["1", "4", "1"], "ready")
        assert ctl("ready", "db-7", "--cpus", "3", "--memory", "512M").status == 0

        with ctl.start("tasks", "--follow", "--json") as following:
            assert following.stdout is not None
            done = ctl("plug-cpu", "db-7", "3")
            assert (done.status, done.out.splitlines()[0]) == (0, "db-7: online, 3 vCPUs in all")
            seen = json.loads(following.stdout.readline())
            while (seen["command"], seen["state"]) != ("HotPlugCpu", "delivered"):
                seen = json.loads(following.stdout.readline())
            assert seen["outcome"] == "online"
            assert interrupt(following).status == 130
        assert guest.cpus_online() == "0-2"

        shown = ctl.on_terminal("plug-memory", "db-7", "500M", environment={"NO_COLOR": "1"})
        assert shown.status == 0
        assert "  OnlineGuestMemory blocks=" in shown.out
        assert "  rounded  from 500 MiB to 512 MiB" in shown.out
        assert guest.mem_total_kib() > 384 * 1024

        prepared = ctl("ready", "db-7", "--prepare", "--max-cpus", "8", "--diff")
        assert prepared.status == 0
        assert any(line.startswith("+  <vcpu ") and line.endswith(">8</vcpu>") for line in prepared.out.splitlines())
        done = ctl("unplug-memory", "db-7", "384M")
        assert (done.status, done.out) == (1, "")
        assert "kvmagentctl: MEMORY_NOT_REMOVABLE: " in done.err
