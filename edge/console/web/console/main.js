// The console: one header, threads on the left, the thread that is open on the right; on a narrow screen one at a time.

import { announce, button, copy, h, icon } from "./dom.js";
import { follow } from "./events.js";
import * as keys from "./keys.js";
import { Reader } from "./reader.js";
import * as route from "./route.js";
import { isSignInLink, session, tokenFromLink } from "./session.js";
import { signInView, verify } from "./signin.js";
import { empty, failure } from "./states.js";
import { Status } from "./status.js";
import { Threads } from "./threads.js";

const THEMES = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };
const REFRESH_MS = 400;
const SWEEP_MS = 60_000;
const WHOLE_STREAM = "/api/threads/events";

const app = document.getElementById("app");
let screen = null;

function themeNow() {
  return document.documentElement.dataset.theme ?? "auto";
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(themeNow()) + 1) % names.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "auto") localStorage.removeItem("weft.theme");
    else localStorage.setItem("weft.theme", next);
  } catch {
    // It holds until the page is left.
  }
  return next;
}

/** Everything that is there while somebody is signed in. */
class Screen {
  constructor() {
    this.status = new Status();
    const served = (response) => this.status.served(response);
    this.onServed = served;
    this.threads = new Threads({ go: (place, options) => this.go(place, options), onServed: served });
    this.theme = button(THEME_ICONS[themeNow()], THEMES[themeNow()], () => this.changeTheme(), { bare: true });
    const { claims } = session;
    this.offline = h("p", { class: "offline", role: "status", hidden: navigator.onLine !== false }, "You are offline. What is shown may be out of date.");
    this.reader = null;
    this.place = h("div", { class: "place" });
    const header = h("header", { class: "bar" },
      h("a", { class: "skip", href: "#main", onclick: (event) => this.skip(event) }, "Skip to the thread"),
      h("a", { class: "brand", href: "#/" }, h("img", { src: document.querySelector("link[rel=icon]").href, alt: "", width: "24", height: "24" }), "Weft"),
      this.status.pill, this.status.panel,
      h("span", { class: "who", title: claims.team ? `team ${claims.team}` : "" }, claims.sub, claims.team ? h("span", { class: "muted" }, ` · ${claims.team}`) : null),
      this.theme,
      button("help", "Keys", () => keys.showHelp(), { bare: true, class: "button bare wide-only" }),
      button("out", "Sign out", () => session.end("out"), { bare: true }));
    this.element = h("div", { class: "shell" }, header, this.offline, h("div", { class: "panes" }, this.threads.element, this.place));
    const stop = (this.stopped = new AbortController()).signal;
    addEventListener("hashchange", () => this.show(), { signal: stop });
    addEventListener("offline", () => (this.offline.hidden = false), { signal: stop });
    addEventListener("online", () => {
      this.offline.hidden = true;
      this.moved();
      if (this.reader?.articles.size === 0) this.reader.open(route.read().message);
    }, { signal: stop });
    document.addEventListener("visibilitychange", () => this.watch(), { signal: stop });
    this.sweep = setInterval(() => document.visibilityState === "visible" && this.threads.refresh(), SWEEP_MS);
    this.unlisten = keys.listen(this.commands());
  }

  close() {
    this.stopped.abort();
    clearInterval(this.sweep);
    clearTimeout(this.refreshing);
    this.unlisten();
    this.reader?.close();
    this.stream?.close();
    this.threads.close();
    this.status.close();
    this.element.remove();
  }

  commands() {
    const reading = () => this.reader && (this.narrow() || !this.threads.element.contains(document.activeElement));
    return {
      next: () => (reading() ? this.reader.move(1) : this.threads.move(1)),
      previous: () => (reading() ? this.reader.move(-1) : this.threads.move(-1)),
      open: () => (reading() ? this.reader.toggle() : this.threads.open()),
      search: () => {
        if (this.narrow() && this.reader) this.back();
        this.threads.search.focus();
        this.threads.search.select();
      },
      back: () => (this.reader ? this.back() : false),
      first: () => (reading() ? this.reader.first() : false),
      last: () => (reading() ? void this.reader.last() : false),
      fold: () => (this.reader ? this.reader.foldAll() : false),
      curl: () => (this.reader ? this.reader.copyCurl() : this.threads.copyCurl()),
      theme: () => this.changeTheme(),
      help: () => keys.showHelp(),
    };
  }

