// Elements and words. Text from the agent only ever becomes a text node.

/** An element with attributes and children; strings become text nodes, null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  fill(element, ...children);
  return element;
}

/** Replace what an element holds. */
export function fill(element, ...children) {
  const kept = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  element.replaceChildren(...kept.map((child) => (child instanceof Node ? child : String(child))));
}

/** One of the page's symbols: good, warn, bad, busy, idle. Decoration: the words beside it say the same. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", `icon ${name}`);
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#${name}`);
  svg.append(use);
  return svg;
}

/** Show an error of the agent with its remedy in an element, or hide the element. */
export function tell(element, error) {
  element.hidden = !error;
  const print = error ? error.error + (error.remedy ?? "") : "";
  if (element.dataset.print === print) return; // what is announced is announced once
  element.dataset.print = print;
  if (error) fill(element, h("p", { class: "problem" }, icon("bad"), h("span", {}, error.error)), remedy(error.remedy));
}

/** The one thing to do. */
export function remedy(text) {
  return text ? h("p", { class: "remedy" }, h("span", { class: "hidden" }, "Remedy: "), text) : null;
}

/** A bar of parts, [class, amount] each, that are as wide as their amounts. The words around it say the same. */
export function makeBar(parts, most) {
  const element = h("div", { class: "bar", "aria-hidden": "true" });
  for (const [kind, amount] of parts) {
    if (amount <= 0) continue;
    const part = h("i", { class: kind });
    part.style.flexGrow = String(amount / most);
    element.append(part);
  }
  return element;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Bytes for people: 6 GiB, 1.5 GiB, 512 MiB. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return "unknown";
  let unit = 0;
  let amount = bytes;
  while (amount >= 1024 && unit < UNITS.length - 1) {
    amount /= 1024;
    unit += 1;
  }
  return `${amount >= 100 ? Math.round(amount) : Math.round(amount * 10) / 10} ${UNITS[unit]}`;
}

/** Seconds for people: 20 ms, 0.4 s, 12 s, 3 min, 5 h, 2 d; a number stays on the line of its unit. */
export function duration(seconds) {
  if (seconds <= 0) return "0\u00a0s";
  if (seconds < 0.1) return `${Math.round(seconds * 1000)}\u00a0ms`;
  if (seconds < 10) return `${Math.round(seconds * 10) / 10}\u00a0s`;
  if (seconds < 120) return `${Math.round(seconds)}\u00a0s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)}\u00a0min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)}\u00a0h`;
  return `${Math.round(seconds / 86400)}\u00a0d`;
}

/** How long ago, without a number that changes every second. */
export function ago(seconds) {
  return seconds < 5 ? "just now" : `${duration(Math.round(seconds))} ago`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** Words that stay on one line. */
export function unbroken(text) {
  return text.replaceAll(" ", "\u00a0");
}

/** A message with a capital letter, unless it begins with the name of a field. */
export function sentence(text) {
  return /^[a-z]+[ -]/.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
}
