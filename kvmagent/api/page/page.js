// The status page: reads /healthz, /tasks and /vms of the agent that served it, and changes nothing.

import { ago, duration, fill, h, icon, makeBar, plural, sentence, size, tell, unbroken } from "./dom.js";
import { Poll, Refused, token } from "./poll.js";
import * as tasks from "./tasks.js";
import * as vms from "./vms.js";

const $ = (id) => document.getElementById(id);
// Seconds without an answer after which the page says so.
const STALE_S = 5;

let paused = false;
let locked = false;
let health = null;
let counted = null;
let running = new Map();
let finished = null;
let silentSince = null;
let refused = null;

const hold = () => paused || locked || document.hidden;
const polls = {
  health: new Poll("healthz", { every: 2000, timeout: 8000, also: [503], hold, show: showHealth, fail: failed() }),
  tasks: new Poll("tasks?limit=40", { every: 2500, timeout: 15000, hold, show: showTasks, fail: failed("tasks") }),
  vms: new Poll(`vms?fields=${vms.FIELDS}`, { every: 10000, timeout: 120000, list: "vms", hold, show: showVms, fail: failed("vms") }),
};

function showHealth(body) {
  health = body;
  silentSince = refused = null;
  running = new Map(body.running.map((task) => [task.taskUuid, task.seconds]));
  document.title = `${body.ready ? "" : "⚠ "}${body.host.name} – kvmagent`;
  $("host").textContent = body.host.name;
  $("version").textContent = `kvmagent ${body.version}`;
  drawVerdict(body.ready ? "good" : "bad", body.ready ? "Ready" : "Not ready", body.down);
  $("status").hidden = false;
  drawFigures();
}

/** The one word that everybody looks for, and what is down. It is announced when it changes. */
function drawVerdict(symbol, words, down) {
  const print = JSON.stringify([words, down]);
  if ($("health").dataset.print === print) return;
  $("health").dataset.print = print;
  $("health").className = symbol;
  fill($("health"), h("p", { class: "verdict" }, icon(symbol), words),
    h("ul", {}, Object.entries(down).map(([part, text]) => h("li", {}, h("b", {}, part), ` ${text}`))));
}

function showTasks(body) {
  tell($("tasks-error"), null);
  const done = new Set(tasks.take(body, running));
  const news = finished !== null && [...done].some((id) => !finished.has(id));
  finished = done;
  if (news) polls.vms.run(); // a VM is not what it was
}

function showVms(body) {
  tell($("vms-error"), null);
  vms.take(body, (summary) => {
    counted = summary;
  });
  drawFigures();
}

function figure(label, value, note, bad = false) {
  return h("div", { class: bad ? "bad" : null }, h("dt", {}, label), h("dd", {}, h("b", {}, value), note ? h("span", {}, note) : null));
}

