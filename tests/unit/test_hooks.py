"""The operator's hooks: what they say counts before a task, and nothing of what they do harms the agent."""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kvmagent.model.command import Goal
from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.hooks import Hooks
from kvmagent.tasks.journal import Task
from tests.fakes.hooks import KEEP, HookDirectory
from tests.lab.processes import wait_for

TASK = Task(
    task_uuid="t1",
    command="HotPlugCpu",
    lane="vm1",
    request=b'{"vmUuid":"vm1","cpuNum":2}',
    callback_url="http://127.0.0.1/",
    client="127.0.0.1",
    caller="token:cloud",
)
GOAL = Goal()
REPLY = b'{"success":true}'
# Shows that it ran.
TOUCH = 'echo "{{}}" >> "{told}"'


@pytest.fixture
def directory(tmp_path: Path) -> HookDirectory:
    return HookDirectory(tmp_path)


def refusal(hooks: Hooks) -> str:
    with pytest.raises(AgentError) as caught:
        hooks.run_before(TASK, GOAL)
    assert caught.value.code is Code.REFUSED_BY_HOOK
    return caught.value.message


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or is a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_without_a_directory_nothing_is_run() -> None:
    hooks = Hooks()
    hooks.check()
    assert hooks.run_before(TASK, GOAL) is False
    hooks.run_after(TASK, REPLY)


def test_an_empty_directory_refuses_nothing(directory: HookDirectory) -> None:
    assert Hooks(str(directory.path)).run_before(TASK, GOAL) is False


def test_hooks_are_run_in_the_order_of_their_names_with_the_task_as_json(directory: HookDirectory) -> None:
    directory.write("before.d/20-b", 'echo b >> "{told}"')
    directory.write("before.d/10-a", KEEP)
    assert Hooks(str(directory.path)).run_before(TASK, GOAL) is True
    told, last = directory.lines()
    assert json.loads(told) == {
        "event": "before",
        "taskUuid": "t1",
        "command": "HotPlugCpu",
        "vm": "vm1",
        "caller": "token:cloud",
        "request": {"vmUuid": "vm1", "cpuNum": 2},
        "goal": json.loads(msgspec.json.encode(GOAL)),
    }
    assert last == "b"


def test_after_hooks_see_the_reply(directory: HookDirectory) -> None:
    directory.write("after.d/10-a", KEEP)
    Hooks(str(directory.path)).run_after(TASK, REPLY)
    (told,) = map(json.loads, directory.lines())
    assert (told["event"], told["reply"]) == ("after", {"success": True})


def test_a_refusal_is_told_by_the_hook_s_name_and_last_words_and_ends_the_row(directory: HookDirectory) -> None:
    directory.write("before.d/10-no", "echo looking", "printf 'not\\033 now\\n\\n' >&2", "exit 3")
    directory.write("before.d/20-never", TOUCH)
    assert refusal(Hooks(str(directory.path))) == "before.d/10-no: not? now"
    assert directory.lines() == []


@pytest.mark.parametrize(
    ("commands", "words"),
    [(["exit 3"], "exit status 3"), (["kill -TERM $$"], "ended by signal 15"), (["echo $(seq 999); exit 1"], "1 2 3")],
)
def test_a_hook_without_words_is_told_by_how_it_ended(
    directory: HookDirectory, commands: list[str], words: str
) -> None:
    directory.write("before.d/10-no", *commands)
    message = refusal(Hooks(str(directory.path)))
    assert message.startswith(f"before.d/10-no: {words}")
    assert len(message) < 250


def test_a_hook_that_hangs_is_killed_with_what_it_started(directory: HookDirectory) -> None:
    directory.write("before.d/10-hang", "sleep 1000 &", 'echo $! $$ > "{told}"', "wait")
    began = time.monotonic()
    assert refusal(Hooks(str(directory.path), timeout_s=1.0)) == ("before.d/10-hang: the hooks took longer than 1 s")
    assert time.monotonic() - began < 60
    for pid in directory.lines()[0].split():
        wait_for(lambda pid=pid: is_gone(int(pid)), timeout_s=5, what="the end of the hook's processes")


