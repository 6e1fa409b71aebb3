// Gives a VM vCPUs by the client that openapi-typescript makes of an agent's document, and tells what came of it.
//     node plug.js AGENT VM VCPUS TASK

import createClient from "openapi-fetch";

import type { components, paths } from "./agent.js";

declare const process: { argv: string[] };

const [url, vmUuid, cpuNum, taskuuid] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: url });

const params = { header: { taskuuid, callbackurl: "none" } };
const { data: accepted, error: refusal } = await client.POST("/vm/hotplug/cpu", {
  params,
  body: { vmUuid, cpuNum: Number(cpuNum) },
});
if (!accepted) throw new Error(`${refusal.errorCode}: ${refusal.error}`);

let task: components["schemas"]["WholeTask"] | undefined;
while (!task || task.state === "accepted" || task.state === "running") {
  const answer = await client.GET("/tasks/{taskUuid}", { params: { path: { taskUuid: accepted.taskUuid } } });
  if (!answer.data) throw new Error(answer.error.error);
  task = answer.data;
}

const { data: vm } = await client.GET("/vms/{vmUuid}", { params: { path: { vmUuid } } });
const wrong = await client.POST("/vm/hotplug/cpu", { params, body: { vmUuid, cpuNum: 0 } });
console.log(
  JSON.stringify({ outcome: task.outcome, cpuNum: vm?.after.cpuNum, refused: wrong.error?.errorCode ?? null }),
);
