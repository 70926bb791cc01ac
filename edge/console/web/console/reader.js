// One thread: read as far as it goes, followed while it grows. A long one stays fluid since a message is laid out only
// near the screen (content-visibility) and made into nodes when it comes near, the rest when the browser is idle, so
// that the browser's own search finds all of it.

import { curl, get, threadPath, withQuery } from "./api.js";
import { blocksOf, isResult, plainText, render, text } from "./blocks.js";
import { announce, button, copy, h, icon, toast } from "./dom.js";
import { follow } from "./events.js";
import { number, plural, when } from "./format.js";
import * as route from "./route.js";
import { empty, failure, skeleton } from "./states.js";

const PAGE = 200;
const READ_AT_ONCE_MAX = 2_000;
const NEAR = "1500px 0px";
const HIDDEN_MS_MAX = 30_000;
const SETTLE_MS = 600;
const BUDGET_MS = 8;
const ROLES = { user: "User", assistant: "Assistant", system: "System", tool: "Tool" };
const LIVE = { live: "Live", connecting: "Connecting", waiting: "Reconnecting", ended: "Not live", paused: "Paused" };
const VISIBILITY = { private: ["lock", "Private"], team: ["team", "Team"], public: ["globe", "Public"] };

/** Tool calls of a thread and what came of them, whichever is known first. */
class Calls {
  constructor() {
    this.known = new Map();
  }

  at(id) {
    if (!this.known.has(id)) this.known.set(id, { fills: [], result: null, caller: null });
    return this.known.get(id);
  }

  learn(message) {
    for (const block of blocksOf(message)) {
      if (block?.type === "tool_use" && block.id) this.at(block.id).caller = message.id;
      if (isResult(block) && block.tool_use_id) {
        const one = this.at(block.tool_use_id);
        one.result = block;
        for (const fill of one.fills) fill(block);
      }
    }
  }

  of(id, fill) {
    const one = this.at(id);
    one.fills.push(fill);
    if (one.result) fill(one.result);
  }

  knows(id) {
    return Boolean(this.known.get(id)?.caller);
  }

  /** The message that called, of one that holds nothing but results shown there. */
  callerOf(message) {
    const blocks = blocksOf(message);
    return blocks.length && blocks.every((block) => isResult(block) && this.knows(block.tool_use_id))
      ? this.known.get(blocks[0].tool_use_id).caller
      : null;
  }
}

