from pathlib import Path

import msgspec
import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.settings import Settings, list_settings, parse_sources, sample_conf, take_reloadable
from tests.fakes.settings import parse_settings

CONF = Path(__file__).parents[2] / "conf/kvmagent.conf"


def test_the_shipped_conf_is_what_the_table_makes() -> None:
    assert CONF.read_text() == sample_conf()


def test_the_shipped_conf_holds_the_defaults() -> None:
    assert parse_settings(CONF.read_text()) == Settings() == parse_settings("")


def test_keys_are_typed_and_overrides_win() -> None:
    settings = parse_settings(
        "[http]\nport = 8080\n[agent]\nplugins = vm, other\n", ["http.port=9090", "log.format = json"]
    )
    assert settings.http.port == 9090
    assert settings.agent.plugins == ("vm", "other")
    assert settings.log.format == "json"


@pytest.mark.parametrize("number", [2**62, 2**63, 10**30, 10**400])
def test_a_number_without_a_maximum_is_one_that_sqlite_and_metrics_can_take(number: int) -> None:
    keys = ("agent.keep_tasks", "agent.keep_sec", "agent.keep_history_sec", "agent.keep_bytes", "host.memory_reserve")
    read = parse_settings("", [f"{key}={number}" for key in keys])
    taken = {getattr(getattr(read, section), key) for section, key in (name.split(".") for name in keys)}
    assert taken == {min(number, 2**63 - 1)}


def test_a_later_file_wins_and_each_fault_says_where_it_stands() -> None:
    sources = [
        ("kvmagent.conf", "[http]\nport = 8080\n[log]\nlevel = info\n"),
        ("conf.d/9.conf", "[http]\nport = 9090\n"),
    ]
    assert parse_sources(sources).http.port == 9090
    assert parse_sources(sources, ["http.port=1"]).http.port == 1
    sources[1] = ("conf.d/9.conf", "# here\n[http]\nport = x\nPORTS: 3\n")
    with pytest.raises(AgentError) as caught:
        parse_sources(sources, ["log.levle=info"])
    assert caught.value.message.split("; ") == [
        "conf.d/9.conf, line 3: http.port must be a whole number from 1 to 65535, got 'x'",
        "conf.d/9.conf, line 4: [http] has no key ports",
        "did you mean port?",
        "--set: [log] has no key levle",
        "did you mean level?",
    ]


@pytest.mark.parametrize("value", ["[::1]", "[::1]:8080", "[::1]:1, [::2]:2", "caller, 10.0.0.0/8, db.example:8080"])
def test_an_address_in_brackets_is_no_list_in_brackets(value: str) -> None:
    assert len(parse_settings(f"[security]\nallowed_callbacks = {value}").security.allowed_callbacks) > 0


def test_percent_signs_are_plain_text() -> None:
    assert parse_settings("[libvirt]\nuri = qemu+unix:///session?socket=/a%20b\n").libvirt.uri.endswith("/a%20b")


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("[htpp]\nport = 1", [], "[htpp]"),
        ("[http]\nprot = 1", [], "prot"),
        ("[http]\nport = none", [], "http.port"),
        ("[http]\nport = 0", [], "http.port"),
        ("[http]\nport = 70000", [], "http.port"),
        ("[log]\nlevel = loud", [], "log.level"),
        ("[agent]\nworkers = 1.5", [], "agent.workers"),
        ("no section", [], "no section"),
        ("[http]\nport = 1\nport = 2", [], "port"),
        ("", ["http.port"], "http.port"),
        ("", ["port=1"], "port=1"),
        ("[security]\nallowed_clients = 10.0.0.0/33", [], "security.allowed_clients"),
    ],
)
def test_what_cannot_be_used_stops_the_start_by_name(text: str, overrides: list[str], named: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_settings(text, overrides)
    assert caught.value.code is Code.BAD_CONFIGURATION
    assert named in caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "compute-1"])
def test_refuses_to_listen_beyond_loopback_without_authentication(host: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_settings(f"[http]\nhost = {host}")
    assert "allow_unauthenticated" in caught.value.remedy


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_listens_on_loopback_as_it_is(host: str) -> None:
    assert parse_settings(f"[http]\nhost = {host}").http.host == host


def test_listens_beyond_loopback_where_both_keys_say_so() -> None:
    text = "[http]\nhost = 192.0.2.1\n[security]\nallow_unauthenticated = true\nallowed_clients = 192.0.2.0/24"
    assert parse_settings(text).security.allowed_clients == ("192.0.2.0/24",)


def test_a_reload_takes_every_key_or_says_that_it_needs_a_restart() -> None:
    """Whatever key changes: nothing is passed over in silence."""
    base = Settings()
    for section, key, _, _ in list_settings(base):
        former = getattr(getattr(base, section), key)
        value = {bool: True, int: 77, float: 2.5, str: "other", tuple: ("other",)}[type(former)]
        values = msgspec.structs.replace(getattr(base, section), **{key: value})
        taken, waiting = take_reloadable(base, msgspec.structs.replace(base, **{section: values}))
        is_taken = getattr(getattr(taken, section), key) == value
        assert is_taken != (f"{section}.{key}" in waiting), key
    words = " ".join(line.removeprefix("# ") for line in sample_conf().splitlines())
    assert words.count("A change needs a restart.") == 13
