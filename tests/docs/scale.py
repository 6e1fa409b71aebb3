"""The numbers of docs/scale.md that are worked out from those that were measured, each by its formula.

The document has a table of what was measured and one of what is assumed, each row with a name; everything else is
computed from those rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.fleet.comeback import come_back, make_backoff, most_within

DOCUMENT = Path(__file__).parents[2] / "docs/scale.md"
HOSTS = (100, 1_000, 10_000)
_GIVEN = re.compile(r"^\| `(?P<name>\w+)` \|[^|]*\| (?P<value>[\d.,]+)", re.MULTILINE)

Given = Mapping[str, float]
Work = Callable[[Given, int], float]
Row = tuple[str, str, Work]


def read_given(text: str | None = None) -> Given:
    """What was measured or is assumed, by the row's name."""
    found = _GIVEN.finditer(DOCUMENT.read_text() if text is None else text)
    return {row["name"]: float(row["value"].replace(",", "")) for row in found}


def _all_series(given: Given, hosts: int) -> float:
    commands = given["commands_used"] * given["series_command"]
    return hosts * (given["series_host"] + commands + given["vms"] * given["series_vm"])


def _fewer_series(given: Given, hosts: int) -> float:
    """With per_vm = trouble."""
    return _all_series({**given, "vms": given["vms_trouble"]}, hosts)


def _fewest_series(given: Given, hosts: int) -> float:
    """And without the errors of each command by their code, dropped by Prometheus."""
    return _fewer_series(given, hosts) - hosts * given["series_errors"]


def _samples(series: Work) -> Work:
    return lambda given, hosts: series(given, hosts) / given["scrape_s"]


def _disk(series: Work) -> Work:
    """In GB over the time that samples are kept."""
    rate = _samples(series)
    return lambda given, hosts: rate(given, hosts) * given["sample_bytes"] * given["kept_days"] * 86400 / 1e9


def _memory(series: Work) -> Work:
    """In GB."""
    return lambda given, hosts: series(given, hosts) * given["series_bytes"] / 1e9


def _scraped(given: Given, hosts: int) -> float:
    """In MB/s."""
    return _samples(_all_series)(given, hosts) * given["series_line"] / 1e6


def _of_scrapes(given: Given, hosts: int) -> float:
    """CPUs of the agents, in thousandths of one CPU of each host."""
    return given["scrape_ms"] / given["scrape_s"] + given["rest_ms"]


def _callbacks(given: Given, hosts: int) -> float:
    return hosts * given["vms"] * given["commands_day"] / 86400


def _moments(given: Given) -> list[float]:
    return come_back(make_backoff(1), given["outage_s"], int(given["owed"]))


def _busiest(given: Given, hosts: int) -> float:
    moments = _moments(given)
    return hosts * most_within(moments, 1.0) / len(moments)


def _median(given: Given, _hosts: int) -> float:
    moments = _moments(given)
    return moments[len(moments) // 2]


def _last(given: Given, _hosts: int) -> float:
    return _moments(given)[-1]


def _take_all(given: Given, hosts: int) -> float:
    return hosts * given["owed"] / given["server_rate"]


def _rollout(given: Given, hosts: int) -> float:
    """In minutes: each wave is done when its slowest is."""
    return hosts / given["forks"] * given["upgrade_s"] / 60


def _renewal(given: Given, hosts: int) -> float:
    return hosts / given["forks"] * given["renewal_s"] / 60


TABLES: Mapping[str, tuple[Row, ...]] = {
    "prometheus": (
        (
            "series, `per_vm = all`",
            "hosts * (`series_host` + `commands_used` * `series_command` + `vms` * `series_vm`)",
            _all_series,
        ),
        ("series, `per_vm = trouble`", "the same with `vms_trouble`", _fewer_series),
        ("series, and errors by code dropped", "hosts * `series_errors` less", _fewest_series),
        ("samples/s, all", "series / `scrape_s`", _samples(_all_series)),
        ("samples/s, trouble", "the same", _samples(_fewer_series)),
        ("disk, all, GB", "samples/s * `sample_bytes` * `kept_days` * 86,400", _disk(_all_series)),
        ("disk, trouble, GB", "the same", _disk(_fewer_series)),
        ("memory for series, all, GB", "series * `series_bytes`", _memory(_all_series)),
        ("memory for series, trouble, GB", "the same", _memory(_fewer_series)),
        ("memory for series, errors dropped, GB", "the same", _memory(_fewest_series)),
        ("scraped, MB/s", "samples/s * `series_line`", _scraped),
        ("CPU of each agent, thousandths", "`rest_ms` + `scrape_ms` / `scrape_s`", _of_scrapes),
    ),
    "server": (
        ("callbacks/s, steady", "hosts * `vms` * `commands_day` / 86,400", _callbacks),
        (
            "callback connections open, steady",
            "callbacks/s * `idle_s`, at most one for each host",
            lambda given, hosts: min(hosts, _callbacks(given, hosts) * given["idle_s"]),
        ),
        ("undelivered callbacks after an outage", "hosts * `owed`", lambda given, hosts: hosts * given["owed"]),
        ("agents that come back in the busiest second", "simulated, see below", _busiest),
        ("half of the agents are back after, s", "simulated", _median),
        ("the last agent is back after, s", "simulated", _last),
        ("the server is busy with them for, s", "undelivered callbacks / `server_rate`", _take_all),
    ),
    "rollout": (
        ("upgrade, minutes", "hosts / `forks` * `upgrade_s` / 60", _rollout),
        ("certificates, minutes", "hosts / `forks` * `renewal_s` / 60", _renewal),
    ),
}


def make_table(name: str | None) -> str:
    """One of the tables."""
    assert name is not None
    given = read_given()
    head = " | ".join(f"{hosts:,} hosts" for hosts in HOSTS)
    lines = [f"| figure | formula | {head} |", "|---|---|" + "---|" * len(HOSTS)]
    for figure, formula, work_out in TABLES[name]:
        lines.append(f"| {figure} | {formula} | " + " | ".join(show(work_out(given, n)) for n in HOSTS) + " |")
    return "\n".join(lines) + "\n"


def show(value: float) -> str:
    """A number with what matters of it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