export class Reader {
  constructor({ id, onServed, onMoved, back }) {
    this.id = id;
    this.onServed = onServed;
    this.onMoved = onMoved;
    this.closed = new AbortController();
    this.title = h("h1", { tabindex: "-1" }, "…");
    this.about = h("p", { class: "about" });
    this.live = h("span", { class: "live" });
    this.folder = button("fold", "Unfold all", () => this.foldAll(), { bare: true });
    this.actions = h("div", { class: "actions" }, this.live, this.folder,
      button("link", "Copy the link", (event) => copy(location.href, "Link", event.currentTarget), { bare: true }),
      button("terminal", "Copy as curl", (event) => this.copyCurl(event.currentTarget), { bare: true }));
    this.messages = h("section", { class: "messages", "aria-label": "Messages" });
    this.tail = h("div", { class: "tail" });
    this.newer = h("button", { type: "button", class: "newer", hidden: true, onclick: () => this.last() });
    this.scroller = h("div", { class: "reader-scroller" }, h("div", { class: "column" }, this.messages, this.tail));
    this.element = h("main", { class: "reader", id: "main", "aria-label": "Thread" },
      h("header", { class: "thread-head" },
        button("back", "Back to the threads", back, { bare: true, class: "button bare back" }),
        h("div", { class: "thread-title" }, this.title, this.about), this.actions),
      this.scroller, this.newer);
    this.near = new IntersectionObserver((seen) => {
      for (const one of seen) if (one.isIntersecting) this.fill(one.target);
    }, { root: this.scroller, rootMargin: NEAR });
    this.end = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && this.readOn(),
      { root: this.scroller, rootMargin: NEAR });
    this.end.observe(this.tail);
    this.scroller.addEventListener("scroll", () => this.atEnd() && this.caughtUp(), { passive: true });
    document.addEventListener("visibilitychange", () => this.watchVisibility(), { signal: this.closed.signal });
    this.forget();
  }

  forget() {
    this.calls = new Calls();
    this.articles = new Map();
    this.waiting = new Set();
    this.pending = [];
    this.unseen = 0;
    this.after = undefined;
    this.complete = false;
    this.messages.replaceChildren();
    this.near.disconnect();
  }

  close() {
    this.closed.abort();
    this.stream?.close();
    this.near.disconnect();
    this.end.disconnect();
    clearTimeout(this.hiding);
  }

  path(after) {
    return withQuery(threadPath(this.id), { after, limit: PAGE });
  }

  copyCurl(at) {
    copy(curl(threadPath(this.id)), "Command", at);
  }

  // ------------------------------------------------------------ reading

  /** Everything anew; `message`: go there, `keep`: stay where the reader is. */
  async open(message, { keep = false } = {}) {
    const anchor = keep ? this.anchor() : null;
    this.stream?.close();
    this.stream = null;
    if (!keep) this.tail.replaceChildren(skeleton(3, "said"));
    this.messages.setAttribute("aria-busy", "true");
    try {
      const page = await this.page(undefined);
      this.forget();
      this.head(page);
      this.take(page);
      this.followFrom(`${page.epoch}.${page.v}`);
    } catch (error) {
      return this.fail(error, () => this.open(message));
    } finally {
      this.messages.removeAttribute("aria-busy");
    }
    if (message) await this.seek(message);
    else if (anchor && (await this.readUntil(anchor.id))) this.settle(() => this.hold(anchor));
    while (!this.complete && !this.closed.signal.aborted && this.articles.size < READ_AT_ONCE_MAX) {
      if (!(await this.readOn())) return;
    }
  }

  /** Read on until a message is there; false when it is in none of the pages. */
  async readUntil(id) {
    while (!this.articles.has(id) && !this.closed.signal.aborted) if (!(await this.readOn())) break;
    return this.articles.has(id);
  }

  /** Go to a message, wherever it is in the thread. */
  async seek(id) {
    if (await this.readUntil(id)) this.goTo(id);
    else if (!this.closed.signal.aborted) toast("That message is not in this thread");
  }

  async page(after) {
    const response = await get(this.path(after), { signal: this.closed.signal });
    this.onServed(response);
    return response.json();
  }

  /** The next page; false when there is none, or it could not be had. */
  readOn() {
    if (this.complete || this.after === undefined) return false;
    return (this.reading ??= this.readNext().finally(() => (this.reading = null)));
  }

  async readNext() {
    const articles = this.articles;
    try {
      const page = await this.page(this.after);
      if (articles !== this.articles) return true; // reset meanwhile
      this.take(page);
      return true;
    } catch (error) {
      if (error.status === 409) {
        await this.open(null, { keep: true });
        return false;
      }
      this.fail(error, () => {
        this.tail.replaceChildren(skeleton(1, "said"));
        this.readOn();
      });
      return false;
    }
  }

  fail(error, retry) {
    if (error.name === "AbortError") return;
    if (!this.articles.size) this.title.textContent = "Thread";
    const gone = error.status === 404;
    this.tail.replaceChildren(gone
      ? empty("There is no such thread", h("p", {}, "It does not exist, was deleted, or is not shared with you."))
      : failure(error, retry));
  }

  take(page) {
    const fragment = document.createDocumentFragment();
    for (const message of page.messages) this.calls.learn(message);
    for (const message of page.messages) if (!this.articles.has(message.id)) fragment.append(this.article(message));
    this.messages.append(fragment);
    this.after = page.next_after ?? undefined;
    this.complete = this.after === undefined;
    if (this.complete) {
      this.tail.replaceChildren(...(this.articles.size ? [] : [empty("No messages yet", h("p", {}, "What is said in this thread appears here."))]));
      const waited = this.pending;
      this.pending = [];
      for (const message of waited) this.grow(message);
    } else {
      this.tail.replaceChildren(skeleton(1, "said"));
      this.end.unobserve(this.tail);
      this.end.observe(this.tail);
    }
    this.fillWhenIdle();
  }

  head(thread) {
    this.thread = thread;
    const title = thread.title.trim() || "Untitled thread";
    this.title.textContent = title;
    document.title = `${title} · Weft`;
    const [mark, visibility] = VISIBILITY[thread.visibility] ?? VISIBILITY.private;
    this.count = h("span", {}, plural(thread.message_count, "message"));
    this.about.replaceChildren(
      h("span", { class: `mark ${thread.visibility}` }, icon(mark), visibility),
      h("span", { title: "Owner" }, thread.owner), this.count,
      h("time", { class: "wide", datetime: thread.created_at, title: "Begun" }, when(thread.created_at)),
      h("span", { class: "wide", title: "The region that orders its writes" }, thread.origin_region),
      ...(thread.archived ? [h("span", { class: "mark" }, "Archived")] : []),
      ...(thread.visibility === "public" ? [h("a", { href: `/t/${encodeURIComponent(this.id)}`, target: "_blank", rel: "noopener" }, "Public page")] : []));
  }

  // ------------------------------------------------------------ messages

  article(message) {
    const role = ROLES[message.role] ?? text(message.role);
    const link = route.write({ thread: this.id, message: message.id, filters: route.read().filters });
    const body = h("div", { class: "body" });
    const words = plainText(message);
    const article = h("article", { class: `message ${ROLES[message.role] ? message.role : "other"}`, tabindex: "-1",
      "aria-label": `Message ${message.seq}, ${role}`, dataset: { id: message.id, seq: message.seq },
      hidden: this.calls.callerOf(message) !== null, style: { "--estimate": `${estimate(message)}px` } },
      h("header", {},
        h("span", { class: "role" }, role),
        h("a", { class: "when", href: link, title: "Link to this message" }, h("time", { datetime: message.created_at }, when(message.created_at)), h("span", { class: "seq" }, `#${message.seq}`)),
        words ? button("copy", "Copy the text", (event) => copy(words, "Text", event.currentTarget), { bare: true, class: "button bare copier" }) : null),
      body);
    this.articles.set(message.id, { article, message, body });
    this.waiting.add(article);
    this.near.observe(article);
    return article;
  }

  fill(article) {
    if (!this.waiting.delete(article)) return;
    this.near.unobserve(article);
    const { message, body } = this.articles.get(article.dataset.id) ?? {};
    if (!body) return;
    body.append(...render(message, this.calls).flat().filter(Boolean));
    if (this.unfolded) for (const details of body.querySelectorAll("details")) details.open = true;
  }

  fillWhenIdle() {
    if (this.idle || !this.waiting.size) return;
    const soon = window.requestIdleCallback ?? ((callback) => setTimeout(callback, 50));
    this.idle = true;
    soon(() => {
      this.idle = false;
      const until = performance.now() + BUDGET_MS;
      for (const article of this.waiting) {
        if (performance.now() > until || this.closed.signal.aborted) break;
        this.fill(article);
      }
      if (!this.closed.signal.aborted) this.fillWhenIdle();
    });
  }

  foldAll() {
    this.unfolded = !this.unfolded;
    const anchor = this.anchor();
    for (const details of this.messages.querySelectorAll("details")) details.open = this.unfolded;
    this.folder.title = this.unfolded ? "Fold all" : "Unfold all";
    this.folder.setAttribute("aria-label", this.folder.title);
    if (anchor) this.hold(anchor);
    announce(this.unfolded ? "Everything is unfolded" : "Everything is folded");
  }

  // ------------------------------------------------------------ following

  followFrom(version) {
    this.version = version;
    if (document.visibilityState === "hidden") return this.say("paused");
    this.stream = follow(`${threadPath(this.id)}/events`, {
      after: version,
      onState: (state) => this.say(state),
      onRefused: (error) => error.status === 404 && this.gone(),
      onEvent: (event) => this.hear(event),
    });
  }

  say(state) {
    this.live.className = `live ${state}`;
    this.live.replaceChildren(h("span", { class: "dot", "aria-hidden": "true" }), h("span", {}, LIVE[state]));
  }

  hear({ type, data, id }) {
    this.version = id || this.version;
    if (type === "message") this.grow(data);
    else if (type === "patch") this.change(data);
    else if (type === "delete") this.gone();
    else if (type === "reset") this.reset();
    this.onMoved();
  }

  grow(message) {
    const known = this.articles.get(message.id);
    if (known) return;
    if (!this.complete) return void this.pending.push(message);
    const follows = this.atEnd();
    this.calls.learn(message);
    const article = this.article(message);
    if (this.articles.size === 1) this.tail.replaceChildren();
    this.messages.append(article);
    article.classList.add("fresh");
    this.fill(article);
    this.thread.message_count = Math.max(this.thread.message_count, this.articles.size);
    this.count.textContent = plural(this.thread.message_count, "message");
    announce(`New message, ${ROLES[message.role] ?? message.role}`);
    if (follows) return this.toEnd();
    if (!article.hidden) this.unseen += 1;
    this.newer.hidden = this.unseen === 0;
    this.newer.replaceChildren(icon("down"), plural(this.unseen, "new message"));
  }

  change(patch) {
    const { thread_id: _, version, ...fields } = patch;
    for (const name of ["title", "visibility", "archived", "metadata"]) if (fields[name] !== undefined && fields[name] !== null) this.thread[name] = fields[name];
    this.head(this.thread);
  }

  gone() {
    this.stream?.close();
    this.say("ended");
    this.newer.hidden = true;
    this.messages.replaceChildren();
    this.waiting.clear();
    this.complete = true;
    this.title.textContent = "Thread";
    this.tail.replaceChildren(empty("This thread is gone", h("p", {}, "It was deleted, or is not shared with you any more.")));
    announce("This thread is gone");
  }

  /** Its entries were put in another order, or the place in the stream is not known any more: read it anew. */
  async reset() {
    await this.open(null, { keep: true });
    announce("The thread was read anew");
  }

  /** A page nobody looks at holds no connection: a browser has six for all its tabs here. */
  watchVisibility() {
    clearTimeout(this.hiding);
    if (document.visibilityState === "hidden") {
      this.hiding = setTimeout(() => {
        this.stream?.close();
        this.stream = null;
        this.say("paused");
      }, HIDDEN_MS_MAX);
    } else if (!this.stream && this.version) this.followFrom(this.version);
  }

  // ------------------------------------------------------------ moving

  /** What is at the top of the screen, and how far from it. */
  anchor() {
    const top = this.scroller.getBoundingClientRect().top;
    for (const { article } of this.articles.values()) {
      if (article.hidden) continue;
      const box = article.getBoundingClientRect();
      if (box.bottom > top) return { id: article.dataset.id, offset: box.top - top };
    }
    return null;
  }

  hold({ id, offset }) {
    const { article } = this.articles.get(id) ?? {};
    if (!article) return;
    const top = this.scroller.getBoundingClientRect().top;
    this.scroller.scrollTop += article.getBoundingClientRect().top - top - offset;
  }

  /** Go to a message that is here. What holds only results is shown where the call is. */
  goTo(id) {
    const one = this.articles.get(id);
    const caller = this.calls.callerOf(one.message);
    const { article } = (caller && this.articles.get(caller)) || one;
    this.focusOn(article);
    for (const other of this.messages.querySelectorAll(".target")) other.classList.remove("target");
    article.classList.add("target");
    this.settle(() => article.scrollIntoView({ block: "start", behavior: "instant" }));
  }

  /** Move, and again while what lies between is laid out and changes size, unless somebody moves meanwhile. */
  settle(move) {
    const until = performance.now() + SETTLE_MS;
    const mine = (this.settling = {});
    for (const name of ["wheel", "touchmove", "keydown"]) {
      this.scroller.addEventListener(name, () => (this.settling = null), { once: true, passive: true });
    }
    const again = () => {
      if (this.settling !== mine || this.closed.signal.aborted || performance.now() > until) return;
      move();
      requestAnimationFrame(again);
    };
    again();
  }

  focusOn(article) {
    this.settling = null;
    this.fill(article);
    article.focus({ preventScroll: true });
    article.scrollIntoView({ block: "start", behavior: "instant" });
  }

  current() {
    const focused = document.activeElement?.closest?.("article.message");
    return focused && this.messages.contains(focused) ? focused : null;
  }

  move(step) {
    const shown = [...this.messages.children].filter((article) => !article.hidden);
    if (!shown.length) return;
    const current = this.current();
    const anchor = current ? null : this.anchor();
    const at = current ? shown.indexOf(current) + step : shown.findIndex((article) => article.dataset.id === anchor?.id);
    const next = shown[Math.min(Math.max(at, 0), shown.length - 1)];
    if (next === shown.at(-1) && !this.complete) this.readOn();
    this.focusOn(next);
  }

  toggle() {
    const folds = [...(this.current()?.querySelectorAll("details") ?? [])];
    const open = folds.some((details) => !details.open);
    for (const details of folds) details.open = open;
    return folds.length > 0;
  }

  first() {
    this.settling = null;
    this.scroller.scrollTop = 0;
    const shown = [...this.messages.children].find((article) => !article.hidden);
    if (shown) this.focusOn(shown);
  }

  async last() {
    while (!this.complete) if (!(await this.readOn())) return;
    const shown = [...this.messages.children].filter((article) => !article.hidden).at(-1);
    if (shown) this.fill(shown);
    this.toEnd();
    shown?.focus({ preventScroll: true });
  }

  toEnd() {
    this.settle(() => (this.scroller.scrollTop = this.scroller.scrollHeight));
    this.caughtUp();
  }

  atEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return this.complete && scrollHeight - scrollTop - clientHeight < 80;
  }

  caughtUp() {
    this.unseen = 0;
    this.newer.hidden = true;
  }
}

/** About how high a message will be, before it is laid out. */
function estimate(message) {
  let height = 56;
  for (const block of blocksOf(message)) {
    height += block?.type === "text" ? Math.min(24 * Math.ceil(text(block.text).length / 80 + 1), 6000) : isResult(block) ? 0 : 44;
  }
  return height;
}
