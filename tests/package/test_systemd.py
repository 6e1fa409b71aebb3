"""The package under a real systemd, with real polkit and the distribution's own libvirtd."""

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.agent import UnixConnection, find_free_port
from tests.lab.booted import Booted
from tests.lab.domainxml import GuestSpec, format_domain
from tests.lab.image import Image
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer
from tests.lab.tree import FreshDebian
from tests.package.conftest import ROOT

pytestmark = pytest.mark.guest

UNIT, CONF = "kvmagent.service", "/etc/kvmagent/kvmagent.conf"
DROP_IN = f"/run/systemd/system/{UNIT}.d"
# Cgroups of another run may be there.
PINNED = f"pinned{os.getpid()}"
CPUTUNE = (
    "<cputune><shares>1000</shares><period>100000</period><quota>50000</quota>"
    "<vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='1' cpuset='1'/><vcpupin vcpu='2' cpuset='0'/></cputune>"
)
RULES, ACTIVE_RULES = "/usr/share/kvmagent/60-kvmagent-access.rules", "/etc/polkit-1/rules.d"
LIBVIRT_CONF = "/etc/libvirt/libvirtd.conf"
KEEP_CONF = ("-oDpkg::Options::=--force-confdef", "-oDpkg::Options::=--force-confold")


@pytest.fixture(scope="module")
def machine(debian: FreshDebian, deb: Path) -> Iterator[Booted]:
    """A booted machine with the package, whose agent listens on a port that is free on the host."""
    tree = debian.copy("systemd")
    tree.install("systemd-sysv", "dbus", "libpam-systemd", "polkitd", "libvirt-daemon-system", "qemu-system-x86")
    with Booted(tree) as booted:
        booted.open_cgroups()
        booted.run("sh", "-c", f"mkdir /etc/kvmagent && printf '[http]\\nport = {find_free_port()}\\n' >{CONF}")
        file = f"/var/tmp/{tree.take(deb).name}"
        booted.run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *KEEP_CONF, file)
        yield booted


