// The status page: reads /healthz, /tasks and /vms of the agent that served it, and changes nothing.

import { ago, duration, fill, h, icon, plural, size, tell } from "./dom.js";
import { Poll, Refused, token } from "./poll.js";
import * as tasks from "./tasks.js";
import * as vms from "./vms.js";

const $ = (id) => document.getElementById(id);
// A second of silence is no news; so many are.
const STALE_S = 5;

let paused = false;
let locked = false;
let health = null;
let counted = null;
let running = new Map();
let finished = null;
let silentSince = null;

const hold = () => paused || locked || document.hidden;
const polls = {
  health: new Poll("healthz", { every: 2000, timeout: 8000, also: [503], hold, show: showHealth, fail: failed() }),
  tasks: new Poll("tasks?limit=40", { every: 2500, timeout: 15000, hold, show: showTasks, fail: failed("tasks") }),
  vms: new Poll("vms", { every: 10000, timeout: 120000, hold, show: showVms, fail: failed("vms") }),
};

function showHealth(body) {
  health = body;
  silentSince = null;
  running = new Map(body.running.map((task) => [task.taskUuid, task.seconds]));
  document.title = `${body.ready ? "" : "⚠ "}${body.host.name} – kvmagent`;
  $("host").textContent = body.host.name;
  $("version").textContent = `kvmagent ${body.version}`;
  const down = Object.entries(body.down);
  const words = body.ready
    ? [h("p", { class: "verdict" }, icon("good"), "Ready")]
    : [h("p", { class: "verdict" }, icon("bad"), "Not ready"),
      h("ul", {}, down.map(([part, text]) => h("li", {}, h("b", {}, part), ` ${text}`)))];
  const print = JSON.stringify([body.ready, body.down]);
  if ($("health").dataset.print !== print) {
    $("health").dataset.print = print;
    $("health").className = body.ready ? "good" : "bad";
    fill($("health"), words);
  }
  $("status").hidden = false;
  drawFigures();
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

function drawFigures() {
  const { host, queued, owedCallbacks } = health ?? {};
  const offline = counted && [
    counted.offlineCpus ? plural(counted.offlineCpus, "vCPU") : null,
    counted.offlineMemory ? size(counted.offlineMemory) : null,
  ].filter(Boolean);
  const figures = [
    counted && figure("VMs", counted.vms.toLocaleString("en"), `${counted.running.toLocaleString("en")} running`),
    counted && figure("Need attention", counted.trouble.toLocaleString("en"), "VMs", counted.trouble > 0),
    counted && figure("Plugged but offline", offline.join(", ") || "none", null, offline.length > 0),
    health && figure("Tasks", running.size, `running, ${queued} waiting`),
    health && figure("Callbacks owed", owedCallbacks, null),
    host && figure("Host memory", size(host.memoryAvailable), `of ${size(host.memoryTotal)} available`),
    host && figure("Host load", host.load === null ? "unknown" : host.load.toFixed(1), `on ${plural(host.cpus, "CPU")}`),
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
    else if (error instanceof Refused) tell($("stale"), error);
    else silentSince ??= Date.now();
  };
}

function ask(error) {
  locked = true;
  const wrong = error.errorCode !== "CREDENTIALS_MISSING";
  if (wrong) token.forget();
  $("login-why").textContent = wrong ? `${error.error}: it may have been replaced.` : "This agent answers those who have a token.";
  $("login").hidden = false;
  $("status").hidden = true;
  $("forget").hidden = true;
  $("token").focus();
}

function letIn() {
  locked = false;
  $("login").hidden = true;
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
    const since = seen === null ? "" : ` What stands here is from ${new Date(seen).toLocaleTimeString("en-GB")}.`;
    tell($("stale"), { error: `The agent does not answer.${since}`, remedy: "On the host: systemctl status kvmagent; journalctl -u kvmagent -n 50" });
  } else if (silentSince === null && polls.health.answeredAt !== null) {
    tell($("stale"), null);
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
  $("pause").textContent = paused ? "Go on" : "Pause";
  if (!paused) runAll();
  tick();
});
$("filter").addEventListener("input", vms.draw);
$("sort").addEventListener("change", vms.draw);
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
