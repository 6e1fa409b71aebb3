// What a VM can have now, after a restart, or never: asked of the agent when somebody opens the VM's row.

import { fill, h, icon, plural, remedy, sentence, size } from "./dom.js";
import { read } from "./poll.js";

const TIMEOUT_MS = 30000;
const MIB = 2 ** 20;
const WORDS = {
  live: ["good", "now"],
  "live-unconfirmed": ["good", "now, not confirmed by the guest"],
  "live-rounded": ["good", "now, rounded up"],
  "live-partial": ["warn", "now, in part"],
  restart: ["warn", "after a restart"],
  never: ["bad", "not possible"],
};

/** The totals that are asked about: half, a little more, all that it was started for, and multiples of what it has. */
function rungs({ cpu, memory }, vm) {
  const step = vm.headroom?.memoryGranularity || 128 * MIB;
  const whole = (bytes) => Math.ceil(bytes / step) * step;
  const cpus = [Math.floor(cpu.has / 2), cpu.has + 1, cpu.most, 2 * cpu.has, 4 * cpu.has];
  const sizes = [memory.has / 2, memory.has + step, memory.most, 2 * memory.has, 4 * memory.has].map(whole);
  const sorted = (totals, has) => [...new Set(totals)].filter((total) => total > 0 && total !== has).sort((a, b) => a - b);
  return [
    ...sorted(cpus, cpu.has).map((cpuNum) => ({ cpuNum })),
    ...sorted(sizes, memory.has).map((memorySize) => ({ memorySize })),
  ];
}

/** Ask what a VM can have, and show it in an element. What is asked later is shown, whichever is answered first. */
export async function showLadder(element, vm, measures) {
  const asked = String(Number(element.dataset.asked ?? 0) + 1);
  element.dataset.asked = asked;
  if (!element.childElementCount) fill(element, h("p", { class: "muted" }, "Asking the agent what this VM can have…"));
  let content;
  try {
    const question = { vmUuid: vm.vmUuid, targets: rungs(measures, vm) };
    content = draw((await read("vm/hotplug/plan", { timeout: TIMEOUT_MS, question })).plans);
  } catch (error) {
    const told = error.errorCode ? error.message : "The agent did not say what this VM can have";
    content = [h("p", { class: "problem" }, icon("bad"), told), remedy(error.remedy)];
  }
  if (element.dataset.asked === asked) fill(element, content);
}

function draw(plans) {
  const kinds = [["vCPUs", ({ target }) => target.cpuNum], ["Memory", ({ target }) => target.memorySize]];
  return kinds.map(([title, pick]) => h("div", {},
    h("h3", {}, `${title} it can have`),
    h("ul", {}, plans.filter(pick).map(rung))));
}

function rung({ target, verdict, memorySize, reasons, prepare }) {
  const [symbol, when] = WORDS[verdict] ?? ["warn", verdict];
  const words = prepare.length ? "after a prepare and a restart" : when;
  const total = target.cpuNum ? plural(target.cpuNum, "vCPU") : size(target.memorySize);
  const instead = /^live-(rounded|partial)$/.test(verdict) ? `: ${size(memorySize)}` : "";
  const [first] = verdict === "live" ? [] : reasons;
  return h("li", { class: verdict },
    h("p", {}, icon(symbol), h("b", {}, total), ` ${words}${instead}`),
    first ? h("p", { class: "muted" }, sentence(first.message)) : null);
}
