// The documentation: what the server's own openapi.json says, by tag. Nothing about any operation is written here.

import { keyed, onKeyNeeded, request } from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, copyButton, el } from "./dom.js";
import { reason, say, speaks, translate } from "./language.js";

const DEEPEST = 6; // schemas may contain themselves
const RANGES = [
  ["minimum", "maximum", "{range}"],
  ["exclusiveMinimum", "exclusiveMaximum", "{range} (exclusive)"],
  ["minLength", "maxLength", "{range} characters"],
  ["minItems", "maxItems", "{range} items"],
  ["minProperties", "maxProperties", "{range} entries"],
];

const NEEDED = say("This server tells what it offers only to those who have a key. With one, this page shows its API.");

let whole;

// --- schemas

/** A schema with its local reference followed. */
function resolve(schema) {
  if (!schema.$ref) return schema;
  const path = schema.$ref.replace(/^#\//, "").split("/");
  return path.reduce((part, name) => part?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], whole) ?? {};
}

/** What a schema admits, alternative by alternative; null is left to `admitsNull`. */
function alternatives(schema) {
  const resolved = resolve(schema);
  const several = resolved.anyOf ?? resolved.oneOf;
  return several ? several.flatMap(alternatives) : resolved.type === "null" ? [] : [resolved];
}

function admitsNull(schema) {
  const resolved = resolve(schema);
  return resolved.type === "null" || (resolved.anyOf ?? resolved.oneOf ?? []).some(admitsNull);
}

function typeOf(schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(say(" or "));
  if (schema.type === "array") return say("array of {what}", { what: namesOf(schema.items ?? {}) });
  if (schema.properties) return schema.title ?? say("object");
  const values = schema.additionalProperties || Object.values(schema.patternProperties ?? {})[0];
  return values && values !== true ? say("object of {what}", { what: namesOf(values) }) : say(String(schema.type ?? "anything"));
}

function namesOf(schema) {
  const names = [...new Set(alternatives(schema).map(typeOf))];
  return [...names, ...(admitsNull(schema) ? ["null"] : [])].join(say(" or ")) || say("anything");
}

/** What is demanded of a value beside its type, of an array's items too. */
function limitsOf(schema) {
  const remarks = alternatives(schema).flatMap((one) => [
    ...RANGES.map(([least, most, unit]) => range(one[least], one[most], unit)),
    one.pattern && say("matches {pattern}", { pattern: one.pattern }),
    ...(one.items ? limitsOf(one.items).map((limit) => say("each {limit}", { limit })) : []),
  ]);
  const preset = resolve(schema).default ?? null;
  return [...new Set([...remarks, preset !== null && say("default {value}", { value: JSON.stringify(preset) })])].filter(Boolean);
}

function range(least, most, unit) {
  if (least === undefined && most === undefined) return null;
  const bounds = { least: number(least ?? 0), most: number(most ?? 0) };
  const limits = say(most === undefined ? "≥ {least}" : least === undefined ? "≤ {most}" : "{least} to {most}", bounds);
  return say(unit, { range: limits });
}

function number(value) {
  return Math.abs(value) < 2 ** 53 ? String(value) : value.toExponential(1); // longer ones are not exact
}

/** The objects in a value: those whose properties are worth a table of their own. */
function objectsIn(schema) {
  return alternatives(schema).flatMap((one) => (one.properties ? [one] : one.items ? objectsIn(one.items) : []));
}

// --- nodes