def test_what_a_hook_leaves_behind_holds_nobody_up_and_is_killed(directory: HookDirectory) -> None:
    directory.write("before.d/10-leave", "sleep 1000 &", 'echo $! > "{told}"')
    assert Hooks(str(directory.path), timeout_s=30.0).run_before(TASK, GOAL) is True
    wait_for(lambda: is_gone(int(directory.lines()[0])), timeout_s=5, what="the end of what it left")


def test_all_hooks_share_the_time(directory: HookDirectory) -> None:
    for name in ("10-a", "20-b", "30-c"):
        directory.write(f"before.d/{name}", "sleep 4")
    assert refusal(Hooks(str(directory.path), timeout_s=7.0)).startswith("before.d/20-b: the hooks took longer")


def test_output_without_end_is_read_and_its_end_kept(
    directory: HookDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write("before.d/10-noisy", "head -c 20000000 /dev/zero | tr '\\0' 'x'", "echo", "echo 'the end=1'")
    with caplog.at_level(logging.INFO):
        assert Hooks(str(directory.path), timeout_s=30.0).run_before(TASK, GOAL) is True
    (line,) = (record.getMessage() for record in caplog.records if "hook ran" in record.getMessage())
    assert "the end=1" in line
    assert len(line) < 1000
    assert "\n" not in line


def test_a_hook_that_does_not_read_a_large_task_holds_nobody_up(directory: HookDirectory) -> None:
    directory.write("before.d/10-deaf", "exit 0")
    directory.write("before.d/20-count", 'wc -c >> "{told}"')
    hooks = Hooks(str(directory.path))
    request = json.dumps({"vmUuid": "x" * 1_000_000}).encode()
    assert hooks.run_before(msgspec.structs.replace(TASK, request=request), GOAL) is True
    assert int(directory.lines()[0]) > len(request)


def test_a_hook_has_a_fixed_environment_and_no_file_of_the_agent(
    directory: HookDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMAGENT_SECRET", "1")
    directory.write("before.d/10-env", '/usr/bin/env > "{told}"', 'ls /proc/$$/fd >> "{told}"', 'pwd >> "{told}"')
    with open(directory.path.parent / "secret", "w") as secret:
        descriptor = fcntl.fcntl(secret, fcntl.F_DUPFD, 100)
        Hooks(str(directory.path)).run_before(TASK, GOAL)
        os.close(descriptor)
    lines = directory.lines()
    # The others are the shell's own.
    names = {line.partition("=")[0] for line in lines if "=" in line} - {"PWD", "SHLVL", "OLDPWD", "_"}
    assert names == {"PATH", "LANG"}
    assert {"0", "1", "2"} <= set(lines)
    assert str(descriptor) not in lines
    assert lines[-1] == "/"


@pytest.mark.parametrize("name", ["10-a.bak", "README.md", ".hidden", "10-a~"])
def test_copies_that_editors_and_package_managers_make_are_not_run(directory: HookDirectory, name: str) -> None:
    directory.write(f"before.d/{name}", "exit 1")
    assert Hooks(str(directory.path)).run_before(TASK, GOAL) is False


def test_a_file_that_is_not_executable_is_no_hook(directory: HookDirectory) -> None:
    directory.write("before.d/10-off", "exit 1", mode=0o644)
    hooks = Hooks(str(directory.path))
    hooks.check()
    assert hooks.run_before(TASK, GOAL) is False


def test_a_hook_that_cannot_be_executed_refuses(directory: HookDirectory) -> None:
    directory.write("before.d/10-bad").write_text("#!/no/such/interpreter\n")
    assert refusal(Hooks(str(directory.path))).startswith("before.d/10-bad: ")


def write_for_others(directory: HookDirectory) -> None:
    (directory.path / "before.d/10-a").chmod(0o757)


def write_for_the_group(directory: HookDirectory) -> None:
    (directory.path / "before.d").chmod(0o775)


def write_above(directory: HookDirectory) -> None:
    directory.path.parent.chmod(0o777)


def give_away(directory: HookDirectory) -> None:
    os.chown(directory.path, 12345, -1)


def link_to_what_others_write(directory: HookDirectory) -> None:
    target = directory.write("others/a", "exit 0", mode=0o777)
    (directory.path / "before.d/20-link").symlink_to(target)


def link_to_nothing(directory: HookDirectory) -> None:
    (directory.path / "before.d/20-link").symlink_to("/no/such/file")


@pytest.mark.parametrize(
    "spoil",
    [
        write_for_others,
        write_for_the_group,
        write_above,
        pytest.param(give_away, marks=pytest.mark.slow),
        link_to_what_others_write,
        link_to_nothing,
    ],
)
def test_what_others_can_change_stops_the_start_and_is_not_run_later(
    directory: HookDirectory, spoil: Callable[[HookDirectory], None], caplog: pytest.LogCaptureFixture
) -> None:
    directory.write("before.d/10-a", TOUCH)
    directory.write("after.d/10-a", TOUCH)
    hooks = Hooks(str(directory.path))
    hooks.check()
    spoil(directory)
    with pytest.raises(AgentError) as caught:
        hooks.check()
    assert caught.value.code is Code.BAD_CONFIGURATION
    assert "hooks.directory" in caught.value.message
    assert refusal(hooks).startswith("hooks.directory: ")
    assert directory.lines() == []


@pytest.mark.parametrize("path", ["hooks", "/no/such/directory"])
def test_a_directory_that_is_none_stops_the_start(path: str) -> None:
    with pytest.raises(AgentError) as caught:
        Hooks(path).check()
    assert caught.value.code is Code.BAD_CONFIGURATION


def test_a_failure_after_the_reply_is_a_warning_and_the_next_hook_is_run(
    directory: HookDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write("after.d/10-fail", "echo oh; exit 1")
    directory.write("after.d/20-next", KEEP)
    with caplog.at_level(logging.INFO):
        Hooks(str(directory.path)).run_after(TASK, REPLY)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.startswith("hook failed hook=after.d/10-fail")
    assert len(directory.lines()) == 1


def test_a_stop_kills_what_runs_and_refuses_nothing_in_its_name(directory: HookDirectory) -> None:
    directory.write("before.d/10-long", 'echo $$ > "{told}"', "sleep 1000")
    hooks, caught = Hooks(str(directory.path), timeout_s=300.0), []

    def ask() -> None:
        try:
            hooks.run_before(TASK, GOAL)
        except AgentError as error:
            caught.append(error.code)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(directory.lines, timeout_s=10, what="the hook to run")
    hooks.stop()
    thread.join(10)
    assert caught == [Code.STOPPING]
    assert is_gone(int(directory.lines()[0]))
    with pytest.raises(AgentError, match="stopped"):
        hooks.run_before(TASK, GOAL)


def test_many_runs_leave_no_descriptor_and_no_process(directory: HookDirectory) -> None:
    directory.write("before.d/10-a", "exit 0")
    hooks = Hooks(str(directory.path))
    hooks.run_before(TASK, GOAL)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        hooks.run_before(TASK, GOAL)
    assert len(os.listdir("/proc/self/fd")) == before
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert not [pid for pid in children if is_gone(int(pid))]


def test_a_hook_that_others_can_change_since_the_one_before_it_ran_is_not_run(directory: HookDirectory) -> None:
    second = directory.write("before.d/20-b", TOUCH)
    directory.write("before.d/10-a", f"chmod 0777 {second}")
    assert "writable by others" in refusal(Hooks(str(directory.path)))
    assert not directory.lines()
