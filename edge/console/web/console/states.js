// What a screen shows while it has nothing to show: loading, nothing there, something wrong.

import { button, h } from "./dom.js";

export function skeleton(rows, kind) {
  return h("div", { class: `skeleton ${kind}`, "aria-hidden": "true" },
    Array.from({ length: rows }, () => h("div", { class: "bones" }, h("i"), h("i"), h("i"))));
}

export function empty(title, ...more) {
  return h("div", { class: "state" }, h("h2", {}, title), more);
}

/** An error with what may help: to try again, and the trace by which an operator finds it. */
export function failure(error, retry) {
  const offline = error.kind === "offline";
  return h("div", { class: "state", role: "alert" },
    h("h2", {}, offline ? "No connection" : error.status === 404 ? "Not found" : "That did not work"),
    h("p", {}, error.message),
    error.trace ? h("p", { class: "muted" }, "Trace ", h("code", {}, error.trace)) : null,
    retry ? button("retry", "Try again", retry, { class: "button primary" }) : null);
}
