// The chat page: which session is shown, what is asked of the server, and how the server is.

import { chat, health, metrics, models, onKeyNeeded } from "./api.js";
import { Conversation } from "./conversation.js";
import { askForKey, confirmed } from "./dialogs.js";
import { byId, el } from "./dom.js";
import { reason, say, translate } from "./language.js";
import { SessionList } from "./session_list.js";
import { Sessions, titleOf } from "./sessions.js";

const POLL_MS = 2000;
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed"];
const SERVER = {
  unreachable: say("The server cannot be reached. This page looks for it every two seconds."),
  stopped: say("The server’s engine has stopped: somebody has to start the server again."),
  stalled: say("The server makes no progress at the moment."),
  draining: say("The server is shutting down and takes no new questions."),
};
const CURRENT = "quantflow.current"; // in the tab's own storage: which session it shows

const [log, prompt, parameters] = ["log", "prompt", "parameters"].map(byId);
const drawer = matchMedia("(max-width: 760px)"); // as in style.css: the sessions cover the page
const overlay = matchMedia("(max-width: 1100px)"); // the settings do
const touched = matchMedia("(hover: none)");

const sessions = new Sessions(storage("localStorage"));
const conversation = new Conversation(log, byId("jump"), { regenerate, edit, retry: answerLast });
const sessionList = new SessionList(byId("sessions"), { open: choose, rename, remove });
const runs = new Map(); // the AbortController of each session that is being answered
const failures = new Map(); // why a session's last question has no answer, or half of one
let session;
let served = []; // the models
let server = "ok";
let unsaved = false;

function storage(name) {
  try {
    return window[name];
  } catch {
    return null; // the browser denies it
  }
}

// --- sessions

function openSession(id) {
  if (session) keepDraft();
  session = sessions.get(id);
  try {
    storage("sessionStorage").setItem(CURRENT, id);
  } catch {
    // A reload begins a new one.
  }
  prompt.value = session.draft;
  writeSettings();
  conversation.follow();
  show();
}

/** The user's choice, in a drawer perhaps. */
function choose(id) {
  openSession(id);
  toggleDrawer(false);
  rest();
}

function openNew() {
  choose(sessions.create(session.settings).id);
}

function save(changed) {
  unsaved = !sessions.save(changed);
}

function keepDraft() {
  if (session.draft === prompt.value) return;
  session.draft = prompt.value;
  save(session);
}

function rename(id, title) {
  const renamed = sessions.get(id);
  if (renamed && renamed.title !== title) {
    Object.assign(renamed, { title: titleOf(title), named: true });
    save(renamed);
  }
  show();
}

async function remove(id) {
  const { title } = sessions.get(id);
  if (!(await confirmed(say("Delete this conversation?"), say("“{title}” cannot be brought back.", { title }), say("Delete")))) return;
  runs.get(id)?.abort();
  failures.delete(id);
  sessions.remove(id);
  if (id === session.id) {
    const { settings } = session;
    session = null;
    openSession((sessions.list()[0] ?? sessions.create(settings)).id);
  }
  show();
  byId("new").focus();
}

// --- questions and answers

function send() {
  if (!prompt.value.trim() || runs.has(session.id) || !settingsAreValid()) return;
  const text = prompt.value.trimEnd();
  const last = session.messages.at(-1);
  // A question without an answer grows: many models' formats take no two questions in a row.
  if (last?.role === "user") session.messages.splice(-1, 1, { role: "user", content: `${last.content}\n\n${text}` });
  else session.messages.push({ role: "user", content: text });
  if (!session.named && session.messages.length === 1) session.title = titleOf(text);
  prompt.value = session.draft = "";
  answer(session);
  rest();
}

/** Asks again where there is no answer. */
function answerLast() {
  if (session.messages.at(-1)?.role !== "user" || runs.has(session.id)) return;
  answer(session);
  rest();
}

