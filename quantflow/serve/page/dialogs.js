// Questions that must be answered before anything else: the browser's own modal dialogs keep the focus and close on Escape.

import { el } from "./dom.js";
import { say } from "./language.js";

/** The server's key, or null where the user gives none. refused: whether one has been tried. use: what it is needed for. */
export async function askForKey(refused, use = say("This server answers only to those who have a key.")) {
  const input = el("input", { type: "password", id: "key", required: true, autocomplete: "off", spellcheck: "false", "aria-describedby": "key-hint" });
  const answer = await ask(
    say("This server asks for a key"),
    say("Use it"),
    el("p", {}, use),
    el("p", { class: "hint", id: "key-hint" }, say("Whoever runs the server has it. It stays in this page’s memory and is stored nowhere: a reload asks again.")),
    el("label", { for: "key" }, say("API key")),
    input,
    refused ? el("p", { class: "wrong", role: "alert" }, say("That key is not one of this server’s.")) : null,
  );
  return answer ? input.value.trim() || null : null;
}

export function confirmed(question, detail, action) {
  return ask(question, action, el("p", {}, detail));
}

/** Whether the user agreed. */
function ask(title, action, ...content) {
  const { promise, resolve } = deferred();
  const form = el(
    "form",
    { onsubmit: submit },
    el("h2", { id: "dialog-title" }, title),
    ...content.filter(Boolean),
    el(
      "div",
      { class: "row end" },
      el("button", { type: "button", onclick: () => dialog.close() }, say("Cancel")),
      el("button", { type: "submit", class: "primary" }, action),
    ),
  );
  const dialog = el("dialog", { "aria-labelledby": "dialog-title", onclose: closed }, form);

  function submit(event) {
    event.preventDefault();
    dialog.close("yes");
  }

  function closed() {
    dialog.remove();
    resolve(dialog.returnValue === "yes");
  }

  document.body.append(dialog);
  dialog.showModal();
  return promise;
}

function deferred() {
  let resolve;
  const promise = new Promise((done) => (resolve = done));
  return { promise, resolve };
}
