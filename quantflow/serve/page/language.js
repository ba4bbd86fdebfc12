// What the pages say, in the browser's language. English is written where it is said; a dictionary has another language's words by it.

import { CHINESE } from "./chinese.js";

const DICTIONARIES = { zh: ["zh-CN", CHINESE] };
const ATTRIBUTES = ["aria-label", "title", "placeholder"];

const known = (name) => name === "en" || Object.hasOwn(DICTIONARIES, name);
const chosen = navigator.languages.map((tag) => tag.toLowerCase().split("-")[0]).find(known);
const [tag, words] = DICTIONARIES[chosen] ?? ["en", {}];

/** Whether there are words for it in the browser's language. */
export const speaks = (text) => tag === "en" || Object.hasOwn(words, text);

/** A text in the browser's language, else in English; {name} stands for a value. */
export function say(text, values = {}) {
  const template = Object.hasOwn(words, text) ? words[text] : text;
  return template.replace(/{(\w+)}/g, (whole, name) => values[name] ?? whole);
}

/** Why something failed: in English the server's own words, which say most; else what its code means, and those words if need be. */
export function reason({ message, code, param }) {
  if (tag === "en" || !code) return message;
  if (speaks(`code ${code}`)) return say(`code ${code}`);
  return param ? say("{param} was refused: {message}", { param, message }) : say("The server says: {message}", { message });
}

/** What stands in the document already. */
export function translate() {
  document.documentElement.lang = tag;
  if (tag === "en") return;
  document.title = say(document.title);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE) {
      const text = node.data.trim();
      if (text) node.data = node.data.replace(text, () => say(text));
    } else {
      for (const name of ATTRIBUTES.filter((each) => node.getAttribute(each))) node.setAttribute(name, say(node.getAttribute(name)));
    }
  }
}
