"""The benchmark's machinery on a tiny load: that it measures what it says. How fast anything is, is not its matter."""

import json
from pathlib import Path

import pytest

from tests.bench.load import Receiver
from tests.bench.measures import Runs, config_changes, growing, ready
from tests.bench.profile import summarize
from tests.bench.report import Report
from tests.bench.sections import owe
from tests.bench.subject import cpu_s, domain_name, rss_mib, start_agent, write_node


def test_every_command_has_its_answer_its_callback_and_says_what_was_measured(tmp_path: Path) -> None:
    with start_agent(write_node(tmp_path, 3)) as agent:
        runs = Runs(agent)
        result, cpu_ms = runs(growing(3, 9), clients=2, outcome="plugged")
        assert all(0 < answer < 10_000 and 0 < callback < 10_000 for answer, callback in _times(result))
        assert len(result.callback_ms) == 9
        assert cpu_ms > 0
        assert rss_mib(agent.pid) > 10
        changes, _ = runs(config_changes([domain_name(n) for n in range(3)], 6), clients=3)
        assert sum(changes.outcomes.values()) == 6
        with pytest.raises(RuntimeError, match="should all say 'plugged'"):
            runs([ready(domain_name(0))], clients=1, outcome="plugged")
    with pytest.raises(ValueError, match="take 93 plugs"):
        growing(3, 94)


def test_what_is_owed_is_taken_and_timed(tmp_path: Path) -> None:
    agent, receiver = start_agent(write_node(tmp_path, 1)), Receiver()
    try:
        owe(agent.directory / "state/journal.sqlite", receiver.url, 20)
        agent.start()
        assert receiver.take(20) > 0
        assert cpu_s(agent.pid) > 0
    finally:
        agent.remove()


def test_a_row_has_its_ratio_and_whether_its_target_is_reached(tmp_path: Path) -> None:
    report = Report()
    report.begin("part")
    report.add("fast", 2.0, "ms", at_most=4.0)
    report.add("many", 300.0, "/s", at_least=400.0)
    report.add("told", 7.0, "ms")
    report.write(tmp_path / "out" / "bench.json")
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["ratio"], row["reached"]) for row in rows] == [(0.5, True), (0.75, False), (None, None)]
    assert "1 of 2 targets reached" in report.format_targets()


def test_a_profile_names_what_most_samples_are_below() -> None:
    summary = summarize("run (a.py:1);work (a.py:2) 30\nrun (a.py:1);rest (a.py:3) 10\n")
    assert summary.splitlines()[1:3] == ["100.0%   0.0%  run (a.py:1)", " 75.0%  75.0%  work (a.py:2)"]


def _times(result: object) -> list[tuple[float, float]]:
    return list(zip(result.answer_ms, result.callback_ms, strict=True))  # type: ignore[attr-defined]