function table(headings, rows) {
  const head = el("tr", {}, ...headings.map((heading) => el("th", { scope: "col" }, heading)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

/** What the server's document says, of which there may be no translation. */
function theirs(tag, attributes, text) {
  return el(tag, { ...attributes, lang: speaks(text) ? null : "en" }, say(text));
}

function cells(...contents) {
  return el("tr", {}, ...contents.map((content) => el("td", {}, content)));
}

/** Whether a property admits nothing that would change an answer. */
function idles(schema) {
  return schema["x-changes-nothing"] || !alternatives(schema).length;
}

/** The properties of an object, and of those in it, folded up. Those that change nothing are only named, with what they admit. */
function properties(schema, depth = 0) {
  const all = Object.entries(schema.properties);
  const required = ([name]) => (schema.required?.includes(name) ? 0 : 1);
  const useful = all.filter(([, value]) => !idles(value)).sort((a, b) => required(a) - required(b));
  const idle = all.filter(([, value]) => idles(value)).map(([name, value]) => `${name}: ${namesOf(value)}`);
  const rows = useful.flatMap(([name, value]) => {
    const { description } = resolve(value);
    const limits = limitsOf(value).join(say(", "));
    const words = el("span", {}, description ? theirs("span", {}, description) : "", description && limits ? " · " : "", limits);
    const nested = depth < DEEPEST ? objectsIn(value) : [];
    const folded = nested.map((one) => el("details", {}, el("summary", {}, one.title ?? name), properties(one, depth + 1)));
    return [
      cells(el("code", {}, name), namesOf(value), words, required([name]) ? "" : say("required")),
      ...(folded.length ? [el("tr", {}, el("td", { colspan: "4", class: "nested" }, ...folded))] : []),
    ];
  });
  const others = el("p", { class: "hint" }, el("code", {}, idle.join(", ")));
  return el(
    "div",
    {},
    schema.description ? theirs("p", { class: "hint" }, schema.description) : null,
    table([say("Name"), say("Type"), say("Constraints"), say("Required")], rows),
    idle.length ? el("details", {}, el("summary", {}, say("{count} more, which change nothing", { count: idle.length })), others) : null,
  );
}

/** The least that fits a schema: what is required. */
function example(schema, name, depth = 0) {
  const [first = {}] = alternatives(schema);
  if (first.default !== undefined) return first.default;
  if (first.const !== undefined) return first.const;
  if (first.enum) return first.enum.includes("user") ? "user" : first.enum[0];
  if (first.type === "array") return depth < DEEPEST ? [example(first.items ?? {}, name, depth + 1)] : [];
  if (first.type === "integer" || first.type === "number") return Math.max(first.minimum ?? 1, 1);
  if (first.type === "boolean") return true;
  if (!first.properties) return first.type === "object" ? {} : "Hello";
  // A message without content is none, though tool calls make it optional; and a request without any field says nothing.
  const useful = ["content", "prompt"].filter((known) => known in first.properties && !idles(first.properties[known]));
  const wanted = new Set([...(first.required ?? []), ...useful]);
  return Object.fromEntries([...wanted].map((key) => [key, example(first.properties[key], key, depth + 1)]));
}

function curl(method, path, schema, admin) {
  const address = new URL(".", document.baseURI) + path.slice(1).replace(/{(\w+)}/g, (_, name) => name.toUpperCase());
  const lines = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${address}`];
  if (admin) lines.push('-H "authorization: Bearer $QUANTFLOW_ADMIN_KEY"');
  else if (keyed()) lines.push('-H "authorization: Bearer $QUANTFLOW_API_KEY"');
  if (method !== "get") lines.push("-H 'content-type: application/json'");
  if (schema) lines.push(`-d '${JSON.stringify(example(schema)).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}

function operation({ path, method, detail }) {
  const schema = detail.requestBody?.content["application/json"]?.schema;
  const command = curl(method, path, schema, path.startsWith("/admin/"));
  const parameters = (detail.parameters ?? []).map(resolve);
  const answers = Object.entries(detail.responses).map(([status, given]) => {
    const { description, content = {} } = resolve(given);
    const kinds = Object.entries(content).map(([kind, body]) => kind + (body.schema ? `: ${namesOf(body.schema)}` : ""));
    return cells(el("code", {}, status), theirs("span", {}, description ?? ""), kinds.join(say(", ")));
  });
  const statuses = Object.keys(detail.responses);
  const bodies = schema ? objectsIn(schema) : [];
  return el(
    "article",
    { class: "operation", id: anchor(method, path) },
    el("h3", {}, el("span", { class: "method" }, method.toUpperCase()), " ", el("code", {}, path)),
    detail.description ? theirs("p", {}, detail.description) : null,
    ...(parameters.length ? [el("h4", {}, say("In the address")), parametersTable(parameters)] : []),
    ...(bodies.length ? [el("h4", {}, say("Request body")), ...bodies.map((body) => properties(body))] : []),
    el("details", {}, el("summary", {}, say("Answers: {statuses}", { statuses: statuses.join(", ") })), table([say("Status"), say("Meaning"), say("Content")], answers)),
    el(
      "figure",
      { class: "code" },
      el("figcaption", {}, el("span", {}, "curl"), copyButton(() => command)),
      el("pre", { tabindex: "0", "aria-label": say("curl for {path}", { path }) }, el("code", {}, command)),
    ),
  );
}

function parametersTable(parameters) {
  const rows = parameters.map(({ name, in: place, required, schema = {} }) =>
    cells(el("code", {}, name), `${namesOf(schema)} (${say(place)})`, limitsOf(schema).join(say(", ")), required ? say("required") : ""),
  );
  return table([say("Name"), say("Type"), say("Constraints"), say("Required")], rows);
}

function anchor(method, path) {
  return `${method}${path.replace(/[^a-z0-9]+/gi, "-")}`;
}

function draw() {
  const groups = new Map();
  for (const [path, methods] of Object.entries(whole.paths)) {
    for (const [method, detail] of Object.entries(methods)) {
      const tag = detail.tags?.[0] ?? "other";
      groups.set(tag, [...(groups.get(tag) ?? []), { path, method, detail }]);
    }
  }
  const { title, version, description = "" } = whole.info;
  byId("intro").replaceChildren(`${title} ${version} · `, theirs("span", {}, description));
  const links = [...groups.values()].flat().map(({ path, method }) => {
    const words = [el("span", { class: "method" }, method.toUpperCase()), " ", el("code", {}, path)];
    return el("li", {}, el("a", { href: `#${anchor(method, path)}` }, ...words));
  });
  byId("contents").replaceChildren(el("ul", {}, ...links));
  const sections = [...groups].map(([tag, operations]) =>
    el("section", {}, theirs("h2", {}, tag[0].toUpperCase() + tag.slice(1)), ...operations.map(operation)),
  );
  byId("operations").replaceChildren(...sections);
  document.getElementById(location.hash.slice(1))?.scrollIntoView(); // what the address names was not there when the page was opened
}

/** The link to the document itself. A link carries no key: what was read with one is given from here. */
function link(text) {
  const node = byId("document");
  node.hidden = false;
  if (!keyed()) return;
  node.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  node.download = "openapi.json";
}

/** What keeps the document from being shown, and the button that may help. */
function explain(text, label) {
  const button = el("button", { type: "button", onclick: read }, label);
  byId("intro").replaceChildren(el("span", {}, text), button);
  button.focus();
}

async function read() {
  try {
    const text = await (await request("openapi.json")).text();
    whole = JSON.parse(text);
    draw();
    link(text);
  } catch (error) {
    if (error.status === 401) explain(NEEDED, say("Enter a key"));
    else explain(say("openapi.json cannot be shown: {reason}", { reason: reason(error) }), say("Retry"));
  }
}

translate();
onKeyNeeded((refused) => {
  byId("intro").textContent = NEEDED;
  return askForKey(refused, NEEDED);
});
read();
