from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.roles import ROLES, Access, Role, find_access, parse_rule
from kvmagent_plugins.host_plugin import PLUGIN as HOST
from kvmagent_plugins.vm_plugin import PLUGIN as VM

RULES = tuple(
    map(
        parse_rule,
        (
            "token:watcher read",
            "token:tenant plug read vm=tenant-* vm=5f2c*",
            "certificate:*.example plug unplug",
            "group:operators admin",
            "token:* host",
        ),
    )
)


def access(*names: str) -> Access:
    return find_access(names[0], names, RULES)


def refusal(given_access: Access, role: Role, *, host: bool = False, vm: str | None = None) -> AgentError:
    with pytest.raises(AgentError) as caught:
        given_access.check(role, host=host, vm=vm)
    assert caught.value.code is Code.ROLE_MISSING
    assert caught.value.status == 403
    return caught.value


def test_the_first_rule_that_fits_counts() -> None:
    assert access("token:watcher").roles == {"read"}
    assert access("token:zstack").roles == {"host"}
    assert access("certificate:server.example").roles == {"plug", "unplug"}
    assert access("unix:ann", "group:users", "group:operators").is_admin
    assert access("unix:bob", "group:users").roles == frozenset()


def test_a_refusal_names_the_role_that_is_missing_and_what_there_is() -> None:
    error = refusal(access("token:watcher"), "unplug")
    assert error.message == "token:watcher needs the role unplug; it has read"
    assert error.details == {"role": "unplug"}
    assert "it has none" in refusal(access("unix:bob"), "read").message


def test_a_role_for_some_vms_opens_neither_others_nor_the_host() -> None:
    tenant = access("token:tenant")
    assert tenant.check("plug", vm="tenant-7") == "plug"
    assert tenant.may("read", "tenant-7", "0000")
    assert tenant.may("read", "other", "5f2c88")
    assert not tenant.may("read")
    refusal(tenant, "plug", vm="db-7")
    refusal(tenant, "read", host=True)
    assert not replace(tenant, roles=frozenset({"admin"})).is_admin


@given(has=st.sets(st.sampled_from(ROLES)), needs=st.sampled_from(ROLES))
def test_only_the_role_itself_or_admin_lets_in(has: set[Role], needs: Role) -> None:
    caller = Access("token:t", frozenset(has))
    if needs in has or "admin" in has:
        assert caller.check(needs) in (needs, "admin")
    else:
        refusal(caller, needs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("watcher read", "must be unix:NAME"),
        ("token: read", "must be unix:NAME"),
        ("token:watcher reed", "one of the roles read"),
        ("token:watcher read vm=", "needs the name"),
        ("host:x read", "must be unix:NAME"),
    ],
)
def test_a_rule_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_rule(text)


@pytest.mark.parametrize("declared", [*VM.commands, *HOST.queries], ids=lambda one: one.name)
def test_a_declaration_without_a_role_is_refused(declared: object) -> None:
    with pytest.raises(ValueError, match="must declare a role"):
        replace(declared, role=None)  # type: ignore[type-var]


def test_what_a_command_needs_is_what_it_does() -> None:
    needed = {one.path: one.role for one in (*VM.commands, *HOST.queries)}
    assert {path for path, role in needed.items() if role == "unplug"} == {
        "/vm/hotunplug/cpu",
        "/vm/hotunplug/memory",
    }
    assert {path for path, role in needed.items() if role == "read"} == {"/vm/hotplug/ready"}
    assert needed["/host/connect"] == "host"
    ready = next(one for one in VM.commands if one.path == "/vm/hotplug/ready")
    assert ready.needs_also(ready.request(vm_uuid="v")) is None
    assert ready.needs_also(ready.request(vm_uuid="v", prepare=True)) == "prepare"


UUID = "db3c1e50-1111-4222-8333-abcdefabcdef"


@pytest.mark.parametrize(
    ("pattern", "name", "is_for"),
    [
        ("db*", UUID, False),
        ("*", UUID, False),
        ("db*", "db-7", True),
        (UUID, UUID, True),
        (UUID, UUID.replace("-", ""), True),
        (UUID.upper(), UUID, True),
        (UUID.replace("-", ""), UUID.upper(), True),
        (UUID, "db-7", False),
    ],
)
def test_a_uuid_is_meant_by_itself_alone_however_it_is_written(pattern: str, name: str, is_for: bool) -> None:
    assert Access("token:t", frozenset({"plug"}), (pattern,)).covers(name) is is_for


def test_a_vm_named_like_another_s_uuid_is_not_that_one() -> None:
    uuid, other = "5f2c0000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
    reader = Access("token:t", frozenset({"read"}), (uuid,))
    assert reader.covers_vm(uuid, "db-1")
    assert reader.covers_vm(uuid, other)
    assert not reader.covers_vm(other, uuid)
    assert Access("token:t", frozenset({"read"}), ("db-*",)).covers_vm(other, "db-1")