def test_the_installation_starts_the_service_and_its_user_reaches_libvirt(machine: Booted) -> None:
    assert machine.run("systemctl", "is-active", "kvmagent", "libvirtd.socket").split() == ["active", "active"]
    assert machine.run("systemctl", "is-enabled", "kvmagent").strip() == "enabled"
    status = machine.run("cat", f"/proc/{machine.show(UNIT, 'MainPID')}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == machine.run("id", "-u", "kvmagent").strip()
    assert (int(fields["CapEff"], 16), fields["NoNewPrivs"], fields["Seccomp"]) == (0, "1", "2")
    assert health(machine)["ready"] is True


@pytest.fixture
def pinned(machine: Booted, image: Image) -> Iterator[str]:
    """A VM whose vCPUs have a quota each, shares together, and pins, but for the last one."""
    spec = GuestSpec(name=PINNED, max_vcpus=4, domain_xml=CPUTUNE)
    xml = format_vm(machine, image, spec)
    start_vm(machine, spec.name, xml.replace("<vcpu placement='static'", "<vcpu placement='static' cpuset='0-1'"))

    def is_confirmable() -> bool:
        told = json.loads(machine.run("kvmagentctl", "ready", spec.name, "--json"))
        return bool(told["confirmable"])

    wait_for(is_confirmable, timeout_s=120, what="the guest and its agent")
    yield spec.name
    machine.run("virsh", "destroy", spec.name)


def format_vm(machine: Booted, image: Image, spec: GuestSpec) -> str:
    """The XML of a VM that boots the lab's image in the machine."""
    files = [machine.root / "var/tmp" / file.name for file in (image.kernel, image.initramfs)]
    for source, target in zip((image.kernel, image.initramfs), files, strict=True):
        shutil.copyfile(source, target)
    return format_domain(
        spec,
        Image(*(Path("/var/tmp") / file.name for file in files), image.kernel_release),
        virt_type="qemu",
        console_log=Path(f"/var/log/libvirt/qemu/{spec.name}-console.log"),
        harness=Path(f"/var/lib/libvirt/qemu/{spec.name}-harness.sock"),
    )


def start_vm(machine: Booted, name: str, xml: str) -> None:
    """Define a VM and start it."""
    (machine.root / f"var/tmp/{name}.xml").write_text(xml)
    machine.run("virsh", "define", f"/var/tmp/{name}.xml")
    machine.run("virsh", "start", name)


def test_plugged_vcpus_have_their_pins_and_quota_and_shares_follow_where_asked(machine: Booted, pinned: str) -> None:
    """Held against what the kernel has of each vCPU's thread, and what libvirt says."""
    assert (read_pins(machine), read_quotas(machine), read_shares(machine)) == (["0"], [0.5], 1000)
    reply = json.loads(machine.run("kvmagentctl", "plug-cpu", pinned, "3", "--json"))
    assert (reply["outcome"], reply["after"]["guestCpuNum"], read_shares(machine)) == ("online", 3, 1000), reply
    reply = json.loads(machine.run("kvmagentctl", "plug-cpu", pinned, "4", "--scale-shares", "--json"))
    assert (reply["outcome"], reply["after"]["guestCpuNum"]) == ("online", 4), reply
    assert read_pins(machine) == ["0", "1", "0", "0-1"], "the last one has what the VM has"
    assert read_quotas(machine) == [0.5] * 4, "of a CPU, each"
    assert read_shares(machine) == 1333, "a third more, as the vCPUs"
    pins = [line.split() for line in machine.run("virsh", "vcpupin", pinned).splitlines()[2:] if line]
    assert pins == [["0", "0"], ["1", "1"], ["2", "0"], ["3", "0-1"]]
    told = machine.run("virsh", "vcpuinfo", pinned).splitlines()
    assert [line.split()[-1][:2] for line in told if line.startswith("CPU Affinity")] == ["y-", "-y", "y-", "yy"]
    for where in ("--live", "--config"):
        lines = machine.run("virsh", "schedinfo", pinned, where).splitlines()
        values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert (values["cpu_shares"], values["vcpu_quota"]) == ("1333", "50000"), (where, values)


def read_pins(machine: Booted) -> list[str]:
    """The CPUs of the host on which the thread of each vCPU may run."""
    threads = [words[0] for words in read_cgroups(machine, "vcpu*/cgroup.threads", "vcpu*/tasks")]
    status = [Path(f"/proc/{thread}/status").read_text() for thread in threads]
    return [text.partition("Cpus_allowed_list:\t")[2].split()[0] for text in status]


def read_quotas(machine: Booted) -> list[float]:
    """How much of a CPU each vCPU may use."""
    maxima = read_cgroups(machine, "vcpu*/cpu.max")
    if not maxima:
        quotas, periods = (read_cgroups(machine, f"vcpu*/cpu.cfs_{name}_us") for name in ("quota", "period"))
        maxima = [[*quota, *period] for quota, period in zip(quotas, periods, strict=True)]
    return [int(quota) / int(period) for quota, period in maxima]


def read_shares(machine: Booted) -> int:
    """What the VM weighs."""
    ((shares,),) = read_cgroups(machine, f"*{PINNED}*/cpu.weight", f"*{PINNED}*/cpu.shares")
    return int(shares)


def read_cgroups(machine: Booted, *patterns: str) -> list[list[str]]:
    """The words of such files of the VM's cgroups, in order; where version 1 has one for each controller, of one."""
    files = [
        file for pattern in patterns for file in (machine.root / "sys/fs/cgroup").rglob(pattern) if PINNED in str(file)
    ]
    by_name = {file.parent.name: file for file in files}
    return [by_name[name].read_text().split() for name in sorted(by_name)]


def test_a_reload_keeps_the_process_and_a_restart_is_clean(machine: Booted) -> None:
    before = machine.show(UNIT, "MainPID")
    machine.run("systemctl", "reload", "kvmagent")
    wait_for(lambda: "section=log" in machine.journal(UNIT), timeout_s=20, what="the reload")
    assert machine.show(UNIT, "MainPID") == before
    machine.run("systemctl", "restart", "kvmagent")
    assert machine.show(UNIT, "MainPID") != before
    assert machine.show(UNIT, "NRestarts") == "0"
    assert "agent stopped" in machine.journal(UNIT)


def test_a_configuration_that_is_wrong_is_an_error_of_the_journal_and_not_tried_for_ever(machine: Booted) -> None:
    before = machine.show(UNIT, "NRestarts")
    machine.run(
        "sh", "-c", "mkdir -p /etc/kvmagent/conf.d && printf '[http]\nprot = 1\n' >/etc/kvmagent/conf.d/bad.conf"
    )
    machine.run("sh", "-c", "systemctl restart kvmagent || true")
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "failed", timeout_s=60, what="the end of the start")
    assert (machine.show(UNIT, "ExecMainStatus"), machine.show(UNIT, "NRestarts")) == ("78", before)
    assert "bad.conf, line 2: [http] has no key prot" in machine.journal(UNIT, "--priority=err")
    machine.run("rm", "/etc/kvmagent/conf.d/bad.conf")
    machine.run("systemctl", "start", "kvmagent")
    wait_for(lambda: health(machine)["ready"], timeout_s=60, what="the agent to be ready")


