// One session's messages as they are seen. Nodes of messages that are drawn already stay, and with them focus, selection and scrolling.

import { copyButton, el } from "./dom.js";
import { say } from "./language.js";
import { draw } from "./markup.js";

const BOTTOM_PX = 4; // what still counts as scrolled to the end

const ENDED = { length: say("ended at the token limit"), stopped: say("stopped"), cut: say("cut off") };

export class Conversation {
  #log;
  #jump;
  #actions;
  #articles = new WeakMap(); // by message
  #growing = null;
  #following = true; // whether the end is kept in view
  #top = 0;

  /** log: what scrolls. jump: the button that leads back to the end. actions: {regenerate, edit, retry}. */
  constructor(log, jump, actions) {
    this.#log = log;
    this.#jump = jump;
    this.#actions = actions;
    log.addEventListener("scroll", () => this.#scrolled());
    jump.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#keepUp()).observe(log);
  }

  /** running: whether an answer is being written. welcome: what stands in an empty session. */
  show(session, { running, welcome }) {
    const { messages } = session;
    this.#growing = null; // all of it is drawn here
    const nodes = messages.map((message) => this.#article(message, running && message === messages.at(-1)));
    if (!nodes.length) nodes.push(welcome);
    if (messages.at(-1)?.role === "user") nodes.push(this.#unanswered());
    nodes.forEach((node, index) => {
      const old = this.#log.children[index];
      if (old !== node) this.#log.insertBefore(node, old ?? null);
    });
    while (this.#log.children.length > nodes.length) this.#log.lastChild.remove();
    this.#log.setAttribute("aria-busy", String(running));
    this.#keepUp();
  }

  /** An answer that is shown has more text: drawn with the browser's next picture, however many pieces arrive until then. */
  grow(message) {
    if (this.#growing === null) requestAnimationFrame(() => this.#draw());
    this.#growing = message;
  }

  /** Scrolls to the end and stays there. */
  follow() {
    this.#following = true;
    this.#keepUp();
  }

  #draw() {
    const message = this.#growing;
    this.#growing = null;
    this.#articles.get(message)?.update(true);
    this.#keepUp();
  }

  #article(message, running) {
    let article = this.#articles.get(message);
    if (!article) {
      article = message.role === "user" ? this.#question(message) : this.#answer(message);
      this.#articles.set(message, article);
    }
    article.update(running);
    return article.node;
  }

  #question(message) {
    const body = el("div", { class: "body plain", lang: "" }); // in whatever language it is
    const edit = el("button", { type: "button", class: "quiet only-last", onclick: () => this.#actions.edit() }, say("Edit"));
    const node = el("article", { class: "question" }, el("h2", { class: "visually-hidden" }, say("You")), body, edit);
    return { node, update: () => (body.textContent = message.content) };
  }

  #answer(message) {
    const body = el("div", { class: "body", lang: "" });
    const summary = el("p", { class: "stats" });
    const onclick = () => this.#actions.regenerate();
    const regenerate = el("button", { type: "button", class: "quiet only-last", onclick }, say("Regenerate"));
    const foot = el("div", { class: "foot" }, summary, copyButton(() => message.content), regenerate);
    const node = el("article", { class: "answer" }, el("h2", { class: "visually-hidden" }, say("Answer")), body, foot);
    const update = (running) => {
      node.classList.toggle("running", running);
      draw(body, message.content);
      if (!message.content && !running) body.replaceChildren(el("p", { class: "nothing" }, say("The model answered with nothing.")));
      summary.textContent = running ? "" : describe(message);
    };
    return { node, update };
  }

  #unanswered() {
    return el(
      "div",
      { class: "unanswered" },
      el("span", {}, say("This message has no answer.")),
      el("button", { type: "button", onclick: () => this.#actions.retry() }, say("Retry")),
    );
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#log;
    if (scrollHeight - scrollTop - clientHeight <= BOTTOM_PX) this.#following = true;
    else if (scrollTop < this.#top) this.#following = false;
    this.#top = scrollTop;
    this.#jump.hidden = this.#following;
  }

  #keepUp() {
    if (this.#following) this.#log.scrollTop = this.#log.scrollHeight;
    this.#scrolled();
  }
}

/** What an answer took, in words. */
export function describe({ ended, stats }) {
  const { tokens, rate, first, prompt, cached, context } = stats;
  return [
    tokens != null && say(tokens === 1 ? "{tokens} token" : "{tokens} tokens", { tokens }),
    rate != null && say("{rate} tokens/s", { rate: rate.toFixed(1) }),
    first != null && say("first token after {time}", { time: duration(first) }),
    prompt != null && say(cached ? "prompt of {prompt}, {cached} of them cached" : "prompt of {prompt}", { prompt, cached }),
    prompt != null && context != null && say("{share}% of the context", { share: Math.round((100 * (prompt + tokens)) / context) }),
    ENDED[ended],
  ]
    .filter(Boolean)
    .join(" · ");
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
