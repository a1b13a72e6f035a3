// Pieces that views share.

import { Failure, send } from "./api.js";
import { ask, copyButton, h, long, say, time } from "./dom.js";
import { bytes, clip, count, duration, percentile, rate, share, shortName } from "./format.js";

export const STATES = ["queued", "running", "done", "dead", "cancelled", "expired"];
const FINAL = new Set(["done", "dead", "cancelled", "expired"]);

export function isFinal(call) {
  return FINAL.has(call.state);
}

export function to(...parts) {
  return "#/" + parts.map(encodeURIComponent).join("/");
}

export function withQuery(address, parameters) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));
  return String(query) ? `${address}?${query}` : address;
}

export function head(title, { crumb, actions } = {}) {
  return h("div", { class: "head" },
    crumb && h("p", { class: "crumb" }, crumb),
    h("h1", { tabindex: -1 }, title),
    actions && h("div", { class: "actions" }, actions));
}

export function state(name, title) {
  return h("span", { class: `state ${name}`, title }, name);
}

export function figures(pairs) {
  return h("dl", { class: pairs.length === 6 ? "figures six" : "figures" }, pairs.filter(Boolean).map(([label, value, options = {}]) => h("div", { title: options.title },
    h("dt", null, label),
    h("dd", { class: value === "–" ? "none" : options.class }, value, options.unit && value !== "–" && h("small", null, options.unit)))));
}

// The first figures of an overview, and of a function.
export function rates(each, over) {
  return [
    ["Calls / min", rate(each.per_minute), { title: `${count(each.calls)} calls ${over}` }],
    ["Failed", share(each.errors, each.calls), { class: each.errors ? "bad" : "", title: `${count(each.errors)} of ${count(each.calls)} ${over}: status 408, or 500 and above` }],
    ["p50", percentile(each.p50_seconds), { title: `Half of the calls ${over} took no longer` }],
    ["p95", percentile(each.p95_seconds), { title: `95 of 100 calls ${over} took no longer` }],
    ["In flight", count(each.in_flight)],
  ];
}

export function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [h("dt", null, name), h("dd", { class: "data" }, value)]));
}

export function table(label, columns, body) {
  return h("div", { class: "table", tabindex: 0, role: "region", "aria-label": label },
    h("table", null, h("thead", null, h("tr", null, columns.map((column) =>
      column instanceof Node ? column : h("th", { scope: "col", class: column.class }, column.label ?? column)))), body));
}

export function empty(...words) {
  return h("p", { class: "empty" }, words);
}

export function note(text, kind) {
  return h("p", { class: `note ${kind ?? ""}`, role: kind === "bad" ? "alert" : null }, text);
}

export function problem(error) {
  return note(error.isOff ? `Turned off: ${error.message}` : error.message, error.isOff ? "" : "bad");
}

// Text, or bytes that are none, as the gateway shows a body: {bytes, shown_bytes?, text? | base64?}
export function body(shown, label) {
  if (!shown || shown.bytes === 0) return h("p", { class: "soft small" }, "Empty.");
  const cut = shown.shown_bytes !== undefined && h("p", { class: "hint" }, `The first ${bytes(shown.shown_bytes)} of ${bytes(shown.bytes)}.`);
  if (shown.text === undefined) return h("div", null, h("p", { class: "hint" }, "Not UTF-8; in base64:"), long(shown.base64 ?? "", { label }), cut);
  return h("div", null, long(shown.text, { label }), cut);
}

export function fieldsTable(label, headers) {
  if (!headers?.length) return empty("None.");
  return table(label, ["Name", { label: "Value", class: "grow" }], h("tbody", null, headers.map(([name, value]) =>
    h("tr", null, h("td", { class: "mono nowrap data" }, clip(name, 200)), h("td", { class: "mono data" }, value.length > 300 ? long(value, { label: name }) : value)))));
}

export function functionLink(name) {
  return h("a", { href: to("functions", shortName(name)), class: "name data", title: shortName(name), "data-focus": "function" }, shortName(name));
}

