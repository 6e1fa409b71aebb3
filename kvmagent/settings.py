"""The settings: one table that makes the typed values, conf/kvmagent.conf and the help.

Each section is a Struct, each key a field: its type, range and meaning are its annotation, its default its default.
"""

import difflib
import ipaddress
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from kvmagent.inifile import Section, read_entries
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.fields import MOST_BYTES, MOST_CPUS
from kvmagent.model.roles import parse_rule
from kvmagent.model.units import parse_amount, parse_count, parse_size

DEFAULT_PATH = "/etc/kvmagent/kvmagent.conf"

# A name ends in a label that is not all digits: else it is an address, and was no valid one.
_HOST_NAME = re.compile(
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?\.)*(?!\d+$)[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
)

_COMMENT_WIDTH = 100

# Source: unix(7), sun_path without its closing zero.
_MAX_SOCKET_PATH = 107

# Marks a key that a running agent does not take: a reload says so where it has changed.
_RESTART = {"restart": True}


class AgentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent itself: its state, its plugins, and how many tasks it runs and keeps."""

    state_dir: Annotated[
        str,
        Meta(
            extra=_RESTART,
            min_length=1,
            description="Directory of the task journal. Only the agent may use it",
        ),
    ] = "/var/lib/kvmagent"
    workers: Annotated[
        int, Meta(ge=1, le=1024, description="Number of VMs that the agent changes at the same time. Other tasks wait")
    ] = 32
    plugins: Annotated[
        tuple[str, ...],
        Meta(
            extra=_RESTART,
            description="Plugins to load, in this order, by the names of their entry points in the group "
            "kvmagent.plugins",
        ),
    ] = ("vm", "host")
    stop_timeout_sec: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description="Seconds that the agent waits for running tasks when it stops. Tasks that take longer continue "
            "at the next start",
        ),
    ] = 90
    max_queued: Annotated[
        int,
        Meta(ge=1, description="Maximum number of unfinished tasks. Above it, new tasks are refused (QUEUE_FULL)"),
    ] = 10000
    max_queued_per_vm: Annotated[
        int,
        Meta(
            ge=1,
            description="Maximum number of unfinished tasks of one VM. Above it, new tasks for that VM are refused "
            "(QUEUE_FULL)",
        ),
    ] = 100
    keep_tasks: Annotated[
        int,
        Meta(
            ge=0,
            description="Number of finished and delivered tasks to keep for look-up. Above it, the oldest are removed",
        ),
    ] = 20000
    keep_sec: Annotated[
        int, Meta(ge=0, description="Seconds to keep a finished and delivered task. The default is 7 days")
    ] = 604800
    keep_history_sec: Annotated[
        int, Meta(ge=0, description="Seconds to keep an entry in a VM's history. The default is 400 days")
    ] = 34560000
    keep_bytes: Annotated[
        int,
        Meta(
            ge=2**24,
            description="Maximum size of the journal in bytes. Above it, the oldest finished and delivered tasks are "
            "removed, then the oldest history. If that does not free enough, new tasks are refused (QUEUE_FULL). The "
            "default is 256 MiB",
        ),
    ] = 2**28
    max_queued_per_client: Annotated[
        int,
        Meta(
            ge=1,
            description="Maximum number of unfinished tasks of one client. Above it, its new tasks are refused "
            "(QUEUE_FULL)",
        ),
    ] = 5000


class HttpSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the agent listens. [security] controls who may connect and what they may do."""

    socket: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="UNIX socket for clients on this host. The agent knows each by its user. Empty: no socket",
        ),
    ] = "/run/kvmagent/kvmagent.sock"
    socket_group: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="Group whose members may connect to the socket. If the group does not exist, only root and the "
            "agent's user may",
        ),
    ] = "kvmagent-admin"
    host: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="Address to listen on for TCP connections. The agent does not listen there until [security] "
            "says who may connect",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(extra=_RESTART, ge=1, le=65535, description="TCP port to listen on")] = 7070
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=256,
            le=64 * 2**20,
            description="Maximum size of a request body in bytes. A larger one is refused (BODY_TOO_LARGE). The "
            "default is 1 MiB",
        ),
    ] = 1048576
    request_timeout_sec: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description="Seconds that a client has to send a complete request, from its first byte; for the first "
            "request, from when it connects. Then the agent closes the connection (REQUEST_TOO_SLOW)",
        ),
    ] = 15
    max_connections: Annotated[
        int,
        Meta(
            ge=16,
            description="Maximum number of open connections. Above it, new ones are refused (TOO_MANY_CONNECTIONS). "
            "One client can hold at most half of them",
        ),
    ] = 2000
    max_connections_per_client: Annotated[
        int,
        Meta(
            ge=1,
            description="Maximum number of open connections from one address (IPv6: from one /64 network). Above it, "
            "new ones are refused (TOO_MANY_CONNECTIONS)",
        ),
    ] = 1000


class LibvirtSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The connection to libvirt."""

    uri: Annotated[str, Meta(extra=_RESTART, min_length=1, description="libvirt connection URI")] = "qemu:///system"
    wait_sec: Annotated[
        int,
        Meta(
            ge=0,
            le=86400,
            description="Seconds that a task waits for libvirt to come back before it fails (LIBVIRT_UNAVAILABLE)",
        ),
    ] = 120
    allow_emulated_removal: Annotated[
        bool,
        Meta(
            extra=_RESTART,
            description="Allow the removal of vCPUs from emulated VMs (domain type qemu). Many QEMU versions crash "
            "afterwards; use it only for tests",
        ),
    ] = False


class CallbackSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the agent delivers results by callback."""

    give_up_sec: Annotated[
        int,
        Meta(
            ge=1,
            le=31 * 86400,
            description="Seconds that the agent retries a callback before it gives up. GET /tasks/ID still returns the "
            "result. The default is 24 hours",
        ),
    ] = 86400
    timeout_sec: Annotated[
        int, Meta(ge=1, le=300, description="Seconds for one attempt, from resolving the host name to the answer")
    ] = 10
    max_undelivered: Annotated[
        int,
        Meta(ge=1, description="Maximum number of undelivered callbacks. Above it, new tasks are refused (QUEUE_FULL)"),
    ] = 20000
    max_undelivered_per_client: Annotated[
        int,
        Meta(
            ge=1,
            description="Maximum number of undelivered callbacks to one client. Above it, its new tasks are refused "
            "(QUEUE_FULL)",
        ),
    ] = 10000
    server_ca: Annotated[
        str,
        Meta(description="PEM file with the CA certificates for verifying callback servers. Empty: the system's CAs"),
    ] = ""
    tls_cert: Annotated[
        str,
        Meta(description="PEM file with the agent's client certificate for callbacks. Empty: no client certificate"),
    ] = ""
    tls_key: Annotated[
        str, Meta(description="PEM file with the key of tls_cert, mode 0600. Empty: the key is in tls_cert")
    ] = ""


class SecuritySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may use the agent, and where it may send callbacks. A reload also reads the files named here again."""

    tls_cert: Annotated[
        str, Meta(description="PEM file with the agent's server certificate and its chain. Empty: plain HTTP")
    ] = ""
    tls_key: Annotated[
        str, Meta(description="PEM file with the key of tls_cert, mode 0600. Empty: the key is in tls_cert")
    ] = ""
    client_ca: Annotated[
        str,
        Meta(
            description="PEM file with the CA that signs client certificates. Empty: clients are not asked for a "
            "certificate"
        ),
    ] = ""
    client_crl: Annotated[
        str,
        Meta(description="PEM file with the revocation list of client_ca. Empty: the agent checks no revocation list"),
    ] = ""
    allowed_names: Annotated[
        tuple[str, ...],
        Meta(
            description="Subject alternative names of the client certificates to accept. Empty: every certificate that "
            "client_ca has signed"
        ),
    ] = ()
    tokens_file: Annotated[
        str,
        Meta(
            description="File of bearer tokens, mode 0600, one NAME:SHA256 per line. kvmagent --new-token NAME makes "
            "a token. Empty: tokens are not accepted"
        ),
    ] = ""
    allow_unauthenticated: Annotated[
        bool,
        Meta(
            description="Accept TCP clients without credentials from the addresses in allowed_clients. Loopback must "
            "be listed too"
        ),
    ] = False
    allowed_clients: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses and networks that may connect by TCP. Empty: any address, if clients must "
            "authenticate"
        ),
    ] = ()
    allowed_callbacks: Annotated[
        tuple[str, ...],
        Meta(
            description="Where callbacks may go: addresses, networks and host names, with :PORT for one port or "
            "without it for all ports. caller is the address that sent the command"
        ),
    ] = ("caller",)
    roles: Annotated[
        tuple[str, ...],
        Meta(
            description="Who may do what. An entry is a caller and its roles, separated by spaces; vm=PATTERN limits "
            "them to some VMs. Callers: token:NAME, certificate:NAME, anonymous, and on the UNIX socket unix:USER and "
            "group:GROUP. Roles: read, plug, unplug, prepare, host, admin. * matches any text. Only the first entry "
            "that matches the caller applies. Root may do everything"
        ),
    ] = ("group:kvmagent-admin admin", "certificate:* admin", "token:* admin", "anonymous admin")
    host_names: Annotated[
        tuple[str, ...],
        Meta(
            description="Extra host names by which clients without credentials may address the agent. Addresses, names "
            "without a dot and this host's own name always work. Others are refused, so that no web page can reach "
            "the agent through a browser (DNS rebinding)"
        ),
    ] = ()

    @property
    def authenticates(self) -> bool:
        """Whether clients have to say who they are by TCP."""
        return bool(self.client_ca or self.tokens_file)

    @property
    def opens_tcp(self) -> bool:
        """Whether anybody could connect by TCP: an address of this host is no credential."""
        return self.authenticates or self.allow_unauthenticated


class HostSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The host's memory budget: (memory - hugepages - memory_reserve) x memory_overcommit. No plug may exceed it."""

    memory_reserve: Annotated[
        int, Meta(ge=0, description="Memory to keep for the host itself, in bytes. The default is 1 GiB")
    ] = 2**30
    memory_overcommit: Annotated[
        float,
        Meta(
            ge=0.1,
            le=100,
            description="Factor by which the remaining memory may be promised to VMs. Above 1, the host can run "
            "out of it",
        ),
    ] = 1.0


class PrepareSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Automatic preparation of VMs for hotplug. docs/prepare.md says what it changes."""

    on_define: Annotated[
        bool,
        Meta(
            extra=_RESTART,
            description="Prepare a VM's persistent definition whenever the VM is defined or started, and those of all "
            "VMs when the agent starts. VMs whose owner's policy has hotplug off stay as they are",
        ),
    ] = False
    max_cpus: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="Maximum number of vCPUs to prepare for. xN means N times the current number, for VMs that "
            "have no room to grow",
        ),
    ] = "x4"
    max_memory: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="Maximum memory to prepare for, such as 64GiB. xN means N times the current memory, for VMs "
            "that have no room to grow",
        ),
    ] = "x4"


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the agent logs, and where."""

    file: Annotated[str, Meta(description="Log file. Empty: standard error, which systemd sends to the journal")] = ""
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Lowest level to log")] = "info"
    format: Annotated[
        Literal["text", "json"], Meta(description="Format of a line: text is key=value, json is one JSON object")
    ] = "text"


class MetricsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /metrics exports."""

    sample_sec: Annotated[
        int,
        Meta(
            extra=_RESTART,
            ge=0,
            le=86400,
            description="Interval in seconds at which the agent asks each running VM's guest what it uses. 0: never",
        ),
    ] = 300
    per_vm: Annotated[
        Literal["all", "trouble", "off"],
        Meta(
            description="VMs with their own series: all of them, only those in trouble, or none (off). With off, no "
            "alert on a single VM fires. Sums over all VMs are always exported"
        ),
    ] = "all"
    max_vms: Annotated[
        int,
        Meta(ge=0, le=100000, description="Maximum number of VMs with their own series. Those in trouble come first"),
    ] = 1000


class HooksSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Your own executables that the agent runs before and after each change of a VM."""

    directory: Annotated[
        str,
        Meta(
            extra=_RESTART,
            description="Absolute path of the directory with before.d and after.d. Only root and the agent's user may "
            "be able to write there. Empty: no hooks",
        ),
    ] = ""
    timeout_sec: Annotated[
        int,
        Meta(
            ge=1,
            le=300,
            description="Seconds for all hooks in before.d together, and again for those in after.d, for each task. "
            "Then they are killed; in before.d the task is refused (REFUSED_BY_HOOK)",
        ),
    ] = 10


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings, checked."""

    agent: AgentSection = AgentSection()
    http: HttpSection = HttpSection()
    libvirt: LibvirtSection = LibvirtSection()
    host: HostSection = HostSection()
    callback: CallbackSection = CallbackSection()
    security: SecuritySection = SecuritySection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()
    hooks: HooksSection = HooksSection()
    prepare: PrepareSection = PrepareSection()


_SECTIONS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}
# The test driver is libvirt's own, for tests.
_DRIVERS = ("qemu", "test")
_TRANSPORTS = ("unix", "tls", "tcp", "ssh", "libssh", "libssh2", "ext")
_QEMU_PATHS = ("system", "session")


def parse_sources(sources: Iterable[tuple[str, str]], overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of (name, text) sources, a later one over an earlier, with overrides over all.

    Raises:
        AgentError: BAD_CONFIGURATION, with every fault: where it stands, the key, the value found, those allowed.
    """
    sections = read_entries(sources, overrides)
    values: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for name, section in sections.items():
        known = _SECTIONS.get(name)
        if known is None:
            faults.append(_say(section.where, f"there is no section [{name}]{_nearest(name, _SECTIONS)}"))
            continue
        for key, entry in section.keys.items():
            try:
                values.setdefault(name, {})[key] = _read_value(name, key, entry.value)
            except ValueError as error:
                faults.append(_say(entry.where, str(error)))
    if not faults:
        settings = msgspec.convert(values, Settings)
        try:
            check_together(settings)
        except AgentError as error:
            raise _place(error, sections) from error
        return settings
    raise AgentError(
        Code.BAD_CONFIGURATION,
        "; ".join(faults),
        remedy="Correct it, then run: kvmagentctl config --check. kvmagent --sample lists every key with its default.",
    )


def sample_conf() -> str:
    """Return conf/kvmagent.conf: every key with its meaning and its default."""
    lines = [
        "# Configuration of kvmagent: every key with its default. An unknown key keeps the agent from starting.",
        "# To apply a change, run: systemctl reload kvmagent. Some keys need a restart instead, and say so.",
    ]
    for section in msgspec.structs.fields(Settings):
        lines += ["", *_comment(section.type.__doc__), f"[{section.name}]"]
        for field in msgspec.structs.fields(section.type):
            lines += [*_comment(describe(field.type)), f"{field.name} = {_format(field.default)}".rstrip()]
    return "\n".join(lines) + "\n"


def take_reloadable(in_force: Settings, read: Settings) -> tuple[Settings, list[str]]:
    """Return the settings that a reload puts in force, and the keys that have changed and need a restart."""
    values: dict[str, Any] = {}
    waiting: list[str] = []
    for section in msgspec.structs.fields(Settings):
        old, new = getattr(in_force, section.name), getattr(read, section.name)
        kept = {
            field.name: getattr(old, field.name)
            for field in msgspec.structs.fields(section.type)
            if _needs_restart(field.type)
        }
        waiting += [f"{section.name}.{key}" for key, value in kept.items() if value != getattr(new, key)]
        values[section.name] = msgspec.structs.replace(new, **kept)
    if in_force.security.opens_tcp != read.security.opens_tcp:
        waiting.append("[security]: whether TCP clients may connect at all")
    return Settings(**values), waiting


def list_settings(settings: Settings) -> list[tuple[str, str, str, bool]]:
    """Return every key as (section, key, value as a file has it, whether that is the default), in order."""
    listed = []
    for section in msgspec.structs.fields(Settings):
        values = getattr(settings, section.name)
        for field in msgspec.structs.fields(section.type):
            value = getattr(values, field.name)
            listed.append((section.name, field.name, _format(value), value == field.default))
    return listed


# Of a key without a maximum a larger number means the same, and is none that SQLite or a metric can take.
_MOST = 2**63 - 1


def _read_value(section: str, key: str, text: str) -> Any:
    """Return a key's value.

    Raises:
        ValueError: there is no such key, or it does not take this value, in words.
    """
    fields = {field.name: field for field in msgspec.structs.fields(_SECTIONS[section])}
    field = fields.get(key)
    if field is None:
        raise ValueError(f"[{section}] has no key {key}{_nearest(key, fields) or _other_section(key)}")
    name = f"{section}.{key}"
    if isinstance(field.default, tuple):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if _is_bracketed(parts):
            raise ValueError(f"{name} is a list with commas, as in: a, b; got {text!r}")
        return tuple(parts)
    try:
        value = msgspec.convert(text, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} must be {_allowed(field.type)}, got {text!r}") from error
    return min(value, _MOST) if type(value) is int else value


