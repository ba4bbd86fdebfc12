// Model text as nodes: paragraphs, fenced code, `code` and **bold**. Everything becomes text nodes, so that no HTML in it is interpreted.

import { copyButton, el } from "./dom.js";
import { say } from "./language.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const INLINE = /`([^`\n]+)`|\*\*(\S(?:[^*\n]*\S)?)\*\*/g;

const sources = new WeakMap(); // of nodes that are drawn

/** Draws text into a container. Blocks that have not changed stay, and with them what is selected there. */
export function draw(container, text) {
  const parts = blocks(text);
  parts.forEach((block, index) => {
    const source = JSON.stringify(block);
    const old = container.children[index];
    if (old && sources.get(old) === source) return;
    const node = block.code ? codeNode(block) : paragraphNode(block);
    sources.set(node, source);
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > parts.length) container.lastChild.remove();
}

/** {text} or {code: true, language, text}, in order. A fence that is not closed yet reaches to the end. */
export function blocks(text) {
  const parts = [];
  let lines = [];
  let fence = null;

  function close() {
    const body = lines.join("\n");
    if (fence) parts.push({ code: true, language: fence.language, text: body });
    else if (body.trim()) parts.push({ text: body });
    lines = [];
    fence = null;
  }

  for (const line of text.split("\n")) {
    const match = FENCE.exec(line);
    if (fence) {
      if (match && match[1].startsWith(fence.marker) && !match[2].trim()) close();
      else lines.push(line);
    } else if (match) {
      close();
      fence = { marker: match[1], language: match[2].trim().split(/\s/)[0] };
    } else if (line.trim()) lines.push(line);
    else close();
  }
  close();
  return parts;
}

function codeNode({ language, text }) {
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, language || say("code")), copyButton(() => text, say("Copy code"))),
    el("pre", { tabindex: "0", "aria-label": say("Code") }, el("code", {}, text)),
  );
}

function paragraphNode({ text }) {
  const node = el("p");
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    node.append(text.slice(end, match.index), match[1] !== undefined ? el("code", {}, match[1]) : el("strong", {}, match[2]));
    end = match.index + match[0].length;
  }
  node.append(text.slice(end));
  return node;
}
