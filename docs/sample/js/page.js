// Says what was loaded, by the names that the build gave.
import { nameOf } from "./names.js";

const list = document.getElementById("loaded");
const urls = [
  import.meta.url,
  new URL("../img/threads.svg", import.meta.url).href,
  ...[...document.querySelectorAll("link[rel=stylesheet]")].map((link) => link.href),
];
for (const url of urls) {
  const item = document.createElement("li");
  item.append(Object.assign(document.createElement("code"), { textContent: nameOf(url) }));
  list.append(item);
}
