// The public API, as anybody could call it: one way to ask, one kind of error.

import { session } from "./session.js";

/** What went wrong, in words for people. `kind`: the problem's own name, "offline", or "broken". */
export class ApiError extends Error {
  constructor(message, { status = 0, kind = "broken", trace = null, retryable = false } = {}) {
    super(message);
    Object.assign(this, { status, kind, trace, retryable });
  }
}

export function threadPath(id) {
  return `/api/threads/${encodeURIComponent(id)}`;
}

export function withQuery(path, query) {
  const stated = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return stated.length ? `${path}?${new URLSearchParams(stated)}` : path;
}

/** What `session` would send; `token` stands in for it while it is being tried. */
export function headersFor(token = session.token) {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** The response of a GET, or an ApiError. A token that is refused ends the session. */
export async function get(path, { signal, token, headers } = {}) {
  const mine = session.token;
  let response;
  try {
    response = await fetch(path, { headers: { ...headersFor(token), ...headers }, signal, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const offline = navigator.onLine === false;
    throw new ApiError(offline ? "You are offline." : "The edge can’t be reached.", { kind: "offline", retryable: true });
  }
  if (response.ok) return response;
  const error = await problemOf(response);
  // Not when somebody signed in anew while the old token was being refused.
  if (response.status === 401 && token === undefined && mine && session.token === mine) session.end("refused");
  throw error;
}

export async function getJson(path, options) {
  const response = await get(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer broke off.", { status: response.status, retryable: true });
  }
}

async function problemOf(response) {
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // Something in between answered.
  }
  return new ApiError(problem.detail || `The edge answered ${response.status}.`, {
    status: response.status,
    kind: typeof problem.type === "string" ? problem.type.split("/").pop() : "broken",
    trace: problem.trace_id ?? null,
    retryable: problem.retryable ?? response.status >= 500,
  });
}

/** A command that asks for the same; the token is left to a variable, so that it is on no clipboard. */
export function curl(path, headers = []) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const more = headers.map((header) => ` -H ${quoted(header)}`).join("");
  return `curl -sS -H "Authorization: Bearer $WEFT_TOKEN"${more} ${quoted(new URL(path, location.origin).href)}`;
}
