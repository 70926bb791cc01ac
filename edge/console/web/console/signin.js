// Signing in: a token is pasted, the edge says whose it is.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { session, tokenFrom } from "./session.js";

const WHY = {
  expired: "Your token has expired. Sign in with a new one to go on where you were.",
  refused: "Your token is not accepted any more: it has expired or was revoked. Sign in with a new one to go on where you were.",
  out: "You are signed out; the token is gone from this tab.",
};

/** Whose token it is; ApiError when the edge does not believe it. */
export function verify(token) {
  return getJson("/api/auth/verify", { token });
}

/** The sign-in screen; `why` the last session ended, if one did. `onDone` is called once somebody is signed in. */
export function signInView({ why, error, onDone }) {
  const problem = h("p", { class: "problem", role: "alert", id: "sign-in-problem" }, error?.message ?? "");
  const field = h("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", autocapitalize: "none",
    required: true, placeholder: "eyJ…", "aria-describedby": "sign-in-problem sign-in-help" });
  const submit = h("button", { type: "submit", class: "button primary" }, "Sign in");
  const onsubmit = async (event) => {
    event.preventDefault();
    const token = tokenFrom(field.value);
    problem.textContent = "";
    if (!token) {
      problem.textContent = "Paste a token first.";
      return field.focus();
    }
    submit.disabled = true;
    try {
      session.begin(token, await verify(token));
      field.value = "";
      onDone();
    } catch (refused) {
      problem.textContent = refused.message;
      field.focus();
      field.select();
    } finally {
      submit.disabled = false;
    }
  };
  queueMicrotask(() => field.focus());
  return h("main", { class: "sign-in", id: "main" },
    h("h1", {}, h("img", { src: document.querySelector("link[rel=icon]").href, alt: "", width: "36", height: "36" }), "Weft"),
    why ? h("p", { class: `notice ${why}`, role: "status" }, WHY[why]) : h("p", { class: "muted" }, "The threads of your coding assistants, in every region."),
    h("form", { onsubmit },
      h("label", { for: "token" }, "Token"), field, problem, submit,
      h("p", { id: "sign-in-help", class: "muted" }, "A JWT from your issuer. On a development cluster ",
        h("code", {}, "weft token --user ada"), " prints one. It is kept in this tab only and goes nowhere but to this edge.")));
}
