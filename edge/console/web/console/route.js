// Where one is: `#/`, `#/?q=…&scope=team&archived=any`, `#/threads/ID`, `#/threads/ID/MESSAGE`. Everything after the `#`,
// so that one document at `/` serves all of it and no thread's id is in a server's log of pages.

const FILTERS = ["q", "scope", "archived"];

/** What the address says: {thread, message, filters}. */
export function read(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [kind, thread, message] = path.split("/");
  const stated = new URLSearchParams(query);
  const filters = Object.fromEntries(FILTERS.map((name) => [name, stated.get(name) ?? ""]));
  if (kind !== "threads" || !thread) return { thread: null, message: null, filters };
  return { thread: decode(thread), message: message ? decode(message) : null, filters };
}

export function write({ thread = null, message = null, filters = {} }) {
  const path = [thread ? "threads" : null, thread, thread ? message : null].filter(Boolean).map(encodeURIComponent).join("/");
  const query = new URLSearchParams(FILTERS.filter((name) => filters[name]).map((name) => [name, filters[name]]));
  return `#/${path}${query.size ? `?${query}` : ""}`;
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
