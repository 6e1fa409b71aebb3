"""The doctor finds each illness that it is given, and names a remedy for it."""

import json
import os
import pwd
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.cli.ctl import look
from kvmagent.cli.ctl.agentuser import Identity, look_as
from kvmagent.cli.ctl.doctor import (
    examine,
    examine_guests,
    examine_memory,
    examine_memory_balance,
    examine_versions,
)
from kvmagent.cli.ctl.findings import Finding, is_healthy, render_findings
from kvmagent.cli.ctl.hostchecks import (
    ask_kernel_clock,
    examine_certificates,
    examine_clock,
    examine_hooks,
    examine_journal,
    examine_kvm,
    examine_state_dir,
)
from kvmagent.hypervisor.budget import Budget
from kvmagent.hypervisor.probe import NO_CHANNEL, NOT_CONNECTED, Probe, ProbedVm
from kvmagent.model.units import MIB
from kvmagent.settings import HooksSection, SecuritySection, Settings
from kvmagent.tasks.journal import Journal, Task
from tests.ctl.ctl import Ctl
from tests.fakes.agent import make_domain, make_host
from tests.fakes.libvirt import FakeConnection
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.pki import LOOPBACK, Authority

NOW = datetime.now(UTC)
HANGS = "the guest agent does not answer: guest agent is not responding"


def found(findings: Any, check: str) -> list[tuple[str, str]]:
    return [(one.level, one.message) for one in findings if one.check == check]


def test_a_host_without_illness_is_healthy(ctl: Ctl, agent: AgentProcess) -> None:
    done = ctl("doctor", "--config", str(agent.config_file))
    assert done.status == 0, done.out
    assert f"good     configuration: {agent.config_file}" in done.out.splitlines()
    assert f"good     agent: {agent.url} is ready, version" in done.out
    assert (
        "note     guest agents: 2 of 2 running VMs have no guest agent, so no plug into them can be confirmed"
        in done.out
    )
    told = ctl("doctor", "--config", str(agent.config_file), "--json").json
    assert told["healthy"] is True
    assert {finding["check"] for finding in told["findings"]} == {
        "user", "configuration", "plugins", "log", "libvirt", "qemu", "guest agents", "kvm", "state_dir", "journal",
        "certificates", "clock", "agent", "page", "alerts", "memory",
    }  # fmt: skip