/** Writes the last answer anew. The old one comes back where there will be nothing new. */
function regenerate() {
  if (session.messages.at(-1)?.role !== "assistant" || runs.has(session.id)) return;
  answer(session, session.messages.pop());
  rest();
}

/** The last question goes back to the message field, and its answer away. */
function edit() {
  if (runs.has(session.id)) return;
  const last = session.messages.findLastIndex((message) => message.role === "user");
  const [question] = session.messages.splice(last);
  prompt.value = [question.content, prompt.value].filter((text) => text.trim()).join("\n\n");
  failures.delete(session.id);
  keepDraft();
  save(session);
  show();
  prompt.focus();
}

function stop() {
  runs.get(session.id)?.abort();
}

/** The server's answer to a session that ends with a question. */
async function answer(asked, replaced = null) {
  const message = { role: "assistant", content: "", ended: "cut", stats: {} };
  const body = { ...samplingOf(asked.settings), messages: dialogue(asked) };
  const run = new AbortController();
  const clock = { began: performance.now(), first: null, last: null };
  let usage = null;
  asked.messages.push(message);
  asked.updated = Date.now();
  runs.set(asked.id, run);
  failures.delete(asked.id);
  save(asked);
  conversation.follow();
  show();
  announce(say("Answering."));
  let failure = null;
  try {
    for await (const event of chat(body, run.signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (choice?.delta?.content) {
        clock.last = performance.now();
        if (clock.first === null) poll(); // an answer may be over before the next round
        clock.first ??= clock.last;
        message.content += choice.delta.content;
        if (asked === session) conversation.grow(message);
      }
      message.ended = choice?.finish_reason ?? message.ended;
    }
  } catch (error) {
    if (run.signal.aborted) message.ended = "stopped";
    else failure = error;
  }
  runs.delete(asked.id);
  message.stats = measured(clock, usage, contextOf(asked));
  const nothing = !message.content && ["stopped", "cut"].includes(message.ended);
  if (nothing) asked.messages.splice(-1, 1, ...(replaced ? [replaced] : []));
  save(asked);
  const lost = document.activeElement === byId("stop"); // it goes away
  show();
  if (lost) rest();
  const heading = message.ended === "cut" ? say("The answer was cut off") : say("Answer");
  if (asked === session && !nothing) announce(`${heading}: ${message.content}`);
  if (failure) await explain(asked, failure);
}

/** What the server's state explains is shown for as long as it lasts; another failure until the user does something about it. */
async function explain(asked, failure) {
  const refused = failure.status >= 400 && failure.status < 500;
  if (refused || (await look()) === "ok") failures.set(asked.id, failure);
  showNotice();
}

function dialogue({ settings, messages }) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  return [...system, ...messages.map(({ role, content }) => ({ role, content }))];
}

function measured({ began, first, last }, usage, context) {
  const tokens = usage?.completion_tokens;
  return {
    tokens,
    prompt: usage?.prompt_tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
    context,
    first: first === null ? null : first - began,
    rate: tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : null, // of what came after the first
  };
}

// --- settings: of the session that is shown; a new one begins with the same

function samplingOf(settings) {
  const given = SAMPLING.filter((name) => Number.isFinite(settings[name])).map((name) => [name, settings[name]]);
  const model = modelOf(settings);
  return { ...(model && { model: model.id }), ...Object.fromEntries(given) };
}

function modelOf(settings) {
  return served.find(({ id }) => id === settings.model) ?? served[0];
}

function contextOf({ settings }) {
  return modelOf(settings)?.max_model_len;
}

function writeSettings() {
  const { elements } = parameters;
  for (const name of SAMPLING) elements[name].value = Number.isFinite(session.settings[name]) ? session.settings[name] : "";
  elements.system.value = session.settings.system ?? "";
  elements.model.replaceChildren(...served.map(({ id }) => el("option", {}, id)));
  elements.model.value = modelOf(session.settings)?.id ?? "";
}