def _is_bracketed(parts: list[str]) -> bool:
    """Return whether a list is written as JSON or Python writes it. An IPv6 address stands in brackets of its own."""
    quoted = any(set(part) & set("\"'") for part in parts)
    first = parts[0] if parts else ""
    return quoted or (first.startswith("[") and ("]" not in first or ":" not in first))


def _allowed(annotation: Any) -> str:
    """Return in words which values a key takes."""
    kind, *metas = get_args(annotation)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    low, high, longest = (
        next((getattr(meta, n) for meta in metas if getattr(meta, n) is not None), None)
        for n in ("ge", "le", "min_length")
    )
    if longest:
        return "set"
    if low is not None:
        words += f" from {low} to {high}" if high is not None else f" of {low} or more"
    return words


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that names what was probably meant, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _other_section(key: str) -> str:
    """Return the section that has the key, if it was written in the wrong one."""
    homes = [name for name, section in _SECTIONS.items() if key in section.__struct_fields__]
    return f"; [{homes[0]}] has it" if homes else ""


def _say(where: str, fault: str) -> str:
    return f"{where}: {fault}" if where else fault


def _place(error: AgentError, sections: Mapping[str, Section]) -> AgentError:
    """Return the error with where the first key that it names is set."""
    for section, key in re.findall(r"\b(\w+)\.(\w+)", error.message):
        if section in sections and key in sections[section].keys:
            where = sections[section].keys[key].where
            return AgentError(error.code, _say(where, error.message), remedy=error.remedy)
    return error


def _check_uri(uri: str) -> None:
    """Refuse a URI that no libvirt takes. Source: libvirt docs/uri.html, "Remote URI format"."""
    scheme, colon, rest = uri.partition("://")
    driver, plus, transport = scheme.partition("+")
    if not colon:
        raise _bad(f"libvirt.uri must be a URI such as qemu:///system, got {uri!r}")
    if driver not in _DRIVERS:
        raise _bad(f"libvirt.uri: driver {driver!r} is not supported, only qemu{_nearest(driver, _DRIVERS)}")
    if plus and transport not in _TRANSPORTS:
        raise _bad(f"libvirt.uri: the transport must be one of {', '.join(_TRANSPORTS)}, got {transport!r}")
    path = rest.partition("?")[0].partition("/")[2]
    if driver == "qemu" and path not in _QEMU_PATHS:
        raise _bad(
            f"libvirt.uri: the path of a qemu URI is {' or '.join('/' + one for one in _QEMU_PATHS)}, "
            f"got {'/' + path!r}{_nearest(path, _QEMU_PATHS)}"
        )


