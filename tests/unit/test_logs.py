"""Log lines: fields that stay fields, lines that nobody can forge, and a file that is turned over under the writer."""

import ast
import contextlib
import fcntl
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmagent.logs import RESERVED, Log, LogOutput, Outlet, format_fields, log_context
from kvmagent.model.errors import AgentError
from kvmagent.settings import LogSection
from tests.lab.processes import wait_for

ROOT = Path(__file__).parents[2]
LOGROTATE_CONF = ROOT / "conf/logrotate.d/kvmagent"
OF_TASK = {"task": "9f1c", "vm": "db 7", "command": "HotPlugCpu", "caller": "token:zstack"}
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) ")

log = Log("kvmagent.test")


@pytest.fixture(autouse=True)
def output() -> Iterator[LogOutput]:
    """This process's log, put back in the end."""
    root = logging.getLogger()
    former = root.handlers, root.level, sys.excepthook, threading.excepthook
    output = LogOutput()
    yield output
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level, sys.excepthook, threading.excepthook = former
    os.close(output.dump_fd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the log goes."""
    return tmp_path / "kvmagent.log"


def section(file: Path, level: str = "info", format: str = "text") -> LogSection:
    return LogSection(file=str(file), level=level, format=format)  # type: ignore[arg-type]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_text_has_the_fields_and_then_the_task_s(output: LogOutput, file: Path) -> None:
    output.open(section(file))
    with log_context(**OF_TASK):
        log.info("step", step="SetVcpus", ms=8.0, problem=None, recovered=True, empty="")
    (line,) = lines(file)
    stamp, _, rest = line.partition(" INFO ")
    assert STAMP.match(f"{stamp} INFO ")
    assert rest == (
        'step step=SetVcpus ms=8.0 recovered=true empty="" task=9f1c vm="db 7" command=HotPlugCpu caller=token:zstack'
    )


def test_json_has_each_field_under_its_name_and_as_what_it_is(output: LogOutput, file: Path) -> None:
    output.open(section(file, format="json"))
    with log_context(**OF_TASK):
        log.info("step", step="SetVcpus", ms=8.0, problem=None, attempts=2, path=file)
    (line,) = lines(file)
    told = json.loads(line)
    assert told.pop("time")
    assert told == {
        "level": "info",
        "logger": "kvmagent.test",
        "message": "step",
        "step": "SetVcpus",
        "ms": 8.0,
        "attempts": 2,
        "path": str(file),
        **OF_TASK,
    }


class Wordless:
    """Has no words of its own."""


def test_no_field_is_the_repr_of_an_object(output: LogOutput, file: Path) -> None:
    output.open(section(file))
    log.info("it", one=Wordless(), many=["a", Wordless()], fields={"vm": "db-7", "at": {3}}, error=KeyError("vm"))
    output.open(section(file, format="json"))
    log.info("it", one=Wordless(), many=["a", Wordless()])
    text, as_json = lines(file)
    assert """one=Wordless many="[\\"a\\", \\"Wordless\\"]" """ in text
    assert """fields="{\\"vm\\": \\"db-7\\", \\"at\\": [3]}" """ in text
    assert json.loads(as_json)["one"] == "Wordless"
    assert "0x" not in text + as_json


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_library_s_line_on_the_task_s_thread_is_the_task_s(output: LogOutput, file: Path, format: str) -> None:
    output.open(section(file, format=format))
    with log_context(**OF_TASK):
        logging.getLogger("urllib3.connectionpool").warning("Pool is full, host: %s task=none", "x")
    (line,) = lines(file)
    if format == "json":
        told = json.loads(line)
        assert (told["logger"], told["message"]) == ("urllib3.connectionpool", "Pool is full, host: x task=none")
        assert OF_TASK.items() <= told.items()
    else:
        assert f'urllib3.connectionpool message="Pool is full, host: x task=none" {format_fields(**OF_TASK)}' in line


def test_a_library_prints_no_query_of_a_url(output: LogOutput, file: Path) -> None:
    output.open(section(file))
    logging.getLogger("urllib3").warning("Failed to parse headers (url=%s)", "http://server/done?key=s3cr3t")
    assert "s3cr3t" not in file.read_text()


@given(st.text())
def test_no_value_passes_for_two_fields_or_two_lines(value: str) -> None:
    told = format_fields(vm=value, task="t")
    assert len(told.splitlines()) == 1
    assert told.isprintable()
    quoted = told.removeprefix("vm=").removesuffix(" task=t")
    assert (json.loads(quoted) if quoted.startswith('"') else quoted) == value
    assert quoted.startswith('"') or not re.search(r'[\s"=]', quoted)


@pytest.mark.parametrize("format", ["text", "json"])
def test_each_line_is_the_agent_s_own_whatever_stands_in_an_error(output: LogOutput, file: Path, format: str) -> None:
    forged = "2026-01-01T00:00:00.000Z INFO audit event=accepted caller=root"
    output.open(section(file, format=format))
    with log_context(**OF_TASK):
        try:
            raise ValueError(f"first\n{forged}\r\u2028{forged}\x1b[2K")
        except ValueError as error:
            log.failure("task failed", error, error_code="X", words=f"\n{forged}")
            logging.getLogger("lib").error("so\n%s", forged, exc_info=error)
    for line in lines(file):
        assert forged not in line or not line.startswith(forged)
        assert line.isprintable()
        if format == "text":
            assert STAMP.match(line)
            assert line.endswith(format_fields(**OF_TASK))
        else:
            assert OF_TASK.items() <= json.loads(line).items()
            assert "Traceback" in json.loads(line)["traceback"]


def test_what_a_lone_surrogate_is_in_is_written(output: LogOutput, file: Path) -> None:
    output.open(section(file))
    log.info("vm event", vm="vm\udc80")
    logging.getLogger("lib").warning("vm\udc80")
    assert len(lines(file)) == 2


def test_the_level_and_the_form_change_at_run_time(output: LogOutput, file: Path) -> None:
    output.open(section(file, level="warning"))
    log.info("unseen")
    output.open(section(file, level="debug", format="json"))
    log.debug("seen")
    assert [json.loads(line)["message"] for line in lines(file)] == ["seen"]


def test_what_nobody_may_turn_off_is_written_at_any_level(output: LogOutput, file: Path) -> None:
    output.open(section(file, level="error"))
    log.info("unseen")
    Log("kvmagent.test.always", always=True).info("seen")
    assert [line.rpartition(" ")[2] for line in lines(file)] == ["seen"]


def test_a_file_that_cannot_be_opened_leaves_what_was_in_force(output: LogOutput, file: Path, tmp_path: Path) -> None:
    output.open(section(file))
    with pytest.raises(AgentError, match=r"log\.file"):
        output.open(section(tmp_path / "nowhere" / "kvmagent.log"))
    log.info("goes on")
    assert lines(file)[0].endswith("goes on")


def test_what_the_file_does_not_take_goes_to_standard_error_and_nobody_fails(
    output: LogOutput, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    output.open(section(directory / "kvmagent.log"))
    directory.rename(tmp_path / "moved")
    log.info("written nevertheless", n=1)
    output.open(section(Path("/dev/full")))
    log.info("written nevertheless", n=2)
    told = capfd.readouterr().err
    assert "written nevertheless n=1" in told
    assert "written nevertheless n=2" in told
    assert "Traceback" not in told


@given(st.lists(st.integers(-12_000, 9_000), max_size=40))
def test_a_reader_that_is_stuck_holds_nobody_up_and_learns_how_many_lines_it_missed(script: list[int]) -> None:
    """A number: a line of that size; a negative one: the reader takes so many bytes."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    outlet, got, count = Outlet(writer, patience_s=0.001), b"", 0

    def take(size: int) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, size)
        return b""

    def write(size: int) -> None:
        nonlocal count
        outlet.write(f"{count} {'x' * size}\n", lambda lost: f"{lost} lost\n")
        count += 1

    for one in script:
        if one < 0:
            got += take(-one)
        else:
            write(one)
    # What has begun is written on with the next line.
    while not got.endswith(b" \n"):
        while piece := take(2**16):
            got += piece
        write(0)
        got += take(2**16)
    os.close(reader)
    outlet.write("nobody reads this\n", str)
    os.close(writer)
    expected = 0
    for line in got.decode().splitlines():
        number, words = line.split(" ")
        if words == "lost":
            expected += int(number)
        else:
            assert (int(number), words.strip("x")) == (expected, "")
            expected += 1
    assert expected == count


