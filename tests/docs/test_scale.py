"""docs/scale.md is worked out from what was measured: changed measurements change it, and three numbers by hand."""

import re
from typing import get_args

import pytest

from kvmagent.api.metrics.events import PHASE_BUCKETS
from kvmagent.api.metrics.table import METRICS
from kvmagent.recorder import Phase
from tests.docs.scale import DOCUMENT, HOSTS, TABLES, make_table, read_given


def rows(table: str) -> dict[str, list[float]]:
    """Of each figure its value for 100, 1,000 and 10,000 hosts, as the document has it."""
    text = DOCUMENT.read_text()
    block = text[text.index(f"<!-- block: scale {table} -->") :].partition("<!-- end -->")[0]
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \|$", block, re.MULTILINE)
    return {figure: [float(value.replace(",", "")) for value in values] for figure, *values in found}


def test_three_numbers_follow_from_what_was_measured() -> None:
    """Series of Prometheus, its disk, and how long a server is busy after an outage, by hand."""
    given = read_given()
    prometheus, server = rows("prometheus"), rows("server")
    for n, hosts in enumerate((100, 1000, 10000)):
        of_host = 50 * 15 + given["series_host"] + given["series_command"] * given["commands_used"]
        series = of_host * hosts
        assert prometheus["series, `per_vm = all`"][n] == pytest.approx(series, rel=0.01)
        per_day = series / given["scrape_s"] * 24 * 3600 * given["sample_bytes"]
        assert prometheus["disk, all, GB"][n] == pytest.approx(per_day * given["kept_days"] / 10**9, rel=0.01)
        busy = hosts * given["owed"] / given["server_rate"]
        assert server["the server is busy with them for, s"][n] == pytest.approx(busy, rel=0.01)


def test_every_given_number_is_used_or_explained_and_every_used_one_is_given() -> None:
    given = read_given()
    formulas = " ".join(formula for table in TABLES.values() for _, formula, _ in table)
    named = set(re.findall(r"`(\w+)`", formulas))
    assert named <= given.keys()
    for table in TABLES:
        assert make_table(table).count("\n") == len(TABLES[table]) + 2
        assert len(HOSTS) == 3


def test_what_is_in_the_code_is_in_the_document() -> None:
    given = read_given()
    assert given["series_vm"] == sum("uuid" in metric.labels for metric in METRICS.values())
    # A histogram's buckets, the last without an end, its sum and its count.
    assert given["series_command"] == len(get_args(Phase)) * (len(PHASE_BUCKETS) + 3)


@pytest.mark.parametrize("name", ["series_host", "sample_bytes", "owed", "upgrade_s"])
def test_another_measurement_is_another_number(name: str) -> None:
    given = dict(read_given())
    before = [work_out(given, 1000) for table in TABLES.values() for _, _, work_out in table]
    given[name] *= 2
    after = [work_out(given, 1000) for table in TABLES.values() for _, _, work_out in table]
    assert before != after