# What makes a host ill, and the check of the doctor that finds it.
ILLNESSES = (
    ("agent", "systemctl stop kvmagent"),
    ("state_dir", "chmod 0755 /var/lib/kvmagent"),
    ("state_dir", "chown root: /var/lib/kvmagent"),
    ("alerts", "printf '[metrics]\nsample_sec = 0\n' >/etc/kvmagent/conf.d/ill.conf"),
    ("alerts", "printf '[metrics]\nsample_sec = 3600\n' >/etc/kvmagent/conf.d/ill.conf"),
    (
        "certificates",
        "install -m 0644 /dev/null /etc/kvmagent/tokens; chown kvmagent: /etc/kvmagent/tokens; "
        "printf '[security]\ntokens_file = /etc/kvmagent/tokens\n' >/etc/kvmagent/conf.d/ill.conf",
    ),
    (
        "hooks",
        "install -d -m 0777 /etc/kvmagent/hooks; printf '[hooks]\ndirectory = /etc/kvmagent/hooks\n' "
        ">/etc/kvmagent/conf.d/ill.conf",
    ),
)
COMMAND = re.compile(
    r"(?:^|(?<=: )|(?<=; ))(?:systemctl|chmod|chown|install|mkdir|usermod) [^;,]+?(?=\.?$|[;,]|\.? [A-Z])"
)
SETTING = re.compile(r"Set (\w+)\.(\w+) = (\w+)")


@pytest.mark.parametrize(("check", "illness"), ILLNESSES)
def test_what_the_doctor_says_to_do_heals(machine: Booted, check: str, illness: str) -> None:
    machine.run("sh", "-c", f"mkdir -p /etc/kvmagent/conf.d; {illness}")
    try:
        told = json.loads(machine.run("sh", "-c", "kvmagentctl doctor --json || true"))["findings"]
        ill = [one for one in told if one["check"] == check and one["level"] in ("wrong", "warning")]
        assert ill, told
        for one in ill:
            lines = [f"printf '[{section}]\n{key} = {value}\n' >/etc/kvmagent/conf.d/zz.conf"
                     for section, key, value in SETTING.findall(one["remedy"])]  # fmt: skip
            lines += COMMAND.findall(one["remedy"])
            assert lines, one
            machine.run("sh", "-ec", "\n".join(lines))
        wait_for(lambda: findings(machine)[check][0] in ("good", "note"), timeout_s=60, what=f"health after {ill}")
    finally:
        machine.run("sh", "-c", "rm -rf /etc/kvmagent/conf.d /etc/kvmagent/hooks /etc/kvmagent/tokens")
        machine.run("chown", "kvmagent:", "/var/lib/kvmagent")
        machine.run("systemctl", "restart", "kvmagent")


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


