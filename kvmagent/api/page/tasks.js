// The list of tasks: what runs, what waits, what came of the others.

import { ago, duration, fill, h, icon, plural, remedy, size } from "./dom.js";
import { now, read } from "./poll.js";
import { nameOf } from "./vms.js";

/** What an outcome looks like, beside the words that say it. */
export const SYMBOLS = {
  online: "good", configured: "good", unchanged: "good", planned: "good",
  plugged: "warn", partial: "warn", pending: "warn", refused: "bad",
};
const WORDS = {
  online: "online in the guest",
  plugged: "plugged, not confirmed by the guest",
  configured: "configured for the next start",
  unchanged: "nothing to do",
  planned: "dry run",
  partial: "failed partway",
  pending: "the guest has not answered yet",
  refused: "refused",
};
const UNFINISHED = ["accepted", "running"];
// Drawn until somebody asks for all.
const AT_ONCE = 10;

let shown = AT_ONCE;
let tasks = [];

const items = new Map();

/** Take in an answer of /tasks; `running` says for how long tasks run, by id. Returns the ids that have finished. */
export function take(body, running) {
  tasks = body.tasks.map((task) => ({ ...task, seconds: running.get(task.taskUuid) }));
  const order = (task) => (UNFINISHED.includes(task.state) ? 0 : 1);
  tasks.sort((a, b) => order(a) - order(b));
  draw();
  const here = new Set(tasks.map((task) => task.taskUuid));
  for (const id of items.keys()) if (!here.has(id)) items.delete(id);
  return tasks.filter((task) => !UNFINISHED.includes(task.state)).map((task) => task.taskUuid);
}

function draw() {
  const list = document.getElementById("task-list");
  fill(list, tasks.length ? tasks.slice(0, shown).map(item) : h("li", { class: "muted" }, "No tasks yet."));
  const more = document.getElementById("more-tasks");
  more.hidden = tasks.length <= shown;
  more.textContent = `Show the ${plural(tasks.length, "newest task", "newest tasks")}`;
}

/** Draw all tasks from now on. */
export function drawAll() {
  shown = Infinity;
  draw();
}

function item(task) {
  const known = items.get(task.taskUuid);
  const when = told(task);
  const print = JSON.stringify([task, when, nameOf(task.vm)]);
  if (known?.print === print) return known.element;
  const element = known?.element ?? h("li");
  const details = known?.element.querySelector("details") ?? makeDetails(task);
  fill(details.firstChild,
    icon(symbol(task)), h("b", {}, task.command), h("span", { class: "vm" }, nameOf(task.vm)),
    h("span", { class: "when" }, when));
  fill(
    element,
    details,
    h("p", { class: "outcome" }, outcome(task)),
    task.error ? h("p", { class: "error" }, task.error) : null,
    remedy(task.remedy),
    undelivered(task));
  items.set(task.taskUuid, { element, print });
  return element;
}

function symbol(task) {
  if (UNFINISHED.includes(task.state)) return "busy";
  return SYMBOLS[task.outcome] ?? (task.error ? "bad" : "good");
}

function outcome(task) {
  if (task.state === "accepted") return "waiting for its turn";
  if (task.state === "running") return "running";
  const took = task.startedAt === null ? null : `took ${duration(task.finishedAt - task.startedAt)}`;
  const words = [WORDS[task.outcome] ?? task.outcome ?? "finished", took].filter(Boolean).join(" · ");
  return task.errorCode ? [words, " · ", h("span", { class: "code" }, task.errorCode)] : words;
}

function told(task) {
  if (task.state === "running") return `for ${duration(Math.round(task.seconds ?? now() - task.startedAt))}`;
  if (task.state === "accepted") return `for ${duration(Math.round(now() - task.acceptedAt))}`;
  return ago(now() - task.finishedAt);
}

function undelivered(task) {
  const { attempts, error } = task.delivery;
  const words = {
    finished: attempts ? `Callback not accepted after ${plural(attempts, "attempt")}: ${error}` : null,
    gone: "The callback receiver does not know this task.",
    given_up: `Gave up on the callback after ${plural(attempts, "attempt")}: ${error}`,
  }[task.state];
  return words ? h("p", { class: "callback" }, icon("warn"), words) : null;
}

/** The line of a task: opened, it shows the task's steps, read at that moment. */
function makeDetails(task) {
  const body = h("div", { class: "steps" });
  const details = h("details", {}, h("summary"), body);
  details.addEventListener("toggle", async () => {
    if (!details.open) return;
    try {
      fill(body, describe(await read(`tasks/${encodeURIComponent(task.taskUuid)}`)));
    } catch (error) {
      fill(body, h("p", { class: "error" }, error.message));
    }
  });
  return details;
}

function describe(task) {
  return [
    task.steps.length ? h("ol", {}, task.steps.map((step) => h("li", {}, stepWords(step)))) : h("p", {}, "The task took no steps."),
    h("p", { class: "code" }, [`task ${task.taskUuid}`, task.caller ? `by ${task.caller}` : null, `from ${task.client}`].filter(Boolean).join(" · ")),
  ];
}

function stepWords({ step, elapsedMs, cutOff, problem, ...fields }) {
  const told = Object.entries(fields)
    .filter(([, value]) => typeof value !== "object")
    .map(([name, value]) => `${name} ${name.endsWith("Bytes") ? size(value) : value}`);
  const took = cutOff ? "interrupted" : elapsedMs === null ? "running" : duration(elapsedMs / 1000);
  return [h("b", {}, step), ` ${told.join(", ")} · ${took}`, problem ? h("p", { class: "error" }, problem.message ?? problem.code) : null];
}
