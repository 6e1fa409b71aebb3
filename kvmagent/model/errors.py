"""Every error code of the agent, once.

A code is a stable word: clients decide on it, so it is never renamed and never used again for another meaning.
`CODES` has the HTTP status (for a request refused at once), the meaning and the default remedy of each; whoever raises
an error may give a better remedy. `LOOKS` has the commands that show an operator the cause. docs/troubleshoot.md
is generated from both.
"""

from enum import StrEnum

import msgspec

from kvmagent.model.urls import shown_text


class Code(StrEnum):
    """The error codes."""

    # the request itself
    MISSING_TASK_UUID = "MISSING_TASK_UUID"
    BAD_TASK_UUID = "BAD_TASK_UUID"
    MISSING_CALLBACK_URL = "MISSING_CALLBACK_URL"
    BAD_CALLBACK_URL = "BAD_CALLBACK_URL"
    BAD_HTTP = "BAD_HTTP"
    BAD_CONTENT_TYPE = "BAD_CONTENT_TYPE"
    BAD_JSON = "BAD_JSON"
    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    NOT_A_JSON_NUMBER = "NOT_A_JSON_NUMBER"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    MISSING_FIELD = "MISSING_FIELD"
    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    WRONG_TYPE = "WRONG_TYPE"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    BAD_QUERY = "BAD_QUERY"
    UNKNOWN_PATH = "UNKNOWN_PATH"
    UNKNOWN_TASK = "UNKNOWN_TASK"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    TASK_CONFLICT = "TASK_CONFLICT"
    TASK_NOT_CANCELLABLE = "TASK_NOT_CANCELLABLE"
    CANCELLED = "CANCELLED"
    HEAD_TOO_LARGE = "HEAD_TOO_LARGE"
    URL_TOO_LONG = "URL_TOO_LONG"
    REQUEST_TOO_SLOW = "REQUEST_TOO_SLOW"
    TLS_REQUIRED = "TLS_REQUIRED"
    # who may do what
    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    CREDENTIALS_WRONG = "CREDENTIALS_WRONG"
    CLIENT_NOT_ALLOWED = "CLIENT_NOT_ALLOWED"
    CERTIFICATE_NOT_ALLOWED = "CERTIFICATE_NOT_ALLOWED"
    ROLE_MISSING = "ROLE_MISSING"
    TASK_NOT_YOURS = "TASK_NOT_YOURS"
    CALLBACK_NOT_ALLOWED = "CALLBACK_NOT_ALLOWED"
    WEB_PAGE_NOT_ALLOWED = "WEB_PAGE_NOT_ALLOWED"
    TOO_MANY_CONNECTIONS = "TOO_MANY_CONNECTIONS"
    # the agent
    STOPPING = "STOPPING"
    QUEUE_FULL = "QUEUE_FULL"
    JOURNAL_UNAVAILABLE = "JOURNAL_UNAVAILABLE"
    TASK_UNREADABLE = "TASK_UNREADABLE"
    STATE_DIR_IN_USE = "STATE_DIR_IN_USE"
    ADDRESS_NOT_FREE = "ADDRESS_NOT_FREE"
    REFUSED_BY_HOOK = "REFUSED_BY_HOOK"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    BAD_CONFIGURATION = "BAD_CONFIGURATION"
    # libvirt
    LIBVIRT_UNAVAILABLE = "LIBVIRT_UNAVAILABLE"
    LIBVIRT_REFUSED = "LIBVIRT_REFUSED"
    LIBVIRT_BUSY = "LIBVIRT_BUSY"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    NOT_VERIFIED = "NOT_VERIFIED"
    # the VM
    VM_NOT_FOUND = "VM_NOT_FOUND"
    VM_NOT_RUNNING = "VM_NOT_RUNNING"
    VM_PAUSED = "VM_PAUSED"
    VM_SUSPENDED = "VM_SUSPENDED"
    VM_SAVED = "VM_SAVED"
    VM_TRANSIENT = "VM_TRANSIENT"
    VM_MIGRATED = "VM_MIGRATED"
    VM_CRASHED = "VM_CRASHED"
    VM_REPLACED = "VM_REPLACED"
    VM_RESTARTED = "VM_RESTARTED"
    VM_OPTED_OUT = "VM_OPTED_OUT"
    ABOVE_POLICY = "ABOVE_POLICY"
    POLICY_UNREADABLE = "POLICY_UNREADABLE"
    NOT_AS_EXPECTED = "NOT_AS_EXPECTED"
    TARGET_BELOW_CURRENT = "TARGET_BELOW_CURRENT"
    TARGET_ABOVE_CURRENT = "TARGET_ABOVE_CURRENT"
    NO_ACPI = "NO_ACPI"
    MACHINE_NOT_SUPPORTED = "MACHINE_NOT_SUPPORTED"
    DEFINITION_REFUSED = "DEFINITION_REFUSED"
    DEFINITION_NOT_CHECKED = "DEFINITION_NOT_CHECKED"
    FORMER_XML_NOT_KEPT = "FORMER_XML_NOT_KEPT"
    # vCPUs
    CPU_ABOVE_MAXIMUM = "CPU_ABOVE_MAXIMUM"
    CPU_TOPOLOGY_MISMATCH = "CPU_TOPOLOGY_MISMATCH"
    CPU_NOT_WHOLE_CORE = "CPU_NOT_WHOLE_CORE"
    CPU_ABOVE_HOST_LIMIT = "CPU_ABOVE_HOST_LIMIT"
    CPU_NOT_REMOVABLE = "CPU_NOT_REMOVABLE"
    CPU_REMOVAL_UNSAFE = "CPU_REMOVAL_UNSAFE"
    CPU_SHARES_NOT_SET = "CPU_SHARES_NOT_SET"
    CPU_REMOVAL_PENDING = "CPU_REMOVAL_PENDING"
    CPU_REMOVAL_REFUSED = "CPU_REMOVAL_REFUSED"
    CPU_REMOVAL_UNFINISHED = "CPU_REMOVAL_UNFINISHED"
    REMOVAL_LOST = "REMOVAL_LOST"
    # memory
    NO_MAX_MEMORY = "NO_MAX_MEMORY"
    MEMORY_ABOVE_MAXIMUM = "MEMORY_ABOVE_MAXIMUM"
    SLOTS_EXHAUSTED = "SLOTS_EXHAUSTED"
    NO_NUMA_CELL = "NO_NUMA_CELL"
    NUMA_CELLS_INCOMPLETE = "NUMA_CELLS_INCOMPLETE"
    NUMA_NODE_NOT_FOUND = "NUMA_NODE_NOT_FOUND"
    MEMORY_NOT_ALIGNED = "MEMORY_NOT_ALIGNED"
    MEMORY_DEVICE_MISALIGNED = "MEMORY_DEVICE_MISALIGNED"
    HOST_MEMORY_SHORT = "HOST_MEMORY_SHORT"
    HOST_MEMORY_PROMISED = "HOST_MEMORY_PROMISED"
    HOST_NODE_MEMORY_SHORT = "HOST_NODE_MEMORY_SHORT"
    HOST_HUGEPAGES_SHORT = "HOST_HUGEPAGES_SHORT"
    MEMORY_HARD_LIMIT = "MEMORY_HARD_LIMIT"
    MEMORY_LOCKED = "MEMORY_LOCKED"
    MEMORY_LOCK_LIMIT = "MEMORY_LOCK_LIMIT"
    MEMORY_ENCRYPTED = "MEMORY_ENCRYPTED"
    MEMORY_NOT_REMOVABLE = "MEMORY_NOT_REMOVABLE"
    MEMORY_SIZE_NOT_REACHABLE = "MEMORY_SIZE_NOT_REACHABLE"
    MEMORY_REMOVAL_REFUSED = "MEMORY_REMOVAL_REFUSED"
    MEMORY_REMOVAL_PENDING = "MEMORY_REMOVAL_PENDING"
    VIRTIO_MEM_STALLED = "VIRTIO_MEM_STALLED"
    NO_BALLOON = "NO_BALLOON"
    BALLOON_ABOVE_TOTAL = "BALLOON_ABOVE_TOTAL"
    BALLOON_NOT_ANSWERING = "BALLOON_NOT_ANSWERING"
    BALLOON_BELOW_FLOOR = "BALLOON_BELOW_FLOOR"
    # the guest
    GUEST_AGENT_ABSENT = "GUEST_AGENT_ABSENT"
    GUEST_AGENT_DISCONNECTED = "GUEST_AGENT_DISCONNECTED"
    GUEST_AGENT_UNRESPONSIVE = "GUEST_AGENT_UNRESPONSIVE"
    GUEST_AGENT_INVALID = "GUEST_AGENT_INVALID"
    GUEST_AGENT_FROZEN = "GUEST_AGENT_FROZEN"
    GUEST_AGENT_REFUSED = "GUEST_AGENT_REFUSED"
    GUEST_ONLINE_NOT_ASKED = "GUEST_ONLINE_NOT_ASKED"
    GUEST_CPU_NOT_SEEN = "GUEST_CPU_NOT_SEEN"
    GUEST_CPU_OFFLINE = "GUEST_CPU_OFFLINE"
    GUEST_MEMORY_NOT_SEEN = "GUEST_MEMORY_NOT_SEEN"
    GUEST_MEMORY_OFFLINE = "GUEST_MEMORY_OFFLINE"
    GUEST_MEMORY_SHORT = "GUEST_MEMORY_SHORT"
    GUEST_CPU_IN_USE = "GUEST_CPU_IN_USE"
    GUEST_MEMORY_IN_USE = "GUEST_MEMORY_IN_USE"
    GUEST_FREE_SHOWS_LESS = "GUEST_FREE_SHOWS_LESS"
    GUEST_MEMORY_IMBALANCED = "GUEST_MEMORY_IMBALANCED"
    GUEST_OS_UNABLE = "GUEST_OS_UNABLE"
    GUEST_OS_LIMITED = "GUEST_OS_LIMITED"
    DRIFT = "DRIFT"
    RESTART_REQUIRED = "RESTART_REQUIRED"
    MEMORY_UNKNOWN_TO_LIBVIRT = "MEMORY_UNKNOWN_TO_LIBVIRT"
    # the plan
    PLAN_NOT_WHOLE = "PLAN_NOT_WHOLE"
    LEFTOVER_TAKEN_BACK = "LEFTOVER_TAKEN_BACK"
    GUEST_STILL_ASKED = "GUEST_STILL_ASKED"


