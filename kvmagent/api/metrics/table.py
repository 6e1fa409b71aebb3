"""Every metric of the agent: name, type, labels, meaning. docs/metrics.md is made from it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from prometheus_client.core import GaugeMetricFamily


class Metric(NamedTuple):
    """One metric; a counter's name gets `_total` behind it, as Prometheus wants."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    words: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name as it is asked for."""
        return self.name + "_total" * (self.type == "counter")


_VM = ("uuid", "name")

METRICS = {
    metric.name: metric
    for metric in (
        # What happens.
        Metric("kvmagent_commands", "counter", "Commands and questions that ended.", ("command", "outcome")),
        Metric("kvmagent_command_errors", "counter", "Those of them that ended in an error.", ("command", "code")),
        Metric("kvmagent_requests_refused", "counter", "Requests that were refused at once.", ("code",)),
        Metric("kvmagent_callbacks", "counter", "Callbacks that were delivered, are gone or given up.", ("result",)),
        Metric("kvmagent_callback_attempts_failed", "counter", "Callbacks that were not taken and are sent again."),
        Metric(
            "kvmagent_guest_agent_calls",
            "counter",
            "Commands sent to guest agents: answered, or the error code of why not.",
            ("result",),
        ),
        Metric("kvmagent_journal_writes", "counter", "Changes that the journal has on disk."),
        Metric(
            "kvmagent_phase_seconds",
            "histogram",
            "A task's time in each phase: queue, plan, journal, libvirt, guest, hook; callback: from its end on.",
            ("command", "phase"),
        ),
        Metric("kvmagent_journal_commit_seconds", "histogram", "Time of a commit, which every acceptance waits for."),
        # What is so now.
        Metric("kvmagent_build_info", "gauge", "1, with the versions of agent and Python.", ("version", "python")),
        Metric("kvmagent_threads", "gauge", "Threads of the agent."),
        Metric("kvmagent_libvirt_up", "gauge", "1 while libvirt is not known to be away."),
        Metric("kvmagent_tasks_running", "gauge", "Tasks that are carried out, each in its VM's lane."),
        Metric("kvmagent_task_running_longest_seconds", "gauge", "How long the longest of them has run."),
        Metric("kvmagent_tasks_queued", "gauge", "Tasks that wait for their VM's lane or for a thread."),
        Metric("kvmagent_tasks_queued_limit", "gauge", "Unfinished tasks above which new ones are refused."),
        Metric("kvmagent_lanes_waiting", "gauge", "VMs with tasks that wait."),
        Metric("kvmagent_lane_depth_max", "gauge", "Tasks that wait in the longest lane."),
        Metric("kvmagent_callbacks_owed", "gauge", "Callbacks that are still to be taken."),
        Metric("kvmagent_callbacks_owed_oldest_seconds", "gauge", "Age of the oldest of them; 0 without any."),
        Metric("kvmagent_callback_destinations_failing", "gauge", "Servers that are owed callbacks and do not answer."),
        Metric("kvmagent_journal_up", "gauge", "1 while the journal's last commit succeeded."),
        Metric("kvmagent_stalled_seconds", "gauge", "For how long a part has had work and done none of it.", ("part",)),
        Metric(
            "kvmagent_certificate_end_timestamp_seconds",
            "gauge",
            "Until when a certificate in force is good: the agent's (security), that of callbacks (callback).",
            ("section",),
        ),
        # The host's memory budget.
        Metric("kvmagent_host_memory_budget_bytes", "gauge", "Memory that VMs may be promised in all."),
        Metric("kvmagent_host_memory_promised_bytes", "gauge", "What VMs may have of it, tasks under way included."),
        Metric("kvmagent_host_memory_reserved_bytes", "gauge", "What of that tasks under way are about to plug."),
        Metric("kvmagent_host_memory_reserve_bytes", "gauge", "What is left to the host itself."),
        # VMs: what libvirt tells of all at once.
        Metric("kvmagent_vms_running", "gauge", "VMs that run."),
        Metric("kvmagent_vm_stats_age_seconds", "gauge", "Age of what libvirt told of all VMs last."),
        # All of them in sums, whichever have series of their own.
        Metric("kvmagent_vms_with_series", "gauge", "VMs with series of their own (metrics.per_vm, metrics.max_vms)."),
        Metric("kvmagent_vms_in_trouble", "gauge", "VMs by what is wrong; one may count under several.", ("trouble",)),
        Metric("kvmagent_vms_vcpus", "gauge", "vCPUs of all running VMs."),
        Metric("kvmagent_vms_promised_bytes", "gauge", "Memory of the host that they may have, QEMU included."),
        Metric("kvmagent_vms_resident_bytes", "gauge", "Memory of the host that their QEMUs have."),
        Metric("kvmagent_vms_offline_vcpus", "gauge", "vCPUs that were plugged and offline in their guests."),
        Metric(
            "kvmagent_vms_offline_memory_bytes", "gauge", "Memory that was plugged and offline, or not seen, there."
        ),
        # Each VM: what libvirt tells.
        Metric("kvmagent_vm_vcpus", "gauge", "vCPUs that the VM has.", _VM),
        Metric("kvmagent_vm_vcpus_max", "gauge", "vCPUs that it can have without a restart.", _VM),
        Metric("kvmagent_vm_promised_bytes", "gauge", "Memory of the host that the VM may have, QEMU included.", _VM),
        Metric("kvmagent_vm_resident_bytes", "gauge", "Memory of the host that its QEMU has.", _VM),
        Metric("kvmagent_vm_balloon_bytes", "gauge", "Memory that the balloon leaves to it.", _VM),
        # VMs: what was seen of each, its guest among it, when it was last looked at.
        Metric("kvmagent_vm_memory_bytes", "gauge", "Memory that the VM had: boot memory and what is plugged.", _VM),
        Metric("kvmagent_vm_slots_free", "gauge", "Memory slots that were free.", _VM),
        Metric(
            "kvmagent_vm_restart_required",
            "gauge",
            "1 when its persistent definition had what the running VM lacks until it is powered off and on.",
            _VM,
        ),
        Metric(
            "kvmagent_vm_guest_answers", "gauge", "1 when its agent answers, 0 when it fell silent; else none.", _VM
        ),
        Metric("kvmagent_vm_guest_vcpus", "gauge", "vCPUs that the guest said it uses.", _VM),
        Metric("kvmagent_vm_offline_vcpus", "gauge", "vCPUs that were plugged and offline in the guest.", _VM),
        Metric("kvmagent_vm_guest_vcpus_age_seconds", "gauge", "Age of what the guest said of its vCPUs.", _VM),
        Metric("kvmagent_vm_guest_memory_bytes", "gauge", "MemTotal in the guest.", _VM),
        Metric(
            "kvmagent_vm_offline_memory_bytes", "gauge", "Memory that was plugged and offline, or not seen, there.", _VM
        ),
        Metric("kvmagent_vm_guest_memory_age_seconds", "gauge", "Age of what the guest said of its memory.", _VM),
    )
}


def make_gauge(name: str, values: Iterable[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily:
    """Return a gauge of the table with its values, each by its labels' values."""
    metric = METRICS[name]
    family = GaugeMetricFamily(metric.name, metric.words, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