def test_a_line_that_is_logged_while_another_is_written_waits_for_no_lock() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    outlet = Outlet(writer, patience_s=0.001)
    while outlet.lost == 0:
        outlet.write("x" * 4095 + "\n", str)
    os.read(reader, 2**20)

    def tell_lost(count: int) -> str:
        outlet.write("from a finalizer\n", lambda lost: "")
        return f"{count} lost\n"

    thread = threading.Thread(target=outlet.write, args=("line\n", tell_lost), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert os.read(reader, 2**20) == b"from a finalizer\n1 lost\nline\n"
    os.close(reader)
    os.close(writer)


def test_an_agent_whose_log_nobody_reads_goes_on(output: LogOutput) -> None:
    script = (
        "from kvmagent.logs import *; from kvmagent.settings import LogSection; LogOutput().open(LogSection())\n"
        "log = Log('x')\nfor n in range(3000): log.info('line', n=n, words='x' * 100)\nprint('done', flush=True)\n"
        "input()\nwith log_context(task='t'): log.info('and on')"
    )
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "done\n"
        shown: list[str] = []
        thread = threading.Thread(target=lambda: shown.extend(child.stderr))
        thread.start()
        is_read = select.poll()
        is_read.register(child.stderr, select.POLLIN)
        wait_for(lambda: shown and not is_read.poll(0), timeout_s=60, what="the log to be read")
        child.stdin.write("\n")
        child.stdin.flush()
        child.wait(60)
        thread.join()
    assert "task=t" in shown[-1]
    lost = re.search(r"WARNING log lines were lost count=(\d+)$", shown[-2])
    assert lost
    assert len(shown) - 2 + int(lost[1]) == 3000


def test_an_error_that_nobody_caught_is_a_line(output: LogOutput, file: Path) -> None:
    output.open(section(file))
    thread = threading.Thread(target=lambda: 1 / 0, name="lane-7")
    thread.start()
    thread.join()
    assert "thread=lane-7" in lines(file)[0]
    assert "ZeroDivisionError" in lines(file)[-1]


def test_only_the_journal_is_told_priorities(tmp_path: Path) -> None:
    script = (
        "from kvmagent.logs import *; from kvmagent.settings import LogSection; LogOutput().open(LogSection())\n"
        "log = Log('x'); log.info('a'); log.warning('b'); log.error('c'); log.failure('d', ValueError('e'))"
    )
    for is_journal in (True, False):
        written = tmp_path / f"stderr-{is_journal}"
        with written.open("wb") as stderr:
            found = os.fstat(stderr.fileno())
            stream = f"{found.st_dev}:{found.st_ino + (not is_journal)}"
            environment = {**os.environ, "JOURNAL_STREAM": stream}
            subprocess.run([sys.executable, "-c", script], stderr=stderr, env=environment, check=True, timeout=60)
        starts = [re.match(r"(<\d>)?\d{4}-", line) for line in lines(written)]
        priorities = [start and start[1] for start in starts]
        assert priorities == (["<6>", "<4>", "<3>", "<3>", "<3>"] if is_journal else [None] * 5)


@pytest.mark.slow
class TestTurnedOver:
    """By the real logrotate, as root, while threads write as fast as they can."""

    THREADS, TURNS = 4, 6

    @pytest.mark.parametrize("how", ["nocreate", "create 0600 root root"])
    def test_no_line_is_lost(self, output: LogOutput, file: Path, how: str) -> None:
        output.open(section(file))
        stop, written = threading.Event(), [0] * self.THREADS

        def write(thread: int) -> None:
            while not stop.is_set():
                log.info("line", thread=thread, n=written[thread])
                written[thread] += 1

        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(self.THREADS)]
        for one in threads:
            one.start()
        for _ in range(self.TURNS):
            so_far = sum(written)
            wait_for(lambda so_far=so_far: sum(written) > so_far + 100, timeout_s=20, what="lines")  # type: ignore[misc]
            turn_over(file, how)
        stop.set()
        for one in threads:
            one.join()
        log.info("last")
        files = sorted(file.parent.glob("kvmagent.log*"))
        found = [line for one in files for line in lines(one) if " line thread=" in line]
        assert len(files) > self.TURNS
        for thread in range(self.THREADS):
            told = sorted(int(line.rpartition("n=")[2]) for line in found if f"thread={thread} " in line)
            assert told == list(range(written[thread]))
        assert {one.stat().st_mode & 0o777 for one in files} == {0o600}

    def test_a_file_that_is_copied_and_truncated_is_gone_on_with_at_its_beginning(
        self, output: LogOutput, file: Path
    ) -> None:
        output.open(section(file))
        for n in range(3):
            log.info("line", n=n)
            turn_over(file, "copytruncate")
            assert file.read_bytes() == b""
        log.info("line", n=3)
        (line,) = lines(file)
        assert line.endswith("n=3")
        assert sorted(one.read_text()[-2:-1] for one in file.parent.glob("kvmagent.log.*")) == ["0", "1", "2"]

    def test_a_dump_follows_to_the_new_file(self, output: LogOutput, file: Path) -> None:
        output.open(section(file))
        file.rename(file.with_suffix(".1"))
        output.follow()
        os.write(output.dump_fd, b"stacks\n")
        assert file.read_text() == "stacks\n"
        output.open(LogSection())
        assert os.fstat(output.dump_fd).st_ino == os.fstat(2).st_ino