class CodeInfo(msgspec.Struct, frozen=True):
    """What one code means: HTTP status where it refuses a request at once, meaning, and the usual remedy."""

    status: int
    meaning: str
    remedy: str


_USE_PREPARE = (
    'Send ReadyForHotplug with {"prepare": true} to correct the persistent definition, then power the VM off and start '
    "it again."
)
_PREPARE = "Correct the VM's persistent definition as the message says, then power the VM off and start it again."

_USE_POLICY = (
    "Its owner reads it with virsh metadata VM urn:kvmagent:policy:1, and sets another with virsh metadata VM "
    "urn:kvmagent:policy:1 --key kvmagent --set '<policy/>' --live --config (docs/operate.md, Per-VM limits)."
)

CPU_ONLINE_HINT = (
    "Let the guest online new vCPUs by itself: udev rule "
    'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"; '
    "or start the guest agent (qemu-ga) and run in the guest: echo 1 > /sys/devices/system/cpu/cpuN/online."
)
MEMORY_ONLINE_HINT = (
    "Let the guest online new memory by itself: kernel parameters memhp_default_state=online "
    "memory_hotplug.online_policy=auto-movable (they also last over a reboot, and keep memory removable), or "
    'udev rule SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", ATTR{state}="online"; '
    "or start the guest agent (qemu-ga) and run in the guest: echo online > /sys/devices/system/memory/memoryN/state."
)

# Memory that is online_movable can be removed again, but the kernel cannot use it for itself: beyond about three times
# the boot memory it kills processes while much memory is free. Source: Linux admin-guide/mm/memory-hotplug.rst, "Zone
# Imbalances" and auto-movable (from 5.16 on; 301 % is its default). Observed by users: neondatabase/autoscaling 1204.
MOVABLE_PARAMETERS = (
    "memhp_default_state=online memory_hotplug.online_policy=auto-movable memory_hotplug.auto_movable_ratio=301"
)

