#!/usr/bin/python
# Copyright: the kvmagent maintainers
# Apache License 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""Brings a VM to a number of vCPUs and an amount of memory."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vm
short_description: Give CPUs and memory to a running VM, or take them away
description:
  - Brings a VM to a number of vCPUs and an amount of memory while it runs, through the kvmagent of its host.
  - Amounts are totals. A VM that has them already is left alone.
  - Waits for the outcome. No VM is ever restarted or migrated.
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
  cpu_num:
    description: How many vCPUs it shall have.
    type: int
  memory_size:
    description:
      - How much memory it shall have. C(8G), C(512M) or a number of bytes; units are powers of 1024.
      - Memory comes in blocks. A VM that has less than one block more than this counts as having it.
    type: str
  method:
    description:
      - How memory is added. V(auto) gives back the balloon first, then grows a virtio-mem device, then attaches dimms.
      - How memory leaves is the agent's choice.
    type: str
    choices: [auto, dimm, virtio-mem, balloon]
    default: auto
  node:
    description: Guest NUMA node that is to have the added memory.
    type: int
  dimm_size:
    description: Size of each dimm, written as O(memory_size).
    type: str
  strict:
    description: Refuse an amount of memory that has to be rounded up to whole blocks.
    type: bool
    default: false
  scale_shares:
    description: Scale the VM's CPU shares, where it has its own, with the number of vCPUs.
    type: bool
    default: false
  affect:
    description:
      - Which definition is changed.
      - V(auto) is both for a running VM, the persistent one for a VM that is off, the live one for a transient VM.
    type: str
    choices: [auto, both, live, config]
    default: auto
  guest_online:
    description: Whether what was plugged is brought online through the guest agent.
    type: bool
    default: true
  guest_timeout:
    description: Seconds to wait for the guest, for each wait.
    type: int
    default: 60
  fail_on_plugged:
    description:
      - Whether it is a failure when the hypervisor has the new amount and the guest does not confirm that it uses it.
      - Without it that is a warning. What is plugged stays either way.
    type: bool
    default: false
attributes:
  check_mode:
    description:
      - Changes nothing, and is no task of the agent; it plans, and the module tells the plan.
      - Fails where the VM could not be brought there without a restart, with the reason.
    support: full
  diff_mode:
    description: Shows the VM's numbers before and after, and in check mode what the plan edits in its persistent XML.
    support: full
"""

EXAMPLES = r"""
- name: Give db-7 four vCPUs and 8 GiB
  kvmagent.hotplug.vm:
    name: db-7
    cpu_num: 4
    memory_size: 8G

- name: Take memory away, from the controller over TLS
  kvmagent.hotplug.vm:
    url: https://node1:7070
    ca_path: pki/ca.pem
    client_cert: pki/controller.pem
    client_key: pki/controller.key
    name: db-7
    memory_size: 4G
  delegate_to: localhost

- name: Fail where the guest does not confirm that it uses its vCPUs
  kvmagent.hotplug.vm:
    name: db-7
    cpu_num: 4
    fail_on_plugged: true
"""

RETURN = r"""
before:
  description: The VM's numbers before; null where unknown. Sizes are bytes.
  returned: success
  type: dict
  sample: {"cpuNum": 2, "guestCpuNum": 2, "memorySize": 4294967296}
after:
  description: The VM's numbers after, read again; in check mode what they would be.
  returned: success
  type: dict
  sample: {"cpuNum": 4, "guestCpuNum": 4, "memorySize": 8589934592}
outcomes:
  description:
    - What became of each command that was sent.
    - C(online) the guest confirms it, C(plugged) it does not, C(configured) from its next start on, C(unchanged).
    - C(planned) in check mode.
  returned: success
  type: list
  elements: str
  sample: [online]
plan:
  description:
    - In check mode, the agent's plan, whole.
    - C(verdict) says whether it can be done now, C(commands) which steps are known, C(took) how long such took lately.
  returned: in check mode
  type: dict
replies:
  description: The agent's replies, whole; none in check mode.
  returned: success
  type: list
  elements: dict
error_code:
  description: The agent's stable name of what went wrong.
  returned: failure
  type: str
  sample: CPU_ABOVE_MAXIMUM
reply:
  description: What the agent said of the failure.
  returned: failure
  type: dict
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
    "cpu_num": {"type": "int"},
    "memory_size": {"type": "str"},
    "method": {"type": "str", "choices": ["auto", "dimm", "virtio-mem", "balloon"], "default": "auto"},
    "node": {"type": "int"},
    "dimm_size": {"type": "str"},
    "strict": {"type": "bool", "default": False},
    "scale_shares": {"type": "bool", "default": False},
    "affect": {"type": "str", "choices": ["auto", "both", "live", "config"], "default": "auto"},
    "guest_online": {"type": "bool", "default": True},
    "guest_timeout": {"type": "int", "default": 60},
    "fail_on_plugged": {"type": "bool", "default": False},
}
# What the plan takes of the commands' fields.
OF_PLAN = (
    "cpuNum",
    "memorySize",
    "method",
    "node",
    "dimmSize",
    "strict",
    "scaleShares",
    "affect",
    "guestOnline",
)
PATHS = {
    ("cpu", "up"): "/vm/hotplug/cpu",
    ("cpu", "down"): "/vm/hotunplug/cpu",
    ("memory", "up"): "/vm/hotplug/memory",
    ("memory", "down"): "/vm/hotunplug/memory",
}


