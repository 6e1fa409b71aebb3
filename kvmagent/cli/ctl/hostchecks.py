"""What the doctor checks on the host itself: KVM, the state directory, the journal, hooks, certificates, the clock.

Paths and the time are arguments of each check; no check changes anything.
"""

import ctypes
import errno
import fcntl
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kvmagent.api.security import Security
from kvmagent.cli.ctl.agentuser import USER, find_user
from kvmagent.cli.ctl.ca import Certificate, read_certificates
from kvmagent.cli.ctl.configuration import check_log, check_state_dir
from kvmagent.cli.ctl.findings import Finding
from kvmagent.model.errors import AgentError
from kvmagent.model.units import MIB, format_size
from kvmagent.settings import AgentSection, HooksSection, LogSection, Settings, parse_callback_rule
from kvmagent.tasks.callbackclient import CallbackClient
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.journal import JOURNAL
from kvmagent.tasks.journalfile import check_file, check_is_file

# Source: Linux Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION and KVM_CREATE_VM.
_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_API_VERSION = 0xAE00, 0xAE01, 12
# Source: adjtimex(2): TIME_ERROR is its result where the clock is not synchronised. struct timex has 208 bytes.
_TIME_ERROR, _TIMEX_BYTES = 5, 256
_LITTLE_ROOM_BYTES, _NO_ROOM_BYTES, _FEW_INODES = 512 * MIB, 64 * MIB, 100
_SOON = timedelta(days=30)
_STEPPED_S = 60.0
_AS_AGENT = "Run doctor as root or as the agent's user."