  narrow() {
    return matchMedia("(max-width: 760px)").matches;
  }

  changeTheme() {
    const now = nextTheme();
    this.theme.title = THEMES[now];
    this.theme.setAttribute("aria-label", THEMES[now]);
    this.theme.replaceChildren(icon(THEME_ICONS[now]));
    announce(THEMES[now]);
  }

  skip(event) {
    event.preventDefault();
    const main = this.place.querySelector("main");
    (main?.querySelector("h1[tabindex]") ?? this.threads.search).focus();
  }

  go(place, { replace = false } = {}) {
    const { thread, message } = route.read();
    const kept = place.filters && place.thread === undefined ? { thread, message, ...place } : place;
    const hash = route.write(kept);
    if (hash === (location.hash || "#/")) return;
    if (!replace) location.hash = hash;
    else {
      history.replaceState(null, "", hash);
      this.show();
    }
  }

  back() {
    const was = this.reader?.id;
    this.go({ thread: null, filters: route.read().filters });
    this.threads.rows.get(was)?.firstElementChild.focus();
  }

  show() {
    if (isSignInLink()) return;
    const at = route.read();
    this.threads.show(at);
    this.element.classList.toggle("reading", at.thread !== null);
    if (at.thread === null) this.leaveReader();
    else if (this.reader?.id === at.thread) at.message && this.reader.seek(at.message);
    else this.read(at);
  }

  leaveReader() {
    this.reader?.close();
    this.reader = null;
    document.title = "Weft";
    this.place.replaceChildren(h("main", { class: "nothing", id: "main" },
      empty("Choose a thread", h("p", { class: "muted" }, h("kbd", {}, "j"), " and ", h("kbd", {}, "k"), " move through them, ", h("kbd", {}, "/"), " searches, ", h("kbd", {}, "?"), " shows all keys."))));
    this.watch();
  }

  read({ thread, message }) {
    this.reader?.close();
    this.stream?.close();
    this.stream = null;
    this.reader = new Reader({ id: thread, onServed: this.onServed, onMoved: () => this.moved(), back: () => this.back() });
    this.place.replaceChildren(this.reader.element);
    if (!message) this.reader.title.focus({ preventScroll: true });
    this.reader.open(message);
  }

  /** Something changed: the list shows it soon, once for a burst. */
  moved() {
    clearTimeout(this.refreshing);
    this.refreshing = setTimeout(() => this.threads.refresh(), REFRESH_MS);
  }

  /** While no thread is followed, all of them are: one connection either way, and none when nobody looks. */
  watch() {
    const wanted = !this.reader && document.visibilityState === "visible";
    if (wanted && !this.stream) {
      this.stream = follow(WHOLE_STREAM, { onEvent: () => this.moved() });
      if (this.threads.begun) this.moved();
    } else if (!wanted && this.stream) {
      this.stream.close();
      this.stream = null;
    }
  }
}

function enter() {
  screen?.close();
  screen = new Screen();
  app.replaceChildren(screen.element);
  screen.show();
}

function signIn(options) {
  screen?.close();
  screen = null;
  document.title = "Sign in · Weft";
  app.replaceChildren(signInView({ ...options, onDone: enter }));
}

/** In with a token that was kept, or came by a link; to the form when there is none, or it is not believed. */
async function start(token, linked) {
  if (!token) return signIn({});
  try {
    session.begin(token, await verify(token));
  } catch (error) {
    if (error.status !== 401 && error.status !== 400) {
      return app.replaceChildren(h("main", { class: "nothing", id: "main" }, failure(error, () => start(token, linked))));
    }
    session.end("refused");
    return linked ? signIn({ error }) : undefined;
  }
  enter();
}

session.onEnd((why) => signIn({ why }));
addEventListener("hashchange", () => isSignInLink() && location.reload()); // a link that is opened over this page
const linked = tokenFromLink();
start(linked ?? session.token, linked !== null);
