// Elements without a line of HTML: text stays text, so nothing that was written elsewhere can become markup here.

/**
 * An element. In `props`, `on…` are listeners, `class` and `dataset` what they say, `style` custom properties set by
 * script (the policy allows no style attributes), booleans are attributes that are there or not; the rest are
 * attributes. Children are nodes, text, or nothing.
 */
export function h(name, props = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(element.dataset, value);
    else if (key === "style") for (const [property, given] of Object.entries(value)) element.style.setProperty(property, given);
    else element.setAttribute(key, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== undefined && child !== null && child !== false) element.append(child);
  }
}

const ICONS = {
  lock: "M5 7V5a3 3 0 0 1 6 0v2M3.5 7h9v6h-9z",
  team: "M6 7.5a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4ZM2 13c0-2.2 1.8-4 4-4s4 1.8 4 4M10.5 3.3a2.2 2.2 0 0 1 0 4.1M11.5 9.2c1.5.5 2.5 2 2.5 3.8",
  globe: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM2 8h12M8 2c2 2 2.6 4 2.6 6S10 12 8 14C6 12 5.4 10 5.4 8S6 4 8 2Z",
  search: "M7 11.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9ZM10.5 10.5 14 14",
  back: "M9.5 3 4.5 8l5 5",
  copy: "M6 5.5h7.5V14H6zM3 10.5H2.5V2H10v1",
  check: "m3 8.5 3.5 3.5L13 4.5",
  link: "M7 9.5a2.5 2.5 0 0 0 3.6 0l2.2-2.2a2.55 2.55 0 0 0-3.6-3.6l-.9.9M9 6.5a2.5 2.5 0 0 0-3.6 0L3.2 8.7a2.55 2.55 0 0 0 3.6 3.6l.9-.9",
  terminal: "m3 4.5 3.5 3.5L3 11.5M8.5 12H13",
  sun: "M8 11a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M3.4 12.6l.7-.7M11.9 4.1l.7-.7",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3a5.5 5.5 0 1 0 6.5 6.5Z",
  auto: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM8 2v12M8 5l4-1.3M8 8.5l5.8-1.5M8 12l4.5-1.5",
  help: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM6.2 6.4a1.8 1.8 0 1 1 2.6 1.6c-.5.3-.8.6-.8 1.2M8 11.4v.1",
  out: "M6.5 2.5h-4v11h4M6 8h7.5M10.5 5l3 3-3 3",
  retry: "M13 8a5 5 0 1 1-1.6-3.7M13.2 1.8v3h-3",
  fold: "M4 6.5 8 2.5l4 4M4 9.5l4 4 4-4",
  down: "M8 3v10M3.5 8.5 8 13l4.5-4.5",
  wrench: "M13.5 4.5 11 7 9 5l2.5-2.5a3.5 3.5 0 0 0-4.6 4.4L2.5 11.3a1.56 1.56 0 0 0 2.2 2.2l4.4-4.4a3.5 3.5 0 0 0 4.4-4.6Z",
  thought: "M8 2.5a4 4 0 0 0-2.2 7.3c.5.4.7.9.7 1.5v.2h3v-.2c0-.6.2-1.1.7-1.5A4 4 0 0 0 8 2.5ZM6.8 13.7h2.4",
};

/** An icon, for eyes only: what it means is said by the text or label beside it. */
export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" })) svg.setAttribute(key, value);
  const path = document.createElementNS(namespace, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; `label` is its name, shown unless `bare`. */
export function button(name, label, onclick, { bare = false, ...props } = {}) {
  return h("button", { type: "button", class: bare ? "button bare" : "button", title: bare ? label : undefined,
    "aria-label": bare ? label : undefined, onclick, ...props }, icon(name), bare ? null : h("span", {}, label));
}

/** Say something to a screen reader, once. */
export function announce(text) {
  const announcer = document.getElementById("announcer");
  announcer.textContent = "";
  requestAnimationFrame(() => (announcer.textContent = text));
}

/** Say something to everybody, for a few seconds. */
export function toast(text) {
  announce(text);
  const shown = h("p", { class: "toast" }, text);
  document.getElementById("toasts").replaceChildren(shown);
  setTimeout(() => shown.remove(), 4000);
}

/** Put text on the clipboard, and say so at the button that asked. */
export async function copy(text, what, at) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not a secure context, or not allowed: an old way that needs no permission.
    const field = h("textarea", { class: "visually-hidden", readonly: true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    at?.focus();
    if (!done) return toast(`${what} could not be copied`);
  }
  toast(`${what} copied`);
  const shown = at?.querySelector("svg");
  if (!shown || at.dataset.done) return;
  const done = icon("check");
  at.dataset.done = "yes";
  shown.replaceWith(done);
  setTimeout(() => {
    done.replaceWith(shown);
    delete at.dataset.done;
  }, 1500);
}
