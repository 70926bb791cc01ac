// Markdown as GitHub reads it. HTML in it is text that is shown; pictures are links, so that reading a thread tells
// nobody that it is read.

import { Marked } from "./vendor/marked.esm.js";
import { copy, h, icon } from "./dom.js";
import { highlight } from "./code.js";
import { purifyMarkdown } from "./purify.js";

const MARKDOWN_CHARACTERS_MAX = 200_000;

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    code: ({ text, lang }) => {
      const language = (lang ?? "").match(/^[\w+#.-]{1,30}/)?.[0] ?? "";
      return `<pre><code data-language="${escaped(language)}">${escaped(text)}</code></pre>`;
    },
  },
});

/** Nodes of a text in Markdown; `breaks`: a line break is one, as people who type expect. */
export function markdown(text, { breaks = false } = {}) {
  if (text.length > MARKDOWN_CHARACTERS_MAX) return h("pre", { class: "plain" }, text);
  let html;
  try {
    html = marked.parse(text, { breaks });
  } catch {
    return h("pre", { class: "plain" }, text); // nested beyond all reason
  }
  const body = h("div", { class: "markdown" });
  body.append(purifyMarkdown(html));
  for (const pre of body.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    if (code) pre.replaceWith(codeBlock(code.textContent.replace(/\n$/, ""), code.dataset.language));
  }
  for (const table of body.querySelectorAll("table")) {
    const scroller = h("div", { class: "scroller", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  return body;
}

/** Code with its language, coloured, and a button that copies it. */
export function codeBlock(text, language = "") {
  const code = h("code", {}, text);
  highlight(code, language);
  const copier = h("button", { type: "button", class: "button bare copier", "aria-label": "Copy the code", title: "Copy",
    onclick: (event) => copy(text, "Code", event.currentTarget) }, icon("copy"));
  return h("figure", { class: language ? "code" : "code plain" },
    h("figcaption", {}, language ? h("span", {}, language) : null, copier),
    h("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, code));
}
