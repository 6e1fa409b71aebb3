// The table of VMs. Rows are kept from one answer to the next, and changed only where their VM has changed.

import { ago, fill, h, icon, makeBar, plural, remedy, sentence, size, unbroken } from "./dom.js";
import { showLadder } from "./ladder.js";
import { now, read } from "./poll.js";

// Rows that are drawn at once: a browser takes seconds for thousands of them.
const AT_ONCE = 100;
// One tick for each vCPU, or for each 2, 4, 8...: more of them cannot be told apart.
const MOST_TICKS = 16;
const MOST_VCPUS = 1024;
// Entries of a history that are shown at once.
const CHANGES = 10;

let shown = AT_ONCE;
let vms = [];
const rows = new Map();

/** The fields of a VM that the table needs; one that cannot be read always has all its fields. */
export const FIELDS =
  "name,state,after,pluggedOffline,atMaximum,readyAfterRestart,guestFellSilent,headroom,blockers,warnings";

/** Whether a warning has no request as its cause: the guest fell silent, or the next start would differ. */
const isUnasked = (vm) => ({ code }) => code === "DRIFT" || (vm.guestFellSilent && code.startsWith("GUEST_AGENT_"));

/** What a row says of a VM: [how bad, symbol, words]; from 2 up somebody has to do something. */
function judge(vm) {
  if (vm.success === false) return [4, "bad", "cannot be read"];
  if (vm.state === "crashed") return [4, "bad", "crashed"];
  if (vm.state === "shutoff") return [0, "idle", "off"];
  const offline = vm.pluggedOffline ?? {};
  if (offline.cpuNum || offline.memorySize) return [3, "warn", vm.state];
  if (vm.warnings.some(isUnasked(vm))) return [2, "warn", vm.state];
  if (vm.state !== "running" || vm.blockers.length) return [1, "warn", vm.state];
  return [0, "good", vm.state];
}

/** The numbers that the row's bars are drawn from. */
function measure(vm) {
  const after = vm.after ?? {};
  const offline = vm.pluggedOffline ?? {};
  const live = vm.state !== "shutoff";
  const cpus = (live ? after.cpuNum : after.configCpuNum) ?? 0;
  const memory = (live ? after.memorySize : after.configMemorySize) ?? 0;
  return {
    live,
    cpu: { has: cpus, most: Math.max(after.maxCpuNum ?? 0, cpus), offline: offline.cpuNum ?? null, ballooned: 0 },
    memory: {
      has: memory,
      most: Math.max(after.maxMemorySize ?? 0, memory),
      offline: offline.memorySize ?? null,
      ballooned: offline.ballooned ?? 0,
    },
  };
}

/** Take in an answer of /vms. */
export function take(body, changed) {
  vms = body.vms.map((vm) => {
    const [rank, symbol, words] = judge(vm);
    const name = vm.name ?? vm.vmUuid;
    const codes = [vm.errorCode, ...(vm.blockers ?? []).map((b) => b.code), ...(vm.warnings ?? []).map((w) => w.code)];
    const text = [name, vm.vmUuid, words, ...codes].join(" ").toLowerCase();
    return { vm, rank, symbol, words, name, text, measures: measure(vm), print: JSON.stringify(vm) };
  });
  const here = new Set(vms.map((entry) => entry.vm.vmUuid));
  for (const uuid of rows.keys()) if (!here.has(uuid)) rows.delete(uuid);
  draw();
  changed(summary());
}

const room = (measures) => measures.most - measures.has;
const ORDERS = {
  trouble: (a, b) => b.rank - a.rank || b.measures.live - a.measures.live,
  name: () => 0,
  cpu: (a, b) => b.measures.live - a.measures.live || room(a.measures.cpu) - room(b.measures.cpu),
  memory: (a, b) => b.measures.live - a.measures.live || room(a.measures.memory) - room(b.measures.memory),
};
const compareNames = new Intl.Collator("en", { numeric: true }).compare;

/** Draw the rows that the filter leaves, in the order that is chosen. */
export function draw() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const order = ORDERS[document.getElementById("sort").value];
  const found = vms.filter((entry) => words.every((word) => entry.text.includes(word)));
  found.sort((a, b) => order(a, b) || compareNames(a.name, b.name));
  const wanted = found.slice(0, shown).map(row);
  const table = document.getElementById("vm-rows");
  // Rows that stand where they stood are not touched: whoever reads one is not disturbed. The first group is the head.
  wanted.forEach((element, n) => {
    if (table.children[n + 1] !== element) table.insertBefore(element, table.children[n + 1] ?? null);
  });
  while (table.children.length > wanted.length + 1) table.lastElementChild.remove();
  const count = document.getElementById("vms-count");
  const none = vms.length ? "No VM matches the filter." : "This host has no VMs.";
  const text = !found.length ? none : found.length < vms.length ? `${found.length} of ${plural(vms.length, "VM")}` : "";
  if (count.textContent !== text) count.textContent = text;
  document.getElementById("vms-none").hidden = vms.length > 0;
  document.getElementById("vms").classList.toggle("empty", !vms.length);
  const more = document.getElementById("more");
  more.hidden = found.length <= shown;
  more.textContent = `Show all ${plural(found.length, "VM")}`;
}