/** The host's memory: what VMs use, what they may have beyond that, what is left, and what the host keeps. */
function budget({ reserve, budget: most, promised, resident, overSince }) {
  const used = Math.min(resident, promised, most);
  const idle = Math.min(promised, most) - used;
  const over = Math.max(0, promised - most);
  const left = Math.max(0, most - promised);
  const parts = [
    ["used", used, `${size(resident)} used`],
    ["promised", idle, `${size(idle)} promised, not used`],
    ["over", over, `${size(over)} over the budget`],
    ["room", left, `${size(left)} left`],
    ["reserve", reserve, `${size(reserve)} kept for the host`],
  ].filter(([, amount]) => amount > 0);
  const since = overSince && `${new Date(overSince * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  return h("div", { class: since ? "memory bad" : "memory" },
    h("dt", {}, "Memory promised to VMs"),
    h("dd", {}, h("b", {}, size(promised)), h("span", {}, `of a budget of ${size(most)}`)),
    h("dd", {}, makeBar(parts, Math.max(promised, most) + reserve),
      h("ul", { class: "legend" }, parts.map(([kind, , words]) => h("li", {}, h("i", { class: kind }), words)))),
    since ? h("dd", { class: "trouble" }, icon("warn"), `Over the budget since ${since}: no VM gets more memory until some is freed`) : null);
}

function drawFigures() {
  const { host, memory, queued, owedCallbacks } = health ?? {};
  const offline = counted && [
    counted.offlineCpus ? plural(counted.offlineCpus, "vCPU") : null,
    counted.offlineMemory ? size(counted.offlineMemory) : null,
  ].filter(Boolean);
  const figures = [
    counted && figure("VMs", counted.vms.toLocaleString("en"), `${counted.running.toLocaleString("en")} running`),
    counted && figure("Need attention", counted.trouble.toLocaleString("en"), "VMs", counted.trouble > 0),
    counted && figure("Plugged but offline", offline.map(unbroken).join(", ") || "none", null, offline.length > 0),
    health && figure("Tasks", running.size, `running, ${queued} waiting`),
    health && figure("Undelivered callbacks", owedCallbacks, null),
    host && figure("Host memory", size(host.memoryAvailable), `of ${size(host.memoryTotal)} available`),
    host && figure("Host load", host.load === null ? "unknown" : host.load.toFixed(1), `on ${plural(host.cpus, "CPU")}`),
    memory && budget(memory),
  ].filter(Boolean);
  const print = figures.map((element) => element.className + element.textContent).join("|");
  if ($("figures").dataset.print === print) return;
  $("figures").dataset.print = print;
  fill($("figures"), figures);
}

/** What a failed read of a section shows. Whoever is not let in is asked who they are. */
function failed(section) {
  return (error) => {
    if (error instanceof Refused && error.status === 401) ask(error);
    else if (error instanceof Refused && section) tell($(`${section}-error`), error);
    else if (error instanceof Refused) refused = error;
    else if (error.name === "TimeoutError" && section) tell($(`${section}-error`), { error: "No answer in time. The page will try again." });
    else silentSince ??= Date.now();
    tick();
  };
}

function ask(error) {
  locked = true;
  const wrong = error.errorCode !== "CREDENTIALS_MISSING";
  if (wrong) token.forget();
  $("login-why").textContent = wrong ? `${sentence(error.error)}. It may have been replaced.` : "This agent requires a token.";
  $("login").hidden = false;
  for (const id of ["status", "forget", "pause", "jump"]) $(id).hidden = true;
  $("token").focus();
}

function letIn() {
  locked = false;
  $("login").hidden = true;
  for (const id of ["pause", "jump"]) $(id).hidden = false;
  $("forget").hidden = token.get() === null;
  runAll();
}

function runAll() {
  for (const poll of Object.values(polls)) poll.run();
}

/** Once a second, while somebody looks: how old is what stands here? */
function tick() {
  if (document.hidden || locked) return;
  for (const section of ["vms", "tasks"]) {
    const { answeredAt, busySince } = polls[section];
    const waits = busySince === null ? 0 : (Date.now() - busySince) / 1000;
    const age = answeredAt === null ? null : (Date.now() - answeredAt) / 1000;
    const words = [age === null ? "" : `read ${ago(age)}`, waits > 3 ? `waiting for an answer for ${duration(Math.round(waits))}` : ""];
    setText($(`${section}-age`), words.filter(Boolean).join(", "));
  }
  const seen = polls.health.answeredAt;
  const silence = silentSince === null ? 0 : (Date.now() - (seen ?? silentSince)) / 1000;
  const stale = silentSince !== null && (silence > STALE_S || seen === null);
  document.body.classList.toggle("stale", stale || paused);
  if (stale) {
    const since = seen === null ? "" : ` This data is from ${new Date(seen).toLocaleTimeString("en-GB")}.`;
    document.title = `✕ No answer – ${health?.host.name ?? "kvmagent"}`;
    drawVerdict("bad", "No answer", {});
    tell($("stale"), { error: `The agent does not answer.${since}`, remedy: "On the host: systemctl status kvmagent; journalctl -u kvmagent -n 50" });
  } else {
    tell($("stale"), refused);
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set($("token").value.trim());
  $("token").value = "";
  letIn();
});
$("forget").addEventListener("click", () => {
  token.forget();
  location.reload();
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Resume" : "Pause";
  if (!paused) runAll();
  tick();
});
/** What is chosen stands in the address, so that it can be kept and handed on. */
function choose() {
  const chosen = new URLSearchParams();
  if ($("filter").value) chosen.set("filter", $("filter").value);
  if ($("sort").selectedIndex) chosen.set("sort", $("sort").value);
  history.replaceState(null, "", chosen.size ? `#${chosen}` : location.pathname);
  vms.draw();
}

function takeAddress() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  if (document.getElementById(location.hash.slice(1))) return; // a place on the page
  $("filter").value = chosen.get("filter") ?? "";
  const known = [...$("sort").options].some((option) => option.value === chosen.get("sort"));
  if (known) $("sort").value = chosen.get("sort");
  else $("sort").selectedIndex = 0;
  vms.draw();
}

$("filter").addEventListener("input", choose);
$("sort").addEventListener("change", choose);
$("more-tasks").addEventListener("click", tasks.drawAll);
addEventListener("hashchange", takeAddress);
takeAddress();
$("more").addEventListener("click", vms.drawAll);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) runAll();
});
addEventListener("pageshow", (event) => {
  if (event.persisted) runAll();
});
setInterval(tick, 1000);
$("forget").hidden = token.get() === null;
runAll();