function readSettings() {
  const { elements } = parameters;
  const given = SAMPLING.filter((name) => elements[name].value !== "" && elements[name].validity.valid);
  session.settings = {
    model: elements.model.value,
    system: elements.system.value,
    ...Object.fromEntries(given.map((name) => [name, elements[name].valueAsNumber])),
  };
  save(session);
  showNotice();
}

function resetSettings() {
  session.settings = { model: session.settings.model };
  save(session);
  writeSettings();
}

function settingsAreValid() {
  if (parameters.checkValidity()) return true;
  toggleSettings(true);
  parameters.reportValidity();
  return false;
}

async function loadModels() {
  try {
    served = await models();
  } catch (error) {
    if (error.status && error.status < 500) failures.set(session.id, error);
  }
  writeSettings();
  show();
}

// --- the server

/** Looks how the server is. */
async function look() {
  const before = server;
  server = await health();
  if (server === "ok" && before !== "ok") loadModels(); // perhaps another server
  if (server !== before) showNotice();
  return server;
}

async function poll() {
  const figures = (await look()) === "ok" ? await metrics() : null;
  showGauges(figures);
}

async function watch() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((next) => setTimeout(next, POLL_MS));
  }
}

function showGauges(figures) {
  const names = ["kv_blocks_used", "kv_blocks", "kv_block_tokens", "sequences_running", "sequences_waiting"];
  const [used, all, size, running, waiting] = names.map((name) => figures?.get(`quantflow_${name}`));
  const memory = figures?.get("process_resident_memory_bytes");
  byId("kv-meter").value = all ? used / all : 0;
  byId("kv-text").textContent = all ? say("{used} of {all} tokens", { used: used * size, all: all * size }) : "–";
  byId("memory").textContent = memory ? bytes(memory) : "–";
  byId("sequences").textContent = running === undefined ? "–" : say("{running} running, {waiting} waiting", { running, waiting });
}

function bytes(count) {
  return count < 2 ** 30 ? `${Math.round(count / 2 ** 20)} MiB` : `${(count / 2 ** 30).toFixed(1)} GiB`;
}

async function retry() {
  if ((await look()) !== "ok") return;
  failures.delete(session.id);
  if (!served.length) await loadModels();
  if (session.messages.at(-1)?.ended === "cut") regenerate();
  else answerLast();
}

/** What is the matter, most urgent first, and what can be done about it: [text, {label: action}]. */
function problem() {
  const dismiss = {
    [say("Dismiss")]: () => {
      failures.delete(session.id);
      unsaved = false;
      showNotice();
      rest();
    },
  };
  if (server !== "ok") return [SERVER[server] ?? SERVER.unreachable, { [say("Retry")]: retry }];
  const failure = failures.get(session.id);
  if (failure?.code === "context_length_exceeded" && failure.param !== "max_tokens") {
    const size = contextOf(session);
    const text = size ? "This conversation does not fit into the model’s context of {size} tokens." : "This conversation does not fit into the model’s context.";
    const advice = say("Shorten your message, or begin a new conversation.");
    return [`${say(text, { size })} ${advice}`, { [say("Edit message")]: edit, [say("New conversation")]: openNew }];
  }
  if (failure?.status === 401) return [say("This server answers only to those who have a key."), { [say("Enter a key")]: retry }];
  if (SAMPLING.includes(failure?.param)) {
    return [reason(failure), { [say("Settings")]: () => toggleSettings(true), [say("Retry")]: retry, ...dismiss }];
  }
  if (failure) return [reason(failure), { [say("Retry")]: retry, ...dismiss }];
  if (unsaved) return [say("The browser’s storage is full, or denied: what is new lasts only until this page is closed."), dismiss];
  return null;
}

function showNotice() {
  const notice = byId("notice");
  const current = problem();
  if (notice.dataset.text === current?.[0]) return; // an alert is read out once
  if (!current) delete notice.dataset.text;
  else [notice.dataset.text] = current;
  const buttons = Object.entries(current?.[1] ?? {}).map(([label, onclick]) => el("button", { type: "button", onclick }, label));
  notice.replaceChildren(...(current ? [el("p", {}, current[0]), el("div", { class: "row" }, ...buttons)] : []));
}

