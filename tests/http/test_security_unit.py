"""The agent without privileges: how the unit confines it, and that it works so."""

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.fakes.hooks import HookDirectory
from tests.lab.agent import AgentProcess, find_command, new_task_uuid
from tests.lab.confined import confine, find_allowed_calls, read_service
from tests.lab.server import ManagementServer

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "init.d/kvmagent.service"
EXPOSURE = 2.0
DOCUMENT = (ROOT / "SECURITY.md").read_text()


def rate(unit: Path) -> float:
    """How exposed systemd finds a unit, 0 to 10."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rated = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert rated is not None, done.stdout + done.stderr
    return float(rated[1])


def test_the_unit_leaves_little_to_an_attacker() -> None:
    """By the measure that SECURITY.md names; each systemd counts a little more than the one before it."""
    told = re.search(r"a unit that systemd (\d+) rates ([0-9.]+)", DOCUMENT)
    assert told is not None
    measured = rate(UNIT)
    assert measured <= EXPOSURE
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    if version.split()[1] == told[1]:
        assert measured == float(told[2])


def test_the_addresses_of_the_document_hold_the_unit_to_them(tmp_path: Path) -> None:
    lines = re.search(r"^    \[Service\]\n(?:    \S.*\n)+", DOCUMENT, re.MULTILINE)
    assert lines is not None
    limited = tmp_path / UNIT.name
    limited.write_text(UNIT.read_text().replace("[Service]\n", textwrap.dedent(lines[0]), 1))
    assert read_service(limited)["IPAddressDeny"] == ["any"]
    assert rate(limited) < rate(UNIT)
    command = ["systemd-analyze", "verify", "--man=no", str(limited)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "IPAddress" not in done.stdout + done.stderr


def test_the_unit_runs_as_the_user_that_polkit_lets_manage_vms() -> None:
    service = read_service(UNIT)
    assert service["User"] == ["kvmagent"]
    assert service["SupplementaryGroups"] == ["libvirt"]
    assert 'subject.user == "kvmagent"' in (ROOT / "conf/50-kvmagent.rules").read_text()
    assert "m kvmagent libvirt" in (ROOT / "conf/kvmagent.sysusers").read_text()


def test_the_filter_of_system_calls_is_one() -> None:
    allowed = find_allowed_calls(UNIT)
    assert {"read", "openat", "clone3", "epoll_wait", "flock"} <= allowed
    assert not {"ptrace", "mount", "init_module", "bpf", "keyctl", "setuid", "chroot"} & allowed


def test_the_agent_works_without_capabilities_and_within_the_filter(
    node_uri: str, server: ManagementServer, tmp_path: Path
) -> None:
    hooks = HookDirectory(tmp_path)
    hooks.write("before.d/10-tell", 'grep NoNewPrivs /proc/self/status >> "{told}"')
    settings = {"hooks": {"directory": str(hooks.path)}}
    with AgentProcess(uri=node_uri, settings=settings, command=confine(UNIT, find_command())) as agent:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{agent.pid}/status").read_text().splitlines())
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh")} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        task = new_task_uuid()
        body = {"vmUuid": "vm1", "cpuNum": 3}
        assert agent.post("/vm/hotplug/cpu", body, task_uuid=task, callback_url=server.url).status == 200
        assert server.wait(task, 20)["cpuNum"] == 3
        assert hooks.lines() == ["NoNewPrivs:\t1"], "confined as the agent is"
        assert agent.stop() == 0
        assert "Traceback" not in agent.log()


def test_the_state_is_the_agent_s_alone(node_uri: str, server: ManagementServer) -> None:
    with AgentProcess(uri=node_uri) as agent:
        state = agent.directory / "state"
        agent.stop()
        state.chmod(0o755)
        (state / "journal.sqlite").chmod(0o644)
        agent.start()
        agent.post("/vm/hotplug/cpu", {"vmUuid": "vm1", "cpuNum": 1}, task_uuid="t", callback_url=server.url)
        assert state.stat().st_mode & 0o777 == 0o700
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in state.iterdir()}
        assert set(modes.values()) == {"0o600"}, modes
        assert "journal.sqlite-wal" in modes
        assert "closed to others" in agent.log()


@pytest.mark.parametrize(
    ("key", "mode"), [("tokens_file", 0o640), ("tokens_file", 0o604), ("tls_cert", 0o644), ("tls_key", 0o640)]
)
def test_a_secret_that_others_can_read_stops_the_start(node_uri: str, tmp_path: Path, key: str, mode: int) -> None:
    secret = tmp_path / "secret"
    secret.write_text("zstack:" + "0" * 64)
    secret.chmod(mode)
    (tmp_path / "cert").touch(mode=0o644)
    section = {key: str(secret), **({"tls_cert": str(tmp_path / "cert")} if key == "tls_key" else {})}
    words = rf"security.{key} .* is accessible to others \({mode:04o}\), it must be 0600"
    with pytest.raises(RuntimeError, match=words):
        AgentProcess(uri=node_uri, settings={"security": section}).__enter__()


def test_nothing_secret_is_on_the_command_line_or_in_the_log(node_uri: str, tmp_path: Path) -> None:
    made = subprocess.run([*find_command(), "--new-token", "zstack"], capture_output=True, text=True, check=True)
    line, token = made.stdout.splitlines()
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{line}\n")
    with AgentProcess(uri=node_uri, settings={"security": {"tokens_file": str(tokens)}}, token=token) as agent:
        agent.get("/tasks")
        agent.get("/tasks", headers={"Authorization": f"Basic {token}"})
        digest = line.partition(":")[2]
        seen = Path(f"/proc/{agent.pid}/cmdline").read_text() + agent.log()
        assert token not in seen
        assert digest not in seen
        assert os.environ.get("HOME", "") not in ("", str(agent.directory))


def test_an_agent_that_takes_too_much_memory_is_started_again_and_disturbs_no_vm() -> None:
    service = read_service(UNIT)
    assert service["MemoryMax"] == ["1G"]
    assert (service["OOMPolicy"], service["Restart"]) == (["stop"], ["always"])


def test_the_agent_can_fill_neither_the_process_table_nor_the_journal() -> None:
    service = read_service(UNIT)
    assert service["TasksMax"] == ["1024"]
    assert (service["LogRateLimitIntervalSec"], service["LogRateLimitBurst"]) == (["30s"], ["20000"])
