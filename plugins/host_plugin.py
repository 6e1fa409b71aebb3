"""The host plugin: what a ZStack management server requests of a host, and the reports on its VMs."""

from kvmagent.model.command import Plugin

from .host.answers import QUERIES, report_event, report_gap, report_progress

PLUGIN = Plugin(
    name="host",
    commands=(),
    queries=QUERIES,
    report_event=report_event,
    report_gap=report_gap,
    report_progress=report_progress,
)
