#!/usr/bin/python
# Copyright: the kvmagent maintainers
# Apache License 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""Tells of VMs: their numbers, their headroom, and what stands in the way."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vm_info
short_description: Tell the VMs of a host, and whether they can be given CPUs and memory
description:
  - Asks the kvmagent of a host for its VMs, or for one, as they are at this moment.
  - With O(cpu_num) or O(memory_size), whether a VM could be brought to these totals now.
version_added: 0.1.0
author:
  - the kvmagent maintainers (@kvmagent)
extends_documentation_fragment:
  - kvmagent.hotplug.agent
options:
  name:
    description: A VM's name or UUID. Without it, all VMs of the host.
    type: str
  cpu_num:
    description: The number of vCPUs to be ready for.
    type: int
  memory_size:
    description: The amount of memory to be ready for. C(8G), C(512M) or a number of bytes.
    type: str
attributes:
  check_mode:
    description: Changes nothing in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Look at all VMs
  kvmagent.hotplug.vm_info:
  register: host

- name: Name those that can be given nothing, and the first reason
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ item.blockers[0].message }}"
  loop: "{{ host.vms | rejectattr('ready') | selectattr('blockers') }}"

- name: Ask whether db-7 could have 16 vCPUs
  kvmagent.hotplug.vm_info:
    name: db-7
    cpu_num: 16
"""

RETURN = r"""
vms:
  description: The VMs. C(success) is false for one that could not be read; C(error) says why.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The domain's name.
      type: str
      returned: success
    vmUuid:
      description: Its UUID, or as it was asked for.
      type: str
      returned: success
    state:
      description: What libvirt says of it.
      type: str
      returned: success
      sample: running
    ready:
      description: Whether a command would be accepted now.
      type: bool
      returned: success
    blockers:
      description: What stands in the way, each with C(code), C(message) and C(remedy).
      type: list
      elements: dict
      returned: success
    headroom:
      description: How far it can grow now and come down.
      type: dict
      returned: success
    after:
      description: Its numbers now. Sizes are bytes.
      type: dict
      returned: success
error_code:
  description: The agent's stable name of what went wrong.
  returned: failure
  type: str
  sample: VM_NOT_FOUND
"""

from ansible_collections.kvmagent.hotplug.plugins.module_utils.agent import (
    describe_failure,
    parse_sizes,
    run_module,
)

SPEC = {"name": {"type": "str"}, "cpu_num": {"type": "int"}, "memory_size": {"type": "str"}}


def find_vms(module, agent):
    """Return what was asked for."""
    params = parse_sizes(module.params, "memory_size")
    if params["name"] is None:
        return {"changed": False, "vms": agent.list_vms()}
    if params["cpu_num"] is None and params["memory_size"] is None:
        return {"changed": False, "vms": [agent.get("vms", params["name"])]}
    request = {"vmUuid": params["name"], "cpuNum": params["cpu_num"], "memorySize": params["memory_size"]}
    reply = agent.run("/vm/hotplug/ready", request, params["wait_timeout"])
    if not reply["success"]:
        raise describe_failure(reply)
    return {"changed": False, "vms": [reply]}


def main():
    """Run the module."""
    run_module(SPEC, find_vms, required_by={"cpu_num": "name", "memory_size": "name"})


if __name__ == "__main__":
    main()
