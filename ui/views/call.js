// One call whole: what it brought, what was tried, what came of it.

import { open } from "../api.js";
import { button, copyButton, h, redraw, say, show, time } from "../dom.js";
import { bytes, clip, count, duration, shortName } from "../format.js";
import { body, deeds, empty, facts, fieldsTable, follow, functionLink, head, isFinal, state, table, withQuery } from "../parts.js";
import { logs } from "./logs.js";

export async function call(context) {
  const id = context.parameter.toLowerCase();
  const place = h("div");
  const logPlace = h("div");
  let shownLogsOf = null;

  async function refresh() {
    const found = await context.get(`/system/calls/${encodeURIComponent(id)}`);
    const act = (deed) => () => deeds[deed](found, deed === "purge" ? async () => { location.hash = "#/calls"; } : refresh);
    redraw(place, found, () => drawCall(found, act, context));
    const print = `${found.state} ${found.attempts}`;
    if (found.attempts && shownLogsOf !== print) {
      shownLogsOf = print;
      const [name, namespace] = found.function.split(".");
      show(logPlace, logs(context, { name, namespace, call: found.id }));
    }
  }

  await refresh();
  context.title(`Call ${id.slice(0, 8)}`);
  follow(context, refresh, 700, ({ kind, data }) => kind === "again" || (kind === "calls" && (data.more || data.calls.some((each) => each.id === id))));
  return [place, logPlace];
}

function drawCall(found, act, context) {
  const deadCallback = found.callback?.state === "dead";
  return [
    head(["Call of ", functionLink(found.function)], {
      crumb: [h("a", { href: "#/calls" }, "Calls"), " of ", h("a", { href: withQuery("#/calls", { function: shortName(found.function) }) }, shortName(found.function))],
      actions: [
        !isFinal(found) && button(found.cancel_requested ? "Being cancelled" : "Cancel", act("cancel"), null, { disabled: found.cancel_requested === true }),
        (found.state === "dead" || deadCallback) && button(found.state === "dead" ? "Try again" : "Deliver again", act("retry"), "main"),
        isFinal(found) && button("Delete", act("purge"), "danger"),
      ],
    }),
    h("p", { class: "identity" }, state(found.state), h("span", null, h("code", { class: "data" }, found.id), " ", copyButton(found.id, "the id"))),
    found.error && found.state !== "done" && h("p", { class: `note ${found.state === "dead" ? "bad" : ""}` }, clip(found.error, 2000)),
    deadCallback && h("p", { class: "note bad" }, `The result could not be delivered: ${clip(found.callback.error ?? "", 1000)}`),
    h("div", { class: "columns" },
      h("section", null, h("h2", null, "What is known"), factsOf(found)),
      h("section", null, h("h2", null, "Attempts"), attempts(found))),
    h("div", { class: "columns" },
      h("section", null, h("div", { class: "bar" }, h("h2", null, "Payload")), body(found.body, "Payload"),
        h("details", { class: "block" }, h("summary", null, `${count(found.headers?.length ?? 0)} headers of the request`), fieldsTable("Headers of the request", found.headers))),
      h("section", null, h("div", { class: "bar" }, h("h2", null, found.excerpt ? "Beginning of the last answer" : "Result"),
        found.result && button(`Save all of it, ${bytes(found.result.bytes)}`, () => download(found, context), "quiet")), result(found))),
    found.callback_url && h("section", null, h("h2", null, "Callback"), callback(found)),
  ];
}

function factsOf(found) {
  return facts([
    ["Request", h("code", null, `${found.method} ${found.path || "/"}${found.query ? `?${found.query}` : ""}`)],
    ["Queue", found.queue],
    ["Accepted", time(found.accepted)],
    ["Due", found.due ? time(found.due) : null],
    ["Expires", found.expires ? time(found.expires) : null],
    ["Started", found.started ? time(found.started) : null],
    ["Finished", found.finished ? time(found.finished) : null],
    ["Time taken", found.duration_seconds === undefined ? null : duration(found.duration_seconds)],
    ["Status", found.status === undefined ? null : `${found.status}`],
    ["Idempotency key", found.idempotency_key],
  ]);
}

function attempts(found) {
  if (!found.history?.length) return empty(found.state === "running" ? "The first attempt runs now." : "Not tried yet.");
  const hidden = found.attempts - found.history.length - (found.state === "running" ? 1 : 0);
  return [
    table("Attempts", [{ label: "Begun", class: "" }, { label: "Took", class: "num" }, { label: "Status", class: "num" }, { label: "What went wrong", class: "grow" }],
      h("tbody", null, found.history.map((each) => h("tr", null,
        h("td", { class: "nowrap" }, time(each.started)),
        h("td", { class: "num" }, each.finished ? duration((new Date(each.finished) - new Date(each.started)) / 1000) : "–"),
        h("td", { class: "num" }, each.status === undefined ? "–" : `${each.status}`),
        h("td", { class: "data bad" }, each.error ? clip(each.error, 600) : ""))))),
    found.state === "running" && h("p", { class: "hint" }, "Another attempt runs now."),
    hidden > 0 && h("p", { class: "hint" }, `${count(hidden)} earlier ones are no longer remembered, or their worker died.`),
  ];
}

function result(found) {
  if (found.result) return [body(found.result, "Result"), h("details", { class: "block" }, h("summary", null, `${count(found.result_headers?.length ?? 0)} headers of the answer`), fieldsTable("Headers of the answer", found.result_headers))];
  if (found.excerpt) return body(found.excerpt, "Beginning of the last answer");
  return empty(isFinal(found) ? (found.state === "done" ? "No longer kept (keep_results)." : "There is none.") : "Not there yet.");
}

function callback(found) {
  const known = found.callback;
  return facts([
    ["To", h("code", null, clip(found.callback_url, 1000))],
    ["State", known ? state(known.state) : "not due before the call has ended"],
    ["Attempts", known && count(known.attempts)],
    ["Next attempt", known?.due ? time(known.due) : null],
    ["Status", known?.status === undefined ? null : `${known.status}`],
    ["What went wrong", known?.error && h("span", { class: "bad" }, clip(known.error, 1000))],
  ]);
}

async function download(found, context) {
  try {
    const blob = await (await open(`/async-function/${found.id}/result`, { signal: context.signal })).blob();
    const link = document.createElement("a"); // a download, not a place to go: the bytes are saved, never shown as a page
    link.href = URL.createObjectURL(new Blob([blob], { type: "application/octet-stream" }));
    link.download = `${found.id}.result`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
}
