// Who is signed in. The token lives in this tab's session storage and nowhere else; it is shown to nobody but the API.

const KEY = "weft.token";
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;

let held = null;
let claims = null;
let timer = 0;
const listeners = new Set();

try {
  held = sessionStorage.getItem(KEY);
} catch {
  // Storage is forbidden: a sign-in lasts until the page is left.
}

export const session = {
  get token() {
    return held;
  },
  /** What the edge says the token says; null until it was asked. */
  get claims() {
    return claims;
  },
  /** Call back with why the session ended: "out", "expired" or "refused". */
  onEnd(listener) {
    listeners.add(listener);
  },
  begin(token, verified) {
    held = token;
    claims = verified;
    keep(token);
    watch(verified.exp);
  },
  end(why) {
    held = claims = null;
    clearTimeout(timer);
    keep(null);
    for (const listener of listeners) listener(why);
  },
};

function keep(token) {
  try {
    if (token === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, token);
  } catch {
    // As above.
  }
}

/** Say that a token has expired when it does, not with the next click. */
function watch(expires) {
  clearTimeout(timer);
  const left = expires * 1000 - Date.now();
  // Timers hold 31 bits of milliseconds; who stays signed in for longer is told by the API.
  if (left < 2 ** 31) timer = setTimeout(() => session.end("expired"), Math.max(left, 0));
}

export function isSignInLink() {
  return location.hash.startsWith("#token=");
}

/**
 * The token of a link `#token=…`, which is out of the address bar and the history before anything else happens. Only
 * on this machine: elsewhere a link that signs somebody in as somebody else is a trap.
 */
export function tokenFromLink() {
  const found = /^#token=([\w.~+/=-]+)$/.exec(location.hash);
  if (isSignInLink()) history.replaceState(null, "", location.pathname + location.search);
  if (!found) return null;
  return LOOPBACK.test(location.hostname) ? found[1] : null;
}

/** A token as people paste it: with its scheme, line breaks and quotes. */
export function tokenFrom(pasted) {
  return pasted.replace(/^\s*["']?(Authorization:)?\s*(Bearer\s+)?/i, "").replace(/["'\s]/g, "");
}
