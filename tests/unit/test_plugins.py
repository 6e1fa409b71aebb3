import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

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
        assert done.returncode == 1
        assert words in done.stderr
        assert "remedy: " in done.stderr
        assert "Traceback" not in done.stderr