export function callLink(call) {
  return h("a", { href: to("calls", call.id), class: "mono nowrap", title: call.id, "data-focus": "call" }, `${call.id.slice(0, 8)}…${call.id.slice(-6)}`);
}

const CALL_COLUMNS = [
  "State", "Function", "Call", "Accepted", { label: "Attempts", class: "num wide" },
  { label: "Time taken", class: "num wide" }, { label: "Answer", class: "grow" },
];

export function callTable(label, body, more = []) {
  const made = table(label, [...CALL_COLUMNS, ...more], body);
  made.classList.add("calls");
  return made;
}

function answerOf(call) {
  if (call.error) return h("span", { class: call.state === "done" ? "" : "bad", title: clip(call.error, 400) }, clip(call.error, 140));
  if (call.status) return `${call.status}`;
  if (call.state === "queued" && call.due && new Date(call.due) > Date.now() + 1000) return h("span", { class: "soft" }, "due ", time(call.due));
  return h("span", { class: "soft" }, call.cancel_requested ? "to be cancelled" : "");
}

export function callRow(call, actions) {
  const undelivered = call.callback?.state === "dead" && call.state !== "dead";
  return h("tr", null,
    h("td", { class: "nowrap" }, state(call.state), undelivered && h("span", { class: "small bad" }, " undelivered")),
    h("td", null, functionLink(call.function)),
    h("td", { class: "nowrap" }, callLink(call), h("span", { class: "wide" }, copyButton(call.id, "the id"))),
    h("td", { class: "nowrap" }, time(call.accepted)),
    h("td", { class: "num wide" }, count(call.attempts)),
    h("td", { class: "num wide" }, duration(call.duration_seconds)),
    h("td", { class: "grow data" }, undelivered ? h("span", { class: "bad", title: clip(call.callback.error ?? "", 400) }, clip(call.callback.error ?? "not delivered", 140)) : answerOf(call)),
    actions && h("td", { class: "nowrap num" }, actions(call)));
}

// What is done to a call, each with a word on how it went; `done` is told after it.
export const deeds = {
  async retry(call, done) {
    await attempt(() => send("POST", `/system/calls/${call.id}/retry`), "Queued again", done);
  },
  async cancel(call, done) {
    if (!await ask("Cancel this call?", "If it runs, its processes are killed, and what they have done so far stays done; if not, it never will. This cannot be undone.", "Cancel the call")) return;
    await attempt(() => send("DELETE", `/async-function/${call.id}`), "Cancelled", done);
  },
  async purge(call, done) {
    if (!await ask("Delete this call?", "Its payload, its result and its history are gone then. This cannot be undone.", "Delete")) return;
    await attempt(() => send("DELETE", `/system/calls/${call.id}`), "Deleted", done);
  },
};

export async function attempt(work, word, done) {
  try {
    await work();
    say(word);
  } catch (error) {
    say(error.message);
    if (!(error instanceof Failure)) throw error;
  }
  await done?.();
}

// What goes wrong while a view is kept up to date: the reader has gone elsewhere, or the gateway cannot be reached. What
// was shown stays, and the line in the navigation says so. Anything else is a fault of ours, for the console.
export function letGo(error) {
  if (error.status === undefined && error.name !== "AbortError") throw error;
}

// Keep a view up to date: read again, at most once in `ms`, when something happens that `wants` it. Where what it shows
// is there no more, it says so.
export function follow(context, refresh, ms, wants = () => true) {
  const soon = throttled(() => refresh().catch((error) => (error.status === 404 ? context.fail(error) : letGo(error))), ms);
  context.listen((event) => wants(event) && soon());
}

// Run `work` at most once in `ms`, the last time after the last wish.
export function throttled(work, ms) {
  let timer = null;
  let again = false;
  return function wish() {
    if (timer !== null) {
      again = true;
      return;
    }
    work();
    timer = setTimeout(() => {
      timer = null;
      if (again) {
        again = false;
        wish();
      }
    }, ms);
  };
}