/** Draw all rows from now on. */
export function drawAll() {
  shown = Infinity;
  draw();
}

/** The name of a VM by its name or UUID, as a task has it. */
export function nameOf(lane) {
  const bare = (text) => text.replaceAll("-", "").toLowerCase();
  return vms.find((entry) => bare(entry.vm.vmUuid) === bare(lane))?.name ?? lane;
}

function summary() {
  const total = (pick) => vms.reduce((sum, entry) => sum + (pick(entry.vm.pluggedOffline ?? {}) ?? 0), 0);
  return {
    vms: vms.length,
    running: vms.filter((entry) => entry.vm.state === "running").length,
    trouble: vms.filter((entry) => entry.rank >= 2).length,
    offlineCpus: total((offline) => offline.cpuNum),
    offlineMemory: total((offline) => offline.memorySize),
  };
}

/** A VM's group of rows: its numbers, and once somebody has asked what stands in its way and what it can have. */
function row(entry) {
  const known = rows.get(entry.vm.vmUuid);
  if (known?.print === entry.print) return known.element;
  const element = known?.element ?? h("tbody", { role: "rowgroup" });
  const isOpen = (kind) => element.querySelector(`button.${kind}`)?.getAttribute("aria-expanded") === "true";
  const [open, told] = [isOpen("problems-of"), isOpen("history-of")];
  const focused = element.contains(document.activeElement) ? document.activeElement.classList[1] : null;
  const history = known?.history ?? h("div", { role: "status" });
  const { vm, measures } = entry;
  const unread = vm.success === false;
  const problems = unread || !measures.live ? [] : worstFirst(vm);
  const ladder = known?.ladder ?? h("div", { class: "ladder", "aria-live": "polite" });
  fill(
    element,
    h("tr", { role: "row" },
      h("th", { scope: "row", role: "rowheader" },
        h("span", { class: "name" }, entry.name),
        h("span", { class: "state" }, icon(entry.symbol), entry.words),
        entry.name === vm.vmUuid ? null : h("span", { class: "uuid" }, vm.vmUuid)),
      unread ? h("td", { role: "cell", class: "unread" }, "–") : cpuCell(measures, vm),
      unread ? h("td", { role: "cell", class: "unread" }, "–") : memoryCell(measures, vm),
      h("td", { role: "cell", class: "why" }, why(vm, entry.name, problems, open),
        h("button", { type: "button", class: "link history-of", "aria-expanded": String(told) },
          "History", h("span", { class: "hidden" }, ` of ${entry.name}`)))),
    unread ? null : h("tr", { role: "row", class: "problems", hidden: !open },
      h("td", { role: "cell", colspan: 4 }, problems.length ? h("ul", {}, problems.map(explain)) : null, ladder)),
    h("tr", { role: "row", class: "problems history", hidden: !told },
      h("td", { role: "cell", colspan: 4 }, history)));
  toggle(element, "problems-of", ".problems:not(.history)", () => showLadder(ladder, vm, measures));
  toggle(element, "history-of", ".history", () => tellHistory(vm, history));
  // What is open is not what it was.
  if (open && !unread) showLadder(ladder, vm, measures);
  if (told) tellHistory(vm, history);
  if (focused) element.querySelector(`button.${focused}`)?.focus();
  rows.set(vm.vmUuid, { element, print: entry.print, ladder, history });
  return element;
}

/** Have a button open and close a row of its group; `opened` is called when it opens. */
function toggle(element, kind, row, opened) {
  const button = element.querySelector(`button.${kind}`);
  button?.addEventListener("click", () => {
    const opens = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(opens));
    element.querySelector(row).hidden = !opens;
    if (opens) opened();
  });
}

/** Read who changed a VM, and show it with the whole UUID. */
async function tellHistory(vm, place) {
  const uuid = h("p", { class: "code whole" }, `UUID ${vm.vmUuid}`);
  try {
    const { changes } = await read(`vms/${encodeURIComponent(vm.vmUuid)}/history?limit=${CHANGES}`);
    fill(place, uuid, changes.length ? h("ol", {}, changes.map(change)) : h("p", { class: "muted" }, "No changes so far."));
  } catch (error) {
    fill(place, uuid, h("p", { class: "error" }, error.message));
  }
}

function change({ finishedAt, command, caller, client, outcome, errorCode, before, after, asked }) {
  const when = new Date(finishedAt * 1000);
  const time = when.toISOString().slice(0, 19).replace("T", " ");
  const words = [outcome, errorCode].filter(Boolean).join(" · ");
  return h("li", {},
    h("time", { datetime: when.toISOString() }, `${time} UTC`), h("span", { class: "muted" }, ` · ${ago(now() - finishedAt)} · by ${caller || client}`),
    h("p", {}, h("b", {}, moved(before, after) || wish(asked) || command), ` · ${words}`));
}

