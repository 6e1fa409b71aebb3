"""Prints docs/metrics.md, made from the table of metrics."""

from kvmagent.api.metrics.table import METRICS

HEAD = """\
# Metrics

`GET /metrics`, for whoever may read. This page is made: `python docs/metrics_page.py > docs/metrics.md`.

A scrape asks libvirt once for all VMs and no guest at all, and waits two seconds at most; of a libvirt that hangs the
last answer is told, and `kvmagent_vm_stats_age_seconds` grows. What a guest uses is what it said last, when a command,
a read or the sampler (`metrics.sample_sec`) asked it, and its age stands beside it. A VM's series end with its run.
`metrics.per_vm` says which VMs have series of their own: `all`, those in `trouble` (an alert on a VM asks for nothing
else), or `off`; `metrics.max_vms` bounds them. `kvmagent_vms_...` are sums over all running VMs, whichever have series;
what is not known of a VM is not in them.
`process_...` and `python_gc_...` are those of every Python program. Counters begin at 0 for every label that is known
when the agent starts, so that the first event is an increase.

`conf/prometheus/kvmagent.rules.yml` alerts on them, `conf/prometheus/kvmagent.recording.yml` sums them by host and over
all hosts, `conf/grafana/kvmagent.json` shows them.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def make_page() -> str:
    """Return the page."""
    rows = (
        f"| `{metric.exported}` | {metric.type} | {', '.join(metric.labels)} | {metric.words} |"
        for metric in METRICS.values()
    )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(make_page(), end="")
