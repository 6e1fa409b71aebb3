"""Every metric of the agent: name, type, labels, meaning. docs/metrics.md is generated from it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from prometheus_client.core import GaugeMetricFamily


class Metric(NamedTuple):
    """One metric; a counter's name gets `_total` appended, as Prometheus requires."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    words: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name in a scrape."""
        return self.name + "_total" * (self.type == "counter")


_VM = ("uuid", "name")

METRICS = {
    metric.name: metric
    for metric in (
        # What happens.
        Metric("kvmagent_commands", "counter", "Commands and host queries that ended.", ("command", "outcome")),
        Metric(
            "kvmagent_command_errors",
            "counter",
            "Commands and host queries that ended in an error.",
            ("command", "code"),
        ),
        Metric("kvmagent_requests_refused", "counter", "Requests that were refused at once.", ("code",)),
        Metric(
            "kvmagent_callbacks",
            "counter",
            "Callbacks that were delivered, refused for good (gone) or given up.",
            ("result",),
        ),
        Metric(
            "kvmagent_callback_attempts_failed",
            "counter",
            "Attempts to deliver a callback that failed and are retried.",
        ),
        Metric(
            "kvmagent_guest_agent_calls",
            "counter",
            "Commands sent to guest agents: answered, or the error code.",
            ("result",),
        ),
        Metric("kvmagent_journal_writes", "counter", "Changes that the journal has written to disk."),
        Metric(
            "kvmagent_phase_seconds",
            "histogram",
            "A task's time in each phase: queue, plan, journal, libvirt, guest, hook; callback: after its end.",
            ("command", "phase"),
        ),
        Metric("kvmagent_journal_commit_seconds", "histogram", "Time of a commit; a task is accepted only after one."),
        # What is so now.
        Metric(
            "kvmagent_build_info",
            "gauge",
            "Always 1; the labels have the versions of agent and Python.",
            ("version", "python"),
        ),
        Metric("kvmagent_threads", "gauge", "Threads of the agent."),
        Metric("kvmagent_libvirt_up", "gauge", "0 while libvirt is known to be down, else 1."),
        Metric("kvmagent_tasks_running", "gauge", "Tasks that are running, at most one for each VM."),
        Metric("kvmagent_task_running_longest_seconds", "gauge", "How long the longest running task has run."),
        Metric("kvmagent_tasks_queued", "gauge", "Tasks that wait for their VM's lane or for a thread."),
        Metric("kvmagent_tasks_queued_limit", "gauge", "Unfinished tasks above which new ones are refused."),
        Metric("kvmagent_lanes_waiting", "gauge", "VMs with waiting tasks."),
        Metric("kvmagent_lane_depth_max", "gauge", "Waiting tasks of the VM that has most of them."),
        Metric("kvmagent_callbacks_owed", "gauge", "Callbacks that are not delivered yet."),
        Metric(
            "kvmagent_callbacks_owed_oldest_seconds",
            "gauge",
            "Age of the oldest undelivered callback; 0 if there is none.",
        ),
        Metric(
            "kvmagent_callback_destinations_failing", "gauge", "Servers with undelivered callbacks that do not answer."
        ),
        Metric("kvmagent_journal_up", "gauge", "1 while the journal's last commit succeeded."),
        Metric(
            "kvmagent_stalled_seconds", "gauge", "How long a part has had work to do and made no progress.", ("part",)
        ),
        Metric(
            "kvmagent_certificate_end_timestamp_seconds",
            "gauge",
            "When a certificate in use expires: the agent's (security), the one for callbacks (callback).",
            ("section",),
        ),
        # The host's memory budget.
        Metric("kvmagent_host_memory_budget_bytes", "gauge", "Memory of the host that may be promised to VMs."),
        Metric(
            "kvmagent_host_memory_promised_bytes", "gauge", "Memory that is promised to VMs, running tasks included."
        ),
        Metric("kvmagent_host_memory_reserved_bytes", "gauge", "The part of it that running tasks are about to plug."),
        Metric("kvmagent_host_memory_reserve_bytes", "gauge", "Memory that is kept for the host itself."),
        # VMs: what libvirt reports on all at once.
        Metric("kvmagent_vms_running", "gauge", "Running VMs."),
        Metric("kvmagent_vm_stats_age_seconds", "gauge", "Age of libvirt's last answer about all VMs."),
        # All of them in sums, whichever have series of their own.
        Metric("kvmagent_vms_with_series", "gauge", "VMs with their own series (metrics.per_vm, metrics.max_vms)."),
        Metric(
            "kvmagent_vms_in_trouble",
            "gauge",
            "VMs by what is wrong with them; a VM may count several times.",
            ("trouble",),
        ),
        Metric("kvmagent_vms_vcpus", "gauge", "vCPUs of all running VMs."),
        Metric("kvmagent_vms_promised_bytes", "gauge", "Host memory that running VMs may use, QEMU included."),
        Metric("kvmagent_vms_resident_bytes", "gauge", "Host memory that their QEMU processes use now."),
        Metric("kvmagent_vms_offline_vcpus", "gauge", "vCPUs that were plugged but offline in their guests."),
        Metric(
            "kvmagent_vms_offline_memory_bytes",
            "gauge",
            "Memory that was plugged but offline in their guests, or not listed there.",
        ),
        # Each VM: what libvirt reports.
        Metric("kvmagent_vm_vcpus", "gauge", "vCPUs that the VM has.", _VM),
        Metric("kvmagent_vm_vcpus_max", "gauge", "vCPUs that the VM can have without a restart.", _VM),
        Metric("kvmagent_vm_promised_bytes", "gauge", "Host memory that the VM may use, QEMU included.", _VM),
        Metric("kvmagent_vm_resident_bytes", "gauge", "Host memory that its QEMU process uses now.", _VM),
        Metric("kvmagent_vm_balloon_bytes", "gauge", "Memory that the balloon leaves to the VM.", _VM),
        # VMs: the last observation of each, with its guest.
        Metric(
            "kvmagent_vm_memory_bytes",
            "gauge",
            "Memory that the VM had when last observed: boot memory and plugged memory.",
            _VM,
        ),
        Metric("kvmagent_vm_slots_free", "gauge", "Memory slots that were free when last observed.", _VM),
        Metric(
            "kvmagent_vm_restart_required",
            "gauge",
            "1 if its persistent definition has something that the running VM gets only after a power cycle.",
            _VM,
        ),
        Metric(
            "kvmagent_vm_guest_answers",
            "gauge",
            "1 if its guest agent answers, 0 if it stopped answering; absent if it never has.",
            _VM,
        ),
        Metric("kvmagent_vm_guest_vcpus", "gauge", "vCPUs that the guest reports as online.", _VM),
        Metric("kvmagent_vm_offline_vcpus", "gauge", "vCPUs that were plugged but offline in the guest.", _VM),
        Metric("kvmagent_vm_guest_vcpus_age_seconds", "gauge", "Age of what the guest reported about its vCPUs.", _VM),
        Metric("kvmagent_vm_guest_memory_bytes", "gauge", "MemTotal in the guest, as last reported.", _VM),
        Metric(
            "kvmagent_vm_offline_memory_bytes",
            "gauge",
            "Memory that was plugged but offline in the guest, or not listed there.",
            _VM,
        ),
        Metric(
            "kvmagent_vm_guest_memory_age_seconds", "gauge", "Age of what the guest reported about its memory.", _VM
        ),
    )
}


def make_gauge(name: str, values: Iterable[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily:
    """Return a gauge of the table with its values, each by its labels' values."""
    metric = METRICS[name]
    family = GaugeMetricFamily(metric.name, metric.words, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