def examine_kvm(device: Path = Path("/dev/kvm")) -> Iterator[Finding]:
    """Look whether the kernel makes a VM when asked; whether it then also runs shows only when one does."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        remedy = "Switch virtualisation on in the firmware (or nested virtualisation in the hypervisor): modprobe kvm."
        yield Finding("kvm", "warning", f"{device} does not exist: VMs can only be emulated", remedy)
        return
    except PermissionError:
        remedy = "Run doctor as root to check it; QEMU opens it as its own user."
        yield Finding("kvm", "note", f"{device} cannot be opened by this user", remedy)
        return
    except OSError as error:
        yield Finding("kvm", "wrong", f"{device}: {error.strerror}", "Load the module: modprobe kvm_intel, or kvm_amd.")
        return
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        os.close(fcntl.ioctl(descriptor, _KVM_CREATE_VM, 0))
    except OSError as error:
        remedy = "Another hypervisor may hold the processor, or virtualisation is off in the firmware: see dmesg."
        yield Finding("kvm", "wrong", f"{device} cannot create a VM: {error.strerror}", remedy)
        return
    finally:
        os.close(descriptor)
    if version != _KVM_API_VERSION:
        yield Finding(
            "kvm", "wrong", f"{device} has API version {version}, but version 12 is needed", "Update the kernel."
        )
    else:
        yield Finding("kvm", "good", f"{device} works")


def examine_state_dir(path: Path, *, look_at: Callable[[Path], os.statvfs_result] = os.statvfs) -> Iterator[Finding]:
    """Look whether tasks can be kept there, and by the agent alone."""
    make = f"install -d -o {USER} -g {USER} -m 0700 {path}"
    try:
        found, room = path.stat(), look_at(path)
    except FileNotFoundError:
        check_state_dir(Settings(agent=AgentSection(state_dir=str(path))))
        yield Finding("state_dir", "warning", f"{path} does not exist yet; the agent creates it at its start", make)
        return
    except PermissionError as error:
        yield Finding("state_dir", "note", f"{path}: {error.strerror}", _AS_AGENT)
        return
    except OSError as error:
        yield Finding("state_dir", "wrong", f"{path}: {error.strerror}", "Set agent.state_dir to a directory.")
        return
    if not stat.S_ISDIR(found.st_mode):
        yield Finding("state_dir", "wrong", f"{path} is not a directory", f"Move it away, then: {make}")
        return
    if room.f_flag & os.ST_RDONLY:
        remedy = "See dmesg for errors of its disk, then: mount -o remount,rw."
        yield Finding("state_dir", "wrong", f"{path} is on a file system that is read-only", remedy)
        return
    faults = 0
    if mode := stat.S_IMODE(found.st_mode) & 0o077:
        yield Finding(
            "state_dir", "warning", f"{path} is accessible to others ({mode | 0o700:04o})", f"chmod 0700 {path}"
        )
        faults += 1
    owner, user = _user_name(found.st_uid), find_user()
    if user is not None and found.st_uid != user.pw_uid:
        remedy = f"chown -R {USER}: {path}"
        yield Finding("state_dir", "warning", f"{path} belongs to {owner}, but the agent's user is {USER}", remedy)
        faults += 1
    free_bytes = room.f_bavail * room.f_frsize
    few_inodes = bool(room.f_files) and room.f_favail < _FEW_INODES
    if free_bytes < _LITTLE_ROOM_BYTES or few_inodes:
        message = f"{path} has {format_size(free_bytes)} and {room.f_favail} inodes left"
        remedy = "Free space there: until then the agent accepts no task, but loses none."
        is_full = few_inodes or free_bytes < _NO_ROOM_BYTES
        yield Finding("state_dir", "wrong" if is_full else "warning", message, remedy)
        faults += 1
    if not faults:
        yield Finding("state_dir", "good", f"{path} belongs to {owner} alone and has {format_size(free_bytes)} left")


def examine_log(section: LogSection) -> Iterator[Finding]:
    """Look where the log goes, and whether it can."""
    check_log(Settings(log=section))
    where = section.file or "standard error: the journal of systemd (journalctl -u kvmagent)"
    yield Finding("log", "good", f"{where}, from {section.level} on")


def examine_journal(state_dir: Path) -> Iterator[Finding]:
    """Check the whole journal, which an agent that starts does only where it is small."""
    path = state_dir / JOURNAL
    try:
        names = os.listdir(state_dir)
        found = path.stat() if JOURNAL in names else None
        if found is None:
            return  # of a new agent
        check_is_file(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        faults = check_file(path)
    except PermissionError as error:
        yield Finding("journal", "note", f"{path}: {error.strerror}", _AS_AGENT)
        return
    except OSError as error:
        if state_dir.is_dir():  # what is wrong with the directory is told already
            yield Finding("journal", "wrong", f"{path}: {error.strerror}", "See dmesg for errors of its disk.")
        return
    except AgentError as error:
        yield Finding("journal", "wrong", error.message, error.remedy)
        return
    for fault in faults:
        remedy = (
            f"systemctl stop kvmagent, move {path} with its -wal and -shm away, start it again; sqlite3's .recover "
            "may save the tasks."
        )
        yield Finding("journal", "wrong", f"{path} is damaged: {fault}", remedy)
    if not faults:
        yield Finding("journal", "good", f"{path} is intact, {format_size(found.st_size)}")


def examine_hooks(settings: HooksSection) -> Iterator[Finding]:
    """Look which hooks there are, and whether the agent would run them."""
    user = find_user()
    if found := Hooks(settings.directory, user_id=user and user.pw_uid).check():
        told = "; ".join(f"{event}.d: {names or 'none'}" for event, names in found.items())
        yield Finding("hooks", "good", f"{settings.directory}: {told}")


def examine_certificates(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Look at keys, tokens and certificates as an agent that starts does, then at the dates and names of each."""
    security, callback = settings.security, settings.callback
    rules = map(parse_callback_rule, security.allowed_callbacks)
    user = find_user()
    user_id = user and user.pw_uid
    for load in (Security(security, user_id=user_id).load, CallbackClient(rules, callback, user_id=user_id).load):
        try:
            load()
        except AgentError as error:
            yield Finding("certificates", "wrong", error.message, error.remedy)
    files = {
        "security.tls_cert": security.tls_cert,
        "security.client_ca": security.client_ca,
        "callback.tls_cert": callback.tls_cert,
        "callback.server_ca": callback.server_ca,
    }
    if not any(files.values()):
        words = "tokens" if security.tokens_file else "neither certificates nor tokens"
        where = f"plain HTTP on {settings.http.host}" if security.opens_tcp else "no TCP listener"
        yield Finding("certificates", "note", f"none: {where}, {words}")
    for key, name in files.items():
        if name:
            yield from _examine_file(key, Path(name), now)
    if security.tls_cert:
        yield from _examine_names(Path(security.tls_cert), settings.http.host)


