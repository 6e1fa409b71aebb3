"""Roles: what each allows, which a caller has, and the one check.

    settings (security.roles) -> Rule ... -> find_access(caller's names) -> Access.check(role, vm)

The first rule that fits a caller counts, and no other. A rule for some VMs gives its roles for these alone: what
concerns the whole host needs a rule without VMs.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.vmname import parse_uuid

#: read: look; plug, unplug, prepare: change VMs so; host: what a management server asks and tells; admin: all of it.
Role = Literal["read", "plug", "unplug", "prepare", "host", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
#: What a route needs that is no role: any caller that was let in; anyone whose address may connect.
Open = Literal["caller", "public"]
OPEN: tuple[Open, ...] = get_args(Open)

_KINDS = ("unix", "group", "token", "certificate")
#: The address of a caller on this host's UNIX socket.
LOCAL = "local"
#: A caller that nobody asked who it is.
ANONYMOUS = "anonymous"
_VM_PREFIX = "vm="


@dataclass(frozen=True)
class Rule:
    """One line of the table: `who` is KIND:PATTERN or anonymous; no `vms` means all."""

    who: str
    roles: frozenset[Role]
    vms: tuple[str, ...] = ()

    def fits(self, names: tuple[str, ...]) -> bool:
        """Return whether the rule is about a caller with these names."""
        return any(fnmatchcase(name, self.who) for name in names)


@dataclass(frozen=True)
class Access:
    """An authenticated caller, and what it may do."""

    caller: str
    roles: frozenset[Role] = frozenset()
    vms: tuple[str, ...] = ()

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything to everything: other callers' tasks are its own too."""
        return "admin" in self.roles and not self.vms

    def has(self, role: Role) -> bool:
        """Return whether it has a role, for some VM at least."""
        return role in self.roles or "admin" in self.roles

    def covers(self, *names: str) -> bool:
        """Return whether its roles are for a VM, by any of its names."""
        return not self.vms or any(_means(pattern, name) for name in names for pattern in self.vms)

    def covers_vm(self, uuid: str, name: str) -> bool:
        """Return whether its roles are for a VM; a name that looks like a UUID means the VM that has that UUID."""
        return self.covers(uuid) or (parse_uuid(name) is None and self.covers(name))

    def may(self, role: Role, *names: str) -> bool:
        """Return whether it has a role for a VM, or without names for the whole host."""
        return self.has(role) and (self.covers(*names) if names else not self.vms)

    def check(self, role: Role, *, host: bool = False, vm: str | None = None) -> Role:
        """Return the role that lets it in: for the whole host, for a VM, or for whatever its VMs are.

        Raises:
            AgentError: ROLE_MISSING.
        """
        if not self.has(role):
            has = f"it has {', '.join(sorted(self.roles))}" if self.roles else "it has none"
            raise self._missing(role, f"{self.caller} needs the role {role}; {has}")
        if host and self.vms:
            raise self._missing(role, f"{self.caller} needs the role {role} for all VMs; it has it for some")
        if vm is not None and not self.covers(vm):
            raise self._missing(role, f"{self.caller} has the role {role} for other VMs, not for {vm!r}")
        return role if role in self.roles else "admin"

    def _missing(self, role: Role, message: str) -> AgentError:
        return AgentError(Code.ROLE_MISSING, message, details={"role": role})


def _means(pattern: str, name: str) -> bool:
    """Return whether a pattern is for what a VM is called; a UUID is meant by itself alone, however it is written.

    A pattern of names is never held against a UUID: db-* would mean whichever VM has one that begins so.
    """
    uuid = parse_uuid(name)
    return fnmatchcase(name, pattern) if uuid is None else uuid == parse_uuid(pattern)


def find_access(caller: str, names: tuple[str, ...], rules: tuple[Rule, ...]) -> Access:
    """Return what a caller may: by the first rule that fits one of its names."""
    for rule in rules:
        if rule.fits(names):
            return Access(caller, rule.roles, rule.vms)
    return Access(caller)


def parse_rule(text: str) -> Rule:
    """Return an entry of security.roles: WHO ROLE... [vm=PATTERN...].

    Raises:
        ValueError: it is none; the words say why.
    """
    who, *words = text.split()
    kind, colon, name = who.partition(":")
    if who != ANONYMOUS and not (kind in _KINDS and colon and name):
        raise ValueError(f"{who!r} must be {', '.join(f'{known}:NAME' for known in _KINDS)} or {ANONYMOUS}")
    roles = {word for word in words if not word.startswith(_VM_PREFIX)}
    vms = tuple(word.removeprefix(_VM_PREFIX) for word in words if word.startswith(_VM_PREFIX))
    if unknown := sorted(roles - set(ROLES)):
        raise ValueError(f"{unknown[0]!r} must be one of the roles {', '.join(ROLES)}")
    if not all(vms):
        raise ValueError("vm= needs the name, UUID or pattern of a VM")
    if kind == "certificate":
        who = who.lower()
    return Rule(who, frozenset(role for role in ROLES if role in roles), vms)


def check_role(name: str, role: object, known: tuple[str, ...] = ROLES) -> None:
    """Refuse a declaration that names no role: nothing is offered that nobody thought about.

    Raises:
        ValueError: it is none of `known`.
    """
    if role not in known:
        raise ValueError(f"{name} must declare a role, one of {', '.join(known)}; got {role!r}")