def test_every_illness_ends_in_status_7_and_has_a_remedy(ctl: Ctl, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    config = tmp_path / "kvmagent.conf"
    config.write_text(
        f"[agent]\nstate_dir = {state}\nplugins = vm, nowhere\n[http]\nport = 1\n"
        "[libvirt]\nuri = qemu+unix:///system?socket=/nonexistent\n"
        "[security]\ntls_cert = /nonexistent\nclient_ca = /nonexistent\n"
    )
    done = ctl("doctor", "--config", str(config), "--json", environment={"KVMAGENT_URL": "", "LIBVIRT_AUTOSTART": "0"})
    assert (done.status, done.json["healthy"], done.err) == (7, False, "")
    ill = [finding for finding in done.json["findings"] if finding["level"] in ("wrong", "warning")]
    assert {"plugins", "libvirt", "state_dir", "certificates", "agent"} <= {finding["check"] for finding in ill}
    assert all(finding["remedy"] for finding in ill)


def test_a_configuration_that_is_wrong_hides_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "kvmagent.conf"
    config.write_text("[http]\nprot = 1\n[libvirt]\n")
    findings = examine(config, {"url": "http://127.0.0.1:1"})
    assert found(findings, "configuration")[0][0] == "wrong"
    assert found(findings, "clock")
    assert not is_healthy(findings)


def test_a_libvirt_that_hangs_holds_the_doctor_up_no_longer_than_told(tmp_path: Path) -> None:
    """It takes the connection and says nothing: libvirt's own call never returns."""
    with closing(socket.socket(socket.AF_UNIX)) as mute:
        mute.bind(str(tmp_path / "mute"))
        mute.listen()
        config = tmp_path / "kvmagent.conf"
        config.write_text(
            f"[agent]\nstate_dir = {tmp_path}/state\n[libvirt]\nuri = qemu+unix:///system?socket={tmp_path}/mute\n"
        )
        findings = examine(config, {"url": "http://127.0.0.1:1"}, look_s=5)
    (ill,) = (one for one in findings if one.check == "libvirt")
    assert (ill.level, ill.message) == ("wrong", "no answer within 5 s")
    assert ill.remedy
    assert found(findings, "plugins")[0][0] == "good"
    assert found(findings, "clock")


def test_what_root_may_and_the_agent_s_user_may_not_is_told_by_a_look_as_that_user(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    tokens = tmp_path / "tokens"
    tokens.write_text("")
    tokens.chmod(0o600)
    config = tmp_path / "kvmagent.conf"
    config.write_text(f"[agent]\nstate_dir = {tmp_path}/state\n[security]\ntokens_file = {tokens}\n")
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(0o755)

    def ill_of(identity: Identity | None) -> dict[str, str]:
        told = look_as(identity, "configuration", [str(config)], timeout_s=60)
        return {one.check: one.message for one in told if one.level == "wrong"}

    assert ill_of(None) == {}
    other = ill_of(Identity("nobody", nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid,)))
    assert other.keys() == {"certificates", "state_dir"}
    assert "Permission denied" in other["certificates"]
    assert "cannot be created by the agent's user" in other["state_dir"]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("[hooks]\ndirectory = {tmp}/none", ["hooks.directory", "{tmp}/none"]),
        ("[log]\nfile = {tmp}/none/kvmagent.log", ["log.file", "no directory {tmp}/none"]),
        ("[log]\nfile = {tmp}", ["log.file", "is not a regular file"]),
        ("[agent]\nstate_dir = {tmp}/kvmagent.conf/state", ["agent.state_dir", "is not a directory"]),
        ("[libvirt]\nuri = qemuu:///system", ["line 2", "libvirt.uri", "'qemuu'", "did you mean qemu?"]),
        ("[libvirt]\nuri = qemu:///sytem", ["line 2", "libvirt.uri", "did you mean system?"]),
        ("[libvirt]\nuri = qemu+unx:///system", ["line 2", "'unx'", "unix, tls"]),
        ('[agent]\nplugins = ["vm", "host"]', ["line 2", "agent.plugins is a list with commas", '["vm", "host"]']),
        (
            "[agent]\nplugins = vm, host, vm",
            ["agent.plugins", "'vm'", "another plugin has already declared HotPlugCpu or /vm/hotplug/cpu"],
        ),
        ("[http]\nsocket = {tmp}", ["http.socket {tmp} exists and is not a socket"]),
        (
            "[http]\nhost = 192.0.2.77\n[security]\nallow_unauthenticated = true\nallowed_clients = 192.0.2.0/24",
            ["http.host 192.0.2.77: Cannot assign requested address"],
        ),
        ("[agent]\nplugins = [vm, host]", ["line 2", "agent.plugins is a list with commas"]),
        ("[http]\n\nprot = 7070", ["kvmagent.conf, line 3", "[http] has no key prot", "did you mean port?"]),
        ("[http]\nlevel = info", ["line 2", "[http] has no key level", "[log] has it"]),
        ("[htpp]", ["line 1", "no section [htpp]", "did you mean http?"]),
        ("[log]\nlevel = loud", ["log.level must be one of debug, info, warning, error, got 'loud'"]),
        ("[http]\nport = 0", ["http.port must be a whole number from 1 to 65535, got '0'"]),
        ("[http]\nport = 1\n[agent]\nworkers = 1.5\nspeed = 1", ["agent.workers must be", "no key speed"]),
        ("[host]\nmemory_overcommit = lots", ["host.memory_overcommit must be a number from 0.1 to 100, got 'lots'"]),
        ("[libvirt]\nallow_emulated_removal = maybe", ["must be true or false, got 'maybe'"]),
        ("[security]\nallowed_clients = 10.0.0.0/33", ["line 2", "security.allowed_clients", "10.0.0.0/33"]),
    ],
)
def test_a_check_names_whatever_stops_a_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], lines: str, named: list[str]
) -> None:
    config = write_config(tmp_path, lines)
    given = [] if "state_dir" in lines else [f"agent.state_dir={tmp_path}/state"]
    assert look.main(["configuration", str(config), *given]) == 0
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    (ill,) = (one for one in told if one.get("level") == "wrong")
    for words in named:
        assert words.replace("{tmp}", str(tmp_path)) in ill["message"]
    assert ill["remedy"]


