// Reads of the agent, again and again. One request of a path at a time; none while nobody looks.
//
//     due -> request -> answer, refusal or silence -> `every` ms later (longer after a slow answer): due

const TOKEN = "kvmagent.token";
// Entries of a list that are read at once.
const PAGE = 100;

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/** What the agent refused: `error`, `errorCode`, `remedy` as it told them. */
export class Refused extends Error {
  constructor(status, body) {
    super(body.error || `HTTP status ${status}`);
    Object.assign(this, { status, error: this.message, errorCode: body.errorCode, remedy: body.remedy });
  }
}

// Seconds that the agent's clock is ahead of this one: ages are told by the agent's.
let ahead = 0;
export const now = () => Date.now() / 1000 + ahead;

/**
 * Read a path, or ask it something; a status of `also` is an answer too. Throws Refused, or as fetch without answer.
 * `known` is {tag, body} of the answer before: where nothing has changed the agent sends it no second time.
 */
export async function read(path, { timeout = 10000, also = [], question = null, known = {} } = {}) {
  const secret = token.get();
  const response = await fetch(path, {
    method: question ? "POST" : "GET",
    body: question && JSON.stringify(question),
    headers: {
      ...(secret && { Authorization: `Bearer ${secret}` }),
      ...(question && { "Content-Type": "application/json" }),
      ...(known.tag && { "If-None-Match": known.tag }),
    },
    cache: "no-store",
    redirect: "error",
    signal: AbortSignal.timeout(timeout),
  });
  const date = Date.parse(response.headers.get("Date") ?? "") / 1000;
  if (date) ahead = date - Date.now() / 1000;
  if (response.status === 304) return known.body;
  const body = await response.json();
  if (response.ok) Object.assign(known, { tag: response.headers.get("ETag"), body });
  if (!response.ok && !also.includes(response.status)) throw new Refused(response.status, body);
  return body;
}

/**
 * Read a list whole, page by page: no answer makes the agent hold all of it, and a page that is as it was is not sent
 * again. `pages` has of each page what `known` is of an answer.
 */
async function readPages(path, list, { pages, ...options }) {
  const entries = [];
  const seen = new Map();
  let cursor;
  do {
    const page = `${path}&limit=${PAGE}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`;
    const known = pages.get(page) ?? {};
    const body = await read(page, { ...options, known });
    seen.set(page, known);
    entries.push(...body[list]);
    cursor = body.next;
  } while (cursor);
  for (const page of pages.keys()) if (!seen.has(page)) pages.delete(page);
  for (const [page, known] of seen) pages.set(page, known);
  return { [list]: entries };
}

export class Poll {
  /**
   * `show(body)` takes each answer, `fail(error)` each failure, `hold()` says whether to wait; `list` names what is read
   * by pages. Times are in ms.
   */
  constructor(path, { every, timeout, also, show, fail, hold, list = null }) {
    Object.assign(this, { path, every, timeout, also, show, fail, hold, list });
    this.pages = new Map();
    this.busySince = null;
    this.answeredAt = null;
    this.timer = null;
    this.known = {};
  }

  /** Read at once, unless a request is under way already. */
  async run() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.busySince !== null || this.hold()) return;
    this.busySince = Date.now();
    try {
      const body = this.list ? await readPages(this.path, this.list, this) : await read(this.path, this);
      this.answeredAt = Date.now();
      this.show(body);
    } catch (error) {
      this.fail(error);
    } finally {
      const took = Date.now() - this.busySince;
      this.busySince = null;
      clearTimeout(this.timer);
      // Pages that were opened together do not ask together.
      const pause = Math.max(this.every, 3 * took) * (0.9 + 0.2 * Math.random());
      this.timer = this.hold() ? null : setTimeout(() => this.run(), pause);
    }
  }
}
