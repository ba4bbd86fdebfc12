// Questions that must be answered before anything else: the browser's own modal dialogs keep the focus and close on Escape.

import { el } from "./dom.js";

/** The server's key, or null where the user gives none. refused: whether one has been tried. */
export async function askForKey(refused) {
  const input = el("input", { type: "password", id: "key", required: true, autocomplete: "off", spellcheck: "false" });
  const answer = await ask(
    "This server asks for a key",
    "Use it",
    el("p", {}, "It stays in this page's memory and is stored nowhere: a reload asks again."),
    el("label", { for: "key" }, "API key"),
    input,
    refused ? el("p", { class: "wrong", role: "alert" }, "That key is not one of this server's.") : null,
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
      el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
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
