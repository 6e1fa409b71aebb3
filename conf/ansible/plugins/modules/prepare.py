#!/usr/bin/python
# Copyright: the kvmagent maintainers
# Apache License 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""Makes a VM's next start ready for hotplug."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: prepare
short_description: Make the next start of a VM ready for hotplug
description:
  - Edits a VM's persistent definition, through the kvmagent of its host, so that CPUs and memory can be added to it.
  - The running VM is not touched, and no VM is restarted.
version_added: 0.1.0
author:
  - the kvmagent maintainers (@kvmagent)
extends_documentation_fragment:
  - kvmagent.hotplug.agent
options:
  name:
    description: The VM's name or UUID.
    type: str
    required: true
  max_cpu_num:
    description: How many vCPUs it shall be able to have. Without it, what it is prepared for, or four times its own.
    type: int
  max_memory_size:
    description: How much memory it shall be able to have. C(64G), C(512M) or a number of bytes.
    type: str
  slots:
    description: How many slots for memory it shall have.
    type: int
  memory_device:
    description:
      - What the room for memory is left to.
      - V(dimm) leaves it to dimms; V(virtio-mem) gives each guest NUMA node an empty virtio-mem device that has it, and
        that grows and shrinks in small steps.
    type: str
    choices: [dimm, virtio-mem]
    default: dimm
  free_page_reporting:
    description: Have the balloon give back to the host what the guest frees.
    type: bool
    default: false
  fail_on_clamped:
    description: Whether it is a failure when less than was asked for could be prepared.
    type: bool
    default: false
attributes:
  check_mode:
    description: Changes nothing; tells what would be changed.
    support: full
  diff_mode:
    description: Shows the diff of the persistent XML.
    support: full
"""

EXAMPLES = r"""
- name: Prepare db-7 for 16 vCPUs and 64 GiB
  kvmagent.hotplug.prepare:
    name: db-7
    max_cpu_num: 16
    max_memory_size: 64G
  register: prepared

- name: Tell that a restart is needed
  ansible.builtin.debug:
    msg: db-7 is prepared from its next start on
  when: prepared.restart_required
"""

RETURN = r"""
restart_required:
  description: Whether the persistent definition has something that the running VM lacks until it is powered off and on.
  returned: success
  type: bool
changes:
  description: What was changed, field by field.
  returned: success
  type: list
  elements: dict
  sample: [{"field": "maxCpuNum", "former": 4, "prepared": 16}]
clamped:
  description: What could not be had as asked, and why.
  returned: success
  type: list
  elements: dict
reply:
  description: The agent's reply, whole.
  returned: always
  type: dict
error_code:
  description: The agent's stable name of what went wrong.
  returned: failure
  type: str
  sample: VM_TRANSIENT
"""

from ansible_collections.kvmagent.hotplug.plugins.module_utils.agent import (
    AgentError,
    describe_failure,
    parse_sizes,
    run_module,
    tell_warnings,
)

SPEC = {
    "name": {"type": "str", "required": True},
    "max_cpu_num": {"type": "int"},
    "max_memory_size": {"type": "str"},
    "slots": {"type": "int"},
    "memory_device": {"type": "str", "choices": ["dimm", "virtio-mem"], "default": "dimm"},
    "free_page_reporting": {"type": "bool", "default": False},
    "fail_on_clamped": {"type": "bool", "default": False},
}


def prepare(module, agent):
    """Make the next start ready, or tell what would be changed."""
    params = parse_sizes(module.params, "max_memory_size")
    request = {
        "vmUuid": params["name"],
        "prepare": True,
        "dryRun": module.check_mode,
        "maxCpuNum": params["max_cpu_num"],
        "maxMemorySize": params["max_memory_size"],
        "slots": params["slots"],
        "memoryDevice": params["memory_device"],
        "freePageReporting": params["free_page_reporting"],
    }
    reply = agent.run("/vm/hotplug/ready", request, params["wait_timeout"])
    tell_warnings(module, reply)
    if not reply["success"]:
        raise describe_failure(reply)
    result = {name: reply[name] for name in ("changes", "clamped")}
    result.update(changed=bool(reply["changes"]), restart_required=reply["restartRequired"], reply=reply)
    if reply["clamped"] and params["fail_on_clamped"]:
        why = "; ".join("{field} {prepared} instead of {asked}: {why}".format(**one) for one in reply["clamped"])
        error = AgentError("CLAMPED", why, answer=reply)
        error.result = {"changed": result["changed"]}
        raise error
    if module._diff and reply["diff"]:
        result["diff"] = {"prepared": reply["diff"]}
    return result


def main():
    """Run the module."""
    run_module(SPEC, prepare)


if __name__ == "__main__":
    main()
