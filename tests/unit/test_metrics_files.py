"""What operators load into Prometheus and Grafana names metrics that exist, and alerts when it should."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from kvmagent.api.metrics.events import Metrics
from kvmagent.api.metrics.table import METRICS
from kvmagent.model.command import ANY_TASK
from kvmagent.model.errors import Code
from kvmagent.model.reply import Outcome
from kvmagent.plugins import load_plugins
from kvmagent.tasks.journal import SETTLED
from tests.lab.promtool import find_promtool

ROOT = Path(__file__).parents[2]
RULES = ROOT / "conf/prometheus/kvmagent.rules.yml"
RULE_TESTS = ROOT / "conf/prometheus/kvmagent.rules.test.yml"
DASHBOARD = ROOT / "conf/grafana/kvmagent.json"
DOCUMENT = ROOT / "docs/metrics.md"
# What every Python program exports, and what Prometheus makes of each target.
OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds"}


@pytest.fixture(scope="module")
def rules() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}


def exported() -> set[str]:
    """All names that a query may ask for."""
    names = {metric.exported for metric in METRICS.values()}
    parts = ("_bucket", "_sum", "_count")
    histograms = {metric.name for metric in METRICS.values() if metric.type == "histogram"}
    return names - histograms | {name + part for name in histograms for part in parts}


def panels(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in found:
        yield panel
        yield from panels(panel.get("panels", []))


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:kvmagent|process|python)_[a-z0-9_]+|\bup\b", re.sub(r'"[^"]*"', "", query)))


def promtool(*arguments: str, directory: Path = ROOT, text: str | None = None) -> str:
    command = [str(find_promtool()), *arguments]
    done = subprocess.run(command, cwd=directory, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_are_rules() -> None:
    promtool("check", "rules", str(RULES))


def test_each_rule_fires_when_it_should_and_not_before() -> None:
    """By the command that stands in the file, as whoever has the package runs it."""
    command = "\n".join(re.findall(r"^#   (.+)$", RULE_TESTS.read_text(), re.MULTILINE))
    path = f"{find_promtool().parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", "-ec", command], cwd=RULE_TESTS.parent, env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_each_rule_is_seen_to_fire_and_seen_not_to(rules: dict[str, dict[str, Any]]) -> None:
    tests = [one for group in yaml.safe_load(RULE_TESTS.read_text())["tests"] for one in group["alert_rule_test"]]
    assert {one["alertname"] for one in tests if one["exp_alerts"]} == rules.keys()
    assert {one["alertname"] for one in tests if not one["exp_alerts"]} == rules.keys()


def happen_given_up(metrics: Metrics) -> None:
    metrics.settled("HotPlugCpu", "given_up", 86400.0)


def happen_refused(metrics: Metrics) -> None:
    metrics.ended("HotPlugCpu", "refused", Code.CPU_ABOVE_MAXIMUM)


def happen_unanswered(metrics: Metrics) -> None:
    metrics.guest_called(Code.GUEST_AGENT_UNRESPONSIVE)


def happen_slow_commit(metrics: Metrics) -> None:
    metrics.committed(2.0, 1)


HAPPENS: dict[str, Callable[[Metrics], None]] = {
    "KvmagentCallbacksGivenUp": happen_given_up,
    "KvmagentCommandsFail": happen_refused,
    "KvmagentGuestAgentsFail": happen_unanswered,
    "KvmagentJournalSlow": happen_slow_commit,
}


@pytest.fixture(scope="module")
def told() -> Callable[[Callable[[Metrics], None]], list[dict[str, str]]]:
    """What an agent exports at its start, after what happens, and after it happened twice more: three lives."""
    plugins = load_plugins(("vm", "host"))
    declared = [one for plugin in plugins for one in (*plugin.commands, *plugin.queries)]

    def tell(happen: Callable[[Metrics], None]) -> list[dict[str, str]]:
        metrics = Metrics()
        metrics.declare(declared)
        scrapes = []
        for _ in range(4):
            scrapes.append(dict(re.findall(r"^(kvmagent_\w+\S*) (\S+)$", metrics.render().decode(), re.MULTILINE)))
            happen(metrics)
        return scrapes

    return tell


def test_each_rule_on_a_counter_is_known_here(rules: dict[str, dict[str, Any]]) -> None:
    counted = {name for name, rule in rules.items() if re.search(r"_total\b|_bucket\b", rule["expr"])}
    assert counted == HAPPENS.keys()


@pytest.mark.parametrize("name", HAPPENS)
def test_the_first_occurrence_fires_and_so_does_one_in_twenty_minutes(
    name: str, rules: dict[str, dict[str, Any]], told: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    """Of the very series that an agent exports: one that begins with its first event shows no increase."""
    scrapes = told(HAPPENS[name])
    # Nothing for an hour, then an event in twenty minutes, then nothing for two hours.
    lived = list(zip(scrapes, (60, 20, 20, 120), strict=True))
    asked = names_in(rules[name]["expr"])
    series = [
        {
            "series": one.replace("{", '{instance="n1",') if "{" in one else f'{one}{{instance="n1"}}',
            "values": " ".join(f"{scrape.get(one, '_')}x{minutes - 1}" for scrape, minutes in lived),
        }
        for one in scrapes[-1]
        if one.partition("{")[0] in asked
    ]
    labels = {"alertname": name, "alertstate": "firing", "instance": "n1", **rules[name]["labels"]}
    labels |= {"result": "given_up"} if name == "KvmagentCallbacksGivenUp" else {}
    firing = "ALERTS{" + ", ".join(f'{label}="{value}"' for label, value in labels.items()) + "}"
    expected = {"59m": False, "70m": True, "85m": True, "99m": True, "110m": True, "219m": False}
    test = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertname="{name}", alertstate="firing"}}',
                "eval_time": at,
                "exp_samples": [{"labels": firing, "value": 1}] if fires else [],
            }
            for at, fires in expected.items()
        ],
    }
    (tmp_path / RULES.name).write_text(RULES.read_text())
    whole = {"rule_files": [RULES.name], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "first.yml").write_text(yaml.safe_dump(whole, width=10**6))
    promtool("test", "rules", "first.yml", directory=tmp_path)


def test_no_known_event_begins_a_series(told: Callable[..., list[dict[str, str]]]) -> None:
    """All outcomes of all commands, all refusals that are declared, all ends of callbacks."""
    plugins = load_plugins(("vm", "host"))

    def all_of_it(metrics: Metrics) -> None:
        for plugin in plugins:
            for command in plugin.commands:
                for outcome in get_args(Outcome):
                    for code in (None, *command.refusals, *ANY_TASK):
                        metrics.ended(command.name, outcome, code)
            for query in plugin.queries:
                for code in (None, *ANY_TASK):
                    metrics.ended(query.name, "refused" if code else "answered", code)
        for code in Code:
            metrics.refused(code)
        for state in SETTLED:
            metrics.settled("HotPlugCpu", state, 1.0)
        metrics.callback_failed()
        metrics.committed(0.001, 3)

    scrapes = told(all_of_it)
    # A histogram's series by phase begin with its first time: nothing alerts on them.
    begun = {one for one in scrapes[-1].keys() - scrapes[0].keys() if not one.startswith("kvmagent_phase_seconds")}
    assert not begun


def test_each_rule_says_how_bad_it_is_and_what_to_do(rules: dict[str, dict[str, Any]]) -> None:
    for name, rule in rules.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert len(rule["annotations"]["runbook"]) > 80, name
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"], name


def test_each_rule_and_panel_asks_for_metrics_that_exist(rules: dict[str, dict[str, Any]]) -> None:
    queries = {name: rule["expr"] for name, rule in rules.items()}
    for panel in panels(json.loads(DASHBOARD.read_text())["panels"]):
        for target in panel.get("targets", []):
            queries[f"{panel['title']} {target['refId']}"] = target["expr"]
    assert len(queries) > len(rules) + 15
    for name, query in queries.items():
        assert names_in(query), name
        assert names_in(query) <= exported() | OTHERS, name


def test_each_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    """As a rule, for promtool checks those; Grafana's variables are put in first."""
    found = panels(json.loads(DASHBOARD.read_text())["panels"])
    queries = [target["expr"] for panel in found for target in panel.get("targets", [])]
    filled = [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in queries]
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(filled)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", str(file))


def test_each_panel_has_a_place_of_its_own() -> None:
    found = list(panels(json.loads(DASHBOARD.read_text())["panels"]))
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        (x, y)
        for panel in found
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


def test_each_number_of_a_vm_is_on_the_dashboard() -> None:
    text = DASHBOARD.read_text()
    missing = {name for name in METRICS if name.startswith("kvmagent_vm_") and name not in text}
    assert not missing


def test_the_document_is_made_from_the_table() -> None:
    page = [sys.executable, str(ROOT / "docs/metrics_page.py")]
    made = subprocess.run(page, capture_output=True, text=True, check=True, timeout=60).stdout
    assert DOCUMENT.read_text() == made, "python docs/metrics_page.py > docs/metrics.md"