def find_affect(params, vm):
    """Return which definition is changed."""
    if params["affect"] != "auto":
        return params["affect"]
    if vm["after"]["cpuNum"] is None:
        return "config"
    return "live" if vm["after"]["configCpuNum"] is None else "both"


def plan_commands(params, vm):
    """Return the commands to send, as path and request.

    Whether anything has to be done is the agent's to say: it is asked also where the amounts are right already.
    """
    affect = find_affect(params, vm)
    of_config = affect == "config"
    common = {
        "vmUuid": params["name"],
        "affect": affect,
        "guestOnline": params["guest_online"],
        "timeoutSec": params["guest_timeout"],
    }
    cpu, memory = None, None
    if params["cpu_num"] is not None:
        has = vm["after"]["configCpuNum" if of_config else "cpuNum"]
        direction = "down" if has is not None and params["cpu_num"] < has else "up"
        cpu = direction, {"cpuNum": params["cpu_num"], "scaleShares": params["scale_shares"]}
    if params["memory_size"] is not None:
        wanted, has = params["memory_size"], vm["after"]["configMemorySize" if of_config else "memorySize"] or 0
        granularity = (vm.get("headroom") or {}).get("memoryGranularity") or 1
        if 0 < has - wanted < granularity and not params["strict"]:
            wanted = has
        memory = "down" if wanted < has else "up", {"memorySize": wanted}
    how = {"method": params["method"], "node": params["node"], "dimmSize": params["dimm_size"]}
    how["strict"] = params["strict"]
    special = how != {"method": "auto", "node": None, "dimmSize": None, "strict": False}
    if cpu and memory and cpu[0] == memory[0] == "up" and not special:
        return [("/vm/hotplug/cpumem", dict(common, **cpu[1], **memory[1]))]
    if memory and memory[0] == "up":
        memory[1].update(how)
    parts = (("cpu", cpu), ("memory", memory))
    return [(PATHS[name, part[0]], dict(common, **part[1])) for name, part in parts if part]


def ask_plan(module, agent, params, vm):
    """Tell what the commands would mean, by the agent's own plan: nothing is changed, and there is no task."""
    fields = {}
    for _path, request in plan_commands(params, vm):
        fields.update(request)
    target = {name: fields[name] for name in OF_PLAN if fields.get(name) is not None}
    plan = agent.ask("/vm/hotplug/plan", {"vmUuid": params["name"], "targets": [target]})["plans"][0]
    if not plan["verdict"].startswith("live"):
        reason = plan["reasons"][0]
        error = AgentError(reason["code"], reason["message"], reason["remedy"], plan)
        error.result = {"changed": False, "plan": plan}
        raise error
    tell_warnings(module, {"warnings": plan["reasons"]})
    before, changed = vm["after"], any(command["steps"] for command in plan["commands"])
    after = expect(before, plan, fields["affect"]) if changed else before
    result = {"changed": changed, "before": before, "after": after, "outcomes": ["planned"], "replies": []}
    edits = "\n".join(command["diff"] for command in plan["commands"] if command["diff"])
    return dict(result, plan=plan, edits=edits)


def expect(before, plan, affect):
    """Return a VM's numbers as a plan would leave them."""
    after = dict(before)
    for name in ("cpuNum", "memorySize"):
        config = "config" + name[0].upper() + name[1:]
        names = {"live": [name], "config": [config], "both": [name, config]}[affect]
        if plan[name] is not None:
            after.update({key: plan[name] for key in names if before.get(key) is not None})
    return after


def change(module, agent, params, vm):
    """Send the commands one after the other, and tell what came of them."""
    result = {"changed": False, "before": vm["after"], "after": vm["after"], "outcomes": [], "replies": []}
    try:
        for path, request in plan_commands(params, vm):
            reply = agent.run(path, request, params["wait_timeout"])
            result["replies"].append(reply)
            result["outcomes"].append(reply["outcome"])
            result["changed"] = result["changed"] or reply["outcome"] not in ("unchanged", "refused")
            result["after"] = reply["after"]
            tell_warnings(module, reply)
            if not reply["success"]:
                raise describe_failure(reply)
            if params["fail_on_plugged"] and reply["outcome"] == "plugged":
                message = "the hypervisor has the new amount, and the guest does not confirm that it uses it"
                raise AgentError("PLUGGED", message, "The warnings say why.", reply)
    except AgentError as error:
        error.result = {"changed": result["changed"], "replies": result["replies"]}
        raise
    return result


def size(module, agent):
    """Bring the VM to its size, or tell what that would mean."""
    params = parse_sizes(module.params, "memory_size", "dimm_size")
    vm = agent.get("vms", params["name"])
    result = (ask_plan if module.check_mode else change)(module, agent, params, vm)
    edits = result.pop("edits", "")
    if module._diff:
        result["diff"] = {"before": result["before"], "after": result["after"]}
        if edits:
            result["diff"]["prepared"] = edits
    return result


def main():
    """Run the module."""
    run_module(SPEC, size, required_one_of=[["cpu_num", "memory_size"]])


if __name__ == "__main__":
    main()