def test_an_agent_that_is_killed_for_its_memory_is_started_again_with_all_that_it_had_accepted(
    machine: Booted, image: Image
) -> None:
    """By the unit's own limit, made small enough to be met."""
    xml = format_vm(machine, image, GuestSpec(name="met", max_vcpus=4))
    (machine.root / "var/tmp/met.xml").write_text(xml)
    machine.run("virsh", "define", "/var/tmp/met.xml")  # and libvirtd runs
    restarts = int(machine.show(UNIT, "NRestarts"))
    with ManagementServer() as server:

        def send(task_uuid: str, body: bytes) -> int:
            connection = UnixConnection(machine.root / "run/kvmagent/kvmagent.sock")
            headers = {"Content-Type": "application/json", "taskuuid": task_uuid, "callbackurl": server.url}
            with contextlib.closing(connection):
                connection.request("POST", "/vm/hotplug/cpu", body, headers)
                return connection.getresponse().status

        limits = itertools.count(read_anonymous_bytes(machine) + 8 * 2**20, -(2**19))

        def is_killed() -> bool:
            # What the kernel cannot take back is more than this; a limit below that is refused, or kills at once.
            machine.run("systemctl", "set-property", "--runtime", UNIT, f"MemoryMax={max(next(limits), 2**23)}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                send("large", b'{"vmUuid": "' + b"x" * 900_000 + b'"}')
            return int(machine.show(UNIT, "NRestarts")) > restarts

        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGSTOP", "libvirtd")
        try:
            for cpus in (2, 3):
                body = json.dumps({"vmUuid": "met", "cpuNum": cpus, "affect": "config"})
                assert send(f"cpus{cpus}", body.encode()) == 200
            wait_for(is_killed, timeout_s=120, what="its end, and its start")
            machine.run("systemctl", "set-property", "--runtime", UNIT, "MemoryMax=1G")
        finally:
            machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGCONT", "libvirtd")
        assert [server.wait(f"cpus{cpus}", 60)["outcome"] for cpus in (2, 3)] == ["configured"] * 2
        assert [len(server.callbacks(f"cpus{cpus}")) for cpus in (2, 3)] == [1, 1]
    assert machine.run("virsh", "vcpucount", "met", "--config", "--current").strip() == "3"
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "active", timeout_s=60, what="the agent")
    assert findings(machine)["journal"][0] == "good"
    machine.run("virsh", "undefine", "met")


def read_anonymous_bytes(machine: Booted) -> int:
    """What the agent's memory holds that the kernel cannot take back."""
    status = machine.run("cat", f"/proc/{machine.show(UNIT, 'MainPID')}/status")
    (kibibytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) * 1024


@contextmanager
def access_controlled(machine: Booted) -> Iterator[None]:
    """Have libvirt ask polkit for each call, and log what it asks for."""
    machine.run("cp", LIBVIRT_CONF, "/run/libvirtd.conf")
    more = r'access_drivers = ["polkit"]\nlog_filters = "1:access.accessdriverpolkit"\nlog_outputs = "1:stderr"\n'
    machine.run("sh", "-c", f"printf '{more}' >>{LIBVIRT_CONF}")
    machine.run("systemctl", "restart", "libvirtd")
    try:
        yield
    finally:
        machine.run("cp", "/run/libvirtd.conf", LIBVIRT_CONF)
        machine.run("systemctl", "restart", "libvirtd")


