"""The recording rules sum what hosts export, by host and over all of them; each record is seen with its value."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_metrics_files import OTHERS, ROOT, RULES, exported, names_in, promtool

RECORDING = ROOT / "conf/prometheus/kvmagent.recording.yml"
# What two hosts of a job export, five minutes long: of each metric its labels, and its value on the one and the other.
# A counter's is what it grows by in a second.
HOSTS = (
    ("up", "", 1, 0),
    ("kvmagent_build_info", 'version="9.9.9"', 1, 1),
    ("kvmagent_libvirt_up", "", 1, 0),
    ("kvmagent_certificate_end_timestamp_seconds", 'section="security"', 700, 500),
    ("kvmagent_commands_total", 'command="HotPlugCpu", outcome="online"', 2, 3),
    ("kvmagent_commands_total", 'command="HotPlugMemory", outcome="online"', 5, 0),
    ("kvmagent_command_errors_total", 'command="HotPlugCpu", code="NOT_READY"', 1, 2),
    ("kvmagent_requests_refused_total", 'code="QUEUE_FULL"', 1, 4),
    ("kvmagent_callbacks_total", 'result="delivered"', 7, 3),
    ("kvmagent_guest_agent_calls_total", 'result="answered"', 6, 1),
    ("kvmagent_phase_seconds_bucket", 'phase="plan", le="0.1"', 0, 0),
    ("kvmagent_phase_seconds_bucket", 'phase="plan", le="0.2"', 1, 1),
    ("kvmagent_phase_seconds_bucket", 'phase="plan", le="+Inf"', 1, 1),
    ("kvmagent_tasks_running", "", 2, 1),
    ("kvmagent_tasks_queued", "", 20, 10),
    ("kvmagent_callbacks_owed", "", 5, 6),
    ("kvmagent_callbacks_owed_oldest_seconds", "", 50, 60),
    ("kvmagent_vms_running", "", 10, 20),
    ("kvmagent_vms_vcpus", "", 40, 80),
    ("kvmagent_vms_promised_bytes", "", 400, 800),
    ("kvmagent_vms_resident_bytes", "", 200, 100),
    ("kvmagent_vms_offline_vcpus", "", 1, 2),
    ("kvmagent_vms_offline_memory_bytes", "", 3, 4),
    ("kvmagent_vms_in_trouble", 'trouble="guest_silent"', 1, 3),
    ("kvmagent_host_memory_budget_bytes", "", 1000, 1000),
    ("kvmagent_host_memory_promised_bytes", "", 400, 800),
)
# Of a record what it is for each of its labels' values; of one by host, that of the second.
EXPECTED = {
    "instance:kvmagent_commands:rate5m": ('outcome="online"', 3),
    "instance:kvmagent_command_errors:rate5m": ("", 2),
    "instance:kvmagent_requests_refused:rate5m": ("", 4),
    "instance:kvmagent_callbacks:rate5m": ('result="delivered"', 3),
    "instance:kvmagent_guest_agent_calls:rate5m": ("", 1),
    "instance:kvmagent_host_memory:promised_ratio": ("", 0.8),
    "job:kvmagent_hosts:count": ("", 2),
    "job:kvmagent_hosts_up:sum": ("", 1),
    "job_version:kvmagent_hosts:count": ('version="9.9.9"', 2),
    "job:kvmagent_libvirt_up:sum": ("", 1),
    "job:kvmagent_certificate_end_timestamp_seconds:min": ('section="security"', 500),
    "job:kvmagent_commands:rate5m": ('outcome="online"', 10),
    "job_code:kvmagent_command_errors:rate5m": ('code="NOT_READY"', 3),
    "job:kvmagent_callbacks:rate5m": ('result="delivered"', 10),
    "job:kvmagent_tasks_running:sum": ("", 3),
    "job:kvmagent_tasks_queued:sum": ("", 30),
    "job_phase:kvmagent_phase_seconds:p99_5m": ('phase="plan"', 0.199),
    "job:kvmagent_callbacks_owed:sum": ("", 11),
    "job:kvmagent_callbacks_owed_oldest_seconds:max": ("", 60),
    "job:kvmagent_vms_running:sum": ("", 30),
    "job:kvmagent_vms_vcpus:sum": ("", 120),
    "job:kvmagent_vms_promised_bytes:sum": ("", 1200),
    "job:kvmagent_vms_resident_bytes:sum": ("", 300),
    "job:kvmagent_vms_offline_vcpus:sum": ("", 3),
    "job:kvmagent_vms_offline_memory_bytes:sum": ("", 7),
    "job_trouble:kvmagent_vms_in_trouble:sum": ('trouble="guest_silent"', 4),
    "job:kvmagent_host_memory_budget_bytes:sum": ("", 2000),
    "job:kvmagent_host_memory:promised_ratio": ("", 0.6),
}


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RECORDING.read_text())["groups"]
    return {rule["record"]: rule for group in groups for rule in group["rules"]}


def test_each_rule_asks_for_what_is_exported_or_recorded(records: dict[str, dict[str, Any]]) -> None:
    assert f"{len(records)} rules found" in promtool("check", "rules", str(RECORDING))
    for name, rule in records.items():
        recorded = set(re.findall(r"\w+:\w+:\w+", rule["expr"]))
        asked = names_in(re.sub(r"\w+:\w+:\w+", "", rule["expr"]))
        assert recorded <= records.keys(), name
        assert asked | recorded, name
        assert asked <= exported() | OTHERS, name


def test_each_record_says_whether_it_is_by_host_or_over_all(records: dict[str, dict[str, Any]]) -> None:
    for name in records:
        assert re.fullmatch(r"(instance|job(_[a-z]+)?):kvmagent_[a-z_]+:[a-z0-9_]+", name), name


def test_no_record_has_a_series_for_each_vm(records: dict[str, dict[str, Any]]) -> None:
    for name, rule in records.items():
        assert not re.search(r"\bkvmagent_vm_", rule["expr"]), name


def test_each_record_has_its_value(records: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert records.keys() == EXPECTED.keys()
    series = []
    for name, labels, *values in HOSTS:
        for number, value in enumerate(values, 1):
            counts = name.endswith(("_total", "_bucket"))
            given = ", ".join(filter(None, ('job="kvmagent"', f'instance="n{number}"', labels)))
            grows = f"0+{value * 15}x40" if counts else f"{value}x40"
            series.append({"series": f"{name}{{{given}}}", "values": grows})
    asked = []
    for name, (labels, value) in EXPECTED.items():
        own = ['job="kvmagent"', *filter(None, [labels])] + ['instance="n2"'] * name.startswith("instance")
        sample = {"labels": f"{name}{{{', '.join(own)}}}", "value": value}
        asked.append({"expr": f"{name}{{{', '.join(own)}}}", "eval_time": "9m", "exp_samples": [sample]})
    test = {"interval": "15s", "input_series": series, "promql_expr_test": asked}
    whole = {"rule_files": [RECORDING.name, RULES.name], "evaluation_interval": "15s", "tests": [test]}
    for file in (RECORDING, RULES):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "values.yml").write_text(yaml.safe_dump(whole, width=10**6))
    promtool("test", "rules", "values.yml", directory=tmp_path)
