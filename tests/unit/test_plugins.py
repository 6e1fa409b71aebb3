import dataclasses
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from kvmagent.model.errors import AgentError, Code
from kvmagent.plugins import load_plugins


def test_loads_what_is_listed_in_order() -> None:
    plugin, other = load_plugins(("vm", "host"))
    assert (plugin.name, other.name) == ("vm", "host")
    assert {"HotPlugCpu", "HotPlugMemory", "ReadyForHotplug"} <= {command.name for command in plugin.commands}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module:PLUGIN", "No module named 'no_such_module'"),
        ("kvmagent.model.units:KIB", "is a int, not a Plugin"),
        ("kvmagent.model.units:NOTHING", "NOTHING"),
    ],
)
def test_a_plugin_that_cannot_be_had_stops_the_start_with_its_name_and_cause(
    target: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint(name="broken", value=target, group="kvmagent.plugins")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    with pytest.raises(AgentError) as caught:
        load_plugins(("broken",))
    assert caught.value.code is Code.BAD_CONFIGURATION
    assert "'broken'" in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("wrong", [{"observe_guest": {"cpu"}}, {"observe_first": {"budgets"}}])
def test_a_part_that_cannot_be_observed_is_an_error_and_no_silence(wrong: dict[str, set[str]]) -> None:
    (plugin,) = load_plugins(("vm",))
    declared: Any = {name: frozenset(parts) for name, parts in wrong.items()}
    with pytest.raises(ValueError, match=r"observes \['(cpu|budgets)'\]; what can be observed: 'cpus', 'memory'"):
        dataclasses.replace(plugin.commands[0], **declared)


def test_the_command_line_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    conf = tmp_path / "kvmagent.conf"
    conf.write_text("[agent]\nplugins = nope\n")
    for arguments, words in (
        (["--config", str(conf)], "no plugin 'nope' is installed; installed: host, vm"),
        (["--config", str(tmp_path / "absent")], "No such file"),
        (["--config", str(conf), "--set", "http.host=0.0.0.0"], "not loopback"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kvmagent.cli.daemon", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == os.EX_CONFIG
        assert words in done.stderr
        assert "remedy: " in done.stderr
        assert "Traceback" not in done.stderr


def test_what_a_plugin_declares_can_be_decoded_by_many_threads_at_once() -> None:
    """A fresh process each time: msgspec crashes it only where no thread has used the shape before."""
    for _ in range(5):
        found = subprocess.run([sys.executable, "-c", DECODE_AT_ONCE], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr


DECODE_AT_ONCE = """
import sys, threading, msgspec
from kvmagent.plugins import load_plugins
from kvmagent.tasks.journal import StepRecord
from kvmagent.tasks.run import read_facts, read_report

def at_once(decode, times=8):
    def wait_and_decode():
        barrier.wait()
        try:
            decode()
        except msgspec.ValidationError:
            pass
    barrier = threading.Barrier(times)
    threads = [threading.Thread(target=wait_and_decode) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

plugins = load_plugins(("vm", "host"))
sys.setswitchinterval(1e-6)
for plugin in plugins:
    for shape in [one.request for one in (*plugin.commands, *plugin.queries)] + [one.goal for one in plugin.commands]:
        at_once(lambda: msgspec.json.decode(b'{"vmUuid": "vm1", "cpuNum": 2}', type=shape))
at_once(lambda: read_report(StepRecord(b'{"type": "SetVcpus"}', 0.0, None, '{"code": 1}')))
at_once(lambda: read_facts(b'{"domain": {}}'))
"""
