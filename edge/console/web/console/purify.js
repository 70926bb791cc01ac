// The only place where text becomes markup. DOMPurify parses what the renderers made and gives back nodes, not HTML, so
// that nothing is parsed a second time in another context; what it lets through is this short list and nothing of the
// page that a message could pose as: no ids, names, classes, styles, forms, frames, SVG or MathML, and no image.

import DOMPurify from "./vendor/purify.es.mjs";

const MARKDOWN = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "input", "li", "ol", "p",
    "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "checked", "data-language", "disabled", "href", "start", "title", "type"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "checked", "data-language", "disabled", "start", "type"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOW_SELF_CLOSE_IN_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const HIGHLIGHTED = {
  ALLOWED_TAGS: ["span"],
  ALLOWED_ATTR: ["class"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** Nodes of rendered Markdown, harmless. Links open elsewhere and say nothing about where they were. */
export function purifyMarkdown(html) {
  const fragment = DOMPurify.sanitize(html, MARKDOWN);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow ugc";
  }
  for (const input of fragment.querySelectorAll("input")) {
    // The boxes of task lists, which nobody can tick; no other input.
    if (input.getAttribute("type") !== "checkbox") input.remove();
    input.disabled = true;
    input.setAttribute("aria-label", input.checked ? "done" : "not done");
  }
  return fragment;
}

/** Nodes of highlighted code: spans with the highlighter's classes. */
export function purifyHighlighted(html) {
  return DOMPurify.sanitize(html, HIGHLIGHTED);
}
