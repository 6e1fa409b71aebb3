"""The settings: one table, from which come the typed values, conf/kvmagent.conf and the help.

Each section is a Struct, each key a field: its type, range and meaning are its annotation, its default its default.
"""

import configparser
import ipaddress
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvmagent.model.errors import AgentError, Code

DEFAULT_PATH = "/etc/kvmagent/kvmagent.conf"


class AgentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent itself."""

    state_dir: Annotated[str, Meta(min_length=1, description="Directory of the task journal; the agent's alone")] = (
        "/var/lib/kvmagent"
    )
    workers: Annotated[int, Meta(ge=1, le=1024, description="VMs that are changed side by side, at most")] = 32
    plugins: Annotated[
        tuple[str, ...], Meta(description="Plugins to load, in this order, by their entry point in kvmagent.plugins")
    ] = ("vm",)
    stop_timeout_sec: Annotated[
        int, Meta(ge=1, le=3600, description="Seconds that a stopping agent waits for running tasks")
    ] = 90
    max_queued: Annotated[int, Meta(ge=1, description="Unfinished tasks in all before new ones are refused")] = 10000
    max_queued_per_vm: Annotated[
        int, Meta(ge=1, description="Unfinished tasks of one VM before new ones are refused")
    ] = 100
    keep_tasks: Annotated[int, Meta(ge=0, description="Finished and delivered tasks that are kept to be looked up")] = (
        20000
    )
    keep_sec: Annotated[
        int, Meta(ge=0, description="Seconds after which a finished and delivered task is forgotten")
    ] = 604800


class HttpSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the agent listens."""

    host: Annotated[str, Meta(description="Address to listen on; other than loopback needs the [security] section")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=1, le=65535, description="TCP port to listen on")] = 7070
    max_body_bytes: Annotated[int, Meta(ge=256, le=64 * 2**20, description="Largest request body, bytes")] = 1048576


class LibvirtSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hypervisor."""

    uri: Annotated[str, Meta(min_length=1, description="libvirt connection URI")] = "qemu:///system"
    wait_sec: Annotated[
        int, Meta(ge=0, le=86400, description="Seconds that a task waits for a libvirt that is away before it fails")
    ] = 120


class CallbackSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How outcomes are delivered."""

    give_up_sec: Annotated[int, Meta(ge=1, le=31 * 86400, description="Seconds after which a callback is given up")] = (
        86400
    )
    timeout_sec: Annotated[int, Meta(ge=1, le=300, description="Seconds that a callback's receiver may take")] = 10


class SecuritySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may use the agent."""

    allow_unauthenticated: Annotated[
        bool, Meta(description="Listen beyond loopback without client authentication; needs allowed_clients")
    ] = False
    allowed_clients: Annotated[
        tuple[str, ...], Meta(description="Addresses and networks that may connect; empty allows loopback alone")
    ] = ()


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the agent logs."""

    file: Annotated[str, Meta(description="Log file; empty logs to standard error, for journald")] = ""
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged")] = (
        "info"
    )
    format: Annotated[Literal["text", "json"], Meta(description="text is key=value")] = "text"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings, checked."""

    agent: AgentSection = AgentSection()
    http: HttpSection = HttpSection()
    libvirt: LibvirtSection = LibvirtSection()
    callback: CallbackSection = CallbackSection()
    security: SecuritySection = SecuritySection()
    log: LogSection = LogSection()


def parse_settings(text: str, overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of an INI text, with `section.key=value` overrides applied.

    Raises:
        AgentError: BAD_CONFIGURATION, naming the section and key.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise _bad(str(error).replace("\n", " ")) from error
    values: dict[str, dict[str, str]] = {name: dict(parser.items(name)) for name in parser.sections()}
    for override in overrides:
        name, equals, value = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise _bad(f"--set {override}: not of the form section.key=value")
        values.setdefault(section, {})[key] = value.strip()
    return _check({section: _typed(section, keys) for section, keys in values.items()})


def sample_conf() -> str:
    """Return conf/kvmagent.conf: every key with its meaning and its default."""
    lines = ["# kvmagent's configuration. Every key is shown with its default; unknown keys stop the start."]
    for section in msgspec.structs.fields(Settings):
        lines += ["", f"# {section.type.__doc__.strip()}", f"[{section.name}]"]
        for field in msgspec.structs.fields(section.type):
            lines += [f"# {_description(field.type)}", f"{field.name} = {_format(field.default)}".rstrip()]
    return "\n".join(lines) + "\n"


def _typed(section: str, keys: dict[str, str]) -> dict[str, Any]:
    """Split the values of list keys; the rest is converted with the Struct's own types."""
    struct = next((field.type for field in msgspec.structs.fields(Settings) if field.name == section), None)
    if struct is None:
        raise _bad(f"unknown section [{section}]")
    lists = {field.name for field in msgspec.structs.fields(struct) if isinstance(field.default, tuple)}
    return {
        key: [part.strip() for part in value.split(",") if part.strip()] if key in lists else value
        for key, value in keys.items()
    }


def _check(values: dict[str, dict[str, Any]]) -> Settings:
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise _bad(str(error).replace("$.", "")) from error
    allowed = settings.security.allowed_clients
    for network in allowed:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise _bad(f"security.allowed_clients: {error}") from error
    if not _is_loopback(settings.http.host) and not (settings.security.allow_unauthenticated and allowed):
        raise AgentError(
            Code.BAD_CONFIGURATION,
            f"http.host is {settings.http.host}, which is not loopback, and clients would not be authenticated",
            remedy="Set http.host = 127.0.0.1, or security.allow_unauthenticated = true with security.allowed_clients.",
        )
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _description(annotation: Any) -> str:
    return next(meta.description for meta in annotation.__metadata__ if isinstance(meta, Meta) and meta.description)


def _format(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _bad(message: str) -> AgentError:
    return AgentError(Code.BAD_CONFIGURATION, message)
