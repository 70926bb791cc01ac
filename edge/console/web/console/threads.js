// The list of threads: newest activity first, more as one scrolls, searched over titles and messages.

import { curl, get, withQuery } from "./api.js";
import { announce, button, copy, h, icon } from "./dom.js";
import { ago, number, plural, when } from "./format.js";
import * as route from "./route.js";
import { session } from "./session.js";
import { empty, failure, skeleton } from "./states.js";

const PAGE = 50;
const TYPING_MS = 250;
const MARKS = { private: ["lock", "private"], team: ["team", "team"], public: ["globe", "public"] };

export class Threads {
  /** `onServed` sees every answer; `go(place)` goes somewhere. */
  constructor({ go, onServed }) {
    this.go = go;
    this.onServed = onServed;
    this.filters = { q: "", scope: "", archived: "" };
    this.rows = new Map();
    this.selected = null;
    this.search = h("input", { type: "search", id: "search", placeholder: "Search titles and messages", autocomplete: "off",
      spellcheck: "false", "aria-label": "Search titles and messages", maxlength: "1000",
      oninput: () => this.typed(), onkeydown: (event) => event.key === "Enter" && this.typed(0) });
    this.scope = h("select", { "aria-label": "Whose threads", onchange: () => this.choose() },
      h("option", { value: "" }, "Mine"), h("option", { value: "team" }, "My team’s"));
    this.archived = h("select", { "aria-label": "Archived threads", onchange: () => this.choose() },
      h("option", { value: "" }, "Active"), h("option", { value: "true" }, "Archived"), h("option", { value: "any" }, "All"));
    this.list = h("ul", { class: "threads" });
    this.more = h("button", { type: "button", class: "button more", hidden: true, onclick: () => this.loadMore() }, "Load more");
    this.state = h("div", { class: "list-state" });
    this.scroller = h("div", { class: "list-scroller" }, this.list, this.state, this.more);
    this.element = h("nav", { class: "sidebar", "aria-label": "Threads" },
      h("div", { class: "filters" },
        h("label", { class: "searchbox" }, icon("search"), this.search, h("kbd", { "aria-hidden": "true" }, "/")),
        h("div", { class: "choices" }, this.scope, this.archived,
          button("terminal", "Copy this list as curl", (event) => this.copyCurl(event.currentTarget), { bare: true }))),
      this.scroller);
    this.observer = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && this.loadMore(),
      { root: this.scroller, rootMargin: "600px" });
    this.observer.observe(this.more);
  }

  close() {
    this.observer.disconnect();
    this.loading?.abort();
    clearTimeout(this.timer);
  }

  /** Show what the address says: filters, and which thread is open. */
  show({ thread, filters }) {
    this.scope.hidden = !session.claims?.team;
    this.select(thread);
    const same = Object.entries(filters).every(([name, value]) => this.filters[name] === value);
    if (same && this.begun) return;
    this.filters = { ...filters };
    if (this.search.value.trim() !== filters.q) this.search.value = filters.q;
    this.scope.value = filters.scope;
    this.archived.value = filters.archived;
    this.load();
  }

  path(cursor) {
    const { q, scope, archived } = this.filters;
    return withQuery(q ? "/api/threads/search" : "/api/threads", { q, scope, archived, limit: PAGE, cursor });
  }

  copyCurl(at) {
    copy(curl(this.path()), "Command", at);
  }

  typed(wait = TYPING_MS) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.choose(), wait);
  }

  choose() {
    this.go({ filters: { q: this.search.value.trim(), scope: this.scope.value, archived: this.archived.value } }, { replace: true });
  }

  /** From the top, with bones where there is nothing yet. */
  async load() {
    this.begun = true;
    this.rows.clear();
    this.list.replaceChildren();
    this.state.replaceChildren(skeleton(8, "rows"));
    await this.page(undefined);
    this.scroller.scrollTop = 0;
  }

  loadMore() {
    if (this.cursor && !this.busy) return this.page(this.cursor);
  }

  /** What is new, without disturbing what is shown. */
  async refresh() {
    if (this.busy || !this.begun) return;
    this.loading = new AbortController();
    try {
      const page = await this.fetch(undefined, this.loading.signal);
      if (!this.rows.size) return this.add(page);
      this.state.replaceChildren();
      const first = this.list.firstElementChild;
      const listed = new Set(page.threads.map((thread) => thread.id));
      for (const thread of page.threads) {
        const before = this.rows.get(thread.id);
        const row = this.row(thread);
        this.rows.set(thread.id, row);
        const focused = before?.contains(document.activeElement);
        before?.remove();
        this.list.insertBefore(row, first?.isConnected ? first : null);
        if (focused) row.firstElementChild.focus({ preventScroll: true });
      }
      this.order();
      if (!page.has_more) for (const id of this.rows.keys()) if (!listed.has(id)) this.drop(id);
      this.mark();
    } catch {
      // The list stays as it was; the status says that something is wrong.
    }
  }

  order() {
    const rows = [...this.list.children].sort((a, b) => (a.dataset.at < b.dataset.at ? 1 : a.dataset.at > b.dataset.at ? -1 : 0));
    if (rows.some((row, index) => this.list.children[index] !== row)) this.list.append(...rows);
  }

  drop(id) {
    this.rows.get(id)?.remove();
    this.rows.delete(id);
  }

  async page(cursor) {
    this.loading?.abort();
    const mine = (this.loading = new AbortController());
    this.busy = true;
    this.scroller.setAttribute("aria-busy", "true");
    if (cursor) this.state.replaceChildren(skeleton(2, "rows"));
    try {
      const page = await this.fetch(cursor, mine.signal);
      this.add(page);
      if (!cursor) announce(page.threads.length ? `${page.has_more ? "More than " : ""}${plural(page.threads.length, "thread")}` : "No threads");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.cursor = null;
      this.more.hidden = true;
      this.state.replaceChildren(failure(error, () => (cursor ? this.page(cursor) : this.load())));
    } finally {
      if (this.loading === mine) {
        this.busy = false;
        this.scroller.removeAttribute("aria-busy");
        if (this.cursor) this.reobserve();
      }
    }
  }

  /** An observer tells of changes only: what is in sight still after a page has to be told again. */
  reobserve() {
    this.observer.unobserve(this.more);
    this.observer.observe(this.more);
  }

  async fetch(cursor, signal) {
    const response = await get(this.path(cursor), { signal });
    this.onServed(response);
    return response.json();
  }

  add(page) {
    this.cursor = page.has_more ? page.next_cursor : null;
    this.more.hidden = !this.cursor;
    this.state.replaceChildren();
    for (const thread of page.threads) {
      this.drop(thread.id);
      const row = this.row(thread);
      this.rows.set(thread.id, row);
      this.list.append(row);
    }
    this.mark();
    if (!this.rows.size) this.state.replaceChildren(this.nothing());
  }

  nothing() {
    if (this.filters.q) return empty("Nothing found", h("p", {}, `No title or message has “${this.filters.q}”.`));
    if (this.filters.archived === "true") return empty("Nothing archived");
    if (this.filters.scope === "team") return empty("Nothing shared", h("p", {}, "No thread of your team is shared with it."));
    return empty("No threads yet", h("p", {}, "Bring your assistants’ conversations here:"),
      h("pre", { class: "plain" }, "weft threads import ~/.claude/projects"));
  }

  row(thread) {
    const [mark, visibility] = MARKS[thread.visibility] ?? MARKS.private;
    const title = thread.title.trim() || "Untitled thread";
    const others = thread.owner !== session.claims?.sub;
    return h("li", { dataset: { id: thread.id, at: thread.last_activity } },
      h("a", { href: route.write({ thread: thread.id, filters: this.filters }) },
        h("span", { class: "title" }, title),
        h("span", { class: "about" },
          h("span", { class: `mark ${thread.visibility}`, title: visibility }, icon(mark), h("span", { class: thread.visibility === "private" ? "visually-hidden" : "" }, visibility)),
          others ? h("span", { class: "mark owner" }, h("span", { class: "visually-hidden" }, "owner "), thread.owner) : null,
          thread.archived ? h("span", { class: "mark" }, "archived") : null,
          h("time", { datetime: thread.last_activity, title: when(thread.last_activity) }, ago(thread.last_activity)),
          h("span", {}, h("span", { "aria-hidden": "true" }, `${number(thread.message_count)} msg`),
            h("span", { class: "visually-hidden" }, plural(thread.message_count, "message"))),
          h("span", { class: "region" }, thread.origin_region))));
  }

  select(id) {
    this.selected = id;
    this.mark();
  }

  mark() {
    for (const [id, row] of this.rows) {
      const link = row.firstElementChild;
      if (id === this.selected) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  /** Focus the next (1) or previous (-1) row. */
  move(step) {
    const links = [...this.list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const current = at >= 0 ? at : links.findIndex((link) => link.hasAttribute("aria-current"));
    const next = links[Math.min(Math.max(current + step, 0), links.length - 1)];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  open() {
    const link = document.activeElement?.closest?.(".threads a");
    link?.click();
    return Boolean(link);
  }
}