@pytest.mark.parametrize("lines", ["[hooks]\ndirectory = {tmp}/none", "[libvirt]\nuri = qemuu:///system"])
def test_what_config_check_finds_stops_the_start_for_good(ctl: Ctl, tmp_path: Path, lines: str) -> None:
    config = write_config(tmp_path, lines)
    given = ["--config", str(config), "--set", f"agent.state_dir={tmp_path}/state"]
    done = ctl("config", "--check", *given)
    assert (done.status, done.out) == (1, "")
    assert "; remedy: " in done.err
    command = [sys.executable, "-m", "kvmagent.cli.daemon", *given]
    started = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (started.returncode, started.stdout) == (os.EX_CONFIG, "")
    assert started.stderr.startswith("kvmagent: BAD_CONFIGURATION: ")


@pytest.mark.parametrize("place", ["kvmagent.conf", "conf.d", "conf.d/10-site.conf"])
def test_a_configuration_that_others_can_change_is_found_by_all_that_look_at_it(
    ctl: Ctl, tmp_path: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    config = write_config(tmp_path, "[http]\nport = 7071")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/10-site.conf").touch()
    (tmp_path / place).chmod(0o777)
    given = ["--config", str(config), "--set", f"agent.state_dir={tmp_path}/state"]
    done = ctl("config", "--check", *given)
    words, remedy = f"{tmp_path / place} is writable by others (0777)", f"chmod go-w {tmp_path / place}"
    assert (done.status, done.out) == (1, "")
    assert words in done.err
    assert done.err.rstrip().endswith(f"remedy: {remedy}")
    # In its place it is looked at as the agent's user, and a doctor does the same.
    for what in ("configuration", "host"):
        assert look.main([what, str(config), f"agent.state_dir={tmp_path}/state"]) == 0
        told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        (ill,) = (one for one in told if one.get("check") == "configuration")
        assert (ill["level"], words in ill["message"], ill["remedy"]) == ("wrong", True, remedy)


def write_config(directory: Path, lines: str) -> Path:
    config = directory / "kvmagent.conf"
    config.write_text(lines.replace("{tmp}", str(directory)) + "\n")
    return config


def test_a_failed_start_is_an_error_of_the_journal_and_a_port_that_is_taken_is_tried_again(
    agent: AgentProcess, tmp_path: Path
) -> None:
    """systemd tells a process which descriptor its journal is on: a file of ours here."""
    settings = f"[agent]\nstate_dir = {tmp_path}/state\n[libvirt]\nuri = test:///default\n"
    config = tmp_path / "kvmagent.conf"
    settings += "[security]\nallow_unauthenticated = true\nallowed_clients = 127.0.0.0/8\n"
    taken, wrong = f"{settings}[http]\nsocket =\nport = {agent.port}\n", "[http]\nport = no\n"
    for text, status, code in ((taken, 1, "ADDRESS_NOT_FREE"), (wrong, os.EX_CONFIG, "BAD_CONFIGURATION")):
        config.write_text(text)
        with open(tmp_path / "journal", "wb+") as journal:
            inode = os.fstat(journal.fileno())
            environment = {**os.environ, "JOURNAL_STREAM": f"{inode.st_dev}:{inode.st_ino}"}
            command = [sys.executable, "-m", "kvmagent.cli.daemon", "--config", str(config)]
            done = subprocess.run(command, env=environment, stderr=journal, timeout=60, check=False)
            journal.seek(0)
            lines = journal.read().decode().splitlines()
        assert done.returncode == status
        assert [line for line in lines if line.startswith("<3>kvmagent: ") and f"{code}: " in line]


def test_kvm_that_is_absent_closed_or_broken_is_told(tmp_path: Path) -> None:
    assert found(examine_kvm(tmp_path / "none"), "kvm")[0][0] == "warning"
    broken = tmp_path / "kvm"
    broken.touch()
    told = f"{broken} cannot create a VM: Inappropriate ioctl for device"
    assert found(examine_kvm(broken), "kvm") == [("wrong", told)]


def test_a_state_directory_that_others_can_read_or_that_is_none_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert ("warning", f"{tmp_path} is accessible to others (0750)") in found(examine_state_dir(tmp_path), "state_dir")
    file = tmp_path / "file"
    file.touch()
    assert found(examine_state_dir(file), "state_dir") == [("wrong", f"{file} is not a directory")]
    assert found(examine_state_dir(tmp_path / "none"), "state_dir")[0][0] == "warning"
    assert found(examine_state_dir(file / "below"), "state_dir") == [("wrong", f"{file}/below: Not a directory")]
    (loop := tmp_path / "loop").symlink_to("loop")
    assert found(examine_state_dir(loop), "state_dir")[0][0] == "wrong"


def test_a_state_directory_on_a_read_only_file_system_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    room = [*os.statvfs(tmp_path)]
    room[8] = os.ST_RDONLY
    told = [(one.level, one.message) for one in examine_state_dir(tmp_path, look_at=lambda _: os.statvfs_result(room))]
    assert told == [("wrong", f"{tmp_path} is on a file system that is read-only")]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is not a file"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (lambda path: path.symlink_to("/nowhere/at/all"), "No such file"),
        (lambda path: path.symlink_to(path.name), "Too many levels"),
        (lambda path: path.write_bytes(b"no database at all" * 99), "is damaged"),
        (lambda path: (path.touch(), path.with_name(f"{path.name}-wal").mkdir()), "journal.sqlite: "),
        (lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 99"), "schema version 99"),
    ],
)
def test_a_journal_with_which_no_agent_starts_is_wrong(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / "journal.sqlite")
    ((level, message),) = found(examine_journal(tmp_path), "journal")
    assert level == "wrong"
    assert words in message