def _examine_file(key: str, path: Path, now: datetime) -> Iterator[Finding]:
    try:
        certificates = read_certificates(path)
    except (OSError, ValueError) as error:
        remedy = f"Put PEM certificates there, or name another file in {key}."
        yield Finding("certificates", "wrong", f"{key} {path}: {error}", remedy)
        return
    for one in certificates:
        yield _examine_dates(key, one, now)


def _examine_dates(key: str, one: Certificate, now: datetime) -> Finding:
    renew = f"Issue it anew as SECURITY.md says, into the file of {key}, then: systemctl reload kvmagent."
    name = f"{key} {one.subject!r}"
    if now >= one.not_after:
        return Finding("certificates", "wrong", f"{name} expired on {one.not_after:%Y-%m-%d}", renew)
    if now < one.not_before:
        message = f"{name} is valid from {one.not_before:%Y-%m-%d %H:%M} UTC on, it is {now:%Y-%m-%d %H:%M}"
        return Finding("certificates", "wrong", message, "Set the clock: timedatectl set-ntp true.")
    days = (one.not_after - now).days
    if one.not_after - now < _SOON:
        return Finding("certificates", "warning", f"{name} expires in {days} days", renew)
    return Finding("certificates", "good", f"{name} is valid for {days} more days")


def _examine_names(path: Path, host: str) -> Iterator[Finding]:
    try:
        leaf = read_certificates(path)[0]
    except (OSError, ValueError):
        return  # told already
    is_any = host in ("0.0.0.0", "::")
    if not leaf.names or (not is_any and host.lower() not in leaf.names):
        names = ", ".join(sorted(leaf.names)) or "nothing"
        message = f"security.tls_cert is for {names}, the agent listens on {host}"
        remedy = "Issue one whose subjectAltName has the names and addresses that clients use; they reject this one."
        yield Finding("certificates", "warning", message, remedy)


def ask_kernel_clock() -> int:
    """Return the state of the kernel's clock, as adjtimex(2) has it; nothing is set."""
    return int(ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))


def examine_clock(state_dir: Path, now: datetime, ask_clock: Callable[[], int] = ask_kernel_clock) -> Iterator[Finding]:
    """Look whether the clock is right: certificates and the age of callbacks depend on it."""
    sync = "timedatectl set-ntp true, or install chrony."
    journal = state_dir / JOURNAL
    try:
        written = datetime.fromtimestamp(journal.stat().st_mtime, UTC)
    except OSError:
        written = now
    if (written - now).total_seconds() > _STEPPED_S:
        message = f"it is {now:%Y-%m-%d %H:%M} UTC, before the agent's journal was written ({written:%Y-%m-%d %H:%M})"
        yield Finding("clock", "wrong", message, f"Set the clock: {sync}")
    elif ask_clock() == _TIME_ERROR:
        message = f"it is {now:%Y-%m-%d %H:%M} UTC, and the kernel's clock is not synchronised"
        yield Finding("clock", "warning", message, f"Keep it synchronised: {sync}")
    else:
        yield Finding("clock", "good", f"synchronised, {now:%Y-%m-%d %H:%M} UTC")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
