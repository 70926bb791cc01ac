// A message's content as nodes: text, thinking, tool calls with what came of them, pictures, and whatever else there is.

import { codeBlock, markdown } from "./markdown.js";
import { h, icon } from "./dom.js";
import { size } from "./format.js";

const SHOWN_CHARACTERS_MAX = 20_000;
const PREVIEW_CHARACTERS_MAX = 100;
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const IMAGE_CHARACTERS_MAX = 15_000_000;
// What says most about a call, of the tools that assistants have.
const TELLING = ["command", "cmd", "file_path", "path", "pattern", "query", "url", "description", "prompt"];

export function text(value) {
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value, null, 2);
}

/** The blocks of a message; a text alone is one. */
export function blocksOf(message) {
  const { content } = message;
  if (Array.isArray(content)) return content;
  return content === undefined || content === null || content === "" ? [] : [{ type: "text", text: content }];
}

export function isResult(block) {
  return block?.type === "tool_result";
}

/** A message's own words, for the clipboard. */
export function plainText(message) {
  return blocksOf(message).filter((block) => block?.type === "text").map((block) => text(block.text)).join("\n\n");
}

/** Nodes of all blocks. `calls.of(id)` gives the place of a call's result, `calls.knows(id)` whether it was called. */
export function render(message, calls) {
  const breaks = message.role !== "assistant";
  return blocksOf(message).map((block) => {
    switch (block?.type) {
      case "text":
        return message.role === "tool" ? folded("wrench", "Tool output", text(block.text)) : markdown(text(block.text), { breaks });
      case "thinking":
        return folded("thought", "Thinking", null, markdown(text(block.thinking)));
      case "redacted_thinking":
        return h("p", { class: "muted" }, "Thinking that its provider keeps to itself.");
      case "tool_use":
        return call(block, calls);
      case "tool_result":
        return calls.knows(block.tool_use_id) ? null : result(block);
      case "image":
        return image(block.source);
      default:
        return folded("wrench", typeof block?.type === "string" ? block.type : "Content", text(block));
    }
  });
}

function fold(glyph, kind, name, preview, ...content) {
  return h("details", { class: `fold ${kind}` },
    h("summary", {}, icon(glyph), h("span", { class: "fold-name" }, name), preview ? h("span", { class: "preview" }, preview) : null),
    h("div", { class: "fold-body" }, content));
}

function folded(glyph, name, content, node) {
  const kind = glyph === "thought" ? "thinking" : "tool";
  return fold(glyph, kind, name, null, node ?? long(content));
}

/** Text as it is; of a long one the beginning, and the rest when it is asked for. */
export function long(content, language = "") {
  if (content.length <= SHOWN_CHARACTERS_MAX) return codeBlock(content, language);
  const more = h("button", { type: "button", class: "button" }, `Show all of it (${size(content.length)})`);
  const shown = h("div", {}, codeBlock(content.slice(0, SHOWN_CHARACTERS_MAX), language), more);
  more.addEventListener("click", () => shown.replaceWith(h("pre", { class: "plain", tabindex: "0", "aria-label": "All of it" }, content)));
  return shown;
}

function previewOf(input) {
  if (typeof input === "string") return input.slice(0, PREVIEW_CHARACTERS_MAX);
  if (typeof input !== "object" || input === null) return "";
  const name = TELLING.find((one) => typeof input[one] === "string") ?? Object.keys(input).find((one) => typeof input[one] === "string");
  return name ? input[name].split("\n", 1)[0].slice(0, PREVIEW_CHARACTERS_MAX) : "";
}

function call(block, calls) {
  const name = text(block.name) || "Tool";
  const place = h("div", { class: "result" }, h("p", { class: "muted" }, "No result yet."));
  const badge = h("span", { class: "badge" });
  const details = fold("wrench", "tool", name, previewOf(block.input), inputOf(block.input), place);
  details.firstElementChild.append(badge);
  const fill = (found) => {
    const failed = found.is_error === true;
    badge.textContent = failed ? "failed" : "";
    badge.className = failed ? "badge failed" : "badge";
    place.replaceChildren(h("h4", {}, failed ? "Result (failed)" : "Result"), ...resultParts(found.content));
  };
  calls.of(block.id, fill);
  return details;
}

function inputOf(input) {
  if (typeof input === "object" && input !== null) {
    const [only, ...others] = Object.entries(input);
    if (only && !others.length && typeof only[1] === "string") return long(only[1], only[0] === "command" || only[0] === "cmd" ? "bash" : "");
    if (typeof input.command === "string" && !input.command.includes("\0")) {
      const rest = Object.fromEntries(Object.entries(input).filter(([name]) => name !== "command"));
      return [long(input.command, "bash"), Object.keys(rest).length ? long(text(rest), "json") : null];
    }
    if (typeof input.old_string === "string" && typeof input.new_string === "string") {
      const marked = (sign, lines) => lines.split("\n").map((line) => sign + line).join("\n");
      const rest = Object.fromEntries(Object.entries(input).filter(([name]) => !["old_string", "new_string"].includes(name)));
      return [long(text(rest), "json"), long(`${marked("-", input.old_string)}\n${marked("+", input.new_string)}`, "diff")];
    }
    return long(text(input), "json");
  }
  return input === undefined || input === "" ? null : long(text(input));
}

function result(block) {
  const failed = block.is_error === true;
  return fold("wrench", failed ? "tool failed" : "tool", failed ? "Tool result (failed)" : "Tool result", null, resultParts(block.content));
}

function resultParts(content) {
  if (!Array.isArray(content)) return [content === undefined || content === "" ? h("p", { class: "muted" }, "Nothing.") : long(text(content))];
  return content.map((part) => (part?.type === "image" ? image(part.source) : long(text(part?.type === "text" ? part.text : part))));
}

/** A picture that the message itself holds. One that would have to be fetched is a link: no thread makes a reader's browser call anybody. */
function image(source) {
  if (source?.type === "base64" && IMAGE_TYPES.includes(source.media_type) && typeof source.data === "string" && source.data.length < IMAGE_CHARACTERS_MAX) {
    try {
      const bytes = Uint8Array.from(atob(source.data), (character) => character.charCodeAt(0));
      const url = URL.createObjectURL(new Blob([bytes], { type: source.media_type }));
      const done = () => URL.revokeObjectURL(url);
      return h("img", { class: "picture", src: url, alt: "Picture in the thread", onload: done, onerror: done });
    } catch {
      // Not base64 after all.
    }
  }
  const url = typeof source?.url === "string" && /^https?:/i.test(source.url) ? source.url : null;
  return h("p", { class: "muted" }, "Picture that is not shown",
    url ? [": ", h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, url)] : ".");
}
