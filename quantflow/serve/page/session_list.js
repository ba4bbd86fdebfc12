// The list of sessions in the sidebar: choose, rename, delete.

import { el, icon } from "./dom.js";
import { say } from "./language.js";

export class SessionList {
  #list;
  #actions;
  #renaming = false;

  /** actions: {open(id), rename(id, title), remove(id)}. */
  constructor(list, actions) {
    this.#list = list;
    this.#actions = actions;
  }

  /** current: the id of the session that is shown. running: ids of those that are being answered. */
  show(sessions, current, running) {
    if (this.#renaming) return; // somebody is writing in it
    const focused = this.#list.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    this.#list.replaceChildren(...sessions.map((session) => this.#item(session, session.id === current, running.has(session.id))));
    if (focused) this.#list.querySelector(`[data-focus="${focused}"]`)?.focus();
  }

  #item({ id, title }, current, running) {
    const dot = el("span", { class: "dot" }, el("span", { class: "visually-hidden" }, ` ${say("(being answered)")}`));
    const select = { class: "title", title, "aria-current": current && "true" };
    const item = el(
      "li",
      {},
      this.#button(`select ${id}`, () => this.#actions.open(id), select, title, running ? dot : null),
      this.#tool(`rename ${id}`, () => this.#rename(item, id, title), "pencil", say("Rename “{title}”", { title })),
      this.#tool(`delete ${id}`, () => this.#actions.remove(id), "trash", say("Delete “{title}”", { title })),
    );
    return item;
  }

  #tool(name, onclick, drawing, label) {
    return this.#button(name, onclick, { class: "icon-only", "aria-label": label, title: label }, icon(drawing));
  }

  /** name: by which the focus finds it again when the list is drawn anew. */
  #button(name, onclick, attributes, ...content) {
    return el("button", { type: "button", "data-focus": name, onclick, ...attributes }, ...content);
  }

  #rename(item, id, title) {
    const list = this.#list;
    const input = el("input", { type: "text", "aria-label": say("Title"), maxlength: "60", onblur: () => end(input.value), onkeydown: key });

    const end = (written) => {
      if (!this.#renaming) return; // drawing the list anew takes the focus away, too
      this.#renaming = false;
      this.#actions.rename(id, written.trim() || title);
    };

    function key(event) {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation(); // Escape ends this and no answer
      event.preventDefault(); // Enter would press the button that has the focus next
      end(event.key === "Enter" ? input.value : title);
      list.querySelector(`[data-focus="rename ${id}"]`)?.focus();
    }

    input.value = title;
    this.#renaming = true;
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}