def test_the_journal_is_checked_wholly_while_an_agent_uses_it(tmp_path: Path) -> None:
    assert not list(examine_journal(tmp_path))
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, on_accepted=lambda task: None)
    journal.start()
    task = Task(task_uuid="task-1", command="C", lane="vm1", request=b"{}", callback_url="none", client="")
    journal.accept(task)
    ((level, message),) = found(examine_journal(tmp_path), "journal")
    assert (level, message.startswith(f"{path} is intact")) == ("good", True)
    journal.stop()
    # Its id in the index of ids becomes another: which only a whole check sees.
    path.write_bytes(path.read_bytes().replace(b"task-1", b"task-X", 1))
    levels = {level for level, _ in found(examine_journal(tmp_path), "journal")}
    assert levels == {"wrong"}


def test_hooks_are_told_and_those_that_the_agent_would_not_run_at_all(tmp_path: Path) -> None:
    assert not list(examine_hooks(HooksSection()))
    (tmp_path / "before.d").mkdir(mode=0o755)
    hook = tmp_path / "before.d/10-window"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    settings = HooksSection(directory=str(tmp_path))
    told = f"{tmp_path}: before.d: 10-window; after.d: none"
    assert found(examine_hooks(settings), "hooks") == [("good", told)]
    hook.chmod(0o757)
    config = tmp_path / "kvmagent.conf"
    config.write_text(f"[hooks]\ndirectory = {tmp_path}\n")
    (ill,) = (one for one in examine(config, {"url": "http://127.0.0.1:1"}) if one.check == "hooks")
    assert (ill.level, ill.message) == ("wrong", f"hooks.directory: {hook} is writable by others (0757)")
    assert ill.remedy


def test_a_full_disk_is_told() -> None:
    full = [one for one in examine_state_dir(Path("/proc")) if "left" in one.message]
    assert [one.level for one in full] == ["wrong"]
    assert full[0].remedy.startswith("Free space")