const NAMES = { cpuNum: "vCPUs", memorySize: "memory", maxCpuNum: "max vCPUs", maxMemorySize: "max memory", balloonSize: "balloon" };
const amount = (name, value) => (value === undefined ? "unknown" : name.endsWith("Size") ? size(value) : value);

function moved(before, after) {
  return Object.keys(NAMES).filter((name) => before[name] !== after[name])
    .map((name) => `${NAMES[name]} ${amount(name, before[name])} → ${amount(name, after[name])}`).join(", ");
}

function wish(asked) {
  const told = Object.keys(NAMES).filter((name) => name in asked).map((name) => `${NAMES[name]} ${amount(name, asked[name])}`);
  return told.length ? `${told.join(", ")} requested` : "";
}

function cpuCell({ live, cpu }, vm) {
  const guest = vm.after.guestCpuNum;
  return h("td", { role: "cell", class: live ? "amount" : "amount off" },
    h("p", { class: "figures" }, h("b", {}, plural(cpu.has, "vCPU")), h("span", {}, `max ${cpu.most}`)),
    bar(cpu, live),
    live && cpu.offline ? trouble(`${cpu.offline} plugged but offline`) : null,
    live && guest === null ? h("p", { class: "muted" }, "guest does not report") : null);
}

function memoryCell({ live, memory }, vm) {
  const { maxMemorySize, guestMemorySize, freeSlots } = vm.after;
  const notes = [
    live && guestMemorySize !== null ? `guest sees ${size(guestMemorySize)}` : null,
    live && memory.ballooned ? `${size(memory.ballooned)} in the balloon` : null,
    live && memory.offline === null && guestMemorySize === null ? "guest does not report" : null,
    freeSlots === null ? null : plural(freeSlots, "free slot"),
  ].filter(Boolean);
  return h("td", { role: "cell", class: live ? "amount" : "amount off" },
    h("p", { class: "figures" }, h("b", {}, size(memory.has)),
      h("span", {}, maxMemorySize === null ? "no maxMemory" : `max ${size(memory.most)}`)),
    bar(memory, live),
    live && memory.offline ? trouble(`${size(memory.offline)} plugged but offline`) : null,
    notes.length ? h("p", { class: "muted" }, notes.map(unbroken).join(" · ")) : null);
}

const trouble = (words) => h("p", { class: "trouble" }, icon("warn"), words);

/** A bar of parts that are as wide as their amounts. The words around it say the same. */
function bar({ has, most, offline, ballooned }, live) {
  const used = Math.max(0, has - (offline ?? 0) - ballooned);
  const parts = [
    [!live ? "config" : offline === null ? "unknown" : "used", used],
    ["ballooned", ballooned],
    ["offline", offline ?? 0],
    ["room", most - has],
  ];
  const element = makeBar(parts, most);
  if (most <= MOST_VCPUS && most > 1) {
    let each = 1;
    while (most / each > MOST_TICKS) each *= 2;
    element.classList.add("ticks");
    element.style.setProperty("--ticks", String(most / each));
    if (each > 1) element.title = `each mark is ${each} vCPUs`;
  }
  return element;
}

/** What is plugged for nothing, what stands in the way, what is good to know. */
function worstFirst(vm) {
  const { warnings, blockers } = vm;
  const idle = ({ code }) => /^GUEST_(CPU|MEMORY)_(OFFLINE|NOT_SEEN)$/.test(code);
  const unasked = isUnasked(vm);
  const others = warnings.filter((warning) => !idle(warning) && !unasked(warning));
  return [...warnings.filter(idle), ...warnings.filter(unasked), ...blockers, ...others];
}

/** Whether hotplug can be had, or the first of what stands in the way; and a button for all of it. */
function why(vm, name, problems, open) {
  if (vm.success === false) return [h("p", { class: "problem" }, icon("bad"), sentence(vm.error)), remedy(vm.remedy)];
  const [first, ...others] = problems;
  const opener = (words) => h("button", { type: "button", class: "link problems-of", "aria-expanded": String(open) },
    words, h("span", { class: "hidden" }, `: ${name}`));
  if (first) return [h("p", {}, sentence(first.message)), opener(others.length ? `and ${others.length} more: what to do` : "What to do")];
  if (vm.state === "shutoff") {
    const after = vm.readyAfterRestart ? "ready once started" : "not ready once started";
    return [h("p", { class: "muted" }, `off; ${after}`), opener("What it can have")];
  }
  const words = vm.atMaximum ? "at its maximum; more needs a prepare and a restart" : "ready";
  return [h("p", { class: "ready" }, icon("good"), words), opener("What it can have")];
}

function explain(problem) {
  return h("li", {},
    h("div", {},
      h("p", {}, sentence(problem.message)),
      h("p", { class: "code" }, problem.code, problem.needsRestart ? " · needs a restart of the VM" : "")),
    remedy(problem.remedy));
}
