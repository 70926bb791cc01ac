// The keyboard: one table of what each key does, from which the help is made too.

import { h } from "./dom.js";

const HELP = [
  ["j  ↓", "Next thread or message"],
  ["k  ↑", "Previous thread or message"],
  ["Enter  o", "Open the thread; unfold or fold the message"],
  ["/", "Search"],
  ["u  Esc", "Back to the threads"],
  ["g  Home", "First message"],
  ["G  End", "Latest message"],
  ["e", "Unfold or fold everything"],
  ["c", "Copy this screen as a curl command"],
  ["t", "Change the theme"],
  ["?", "This help"],
];

/** Calls `commands[name]` for keys that are not typed into a field; names: next, previous, open, search, back, … */
export function listen(commands) {
  const names = {
    j: "next", ArrowDown: "next", k: "previous", ArrowUp: "previous", Enter: "open", o: "open", "/": "search", u: "back",
    Escape: "back", g: "first", Home: "first", G: "last", End: "last", e: "fold", c: "curl", t: "theme", "?": "help",
  };
  const onKey = (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (typing) {
      if (event.key === "Escape" || (event.key === "ArrowDown" && event.target.type === "search")) {
        event.target.blur();
        if (event.key === "ArrowDown") commands.next?.();
        event.preventDefault();
      }
      return;
    }
    if (document.querySelector("[popover]:popover-open")) return;
    // What has a use for the key itself keeps it: buttons, links and summaries their Enter, scrollers their arrows.
    if (event.key === "Enter" && event.target.closest?.("a, button, summary")) return;
    if (/^(Arrow|Home|End)/.test(event.key) && event.target.closest?.("pre, .scroller, [role=radiogroup]")) return;
    const command = Object.hasOwn(names, event.key) ? commands[names[event.key]] : undefined;
    if (command && command(event) !== false) event.preventDefault();
  };
  addEventListener("keydown", onKey);
  return () => removeEventListener("keydown", onKey);
}

export function showHelp() {
  const dialog = h("dialog", { class: "help", "aria-labelledby": "help-title" },
    h("h2", { id: "help-title" }, "Keys"),
    h("dl", {}, HELP.map(([keys, what]) => [
      h("dt", {}, keys.split("  ").map((key) => h("kbd", {}, key))), h("dd", {}, what)])),
    h("form", { method: "dialog" }, h("button", { class: "button primary" }, "Close")));
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
}