CODES: dict[Code, CodeInfo] = {
    Code.MISSING_TASK_UUID: CodeInfo(
        400, "An async command came without the taskuuid header.", "Send a taskuuid header: 1 to 64 of A-Za-z0-9-_."
    ),
    Code.BAD_TASK_UUID: CodeInfo(
        400, "The taskuuid header is malformed.", "Send 1 to 64 characters of A-Za-z0-9-_ in the taskuuid header."
    ),
    Code.MISSING_CALLBACK_URL: CodeInfo(
        400,
        "An async command came without the callbackurl header.",
        "Send a callbackurl header: an absolute http or https URL for the outcome, or the word none to poll /tasks "
        "instead.",
    ),
    Code.BAD_CALLBACK_URL: CodeInfo(
        400,
        "The callbackurl header is neither an absolute http or https URL nor the word none.",
        "Send an absolute URL such as http://server:8080/callback.",
    ),
    Code.BAD_HTTP: CodeInfo(400, "The request is not valid HTTP.", "Send a well-formed HTTP/1.1 request."),
    Code.BAD_CONTENT_TYPE: CodeInfo(400, "The Content-Type is not JSON.", "Send Content-Type: application/json."),
    Code.BAD_JSON: CodeInfo(400, "The body is not JSON in UTF-8.", "Send one JSON object, encoded in UTF-8."),
    Code.NOT_AN_OBJECT: CodeInfo(
        400, "The body is JSON, but not an object.", "Send a JSON object: the command's fields by name."
    ),
    Code.NOT_A_JSON_NUMBER: CodeInfo(
        400, "The body holds NaN or Infinity, which JSON does not have.", "Send finite numbers only."
    ),
    Code.DUPLICATE_KEY: CodeInfo(400, "An object in the body has the same key twice.", "Send each field once."),
    Code.MISSING_FIELD: CodeInfo(400, "A required field is missing.", "Send the field that the message names."),
    Code.UNKNOWN_FIELD: CodeInfo(
        400, "The command has no such field.", "Leave the field out; GET /openapi.json lists the command's fields."
    ),
    Code.WRONG_TYPE: CodeInfo(400, "A field has the wrong JSON type.", "Send the type that the message names."),
    Code.OUT_OF_RANGE: CodeInfo(
        400, "A field's value is outside its range.", "Send a value in the range that the message names."
    ),
    Code.BODY_TOO_LARGE: CodeInfo(
        413, "The body is larger than the limit.", "Send a smaller body, or raise http.max_body_bytes in kvmagent.conf."
    ),
    Code.BAD_QUERY: CodeInfo(
        400,
        "The query string has a parameter or value that this path does not accept.",
        "Correct the query string; GET /openapi.json lists the parameters of each path.",
    ),
    Code.UNKNOWN_PATH: CodeInfo(
        404, "The agent serves nothing at this path.", "GET /openapi.json lists the paths that this agent serves."
    ),
    Code.UNKNOWN_TASK: CodeInfo(
        404,
        "The agent has no task with this id.",
        "Check the id. The agent forgets finished tasks after agent.keep_sec.",
    ),
    Code.METHOD_NOT_ALLOWED: CodeInfo(
        405, "The path does not accept this HTTP method.", "Use the method in the Allow header."
    ),
    Code.TASK_NOT_CANCELLABLE: CodeInfo(
        409,
        "The task is already changing its VM, or has ended, so it can no longer be cancelled.",
        "Wait for its callback, then send a command that sets the VM to the size you want.",
    ),
    Code.CANCELLED: CodeInfo(
        409,
        "The task was cancelled (POST /tasks/{taskUuid}/cancel) before it changed anything.",
        "To run it after all, send the command with a new taskuuid.",
    ),
    Code.TASK_CONFLICT: CodeInfo(
        409,
        "The taskuuid belongs to a task with another command, body or callback URL.",
        "Use a new taskuuid for each new request.",
    ),
    Code.HEAD_TOO_LARGE: CodeInfo(
        431, "The request's headers are larger than the limit.", "Send fewer or shorter headers."
    ),
    Code.URL_TOO_LONG: CodeInfo(414, "The request's URL is longer than the limit.", "Send a shorter URL."),
    Code.REQUEST_TOO_SLOW: CodeInfo(
        408,
        "The request did not arrive in time.",
        "Send the whole request without pauses, or raise http.request_timeout_sec in kvmagent.conf.",
    ),
    Code.TLS_REQUIRED: CodeInfo(
        400, "The request used plain HTTP on a port that accepts only TLS.", "Use https:// in the agent's URL."
    ),
    Code.CREDENTIALS_MISSING: CodeInfo(
        401,
        "The request carries no credentials.",
        "Send a token from security.tokens_file in an Authorization: Bearer header, or use a client certificate "
        "signed by security.client_ca.",
    ),
    Code.CREDENTIALS_WRONG: CodeInfo(
        401,
        "The token is not in security.tokens_file, or was removed from it.",
        "Use a token from that file; make one with: kvmagent --new-token NAME.",
    ),
    Code.CERTIFICATE_NOT_ALLOWED: CodeInfo(
        403,
        "The client's certificate is valid, but none of its names is in security.allowed_names.",
        "Add one of its subject alternative names to security.allowed_names.",
    ),
    Code.ROLE_MISSING: CodeInfo(
        403,
        "The caller is known, but security.roles does not give it the role that this request needs.",
        "Add the role to the caller's entry of security.roles, then: systemctl reload kvmagent. GET /whoami shows what "
        "a caller has.",
    ),
    Code.TASK_NOT_YOURS: CodeInfo(
        403,
        "The task id belongs to another caller's task.",
        "Use a new id. A task can be read by its caller and by callers with the role read for all VMs; it can be sent "
        "again or cancelled only by its caller and by admin.",
    ),
    Code.CALLBACK_NOT_ALLOWED: CodeInfo(
        403,
        "The agent is not allowed to send callbacks to this URL.",
        "Use a callback URL on the host that sends the command, or add its host, network or port to "
        "security.allowed_callbacks.",
    ),
    Code.WEB_PAGE_NOT_ALLOWED: CodeInfo(
        403,
        "A browser sent a command, or a request without credentials used an unknown host name for the agent. Another "
        "site's web page may have caused it.",
        "Send commands with a client other than a browser. Open the status page by address, as "
        "http://127.0.0.1:7070/, or add the agent's name to security.host_names.",
    ),
    Code.TOO_MANY_CONNECTIONS: CodeInfo(
        503,
        "This client, or all clients together, have too many open connections.",
        "Use fewer connections, or raise http.max_connections_per_client in kvmagent.conf.",
    ),
    Code.CLIENT_NOT_ALLOWED: CodeInfo(
        403, "The client's address is not in security.allowed_clients.", "Add the address to security.allowed_clients."
    ),
    Code.STOPPING: CodeInfo(
        503, "The agent is stopping and accepts no new tasks.", "Send the request again in a few seconds."
    ),
    Code.QUEUE_FULL: CodeInfo(
        503,
        "Too many tasks are waiting to run, or too many callbacks are waiting to be delivered.",
        "Send the request again after the time in the Retry-After header.",
    ),
    Code.JOURNAL_UNAVAILABLE: CodeInfo(
        503,
        "The task journal cannot be written, so no task can be accepted.",
        "Check free space and permissions of agent.state_dir; the agent recovers by itself once it can write. Then "
        "send the command again with the same taskuuid: it runs only once.",
    ),
    Code.TASK_UNREADABLE: CodeInfo(
        500,
        "The journal holds a task that this agent cannot run: its plugin was removed or has changed.",
        "Add the plugin that declares the command to agent.plugins again, check the VM, and send the command again "
        "with a new taskuuid.",
    ),
    Code.ADDRESS_NOT_FREE: CodeInfo(
        500,
        "The agent cannot listen on its address: another program uses it, or this host does not have it. systemd "
        "starts the agent again.",
        "Stop the other program, or set another http.host, http.port or http.socket.",
    ),
    Code.STATE_DIR_IN_USE: CodeInfo(
        500,
        "Another agent is running with the same agent.state_dir.",
        "Stop the other agent, or give this one its own state_dir and port.",
    ),
    Code.REFUSED_BY_HOOK: CodeInfo(
        403,
        "A hook in before.d, below hooks.directory, rejected the task, could not be run or took too long. Nothing was "
        "changed.",
        "Do what the hook's message says, or correct the hook. Then send the command again with a new taskuuid.",
    ),
    Code.INTERNAL_ERROR: CodeInfo(500, "The agent has a bug.", "Report it, with the agent's log lines for this task."),
    Code.BAD_CONFIGURATION: CodeInfo(
        500, "The configuration cannot be used.", "Correct the key that the message names and start the agent again."
    ),
    Code.LIBVIRT_UNAVAILABLE: CodeInfo(
        503,
        "libvirt cannot be reached or does not answer.",
        "Check that libvirtd runs and that libvirt.uri is right, then send the command again.",
    ),
    Code.LIBVIRT_REFUSED: CodeInfo(
        500, "libvirt or QEMU refused the call.", "Read libvirt's error in the message and the VM's QEMU log."
    ),
    Code.LIBVIRT_BUSY: CodeInfo(
        503,
        "Another libvirt job (a migration, a save) is running on the VM.",
        "Wait for the job (virsh domjobinfo names it) to end, then send the command again.",
    ),
    Code.NOT_SUPPORTED: CodeInfo(
        400, "The hypervisor driver does not support this operation.", "Use a hypervisor that supports it."
    ),
    Code.NOT_VERIFIED: CodeInfo(
        500,
        "libvirt reported success, but the VM does not show the change.",
        "Compare the numbers in the reply, read the VM's QEMU log, then send the command again.",
    ),
    Code.VM_NOT_FOUND: CodeInfo(
        404,
        "This host has no VM with that name or UUID.",
        "Check the VM's name or UUID against virsh list --all on this host.",
    ),
    Code.VM_NOT_RUNNING: CodeInfo(
        400,
        "The VM is off, but the request changes the running VM.",
        'Start the VM, or use "affect": "config" to change only its persistent definition.',
    ),
    Code.VM_PAUSED: CodeInfo(
        400,
        "The VM is paused, so the guest cannot respond.",
        "Resume the VM (virsh resume), then send the command again.",
    ),
    Code.VM_SUSPENDED: CodeInfo(
        400,
        "The guest is suspended to memory. Plugging or removing a vCPU now would crash it when it wakes up.",
        "Wake the guest with virsh dompmwakeup VM (virsh resume does not do it). Memory can be plugged while it "
        "sleeps.",
    ),
    Code.VM_SAVED: CodeInfo(
        400,
        "The VM has a managed save image. Its next start restores that image, with the definition inside it.",
        "Start the VM, power it off and start it again. Or discard the saved state, and the guest's memory with it: "
        "virsh managedsave-remove VM.",
    ),
    Code.VM_TRANSIENT: CodeInfo(
        400,
        "The VM is transient: it has no persistent definition to change.",
        'Use "affect": "live", or define the VM persistently (virsh define).',
    ),
    Code.VM_MIGRATED: CodeInfo(
        200,
        "The VM was live-migrated to this host. Some guests cannot bring vCPUs online that are plugged after a "
        "migration.",
        "Check whether the guest brings plugged vCPUs online. If it does not, power the VM off and on, or use "
        '"affect": "config" to have them at the next start.',
    ),
    Code.VM_CRASHED: CodeInfo(
        500, "QEMU exited during the call.", "Read the VM's QEMU log, /var/log/libvirt/qemu/VM.log."
    ),
    Code.VM_REPLACED: CodeInfo(
        404,
        "The VM that the task started with no longer exists, and another VM has its name now. That VM was not changed.",
        "If the command is meant for the VM that has the name now, send it with a new taskuuid.",
    ),
    Code.VM_RESTARTED: CodeInfo(
        409,
        "The VM was powered off and on while the task ran. The reply describes the VM since its last start.",
        "Compare the numbers before and after; if something is missing, send the command with a new taskuuid.",
    ),
    Code.VM_OPTED_OUT: CodeInfo(
        400,
        "The VM's owner does not allow hotplug: the policy in its metadata says hotplug='off', or is unreadable.",
        _USE_POLICY,
    ),
    Code.ABOVE_POLICY: CodeInfo(
        400,
        "The request is above the limit that the VM's owner set in its metadata (maxCpuNum, maxMemorySize).",
        f"Request no more than the message names. {_USE_POLICY}",
    ),
    Code.POLICY_UNREADABLE: CodeInfo(
        200,
        "Part of the policy in the VM's metadata is unreadable. The agent applies the strictest possible reading.",
        _USE_POLICY,
    ),
    Code.NOT_AS_EXPECTED: CodeInfo(
        409,
        "The VM does not have the size that the caller expects it to have (expectedCpuNum, expectedMemorySize).",
        "Read the VM again (GET /vms/{vmUuid}), calculate the new target, and send it with a new taskuuid.",
    ),
    Code.TARGET_BELOW_CURRENT: CodeInfo(
        400,
        "A hot-plug requested a total below the VM's current one.",
        "Request more than the VM has. To remove, use the hot-unplug path.",
    ),
    Code.TARGET_ABOVE_CURRENT: CodeInfo(
        400,
        "A hot-unplug requested a total above the VM's current one.",
        "Request less than the VM has. To add, use the hot-plug path.",
    ),
    Code.NO_ACPI: CodeInfo(400, "The VM has no ACPI, which announces hot-plugged devices to the guest.", _USE_PREPARE),
    Code.MACHINE_NOT_SUPPORTED: CodeInfo(
        400,
        "The VM's architecture or machine type does not support this while the VM runs.",
        "Change the VM's definition (virsh edit VM), then power it off and start it again.",
    ),
    Code.DEFINITION_REFUSED: CodeInfo(
        500,
        "libvirt rejected the prepared definition. The existing one is unchanged.",
        "Read libvirt's error in the message; then prepare for smaller maxima or correct that part of the definition.",
    ),
    Code.DEFINITION_NOT_CHECKED: CodeInfo(
        400,
        "A dry run could not check the prepared definition, because this host does not have libvirt's schema.",
        "Install the file that the message names (it comes with libvirt's daemon), or run without "
        '"dryRun": if libvirt '
        "rejects the new definition, the existing one stays unchanged.",
    ),
    Code.FORMER_XML_NOT_KEPT: CodeInfo(
        500,
        "The previous definition could not be saved in agent.state_dir, so it was not replaced.",
        "Check free space and permissions of agent.state_dir.",
    ),
    Code.CPU_ABOVE_MAXIMUM: CodeInfo(
        400,
        "The requested number of vCPUs is above the VM's maximum.",
        "Request no more than the maximum, or raise <vcpu> (and the topology) in the persistent definition and power "
        "the VM off and on.",
    ),
    Code.CPU_TOPOLOGY_MISMATCH: CodeInfo(
        400, "sockets x dies x cores x threads does not equal the vCPU maximum.", _PREPARE
    ),
    Code.CPU_NOT_WHOLE_CORE: CodeInfo(
        400,
        "On this architecture only whole cores can be added or removed, and the requested number is not a multiple "
        "of a core's threads.",
        "Request a multiple of the threads per core of the VM.",
    ),
    Code.CPU_ABOVE_HOST_LIMIT: CodeInfo(
        400,
        "The VM's vCPU maximum is above the hypervisor's limit for its machine type.",
        "Lower the vCPU maximum; above 255 an x86 VM needs an IOMMU with eim='on'.",
    ),
    Code.CPU_NOT_REMOVABLE: CodeInfo(
        400,
        "vCPUs that were not hotpluggable when the VM started cannot be removed while it runs.",
        'Request at least the number in the message, or use "affect": "config" and power the VM off and on.',
    ),
    Code.CPU_REMOVAL_UNSAFE: CodeInfo(
        400,
        "The VM is emulated (domain type qemu). There QEMU never confirms the removal of a vCPU, and crashes later.",
        'Use "affect": "config" and power the VM off and on, or run the VM with KVM.',
    ),
    Code.CPU_SHARES_NOT_SET: CodeInfo(
        200,
        "CPU shares should follow the number of vCPUs, but the VM has no shares set: it has the default weight.",
        "Set <cputune><shares> (virsh schedinfo) to give the VM more or less weight than others.",
    ),
    Code.CPU_REMOVAL_PENDING: CodeInfo(
        200,
        "The guest has not given up the vCPUs yet, and has not refused either.",
        "Free the CPUs in the guest (tasks pinned to them, real-time threads), then send the command again.",
    ),
    Code.CPU_REMOVAL_REFUSED: CodeInfo(
        409,
        "The guest refused to give up a vCPU.",
        "Free the CPUs in the guest (tasks pinned to them, real-time threads), then send the command again.",
    ),
    Code.CPU_REMOVAL_UNFINISHED: CodeInfo(
        200,
        "The guest gave up every vCPU that it was asked to, but time ran out before it was asked for the rest.",
        'Send the command again to continue, with a longer "timeoutSec" if the guest is slow.',
    ),
    Code.REMOVAL_LOST: CodeInfo(
        200,
        "The VM was powered off before its guest gave up the device. The removal request ended with the power-off.",
        "Send the command again once the VM runs.",
    ),
    Code.NO_MAX_MEMORY: CodeInfo(400, "The VM has no <maxMemory>, so no memory device can be attached.", _USE_PREPARE),
    Code.MEMORY_ABOVE_MAXIMUM: CodeInfo(
        400,
        "The requested memory is above the VM's <maxMemory>.",
        "Request no more than the maximum, or raise <maxMemory> in the persistent definition and power the VM off "
        "and on.",
    ),
    Code.SLOTS_EXHAUSTED: CodeInfo(
        400,
        "All memory slots are in use.",
        "Raise the slots of <maxMemory> in the persistent definition and power the VM off and on. Larger dimms need "
        "fewer slots.",
    ),
    Code.NO_NUMA_CELL: CodeInfo(400, "The VM has no guest NUMA cell, which memory hotplug needs.", _USE_PREPARE),
    Code.NUMA_CELLS_INCOMPLETE: CodeInfo(400, "The guest NUMA cells do not cover all possible vCPUs.", _USE_PREPARE),
    Code.NUMA_NODE_NOT_FOUND: CodeInfo(
        400, "The guest has no such NUMA node.", 'Use a node that the message lists, or leave "node" out.'
    ),
    Code.MEMORY_NOT_ALIGNED: CodeInfo(
        400,
        "The amount to add is not a multiple of the guest's memory block, so the guest could never use it.",
        'Request an amount that the message names, or leave "strict" out to round it up.',
    ),
    Code.MEMORY_DEVICE_MISALIGNED: CodeInfo(
        400,
        "The size of one of the VM's memory devices is not a multiple of the guest's memory block. The guest can use "
        "neither that device nor any plugged after it.",
        "Detach that device (virsh detach-device) before you plug more memory.",
    ),
    Code.HOST_MEMORY_SHORT: CodeInfo(
        400,
        "The host has too little free memory.",
        "Free memory on the host, migrate a VM away, or request less.",
    ),
    Code.HOST_MEMORY_PROMISED: CodeInfo(
        400,
        "The plug would promise the VMs more memory than the host has. All the memory that a VM may use counts, "
        "whether the VM uses it now or not.",
        "Unplug memory from an idle VM (kvmagentctl reclaim --dry-run shows candidates), migrate one away, or raise "
        "host.memory_overcommit.",
    ),
    Code.HOST_NODE_MEMORY_SHORT: CodeInfo(
        400,
        "The host NUMA nodes that the VM's memory must come from have too little free memory.",
        "Free memory on those nodes, or widen the VM's <numatune>.",
    ),
    Code.HOST_HUGEPAGES_SHORT: CodeInfo(
        400,
        "The VM's memory is backed by hugepages, and the host has too few free ones of that size.",
        "Reserve more hugepages of that size on the host (vm.nr_hugepages), or request less.",
    ),
    Code.MEMORY_HARD_LIMIT: CodeInfo(
        400,
        "The VM's memtune hard_limit is too low for the requested amount: QEMU would be killed or could not lock "
        "memory.",
        "Raise <memtune><hard_limit> (virsh memtune --hard-limit), or remove it.",
    ),
    Code.MEMORY_LOCKED: CodeInfo(
        400, "The VM's memory is locked, which virtio-mem does not support.", 'Use "method": "dimm".'
    ),
    Code.MEMORY_LOCK_LIMIT: CodeInfo(
        400,
        "The VM's memory is locked (for example for a passed-through device), and QEMU is not allowed to lock so much.",
        "Raise LimitMEMLOCK of libvirt's service and power the VM off and on, or request less.",
    ),
    Code.MEMORY_ENCRYPTED: CodeInfo(
        400,
        "The VM's memory is encrypted (launchSecurity), so memory cannot be plugged.",
        "Set the VM's memory in its definition, before it starts.",
    ),
    Code.MEMORY_NOT_REMOVABLE: CodeInfo(
        400,
        "None of the VM's memory devices can be removed without going below the requested total.",
        "Request a total that the message names. Boot memory cannot be unplugged, only ballooned.",
    ),
    Code.MEMORY_SIZE_NOT_REACHABLE: CodeInfo(
        200,
        "No combination of the VM's memory devices has exactly this size. Less was removed, never more.",
        "To get an exact total, request one that the message names.",
    ),
    Code.MEMORY_REMOVAL_REFUSED: CodeInfo(
        409,
        "The guest refused to release a memory device, because its kernel cannot move some of the memory in it.",
        f"Reboot the guest with the kernel parameters {MOVABLE_PARAMETERS} (Linux 5.16 and later), so that plugged "
        "memory stays removable within the kernel's limits, or free memory in the guest and send the command again.",
    ),
    Code.MEMORY_REMOVAL_PENDING: CodeInfo(
        200,
        "The guest has neither released a memory device nor refused to. It may still release it later.",
        "Check the guest (is it running, busy, still booting?) and read the VM again later. To get a second callback "
        "when "
        'the removal ends, use "lateCallback": true.',
    ),
    Code.VIRTIO_MEM_STALLED: CodeInfo(
        500,
        "The guest did not resize its virtio-mem device as requested. The request was set back to the actual size.",
        "Load the virtio_mem driver in the guest (Linux 5.8 and later) and look at its kernel log; to shrink, plugged "
        f"memory must be movable (kernel parameters {MOVABLE_PARAMETERS}, Linux 5.16 and later). Then send the command "
        "again.",
    ),
    Code.NO_BALLOON: CodeInfo(
        400,
        "The VM has no memory balloon device.",
        'Use "method": "dimm", or add <memballoon model="virtio"/> to the persistent definition and power the VM off '
        "and on.",
    ),
    Code.BALLOON_ABOVE_TOTAL: CodeInfo(
        400,
        "The balloon cannot give the VM more than its boot memory and plugged devices.",
        'Use "method": "dimm" to add memory beyond that.',
    ),
    Code.BALLOON_NOT_ANSWERING: CodeInfo(
        500,
        "The balloon did not reach its target: the guest has no balloon driver, or cannot give up the memory. The "
        "target was set back.",
        "Load the virtio_balloon driver in the guest, or free memory there, then send the command again.",
    ),
    Code.BALLOON_BELOW_FLOOR: CodeInfo(
        400,
        "The balloon would take memory that the guest needs. Memory that is offline in the guest counts as taken "
        "already.",
        "Request at least the amount in the message, or first bring the plugged memory online in the guest.",
    ),
    Code.GUEST_AGENT_ABSENT: CodeInfo(
        400,
        "The VM has no guest-agent channel.",
        "Add a virtio channel named org.qemu.guest_agent.0 to the VM and run qemu-ga in the guest.",
    ),
    Code.GUEST_AGENT_DISCONNECTED: CodeInfo(
        400, "No guest agent is connected.", "Install and start qemu-ga in the guest."
    ),
    Code.GUEST_AGENT_UNRESPONSIVE: CodeInfo(
        400, "The guest agent did not answer in time.", "Restart qemu-ga in the guest, and find out what blocks it."
    ),
    Code.GUEST_AGENT_INVALID: CodeInfo(
        503,
        "The guest agent sent an answer with an invalid format or impossible numbers. The agent ignores what this "
        "guest reports until its answers are valid.",
        "Check which program runs as the guest agent; reinstall qemu-ga and restart it.",
    ),
    Code.GUEST_AGENT_FROZEN: CodeInfo(
        500,
        "The guest's filesystems are frozen (by a backup, for example). Until they are thawed, its guest agent does "
        "nothing else.",
        "Wait for the backup to end, or run virsh domfsthaw VM; then send the command again.",
    ),
    Code.GUEST_AGENT_REFUSED: CodeInfo(
        400,
        "The guest agent refused a command.",
        "Allow the command in qemu-ga's configuration (block-rpcs, allow-rpcs) in the guest.",
    ),
    Code.GUEST_ONLINE_NOT_ASKED: CodeInfo(
        400,
        "The request or the VM's policy turned guestOnline off, so nothing was brought online in the guest.",
        "Bring the new vCPUs or memory online in the guest.",
    ),
    Code.GUEST_CPU_NOT_SEEN: CodeInfo(
        400,
        "The guest does not list a vCPU that the hypervisor plugged.",
        "Check the guest's kernel log for ACPI messages, and its kernel parameters maxcpus and nr_cpus.",
    ),
    Code.GUEST_CPU_OFFLINE: CodeInfo(400, "Some of the guest's vCPUs are offline.", CPU_ONLINE_HINT),
    Code.GUEST_MEMORY_NOT_SEEN: CodeInfo(
        400,
        "The guest does not list memory that the hypervisor plugged.",
        "Check the guest's kernel log for ACPI and hotplug messages.",
    ),
    Code.GUEST_MEMORY_OFFLINE: CodeInfo(400, "Some of the guest's memory blocks are offline.", MEMORY_ONLINE_HINT),
    Code.GUEST_MEMORY_SHORT: CodeInfo(
        400,
        "The guest has too little free memory. Added memory costs its kernel 1/64 for the page map; what is in use in "
        "removed memory must be moved elsewhere.",
        "Free memory in the guest, or request a smaller change.",
    ),
    Code.GUEST_CPU_IN_USE: CodeInfo(
        409,
        "The guest could not take a CPU offline.",
        "Find out in the guest what keeps the CPU busy (kernel log, tasks pinned to it).",
    ),
    Code.GUEST_MEMORY_IN_USE: CodeInfo(
        409,
        "The guest could not take memory blocks offline, because its kernel cannot move some of the memory in them.",
        f"Reboot the guest with the kernel parameters {MOVABLE_PARAMETERS} (Linux 5.16 and later), so that plugged "
        "memory stays removable within the kernel's limits, or free memory in the guest and send the command again.",
    ),
    Code.GUEST_FREE_SHOWS_LESS: CodeInfo(
        200,
        "The guest's free command shows less memory than the VM has. Firmware, the kernel, its page map (about 1.6 %) "
        "and a crash kernel are not part of MemTotal.",
        "Nothing needs to be done. Compare how much the total grew, not the totals.",
    ),
    Code.GUEST_MEMORY_IMBALANCED: CodeInfo(
        200,
        "The plugged memory is more than three times the boot memory. If the guest onlined it as movable, its kernel "
        "cannot use it for itself, and may kill processes for lack of memory while much is free.",
        f"Start the guest with the kernel parameters {MOVABLE_PARAMETERS} (Linux 5.16 and later) and not with "
        "online_movable, or give the VM more boot memory.",
    ),
    Code.GUEST_OS_UNABLE: CodeInfo(
        400,
        "The guest's operating system does not support this while it runs.",
        'Use "affect": "config" and power the VM off and on.',
    ),
    Code.GUEST_OS_LIMITED: CodeInfo(
        200,
        "The guest's operating system may not use everything that is plugged.",
        "Check in the guest whether it uses the new vCPUs or memory.",
    ),
    Code.PLAN_NOT_WHOLE: CodeInfo(
        200,
        "The plan stops where the next steps depend on the guest: for example, on what it brings online by itself.",
        "Nothing needs to be done. The reply of the command itself has all steps.",
    ),
    Code.LEFTOVER_TAKEN_BACK: CodeInfo(
        200,
        "An earlier request to the guest (a balloon target or a virtio-mem size) was never reached, and the guest "
        "could have followed it at any time. The plug set that request to what the guest has.",
        "Nothing needs to be done. To shrink the VM, use the unplug path.",
    ),
    Code.GUEST_STILL_ASKED: CodeInfo(
        200,
        "The task requested an amount from the guest that was not reached, and could not withdraw the request because "
        "libvirt was down or refused. The guest may still follow it at any time.",
        "Send HotPlugMemory with the total that the VM has: it sets each request to what the guest has.",
    ),
    Code.DRIFT: CodeInfo(
        200,
        "The running VM and its persistent definition differ.",
        'Send the command again with "affect": "both", or correct the persistent definition, before the next start.',
    ),
    Code.RESTART_REQUIRED: CodeInfo(
        200,
        "The persistent definition has something that the running VM lacks: larger maxima, more slots or a device.",
        "Power the VM off and start it again. A reboot of the guest is not enough.",
    ),
    Code.MEMORY_UNKNOWN_TO_LIBVIRT: CodeInfo(
        200,
        "QEMU has memory that libvirt does not know of, because libvirtd was killed while it attached a device. The "
        "memory counts, but it cannot be removed, and the VM cannot be migrated.",
        "Power the VM off and on when convenient. It then starts from its persistent definition.",
    ),
}