// --- the page

function show() {
  const running = runs.has(session.id);
  byId("title").textContent = session.title;
  document.title = `${session.title} – QuantFlow`;
  sessionList.show(sessions.list(), session.id, runs);
  byId("no-sessions").hidden = sessions.list().length > 0;
  showNotice();
  conversation.show(session, { running, welcome: welcome() });
  byId("stop").hidden = !running;
  byId("send").hidden = running;
  fitPrompt();
}

function welcome() {
  const model = modelOf(session.settings);
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, model ? model.id : "QuantFlow"),
    el("p", {}, model ? say("Ask it something. Its context holds {size} tokens.", { size: model.max_model_len }) : say("Ask something.")),
  );
}

function announce(text) {
  byId("announcer").textContent = text;
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  byId("send").disabled = !prompt.value.trim();
}

function toggleDrawer(opened) {
  document.body.classList.toggle("drawer", opened);
  byId("menu").setAttribute("aria-expanded", String(opened));
  guard();
  if (opened) byId("new").focus();
}

/** Where the focus goes when what had it goes away. On a touch screen a keyboard would cover what there is to read. */
function rest() {
  if (touched.matches) log.focus({ focusVisible: false });
  else prompt.focus();
}

function toggleSettings(opened) {
  byId("settings").hidden = !opened;
  document.body.classList.toggle("settings", opened);
  byId("settings-toggle").setAttribute("aria-expanded", String(opened));
  guard();
  if (opened) byId("settings-title").focus();
  else byId("settings-toggle").focus();
}

/** What is covered cannot be reached. */
function guard() {
  const sessionsCover = drawer.matches && document.body.classList.contains("drawer");
  const settingsCover = overlay.matches && !byId("settings").hidden;
  byId("main").inert = sessionsCover || settingsCover;
  byId("sidebar").inert = settingsCover;
  byId("settings").inert = sessionsCover;
  byId("backdrop").hidden = !(sessionsCover || settingsCover);
}

/** Closes what covers the page, if anything does. */
function uncover() {
  if (byId("backdrop").hidden) return false;
  if (document.body.classList.contains("drawer")) {
    toggleDrawer(false);
    byId("menu").focus();
  } else toggleSettings(false);
  return true;
}

function start() {
  translate();
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", fitPrompt);
  prompt.addEventListener("keydown", (event) => {
    // 229: Safari's key that ends a composition.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (!uncover()) stop();
  });
  byId("stop").addEventListener("click", () => {
    stop();
    rest();
  });
  byId("new").addEventListener("click", openNew);
  byId("menu").addEventListener("click", () => toggleDrawer(true));
  byId("backdrop").addEventListener("click", uncover);
  byId("settings-toggle").addEventListener("click", () => toggleSettings(byId("settings").hidden));
  byId("settings-close").addEventListener("click", () => toggleSettings(false));
  parameters.addEventListener("input", readSettings);
  parameters.addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", resetSettings);
  for (const query of [drawer, overlay]) query.addEventListener("change", guard);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) keepDraft();
    else poll();
  });
  addEventListener("pagehide", () => {
    keepDraft();
    for (const id of runs.keys()) save(sessions.get(id)); // as far as the answers go
  });
  addEventListener("storage", ({ key }) => {
    sessions.reload({ key, kept: [...runs.keys()] });
    const here = sessions.get(session.id); // another tab may have written to it, or deleted it
    if (here) session = here;
    else openSession(sessions.create(session.settings).id);
    show();
  });
  onKeyNeeded(askForKey);

  let id = null;
  try {
    id = storage("sessionStorage").getItem(CURRENT);
  } catch {
    // A new one, then.
  }
  openSession((sessions.get(id) ?? sessions.create(sessions.list()[0]?.settings ?? {})).id);
  prompt.focus();
  loadModels();
  watch();
}

start();
