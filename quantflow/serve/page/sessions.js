// Conversations, kept in the browser: an entry of its storage each, so that two tabs do not overwrite each other's.
//
// A session is {id, title, named, updated, draft, settings, messages}. named: the user gave it its title. draft: what stands in the
// message field. settings: what was set in the panel, as the server's parameters. A message is {role, content}, an answer has also
// {ended, stats}. ended: "stop", "length", "stopped" by the user, or "cut" off; stats: what the page measured.

import { say } from "./language.js";

const PREFIX = "quantflow.session.";
const TITLE_LETTERS = 60;
const UNTITLED = say("New conversation");
const ENDS = ["stop", "length", "stopped", "cut"];

export class Sessions {
  #storage;
  #sessions = new Map();

  /** storage: localStorage, or null where the browser denies it. */
  constructor(storage) {
    this.#storage = storage;
    this.reload();
  }

  /** The latest first. Those in which nothing has been written are left out. */
  list() {
    return [...this.#sessions.values()].filter((s) => s.messages.length || s.draft).sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#sessions.get(id);
  }

  /** A new one, or one in which nothing has been written yet. */
  create(settings) {
    const unused = [...this.#sessions.values()].find((s) => !s.messages.length && !s.draft);
    const session = unused ?? { id: newId(), title: UNTITLED, named: false, updated: 0, draft: "", settings: {}, messages: [] };
    session.settings = { ...settings };
    this.#sessions.set(session.id, session);
    return session;
  }

  /** Whether it could be stored. In the page it is kept in any case. */
  save(session) {
    if (!this.#sessions.has(session.id)) return true; // deleted meanwhile
    try {
      this.#storage.setItem(PREFIX + session.id, JSON.stringify(session));
      return true;
    } catch {
      return false;
    }
  }

  remove(id) {
    this.#sessions.delete(id);
    try {
      this.#storage.removeItem(PREFIX + id);
    } catch {
      // It was not stored.
    }
  }

  /** What another tab has stored. id: of the one entry that changed; kept: ids that stay as they are here. */
  reload({ key = null, kept = [] } = {}) {
    if (key !== null && !key.startsWith(PREFIX)) return;
    for (const name of key === null ? this.#names() : [key]) {
      const id = name.slice(PREFIX.length);
      if (kept.includes(id)) continue;
      const session = read(this.#storage, name);
      if (session?.id === id) this.#sessions.set(id, session);
      else this.#sessions.delete(id);
    }
  }

  #names() {
    try {
      return Object.keys(this.#storage).filter((name) => name.startsWith(PREFIX));
    } catch {
      return [];
    }
  }
}

export function titleOf(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > TITLE_LETTERS ? `${line.slice(0, TITLE_LETTERS - 1).trimEnd()}…` : line || UNTITLED;
}

// randomUUID is missing over plain http from another machine.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A session from the storage, or null for what is none: other software and other versions may have written there. */
function read(storage, name) {
  try {
    const stored = JSON.parse(storage.getItem(name));
    const { id, title, named, updated, draft } = stored;
    const messages = stored.messages.map(message).filter((m) => m.role === "user" || m.content || m.ended !== "cut");
    if (typeof id !== "string" || typeof title !== "string") return null;
    return {
      id,
      title,
      named: named === true,
      updated: Number(updated) || 0,
      draft: typeof draft === "string" ? draft : "",
      settings: { ...numbers(stored.settings), ...texts(stored.settings ?? {}) },
      messages,
    };
  } catch {
    return null;
  }
}

function message({ role, content, ended, stats }) {
  if (typeof content !== "string") throw new TypeError("content");
  if (role === "user") return { role, content };
  if (role !== "assistant") throw new TypeError("role");
  return { role, content, ended: ENDS.includes(ended) ? ended : "cut", stats: numbers(stats) };
}

function numbers(settings) {
  return Object.fromEntries(Object.entries(settings ?? {}).filter(([, value]) => Number.isFinite(value)));
}

/** Those of the settings that are text. */
function texts({ model, system }) {
  return { model: typeof model === "string" ? model : "", system: typeof system === "string" ? system : "" };
}
