// Requests to the server that this page came from. Addresses are relative, so that a proxy may serve it all under some prefix.

import { say } from "./language.js";

const HEALTH_MS = 5000;

/** status: HTTP's, or 0 where the server could not be reached or an answer broke off. code, param: the server's, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

let key = ""; // in memory only
let asking = null; // one question at a time, however many requests have met a 401
let ask = async () => null;

/** callback(refused): asks the user for a key and resolves to it, or to null. refused: whether a key has been tried. */
export function onKeyNeeded(callback) {
  ask = callback;
}

/** Whether the server has asked for a key. */
export const keyed = () => key !== "";

/** The answer to a request that went well. quiet: a missing key is an error like others. Throws ApiError, and AbortError. */
export async function request(path, { body = null, signal = null, quiet = false } = {}) {
  for (;;) {
    const used = key;
    const response = await reach(
      fetch(path, {
        method: body ? "POST" : "GET",
        headers: { ...(used && { authorization: `Bearer ${used}` }), ...(body && { "content-type": "application/json" }) },
        body: body && JSON.stringify(body),
        cache: "no-store",
        signal,
      }),
    );
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quiet) throw error;
    if (key === used) {
      asking ??= ask(used !== "").finally(() => (asking = null));
      const given = await asking;
      if (given === null) throw error;
      key = given;
    }
  }
}

/** Turns a failure of the network, of which browsers tell nothing more, into an ApiError. */
async function reach(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(say("The connection to the server was lost."));
  }
}

async function errorOf(response) {
  const { status } = response;
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { status, code: error.code, param: error.param });
  } catch {
    return new ApiError(say("The server answered {status}", { status: `${status} ${response.statusText}`.trim() }), { status });
  }
}

/** "ok", "stalled", "stopped", "draining" or "unreachable". */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(HEALTH_MS) });
    const { status } = await response.json();
    return typeof status === "string" ? status : "unreachable";
  } catch {
    return "unreachable";
  }
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** The server's numbers by name, or null where they cannot be had. Those with labels are left out. */
export async function metrics() {
  try {
    const text = await (await request("metrics", { quiet: true })).text();
    return new Map([...text.matchAll(/^(\w+) (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]));
  } catch {
    return null;
  }
}

/** The events of an answer, parsed. Throws ApiError, also for one that the server sends in the middle, and AbortError. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  let whole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      whole = true;
      continue;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error);
    yield event;
  }
  if (!whole) throw new ApiError(say("The connection ended before the answer did."));
}

/** The data of server-sent events, whatever pieces they arrive in. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reach(reader.read());
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening in the middle closes the connection
  }
}