def test_certificates_are_told_before_they_expire_and_after(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate = authority.issue(LOOPBACK, file_name="agent")
    settings = Settings(security=SecuritySection(tls_cert=str(certificate), client_ca=str(authority.ca_file)))
    assert {level for level, _ in found(examine_certificates(settings, NOW), "certificates")} == {"good"}

    until = max(one.not_after for one in _read(certificate))
    levels = [one.level for one in examine_certificates(settings, until - timedelta(days=3))]
    assert "warning" in levels
    later = list(examine_certificates(settings, until + timedelta(days=1)))
    assert any(one.level == "wrong" and "expired on" in one.message for one in later)
    early = list(examine_certificates(settings, datetime(1999, 1, 1, tzinfo=UTC)))
    assert any(one.level == "wrong" and "is valid from" in one.message for one in early)

    other = authority.issue("node9.example")
    settings = Settings(security=SecuritySection(tls_cert=str(other)))
    messages = [message for _, message in found(examine_certificates(settings, NOW), "certificates")]
    assert "security.tls_cert is for node9.example, the agent listens on 127.0.0.1" in messages

    certificate.chmod(0o644)
    settings = Settings(security=SecuritySection(tls_cert=str(certificate)))
    told = [one for one in examine_certificates(settings, NOW) if one.level == "wrong"]
    assert [one.remedy for one in told] == [f"chmod 0600 {certificate}"]


def test_a_clock_that_drifts_or_went_back_is_told(tmp_path: Path) -> None:
    assert ask_kernel_clock() in range(6)
    assert found(examine_clock(tmp_path, NOW, lambda: 0), "clock")[0][0] == "good"
    assert found(examine_clock(tmp_path, NOW, lambda: 5), "clock")[0][0] == "warning"
    journal = tmp_path / "journal.sqlite"
    journal.touch()
    ahead = (NOW + timedelta(hours=1)).timestamp()
    os.utime(journal, (ahead, ahead))
    assert found(examine_clock(tmp_path, NOW, lambda: 0), "clock")[0][0] == "wrong"


@pytest.mark.parametrize(
    ("libvirt", "qemu", "levels"),
    [((8, 0, 0), (6, 2, 0), {"good", "note"}), ((7, 0, 0), (5, 2, 0), {"warning", "note"}),
     ((11, 3, 0), (10, 0, 2), {"good"})],
)  # fmt: skip
def test_what_versions_are_known_for_is_told(
    libvirt: tuple[int, int, int], qemu: tuple[int, int, int], levels: set[str]
) -> None:
    probe = Probe(libvirt=libvirt, hypervisor=qemu, driver="QEMU", offers_kvm=True, running=(), vms=0)
    assert {level for level, _ in found(examine_versions(probe), "qemu")} == levels


def test_guests_without_an_agent_are_counted_and_one_that_hangs_is_named() -> None:
    silences = [NO_CHANNEL] * 3 + [NOT_CONNECTED] * 190 + [HANGS, "", ""]
    running = tuple(ProbedVm(name=f"vm{n}", hypervisor="qemu", silence=one) for n, one in enumerate(silences))
    probe = Probe(libvirt=(9, 0, 0), hypervisor=(7, 2, 0), driver="QEMU", offers_kvm=False, running=running, vms=200)
    assert found(examine_guests(probe), "guest agents") == [
        ("good", "2 of 196 answer"),
        ("note", "193 of 196 running VMs have no guest agent, so no plug into them can be confirmed"),
        ("warning", f"{HANGS}: vm193"),
    ]
    told = found(examine_versions(probe), "qemu")
    assert ("warning", "libvirt offers no KVM: VMs are emulated") in told


def test_guests_with_more_plugged_than_their_kernels_can_bear_are_named() -> None:
    vms = (("db-7", 512, 1537), ("web", 512, 1536), ("small", 512, 0))
    running = tuple(
        ProbedVm(name=name, hypervisor="kvm", silence="", boot_bytes=boot * MIB, plugged_bytes=plugged * MIB)
        for name, boot, plugged in vms
    )
    probe = Probe(libvirt=(9, 0, 0), hypervisor=(7, 2, 0), driver="QEMU", offers_kvm=True, running=running, vms=3)
    told = list(examine_memory_balance(probe))
    assert [(one.level, one.message) for one in told] == [
        ("note", "db-7: more than 3 times the boot memory is plugged")
    ]
    assert "memory_hotplug.online_policy=auto-movable memory_hotplug.auto_movable_ratio=301" in told[0].remedy


@pytest.mark.parametrize(("limit_mib", "remedy"), [(None, "host.memory_overcommit."), (8, "machine.slice MemoryMax=")])
def test_a_host_over_its_budget_is_told_what_raises_it(tmp_path: Path, limit_mib: int | None, remedy: str) -> None:
    root = make_host(tmp_path, total_mib=16)
    if limit_mib is not None:
        limit = root / "sys/fs/cgroup/machine.slice/memory.max"
        limit.parent.mkdir(parents=True)
        limit.write_text(f"{limit_mib * MIB}\n")
    budget = Budget(host_root=root, overcommit=1.5)
    host = budget.view(FakeConnection(make_domain(GuestSpec(name="vm1", memory_mib=512)))).host
    (finding,) = examine_memory(msgspec.json.decode(msgspec.json.encode(host)))
    assert finding.level == "warning"
    assert remedy in (finding.remedy or "")


def test_findings_are_shown_with_their_remedies_and_counted() -> None:
    findings = [Finding("kvm", "good", "it is there"), Finding("clock", "wrong", f"{64 * MIB} off", "Set it.")]
    assert [line.replace("\033[0m", "") for line in render_findings(findings)][-4:] == [
        "\033[31mwrong  \x20 clock: 67108864 off",
        "         \033[2mremedy: Set it.",
        "",
        "1 good, 1 wrong",
    ]


def _read(path: Path) -> Any:
    from kvmagent.cli.ctl.ca import read_certificates

    return read_certificates(path)