def test_libvirts_access_control_lets_the_agent_do_its_job_and_no_more(machine: Booted, image: Image) -> None:
    spec = GuestSpec(name="vm1", devices_xml="<graphics type='vnc' passwd='secret'/>")
    with access_controlled(machine):
        start_vm(machine, spec.name, format_vm(machine, image, spec))
        ping = """virsh qemu-agent-command vm1 '{"execute":"guest-ping"}' || true"""
        wait_for(lambda: "return" in machine.run("sh", "-c", ping), timeout_s=120, what="the guest's agent")
        # Without the rules: refused, with the command that mends it.
        refused = machine.run("sh", "-c", "kvmagentctl plug-cpu vm1 2 2>&1 || true")
        assert f"install -m 0644 {RULES} {ACTIVE_RULES}/" in refused
        assert "60-kvmagent-access.rules" in machine.run("sh", "-c", "kvmagentctl doctor || true")
        machine.run("install", "-m", "0644", RULES, f"{ACTIVE_RULES}/")
        wait_for(
            lambda: "access denied" not in machine.run("sh", "-c", "kvmagentctl doctor || true"),
            timeout_s=60,
            what="polkit",
        )
        plugged = json.loads(machine.run("kvmagentctl", "--json", "plug", "vm1", "2", "512M"))
        assert (plugged["cpuNum"], plugged["memorySize"]) == (2, 512 << 20)
        ready = json.loads(machine.run("kvmagentctl", "--json", "ready", "vm1", "--max-cpus", "8", "--apply"))
        assert ready["ready"] is True
        definition = machine.run("virsh", "dumpxml", "vm1", "--inactive", "--security-info")
        assert "passwd='secret'" in definition
        assert ">8</vcpu>" in definition
        machine.run("sh", "-c", "kvmagentctl unplug-memory vm1 256M || true")  # the guest may refuse
        user = machine.run("id", "-u", "kvmagent").strip()
        asked = re.findall(
            rf"Check action 'org\.libvirt\.api\.([^']*)'.* uid {user}$", machine.journal("libvirtd"), re.M
        )
        assert set(asked) == set(
            re.findall(r'"((?:connect|domain)\.[a-z-]+)"', (ROOT / f"conf/{Path(RULES).name}").read_text())
        )
        for command in (
            "destroy vm1",
            "undefine vm1",
            "save vm1 /run/saved",
            "screenshot vm1",
            "pool-list",
            "secret-list",
        ):
            done = machine.run("sh", "-c", f"runuser -u kvmagent -- virsh -c qemu:///system {command} 2>&1 || true")
            assert "access denied" in done, command
        machine.run("virsh", "destroy", "vm1")


def test_the_doctor_looks_as_the_agent_s_user_where_root_would_be_let_in(machine: Booted) -> None:
    assert findings(machine)["user"] == ("good", "checked as kvmagent, the agent's user")
    assert "Permission denied" not in findings(machine)["libvirt"][1]
    socket = "/run/libvirt/libvirt-sock"
    mode = machine.run("stat", "--format=%a", socket).strip()
    machine.run("chmod", "0600", socket)
    try:
        assert machine.run("virsh", "--connect=qemu:///system", "list").startswith(" Id"), "root is let in"
        level, words = findings(machine)["libvirt"]
    finally:
        machine.run("chmod", mode, socket)
    assert (level, "Permission denied" in words) == ("wrong", True), words


def findings(machine: Booted) -> dict[str, tuple[str, str]]:
    """What the doctor finds: of each check the worst, and what it says."""
    told = json.loads(machine.run("sh", "-c", "kvmagentctl doctor --json || true"))["findings"]
    order = ("good", "note", "warning", "wrong")
    worst: dict[str, tuple[str, str]] = {}
    for one in sorted(told, key=lambda one: order.index(one["level"])):
        worst[one["check"]] = (one["level"], one["message"])
    return worst


def health(machine: Booted) -> dict[str, object]:
    """What the agent says of itself."""
    told = machine.run("kvmagentctl", "status", "--json")
    return dict(json.loads(told))
