"""Files that decide what the agent does: who could change one, by whichever place on the way to it, stops the agent."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmagent.cli.configfile import check_files
from kvmagent.model.errors import AgentError, Code
from kvmagent.secretfiles import OpenToOthers, check_file, check_trusted, make_private_directory, owners_of, read_file

# Nobody's, whom no test runs as.
STRANGER = 4_000_000
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


def check(path: Path) -> None:
    check_trusted(path, owners_of())


def refusal(path: Path) -> str:
    with pytest.raises(OpenToOthers) as caught:
        check(path)
    return str(caught.value)


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    """A file of the operator's, two directories deep."""
    path = tmp_path / "etc/kvmagent/ca.pem"
    path.parent.mkdir(parents=True, mode=0o755)
    path.touch(mode=0o644)
    return path


def test_what_only_root_and_the_agent_can_change_is_trusted(anchor: Path) -> None:
    check(anchor)
    check(anchor.parent)
    check_file(str(anchor), "security.client_ca")


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH])
def test_a_place_that_others_can_write_is_named_with_what_closes_it(anchor: Path, depth: int, mode: int) -> None:
    place = (anchor, *anchor.parents)[depth]
    place.chmod(place.stat().st_mode | mode)
    assert f"{place} is writable by others" in refusal(anchor)
    with pytest.raises(AgentError) as caught:
        check_file(str(anchor), "security.client_ca")
    assert (caught.value.code, caught.value.remedy) == (Code.BAD_CONFIGURATION, f"chmod go-w {place}")
    os.system(caught.value.remedy)
    check(anchor)


@is_root
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_place_of_another_user_is_not_trusted_and_one_of_the_agent_s_is(anchor: Path, depth: int) -> None:
    place = (anchor, *anchor.parents)[depth]
    os.chown(place, STRANGER, -1)
    assert f"{place} belongs to user {STRANGER}, neither root nor the agent's user" in refusal(anchor)
    check_trusted(anchor, owners_of(STRANGER))


def test_a_directory_above_may_be_for_everybody_where_nobody_can_touch_what_is_another_s(anchor: Path) -> None:
    above = anchor.parent.parent
    above.chmod(0o1777)
    check(anchor)
    assert "writable by others" in refusal(above)


def make_chain(tmp_path: Path, links: int) -> tuple[Path, list[Path]]:
    """A file behind so many links, relative and absolute by turns, each in a directory of its own."""
    target = tmp_path / "real/file"
    target.parent.mkdir()
    target.touch(mode=0o644)
    places = [target.parent]
    for number in range(links):
        holder = tmp_path / f"holder{number}"
        holder.mkdir()
        link = holder / "link"
        link.symlink_to(target if number % 2 else os.path.relpath(target, holder))
        places.append(holder)
        target = link
    return target, places


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(links=st.integers(0, 6), data=st.data())
def test_every_directory_that_a_link_on_the_way_lies_in_counts(
    tmp_path_factory: pytest.TempPathFactory, links: int, data: st.DataObject
) -> None:
    path, places = make_chain(tmp_path_factory.mktemp("chain"), links)
    check(path)
    opened = data.draw(st.sampled_from(places))
    opened.chmod(0o777)
    assert f"{opened} is writable by others" in refusal(path)


@is_root
def test_a_link_that_another_user_put_into_a_directory_for_everybody_is_not_followed(
    anchor: Path, tmp_path: Path
) -> None:
    (room := tmp_path / "room").mkdir()
    room.chmod(0o1777)
    (link := room / "ca.pem").symlink_to(anchor)
    check(link)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    assert f"{link} belongs to user {STRANGER}" in refusal(link)


def test_a_link_in_the_middle_and_dots_lead_where_the_kernel_goes(anchor: Path, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to("etc/kvmagent")
    check(tmp_path / "short/ca.pem")
    check(tmp_path / "short/../kvmagent/ca.pem")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        check(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "absent")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path, _mode: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    make(tmp_path / "thing", 0o600)
    for look in (lambda path, key: check_file(path, key), read_file):
        with pytest.raises(AgentError, match=r"must be a file$|Is a directory$|writable by others"):
            look(str(tmp_path / "thing"), "security.client_ca")


def test_the_state_directory_is_made_private(tmp_path: Path) -> None:
    state = tmp_path / "lib/kvmagent"
    make_private_directory(state, "agent.state_dir")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    (state / "journal.sqlite").touch(mode=0o644)
    state.chmod(0o770)
    make_private_directory(state, "agent.state_dir")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / "journal.sqlite").stat().st_mode) == 0o600


def test_a_state_directory_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "lib"
    above.mkdir()
    above.chmod(0o777)
    with pytest.raises(AgentError, match=r"agent\.state_dir .*lib is writable by others"):
        make_private_directory(above / "kvmagent", "agent.state_dir")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(above / "kvmagent")
    with pytest.raises(AgentError, match="lib is writable by others"):
        make_private_directory(elsewhere, "agent.state_dir")


@is_root
@pytest.mark.parametrize("name", [".", "journal.sqlite", "link"])
def test_a_state_directory_with_something_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "journal.sqlite").touch(mode=0o600)
    (state / "link").symlink_to("journal.sqlite")
    os.chown(state / name, STRANGER, -1, follow_symlinks=False)
    with pytest.raises(AgentError, match=f"belongs to user {STRANGER}"):
        make_private_directory(state, "agent.state_dir")


@pytest.mark.parametrize("place", ["kvmagent.conf", "conf.d", "conf.d/10-site.conf"])
def test_every_file_of_the_configuration_and_where_more_could_be_put_is_trusted_or_refused(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "conf.d").mkdir(mode=0o755)
    for name in ("kvmagent.conf", "conf.d/10-site.conf"):
        (tmp_path / name).touch(mode=0o644)
    check_files(tmp_path / "kvmagent.conf")
    (tmp_path / place).chmod(0o777)
    with pytest.raises(AgentError) as caught:
        check_files(tmp_path / "kvmagent.conf")
    assert caught.value.code is Code.BAD_CONFIGURATION
    assert caught.value.remedy == f"chmod go-w {tmp_path / place}"
