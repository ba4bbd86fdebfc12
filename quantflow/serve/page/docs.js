// The documentation: what the server's own openapi.json says, by tag. Nothing about any operation is written here.

import { keyed, onKeyNeeded, request } from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, copyButton, el } from "./dom.js";

const DEEPEST = 6; // schemas may contain themselves
const RANGES = [
  ["minimum", "maximum", ""],
  ["exclusiveMinimum", "exclusiveMaximum", " (exclusive)"],
  ["minLength", "maxLength", " characters"],
  ["minItems", "maxItems", " items"],
  ["minProperties", "maxProperties", " entries"],
];

let whole;

// --- schemas

/** A schema with its local reference followed. */
function resolve(schema) {
  if (!schema.$ref) return schema;
  const path = schema.$ref.replace(/^#\//, "").split("/");
  return path.reduce((found, name) => found?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], whole) ?? {};
}

/** What a schema admits, alternative by alternative; null is left to `admitsNull`. */
function alternatives(schema) {
  const found = resolve(schema);
  const several = found.anyOf ?? found.oneOf;
  return several ? several.flatMap(alternatives) : found.type === "null" ? [] : [found];
}

function admitsNull(schema) {
  const found = resolve(schema);
  return found.type === "null" || (found.anyOf ?? found.oneOf ?? []).some(admitsNull);
}

function typeOf(schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return `array of ${namesOf(schema.items ?? {})}`;
  if (schema.properties) return schema.title ?? "object";
  const values = schema.additionalProperties || Object.values(schema.patternProperties ?? {})[0];
  return values && values !== true ? `object of ${namesOf(values)}` : (schema.type ?? "anything");
}

function namesOf(schema) {
  const names = [...new Set(alternatives(schema).map(typeOf))];
  return [...names, ...(admitsNull(schema) ? ["null"] : [])].join(" or ") || "anything";
}

/** What is demanded of a value beside its type, of an array's items too. */
function limitsOf(schema) {
  const found = alternatives(schema).flatMap((one) => [
    ...RANGES.map(([least, most, unit]) => range(one[least], one[most], unit)),
    one.pattern && `matches ${one.pattern}`,
    ...(one.items ? limitsOf(one.items).map((limit) => `each ${limit}`) : []),
  ]);
  const preset = resolve(schema).default ?? null;
  return [...new Set([...found, preset !== null && `default ${JSON.stringify(preset)}`])].filter(Boolean);
}

function range(least, most, unit) {
  if (least === undefined && most === undefined) return null;
  if (most === undefined) return `≥ ${number(least)}${unit}`;
  return least === undefined ? `≤ ${number(most)}${unit}` : `${number(least)} to ${number(most)}${unit}`;
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
    const words = [resolve(value).description, limitsOf(value).join(", ")].filter(Boolean).join(" · ");
    const nested = depth < DEEPEST ? objectsIn(value) : [];
    const folded = nested.map((one) => el("details", {}, el("summary", {}, one.title ?? name), properties(one, depth + 1)));
    return [
      cells(el("code", {}, name), namesOf(value), words, required([name]) ? "" : "yes"),
      ...(folded.length ? [el("tr", {}, el("td", { colspan: "4", class: "nested" }, ...folded))] : []),
    ];
  });
  const others = el("p", { class: "hint" }, el("code", {}, idle.join(", ")));
  return el(
    "div",
    {},
    schema.description ? el("p", { class: "hint" }, schema.description) : null,
    table(["Name", "Type", "Constraints", "Required"], rows),
    idle.length ? el("details", {}, el("summary", {}, `${idle.length} more, which change nothing`), others) : null,
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
  const wanted = new Set([...(first.required ?? []), ...["content", "prompt"].filter((known) => known in first.properties)]);
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
    return cells(el("code", {}, status), description ?? "", kinds.join(", "));
  });
  const statuses = Object.keys(detail.responses);
  const bodies = schema ? objectsIn(schema) : [];
  return el(
    "article",
    { class: "operation", id: anchor(method, path) },
    el("h3", {}, el("span", { class: "method" }, method.toUpperCase()), " ", el("code", {}, path)),
    detail.description ? el("p", {}, detail.description) : null,
    ...(parameters.length ? [el("h4", {}, "In the address"), parametersTable(parameters)] : []),
    ...(bodies.length ? [el("h4", {}, "Request body"), ...bodies.map((body) => properties(body))] : []),
    el("details", {}, el("summary", {}, `Answers: ${statuses.join(", ")}`), table(["Status", "Meaning", "Content"], answers)),
    el(
      "figure",
      { class: "code" },
      el("figcaption", {}, el("span", {}, "curl"), copyButton(() => command)),
      el("pre", { tabindex: "0", "aria-label": `curl for ${path}` }, el("code", {}, command)),
    ),
  );
}

function parametersTable(parameters) {
  const rows = parameters.map(({ name, in: place, required, schema = {} }) =>
    cells(el("code", {}, name), `${namesOf(schema)} (${place})`, limitsOf(schema).join(", "), required ? "yes" : ""),
  );
  return table(["Name", "Type", "Constraints", "Required"], rows);
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
  byId("intro").textContent = `${whole.info.title} ${whole.info.version}. ${whole.info.description ?? ""}`;
  const links = [...groups.values()].flat().map(({ path, method }) => {
    const words = [el("span", { class: "method" }, method.toUpperCase()), " ", el("code", {}, path)];
    return el("li", {}, el("a", { href: `#${anchor(method, path)}` }, ...words));
  });
  byId("contents").replaceChildren(el("ul", {}, ...links));
  const sections = [...groups].map(([tag, found]) =>
    el("section", {}, el("h2", {}, tag[0].toUpperCase() + tag.slice(1)), ...found.map(operation)),
  );
  byId("operations").replaceChildren(...sections);
  document.getElementById(location.hash.slice(1))?.scrollIntoView(); // what the address names was not there when the page was opened
}

async function start() {
  onKeyNeeded(askForKey);
  try {
    whole = await (await request("openapi.json")).json();
    draw();
  } catch (error) {
    byId("intro").textContent = `openapi.json cannot be shown: ${error.message}`;
    byId("intro").append(" ", el("button", { type: "button", onclick: start }, "Retry"));
  }
}

start();
