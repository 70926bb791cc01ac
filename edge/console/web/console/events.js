// Server-sent events over fetch, which unlike EventSource sends the token in a header. The format, resuming and the
// waiting time are those of the HTML standard, section 9.2.

import { ApiError, get } from "./api.js";

const RETRY_MS = 1000;
const RETRY_MS_MAX = 30_000;
const SILENCE_MS_MAX = 40_000; // the edge says something every 15 s

/** Cuts a stream of text into events {type, data, id}; `id` is the last one stated, `retry` the wait that was asked for. */
export class EventParser {
  constructor(onEvent) {
    this.onEvent = onEvent;
    this.id = "";
    this.retry = null;
    this.rest = "";
    this.reset();
  }

  reset() {
    this.type = "";
    this.data = [];
  }

  push(text) {
    this.rest += text;
    // A CR at the end may be half of a CRLF.
    const line = /\r\n|\n|\r(?=[^])/g;
    let from = 0;
    for (let found; (found = line.exec(this.rest)); from = line.lastIndex) this.line(this.rest.slice(from, found.index));
    this.rest = this.rest.slice(from);
  }

  line(line) {
    if (line === "") return this.dispatch();
    if (line.startsWith(":")) return;
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (name === "event") this.type = value;
    else if (name === "data") this.data.push(value);
    else if (name === "id" && !value.includes("\0")) this.id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
  }

  dispatch() {
    if (this.data.length) this.onEvent({ type: this.type || "message", data: this.data.join("\n"), id: this.id });
    this.reset();
  }
}

/**
 * Follow `path` until `close()`: `onEvent({type, data, id})` for each event with its JSON read, `onState` with
 * "connecting", "live", "waiting" or "ended". A lost connection resumes behind the last event; a refusal ends it.
 */
export function follow(path, { after = "", onEvent, onState = () => {}, onRefused = () => {} }) {
  const closed = new AbortController();
  let lastId = after;
  let retry = RETRY_MS;
  let failures = 0;

  const connect = async () => {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    closed.signal.addEventListener("abort", stop);
    let watchdog = setTimeout(stop, SILENCE_MS_MAX);
    try {
      const headers = { Accept: "text/event-stream", ...(lastId ? { "Last-Event-ID": lastId } : {}) };
      const response = await get(path, { signal: attempt.signal, headers });
      onState("live");
      failures = 0;
      const parser = new EventParser(({ type, data, id }) => {
        if (!closed.signal.aborted) onEvent({ type, data: JSON.parse(data), id });
      });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(watchdog);
        watchdog = setTimeout(stop, SILENCE_MS_MAX);
        parser.push(value);
        lastId = parser.id || lastId;
        retry = parser.retry ?? retry;
      }
    } finally {
      clearTimeout(watchdog);
      closed.signal.removeEventListener("abort", stop);
      attempt.abort();
    }
  };

  const run = async () => {
    while (!closed.signal.aborted) {
      onState("connecting");
      try {
        await connect();
      } catch (error) {
        if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
          onState("ended");
          return onRefused(error);
        }
      }
      if (closed.signal.aborted) return;
      onState("waiting");
      await pause(Math.min(retry * 2 ** failures++, RETRY_MS_MAX) * (0.5 + Math.random() / 2), closed.signal);
    }
  };
  run();
  return { close: () => closed.abort() };
}

/** Wait, but not longer than until the network is back. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    addEventListener("online", done);
    signal.addEventListener("abort", done);
  });
}