_LOOK_AT_POLICY = "virsh metadata VM urn:kvmagent:policy:1; virsh metadata VM urn:kvmagent:policy:1 --config"
#: What an operator runs to see the cause of a code: on the host, or in the guest where it says so. VM is its name.
LOOKS: dict[Code, str] = {
    Code.UNKNOWN_TASK: "kvmagentctl tasks --limit 1000",
    Code.TASK_CONFLICT: "kvmagentctl task ID",
    Code.TASK_NOT_CANCELLABLE: "kvmagentctl task ID",
    Code.CREDENTIALS_WRONG: "cut -d: -f1 /etc/kvmagent/tokens",
    Code.CERTIFICATE_NOT_ALLOWED: "openssl x509 -in CERTIFICATE -noout -ext subjectAltName",
    Code.ROLE_MISSING: "kvmagentctl config",
    Code.CLIENT_NOT_ALLOWED: "journalctl -u kvmagent -g CLIENT_NOT_ALLOWED",
    Code.CALLBACK_NOT_ALLOWED: "kvmagentctl config",
    Code.TOO_MANY_CONNECTIONS: "ss -tn state established '( sport = :7070 )'",
    Code.QUEUE_FULL: "kvmagentctl status; kvmagentctl tasks --state running",
    Code.JOURNAL_UNAVAILABLE: "df -h /var/lib/kvmagent; df -i /var/lib/kvmagent; ls -ld /var/lib/kvmagent",
    Code.TASK_UNREADABLE: "kvmagentctl task ID; kvmagentctl config",
    Code.GUEST_STILL_ASKED: "virsh dommemstat VM; virsh dumpxml VM | grep -A8 virtio-mem",
    Code.REFUSED_BY_HOOK: "journalctl -u kvmagent -g 'hook='; kvmagentctl config",
    Code.ADDRESS_NOT_FREE: "ss -ltnp; ss -lxp; systemctl status kvmagent",
    Code.STATE_DIR_IN_USE: "fuser -v /var/lib/kvmagent/journal.sqlite; systemctl status kvmagent",
    Code.INTERNAL_ERROR: "journalctl -u kvmagent -p err -n 100",
    Code.BAD_CONFIGURATION: "kvmagentctl config --check",
    Code.LIBVIRT_UNAVAILABLE: "systemctl status libvirtd virtqemud; virsh -c qemu:///system version",
    Code.LIBVIRT_REFUSED: "tail -n 50 /var/log/libvirt/qemu/VM.log",
    Code.LIBVIRT_BUSY: "virsh domjobinfo VM",
    Code.NOT_VERIFIED: "virsh dumpxml VM; tail -n 50 /var/log/libvirt/qemu/VM.log",
    Code.VM_NOT_FOUND: "virsh list --all --uuid --name",
    Code.VM_NOT_RUNNING: "virsh domstate VM --reason",
    Code.VM_PAUSED: "virsh domstate VM --reason",
    Code.VM_SUSPENDED: "virsh domstate VM --reason",
    Code.VM_SAVED: "virsh list --all --with-managed-save",
    Code.VM_TRANSIENT: "virsh dominfo VM",
    Code.VM_MIGRATED: "in the guest: lscpu -e",
    Code.VM_CRASHED: "tail -n 50 /var/log/libvirt/qemu/VM.log",
    Code.VM_OPTED_OUT: _LOOK_AT_POLICY,
    Code.ABOVE_POLICY: _LOOK_AT_POLICY,
    Code.POLICY_UNREADABLE: _LOOK_AT_POLICY,
    Code.NO_ACPI: "kvmagentctl ready VM --prepare --diff",
    Code.MACHINE_NOT_SUPPORTED: "virsh dumpxml VM | grep '<type arch'",
    Code.DEFINITION_NOT_CHECKED: "ls /usr/share/libvirt/schemas/domain.rng",
    Code.FORMER_XML_NOT_KEPT: "df -h /var/lib/kvmagent; ls -l /var/lib/kvmagent/former-xml",
    Code.CPU_ABOVE_MAXIMUM: "virsh vcpucount VM",
    Code.CPU_TOPOLOGY_MISMATCH: "virsh dumpxml VM | grep -e '<vcpu ' -e '<topology'",
    Code.CPU_ABOVE_HOST_LIMIT: "virsh domcapabilities --machine q35 | grep '<vcpu'",
    Code.CPU_NOT_WHOLE_CORE: "virsh dumpxml VM | grep '<topology'",
    Code.CPU_NOT_REMOVABLE: "virsh dumpxml VM | grep '<vcpu '",
    Code.CPU_REMOVAL_UNSAFE: "virsh dumpxml VM | grep '<domain type'",
    Code.CPU_REMOVAL_PENDING: "virsh vcpucount VM; in the guest: lscpu -e",
    Code.CPU_REMOVAL_REFUSED: "in the guest: dmesg | tail; lscpu -e; ps -eLo psr,pid,cls,comm",
    Code.CPU_REMOVAL_UNFINISHED: "virsh vcpucount VM; in the guest: lscpu -e",
    Code.CPU_SHARES_NOT_SET: "virsh schedinfo VM",
    Code.NO_MAX_MEMORY: "kvmagentctl ready VM --prepare --diff",
    Code.MEMORY_ABOVE_MAXIMUM: "virsh dumpxml VM | grep -i memory",
    Code.SLOTS_EXHAUSTED: "virsh dumpxml VM | grep -e '<maxMemory' -e '<memory model'",
    Code.NO_NUMA_CELL: "kvmagentctl ready VM --prepare --diff",
    Code.NUMA_CELLS_INCOMPLETE: "virsh dumpxml VM | grep -e '<vcpu ' -e '<cell '",
    Code.NUMA_NODE_NOT_FOUND: "virsh dumpxml VM | grep '<cell '",
    Code.MEMORY_DEVICE_MISALIGNED: "virsh dumpxml VM | grep -A 12 '<memory model'",
    Code.HOST_MEMORY_SHORT: "free -h; virsh list --all",
    Code.HOST_MEMORY_PROMISED: "kvmagentctl status; kvmagentctl reclaim --dry-run",
    Code.HOST_NODE_MEMORY_SHORT: "virsh freecell --all; virsh numatune VM",
    Code.HOST_HUGEPAGES_SHORT: "virsh freepages --all",
    Code.MEMORY_HARD_LIMIT: "virsh memtune VM",
    Code.MEMORY_LOCK_LIMIT: "grep 'Max locked memory' /proc/$(cat /run/libvirt/qemu/VM.pid)/limits",
    Code.MEMORY_LOCKED: "virsh dumpxml VM | grep -e '<locked' -e '<hostdev'",
    Code.MEMORY_ENCRYPTED: "virsh dumpxml VM | grep -A 5 '<launchSecurity'",
    Code.MEMORY_NOT_REMOVABLE: "virsh dumpxml VM | grep -A 12 '<memory model'",
    Code.MEMORY_SIZE_NOT_REACHABLE: "virsh dumpxml VM | grep -A 12 '<memory model'",
    Code.MEMORY_REMOVAL_REFUSED: "in the guest: dmesg | grep -i offline; lsmem",
    Code.MEMORY_REMOVAL_PENDING: "kvmagentctl vms; in the guest: lsmem",
    Code.VIRTIO_MEM_STALLED: "virsh dumpxml VM | grep -A 12 '<memory model'; in the guest: lsmod | grep virtio_mem",
    Code.NO_BALLOON: "virsh dumpxml VM | grep '<memballoon'",
    Code.BALLOON_NOT_ANSWERING: "virsh dommemstat VM; in the guest: lsmod | grep virtio_balloon",
    Code.BALLOON_BELOW_FLOOR: "virsh dommemstat VM; in the guest: lsmem",
    Code.GUEST_AGENT_ABSENT: "virsh dumpxml VM | grep guest_agent",
    Code.GUEST_AGENT_DISCONNECTED: 'virsh qemu-agent-command VM \'{"execute":"guest-ping"}\'',
    Code.GUEST_AGENT_UNRESPONSIVE: 'virsh qemu-agent-command VM \'{"execute":"guest-ping"}\'',
    Code.GUEST_AGENT_INVALID: 'virsh qemu-agent-command VM \'{"execute":"guest-get-vcpus"}\'',
    Code.GUEST_AGENT_REFUSED: 'virsh qemu-agent-command VM \'{"execute":"guest-info"}\'',
    Code.GUEST_CPU_NOT_SEEN: "virsh vcpucount VM --guest; in the guest: dmesg | grep -i cpu; cat /proc/cmdline",
    Code.GUEST_CPU_OFFLINE: "virsh guestvcpus VM; in the guest: lscpu -e",
    Code.GUEST_MEMORY_NOT_SEEN: "in the guest: lsmem --all; dmesg | grep -i -e acpi -e hotplug",
    Code.GUEST_MEMORY_OFFLINE: "in the guest: lsmem --all; cat /sys/devices/system/memory/auto_online_blocks",
    Code.GUEST_MEMORY_SHORT: "in the guest: free -m",
    Code.GUEST_CPU_IN_USE: "in the guest: dmesg | tail; ps -eLo psr,pid,cls,comm",
    Code.GUEST_MEMORY_IN_USE: "in the guest: lsmem --all; dmesg | grep -i offline",
    Code.GUEST_FREE_SHOWS_LESS: "in the guest: grep MemTotal /proc/meminfo; dmesg | grep Memory:",
    Code.GUEST_MEMORY_IMBALANCED: "in the guest: grep . /sys/module/memory_hotplug/parameters/*; "
    "grep -e zone -e managed /proc/zoneinfo",
    Code.RESTART_REQUIRED: "diff <(virsh dumpxml VM) <(virsh dumpxml VM --inactive)",
    Code.DRIFT: "diff <(virsh dumpxml VM) <(virsh dumpxml VM --inactive)",
    Code.MEMORY_UNKNOWN_TO_LIBVIRT: "virsh qemu-monitor-command VM --hmp info memory-devices; virsh dumpxml VM",
}


class AgentError(Exception):
    """A failure that the caller sees: `code`, `message` (what was found, what is needed), `remedy`, `details`.

    `expected` failures are caused by the caller or the VM and log one line; others log a traceback, once. The message
    goes into answers, the log and the journal, so its URLs are shown without their secrets.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        remedy: str | None = None,
        details: dict[str, object] | None = None,
        expected: bool = True,
    ) -> None:
        self.message = shown_text(message)
        super().__init__(self.message)
        self.code = code
        self.remedy = CODES[code].remedy if remedy is None else remedy
        self.details = details or {}
        self.expected = expected

    @property
    def status(self) -> int:
        """The HTTP status of a request that this error refuses at once."""
        return CODES[self.code].status