def turn_over(file: Path, how: str) -> None:
    """Run logrotate with the configuration that is shipped, for this file and user."""
    text = LOGROTATE_CONF.read_text()
    assert "/var/log/kvmagent/*.log" in text
    # A file is compressed after its last line only, which delaycompress takes to be there at the next turn.
    for old, new in (
        ("/var/log/kvmagent/*.log", str(file)),
        ("su kvmagent kvmagent", "su root root"),
        ("    nocreate", f"    {how}"),
        ("    compress", "    nocompress"),
        ("    delaycompress", ""),
    ):
        text = text.replace(old, new)
    conf = file.parent / "logrotate.conf"
    conf.write_text(text)
    conf.chmod(0o644)
    command = ["/usr/sbin/logrotate", "--force", "--state", str(file.parent / "state"), str(conf)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in (ROOT / "kvmagent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and isinstance(node.func.value, ast.Name) and node.func.value.id == "log":  # type: ignore[attr-defined]
                yield f"{path.name}:{node.lineno}", node  # type: ignore[attr-defined, misc]


def test_each_line_of_the_agent_has_fixed_words_and_fields_of_its_own() -> None:
    """What differs from line to line is a field: only then can the lines of one kind be counted and found."""
    found = list(calls())
    assert len(found) > 60
    for where, call in found:
        assert isinstance(call.func, ast.Attribute)
        words = call.args[call.func.attr == "write"]
        assert isinstance(words, ast.Constant), where
        assert re.fullmatch(r"[A-Za-z ,']+", words.value), where  # type: ignore[arg-type]
        assert not RESERVED & {keyword.arg for keyword in call.keywords}, where


def test_only_the_log_s_own_modules_write_without_fields() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kvmagent").rglob("*.py")
        if re.search(r"^(import|from) logging", path.read_text(), re.MULTILINE)
    }
    assert users == {"kvmagent/logs.py", "kvmagent/api/listener.py"}
