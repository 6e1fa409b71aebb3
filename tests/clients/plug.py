"""Gives a VM vCPUs by the client that openapi-python-client makes of an agent's document, and tells what came of it.

plug.py AGENT VM VCPUS TASK
"""

import json
import sys

from kvmagent_client import Client
from kvmagent_client.api.commands import hot_plug_cpu
from kvmagent_client.api.reads import get_task, get_vm
from kvmagent_client.models import Accepted, HotPlugCpuRequest, ReadinessReply, Refusal, WholeTask


def main(url: str, vm: str, cpus: str, task_uuid: str) -> None:
    client = Client(url, raise_on_unexpected_status=True)
    request = HotPlugCpuRequest(vm_uuid=vm, cpu_num=int(cpus))
    accepted = hot_plug_cpu.sync(client=client, body=request, taskuuid=task_uuid, callbackurl="none")
    assert isinstance(accepted, Accepted), accepted
    while True:
        task = get_task.sync(accepted.task_uuid, client=client)
        assert isinstance(task, WholeTask), task
        if task.state not in ("accepted", "running"):
            break
    after = get_vm.sync(vm, client=client)
    assert isinstance(after, ReadinessReply), after
    wrong = hot_plug_cpu.sync(
        client=client, body=HotPlugCpuRequest(vm_uuid=vm, cpu_num=0), taskuuid=task_uuid, callbackurl="none"
    )
    assert isinstance(wrong, Refusal), wrong
    print(json.dumps({"outcome": task.outcome, "cpuNum": after.after.cpu_num, "refused": wrong.error_code}))


if __name__ == "__main__":
    main(*sys.argv[1:])
