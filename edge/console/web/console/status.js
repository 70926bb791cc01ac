// How this edge and its region are, from what every edge tells without a token (/readyz and /metrics), and how far the
// other regions are behind, which it tells who is signed in (/api/regions).

import { curl, get, getJson } from "./api.js";
import { button, copy, h } from "./dom.js";
import { seconds } from "./format.js";
import { session } from "./session.js";

const EVERY_MS = 15_000;
const LATE_S = 5;
const SERIES = /^(edge_feed_live|edge_feed_silent_seconds|edge_feed_position|edge_notices_stale_seconds)(?:\{[^}]*\})? (\S+)/gm;
const CLOCK_PAUSE_S = 60;

/** The pill in the header and the panel behind it. `region`: the name, once an answer has said it. */
export class Status {
  constructor() {
    this.dot = h("span", { class: "dot", "aria-hidden": "true" });
    this.name = h("span", {}, "edge");
    this.panel = h("div", { class: "panel", popover: "auto", id: "status-panel", role: "dialog", "aria-label": "Region status" });
    this.pill = h("button", { type: "button", class: "pill", popovertarget: "status-panel", "aria-haspopup": "dialog" }, this.dot, this.name);
    this.panel.addEventListener("toggle", (event) => event.newState === "open" && this.look());
    this.region = null;
    this.timer = setInterval(() => document.visibilityState === "visible" && this.look(), EVERY_MS);
    addEventListener("online", () => this.look());
    addEventListener("offline", () => this.look());
    this.look();
  }

  close() {
    clearInterval(this.timer);
    this.panel.remove();
  }

  served(response) {
    const region = response.headers.get("X-Served-Region");
    if (region && region !== this.region) {
      this.region = region;
      this.show(this.seen ?? { level: "checking" });
    }
  }

  async look() {
    const began = performance.now();
    try {
      const response = await fetch("/readyz", { credentials: "omit", cache: "no-store" });
      const ready = await response.json();
      const took = performance.now() - began;
      const [found, others] = await Promise.all([readMetrics(), readOthers()]);
      this.show({ level: ready.ready ? "ok" : "trouble", checks: ready.checks ?? {}, took, others, ...found });
    } catch {
      this.show({ level: "unreachable" });
    }
  }

  show(seen) {
    this.seen = seen;
    const late = seen.level === "ok" && (seen.silent ?? 0) > LATE_S;
    const level = late ? "late" : seen.level;
    const said = { ok: "ready", late: "behind", trouble: "not ready", unreachable: "out of reach", checking: "checking" }[level];
    this.dot.className = `dot ${level}`;
    this.name.textContent = this.region ?? "this edge";
    this.pill.setAttribute("aria-label", `Region ${this.region ?? ""}: ${said}`);
    const rows = [["Edge and region", said]];
    for (const [check, state] of Object.entries(seen.checks ?? {})) if (state !== "ok") rows.push([`Check “${check}”`, state]);
    if (seen.live !== undefined) rows.push(["The region’s feed", seen.live ? "live" : "lost: reads go to the region itself"]);
    if (seen.silent !== undefined) rows.push(["Lag behind the region", seen.live ? `at most ${seconds(seen.silent)}` : "unknown"]);
    if (seen.position !== undefined) rows.push(["Changes applied", String(seen.position)]);
    if (seen.stale !== undefined) rows.push(["Revocations known as of", seen.stale < CLOCK_PAUSE_S ? `${seconds(seen.stale)} ago` : "long ago"]);
    for (const other of seen.others ?? []) rows.push([other.name, standing(other)]);
    if (seen.took !== undefined) rows.push(["Round trip from here", seconds(seen.took / 1000)]);
    this.panel.replaceChildren(
      h("h2", {}, this.region ?? "This edge"),
      h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      button("terminal", "Copy as curl", (event) => copy(curl("/readyz"), "Command", event.currentTarget)));
  }
}

function standing({ reachable, behind_threads: threads, behind_s: behind }) {
  const lag = threads ? `${threads} thread${threads === 1 ? "" : "s"} behind, for ${seconds(behind)}` : "has everything";
  return reachable ? lag : `out of reach, ${lag}`;
}

async function readOthers() {
  if (!session.token) return [];
  try {
    return (await getJson("/api/regions")).others ?? [];
  } catch {
    return []; // the pill says what is wrong with the edge; a refused token ends the session as anywhere
  }
}

async function readMetrics() {
  let text;
  try {
    text = await (await get("/metrics", { token: "" })).text();
  } catch {
    return {}; // kept from the outside here
  }
  const found = Object.fromEntries([...text.matchAll(SERIES)].map(([, name, value]) => [name, Number(value)]));
  const finite = (value) => (Number.isFinite(value) ? value : undefined);
  return {
    live: found.edge_feed_live === undefined ? undefined : found.edge_feed_live === 1,
    silent: finite(found.edge_feed_silent_seconds),
    position: finite(found.edge_feed_position),
    stale: finite(found.edge_notices_stale_seconds),
  };
}