def check_together(settings: Settings) -> None:
    """Refuse values that do not go together.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    _check_uri(settings.libvirt.uri)
    for key, text, parse, most in (
        ("max_cpus", settings.prepare.max_cpus, parse_count, MOST_CPUS),
        ("max_memory", settings.prepare.max_memory, parse_size, MOST_BYTES),
    ):
        try:
            if parse_amount(text, parse).number > most:
                raise ValueError(f"{text} is more than {most}")
        except ValueError as error:
            raise _bad(f"prepare.{key}: {error}") from error
    if settings.hooks.directory and not settings.hooks.directory.startswith("/"):
        raise _bad(f"hooks.directory must be an absolute path, got {settings.hooks.directory!r}")
    _check_security(settings)


def _check_security(settings: Settings) -> None:
    """Refuse what would let someone in who was not meant to be."""
    security, callback = settings.security, settings.callback
    for network in security.allowed_clients:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise _bad(f"security.allowed_clients: {error}") from error
    for entry in security.allowed_callbacks:
        parse_callback_rule(entry)
    if security.tls_key and not security.tls_cert:
        raise _bad("security.tls_key is set but security.tls_cert is not")
    if callback.tls_key and not callback.tls_cert:
        raise _bad("callback.tls_key is set but callback.tls_cert is not")
    if security.client_ca and not security.tls_cert:
        raise _bad("security.client_ca is set but security.tls_cert is not: client certificates need TLS")
    if security.allowed_names and not security.client_ca:
        raise _bad("security.allowed_names is set but security.client_ca is not")
    for entry in security.roles:
        try:
            parse_rule(entry)
        except ValueError as error:
            raise _bad(f"security.roles: {entry!r}: {error}") from error
    if security.client_crl and not security.client_ca:
        raise _bad("security.client_crl is set but security.client_ca is not")
    if security.allow_unauthenticated and security.authenticates:
        raise _bad("security.allow_unauthenticated contradicts security.client_ca and security.tokens_file")
    if security.allow_unauthenticated and not security.allowed_clients:
        raise AgentError(
            Code.BAD_CONFIGURATION,
            "security.allow_unauthenticated is true, but security.allowed_clients is empty",
            remedy="List the addresses or networks that may connect in security.allowed_clients.",
        )
    if security.tls_cert and not security.opens_tcp:
        raise _bad("security.tls_cert is set, but neither security.client_ca nor security.tokens_file is")
    _check_socket(settings.http.socket)
    if not (settings.http.socket or security.opens_tcp):
        raise _bad("http.socket is empty and [security] allows no TCP client: nothing could reach the agent")
    if not _is_loopback(settings.http.host):
        _check_beyond_loopback(settings.http.host, security)


def _check_socket(path: str) -> None:
    if path and not path.startswith("/"):
        raise _bad(f"http.socket must be an absolute path, got {path!r}")
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise _bad(f"http.socket must have at most {_MAX_SOCKET_PATH} bytes, it has {len(path.encode())}")


def _check_beyond_loopback(host: str, security: SecuritySection) -> None:
    found = f"http.host is {host}, which is not loopback, and"
    if security.allow_unauthenticated:
        return
    if not security.authenticates:
        raise AgentError(
            Code.BAD_CONFIGURATION,
            f"{found} clients would not be authenticated",
            remedy="Set security.tls_cert and security.client_ca (client certificates), or security.tls_cert and "
            "security.tokens_file (bearer tokens), or http.host = 127.0.0.1, or security.allow_unauthenticated = true "
            "with security.allowed_clients.",
        )
    if not security.tls_cert:
        raise AgentError(
            Code.BAD_CONFIGURATION,
            f"{found} tokens would cross the network in clear text",
            remedy="Set security.tls_cert and security.tls_key, or http.host = 127.0.0.1.",
        )


class CallbackRule(msgspec.Struct, frozen=True):
    """One entry of allowed_callbacks: the caller's own address, a network, or a host by name; None: all ports."""

    port: int | None
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    name: str | None = None


def parse_callback_rule(text: str) -> CallbackRule:
    """Return an entry of allowed_callbacks: caller, an address, a network or a name, each with or without :PORT.

    Raises:
        AgentError: BAD_CONFIGURATION.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        is_address, colon, digits = True, rest[:1] if bracket else "?", rest[1:]
    elif text.count(":") > 1:
        host, is_address, colon, digits = text, True, "", ""
    else:
        (host, colon, digits), is_address = text.partition(":"), False
    known_port = re.fullmatch(r"[0-9]{1,5}", digits) and 0 < int(digits) <= 65535
    if not host or colon not in ("", ":") or bool(colon) != bool(known_port):
        raise _bad(
            f"security.allowed_callbacks: {text!r} is not an address, network or host name, with or without :PORT"
        )
    port = int(digits) if digits else None
    if host == "caller":
        return CallbackRule(port)
    try:
        return CallbackRule(port, network=ipaddress.ip_network(host))
    except ValueError as error:
        if is_address or not _HOST_NAME.fullmatch(host):
            raise _bad(f"security.allowed_callbacks: {error}") from error
        return CallbackRule(port, name=host.lower())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def describe(annotation: Any) -> str:
    """Return what a key means, in sentences, by its field's type; and that it needs a restart, where it does."""
    words = next(meta.description for meta in annotation.__metadata__ if isinstance(meta, Meta) and meta.description)
    return f"{words}. A change needs a restart." if _needs_restart(annotation) else f"{words}."


def _comment(words: str) -> list[str]:
    indent = "# "
    return textwrap.wrap(
        words,
        _COMMENT_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _needs_restart(annotation: Any) -> bool:
    return any(isinstance(meta, Meta) and (meta.extra or {}).get("restart") for meta in annotation.__metadata__)


def _format(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _bad(message: str) -> AgentError:
    return AgentError(Code.BAD_CONFIGURATION, message)
