// Highlighted code. A language is loaded when its first block is shown; what is too long, or in a language that is not
// here, is shown plain.

import hljs from "./vendor/highlight/core.min.js";
import { purifyHighlighted } from "./purify.js";

const HIGHLIGHTED_CHARACTERS_MAX = 60_000;

const LANGUAGES = {
  bash: () => import("./vendor/highlight/bash.min.js"),
  c: () => import("./vendor/highlight/c.min.js"),
  cpp: () => import("./vendor/highlight/cpp.min.js"),
  css: () => import("./vendor/highlight/css.min.js"),
  diff: () => import("./vendor/highlight/diff.min.js"),
  dockerfile: () => import("./vendor/highlight/dockerfile.min.js"),
  go: () => import("./vendor/highlight/go.min.js"),
  ini: () => import("./vendor/highlight/ini.min.js"),
  java: () => import("./vendor/highlight/java.min.js"),
  javascript: () => import("./vendor/highlight/javascript.min.js"),
  json: () => import("./vendor/highlight/json.min.js"),
  markdown: () => import("./vendor/highlight/markdown.min.js"),
  python: () => import("./vendor/highlight/python.min.js"),
  ruby: () => import("./vendor/highlight/ruby.min.js"),
  rust: () => import("./vendor/highlight/rust.min.js"),
  shell: () => import("./vendor/highlight/shell.min.js"),
  sql: () => import("./vendor/highlight/sql.min.js"),
  typescript: () => import("./vendor/highlight/typescript.min.js"),
  xml: () => import("./vendor/highlight/xml.min.js"),
  yaml: () => import("./vendor/highlight/yaml.min.js"),
};
const ALIASES = {
  "c++": "cpp", cc: "cpp", cjs: "javascript", console: "shell", docker: "dockerfile", golang: "go", h: "c", hpp: "cpp",
  htm: "xml", html: "xml", js: "javascript", jsx: "javascript", jsonc: "json", jsonl: "json", md: "markdown",
  mjs: "javascript", patch: "diff", py: "python", py3: "python", python3: "python", pyi: "python", rb: "ruby",
  rs: "rust", sh: "bash", svg: "xml", toml: "ini", ts: "typescript", tsx: "typescript", vue: "xml", yml: "yaml",
  zsh: "bash",
};
const loading = new Map();

/** The name under which a language is known here, or null. */
export function languageOf(name) {
  const lower = String(name ?? "").toLowerCase();
  const known = ALIASES[lower] ?? lower;
  return Object.hasOwn(LANGUAGES, known) ? known : null;
}

/** Colour the text of a `code` element; it stays as it is when that is not possible. */
export async function highlight(code, name) {
  const language = languageOf(name);
  const text = code.textContent;
  if (language === null || text.length > HIGHLIGHTED_CHARACTERS_MAX) return;
  try {
    if (!loading.has(language)) {
      loading.set(language, LANGUAGES[language]().then((module) => hljs.registerLanguage(language, module.default)));
    }
    await loading.get(language);
    code.replaceChildren(purifyHighlighted(hljs.highlight(text, { language, ignoreIllegals: true }).value));
    code.classList.add("hljs");
  } catch {
    loading.delete(language); // offline just now, perhaps
  }
}
