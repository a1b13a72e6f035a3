// One function: its last hour, a form to call it now or later, its latest calls and lines.

import { Failure, invoke, send } from "../api.js";
import { minutesChart } from "../chart.js";
import { ask, askForm, button, field, h, keyed, long, redraw, say, show, time } from "../dom.js";
import { age, count, duration } from "../format.js";
import { attempt, callRow, callTable, empty, facts, fieldsTable, figures, head, follow, rates, note, state, to, withQuery } from "../parts.js";
import { deployingIsOff } from "./deploy.js";
import { stateOf } from "./functions.js";
import { logs } from "./logs.js";

const METHODS = ["POST", "GET", "PUT", "PATCH", "DELETE"];

export async function oneFunction(context) {
  const name = context.parameter;
  const full = name.includes(".") ? name : `${name}.openfaas-fn`;
  context.title(name);
  const strip = h("div");
  const picture = h("section");
  const actions = h("div", { class: "actions" });
  const factsPlace = h("div");
  const body = h("tbody");
  const callsPlace = h("div");

  async function refresh() {
    const parameters = new URLSearchParams({ function: full });
    const [described, metrics, list] = await Promise.all([
      context.get(`/system/function/${encodeURIComponent(full)}`), context.get(`/system/metrics?${parameters}`), context.get(`/system/calls?${parameters}&limit=10`),
    ]);
    redraw(actions, { ...described, invocationCount: 0 }, drawActions); // which no call draws anew: one may be about to be clicked
    redraw(factsPlace, described, factsOf);
    const mine = metrics.functions[full] ?? { calls: 0, errors: 0, per_minute: 0, p50_seconds: null, p95_seconds: null, in_flight: 0, queued: 0 };
    show(strip, figures([
      ...rates(mine, `over the last ${age(metrics.window_seconds)}`),
      ["Waiting", count(metrics.queue ? mine.queued : null)],
    ]));
    show(picture, minutesChart(metrics.minutes, new Date(metrics.time) / 1000));
    keyed(body, list.calls, (call) => call.id, (call) => callRow(call));
    show(callsPlace, list.calls.length ? callTable("Latest calls", body) : empty("No asynchronous calls. Choose “later” above to make one."));
  }

  function drawActions(described) {
    const isDeployed = !off && described.createdAt;
    return [
      state(...stateOf(described)),
      described.local && button("Scale", () => scale(described, refresh)),
      isDeployed && h("a", { class: "button", href: to("deploy", name) }, "Change"),
      isDeployed && button("Remove", () => remove(described), "danger"),
    ];
  }

  const off = await deployingIsOff(context);
  await refresh();
  follow(context, refresh, 1500, (event) => event.kind !== "calls" || event.data.more || event.data.calls.some((call) => call.function === full));
  const [bare, namespace] = full.split(".");
  return [
    head(name, { crumb: h("a", { href: "#/functions" }, "Functions"), actions }),
    strip,
    h("div", { class: "columns" }, h("div", null, picture, h("section", null, h("h2", null, "What it is"), factsPlace)), callForm(name, context)),
    h("section", null, h("div", { class: "bar" }, h("h2", null, "Latest asynchronous calls"), h("a", { class: "small", href: withQuery("#/calls", { function: name }) }, "All of them")), callsPlace),
    logs(context, { name: bare, namespace }),
  ];
}

function factsOf(described) {
  const pairs = (object) => Object.entries(object ?? {}).map(([key, value]) => h("div", { class: "mono" }, `${key}: ${value}`));
  return facts([
    ["Command", described.envProcess && h("code", null, described.envProcess)],
    ["Image", described.image], ["Namespace", described.namespace],
    ["Replicas", described.local ? `${described.availableReplicas} of ${described.replicas}` : null],
    ["Calls ever", count(described.invocationCount)],
    ["Deployed", described.createdAt ? time(described.createdAt) : null],
    ["Annotations", pairs(described.annotations).length ? pairs(described.annotations) : null],
    ["Secrets", (described.secrets ?? []).join(", ")],
  ]);
}

function callForm(name, context) {
  const answer = h("div", { "aria-live": "polite" });
  const laterFields = h("div", { class: "row", hidden: true },
    field("Delay", h("input", { name: "delay", placeholder: "10m" })),
    field("Expires after", h("input", { name: "expires", placeholder: "1h" })),
    field("Callback URL", h("input", { name: "callback", type: "url", placeholder: "http://" })));
  const form = h("form", { class: "panel", onsubmit: call, onchange: () => { laterFields.hidden = form.elements.when.value !== "later"; method.disabled = form.elements.when.value === "later"; } });
  const method = h("select", { name: "method" }, METHODS.map((each) => h("option", { value: each }, each)));
  const sender = h("button", { class: "main", type: "submit" }, "Call");
  form.append(
    h("fieldset", null, h("legend", null, "When"), h("div", { class: "radios" },
      h("label", { class: "inline" }, h("input", { type: "radio", name: "when", value: "now", checked: true }), h("span", null, "now")),
      h("label", { class: "inline" }, h("input", { type: "radio", name: "when", value: "later" }), h("span", null, "later, by the queue")))),
    field("Body", h("textarea", { name: "body", spellcheck: "false" })),
    laterFields,
    h("details", null, h("summary", null, "Method, path, headers"), h("div", { class: "row" },
      field("Method", method),
      field("Path and query", h("input", { name: "path", placeholder: "/path?query" }))),
    field("Headers, one a line", h("textarea", { name: "headers", spellcheck: "false", placeholder: "Content-Type: application/json" }))),
    h("div", { class: "actions" }, sender), answer);

  async function call(event) {
    event.preventDefault();
    const values = new FormData(form);
    sender.disabled = true;
    show(answer, h("p", { class: "soft" }, "Waiting for the answer…"));
    try {
      const later = values.get("when") === "later";
      const headers = readHeaders(values.get("headers"));
      if (later) {
        for (const [header, key] of [["X-Delay", "delay"], ["X-Expires", "expires"], ["X-Callback-Url", "callback"]]) if (values.get(key)) headers.append(header, values.get(key));
      }
      const path = `/${later ? "async-function" : "function"}/${encodeURIComponent(name)}${readPath(values.get("path"))}`;
      const response = await invoke(path, { method: later ? "POST" : values.get("method") ?? "POST", headers, body: values.get("body"), signal: context.signal });
      show(answer, later && response.status === 202 ? accepted(response) : drawAnswer(response));
    } catch (error) {
      if (error.name === "AbortError") return;
      show(answer, note(error.message, "bad"));
    } finally {
      sender.disabled = false;
    }
  }

  return h("section", null, h("h2", null, "Call it"), form);
}

function readHeaders(text) {
  const headers = new Headers();
  for (const line of String(text ?? "").split("\n").filter((each) => each.trim())) {
    const at = line.indexOf(":");
    try {
      if (at < 1) throw new TypeError();
      headers.append(line.slice(0, at).trim(), line.slice(at + 1).trim());
    } catch {
      throw new Failure(400, `“${line}” is no header; allowed: Name: value, one a line`);
    }
  }
  return headers;
}

function readPath(text) {
  const path = String(text ?? "").trim();
  return path === "" || path.startsWith("/") || path.startsWith("?") ? path : `/${path}`;
}

function accepted(response) {
  const id = new Map(response.headers).get("x-call-id");
  return h("p", null, state("queued"), " as ", h("a", { class: "mono", href: to("calls", id) }, id));
}

function drawAnswer(response) {
  const failed = response.status === 408 || response.status >= 500 || response.status === 0;
  const took = Number(new Map(response.headers).get("x-duration-seconds"));
  return [
    h("p", { class: "bar" }, h("b", { class: failed ? "bad" : "" }, `${response.status}`),
      h("span", { class: "soft small" }, `in ${duration(response.seconds)}${took ? `, of which the function ${duration(took)}` : ""}`)),
    h("div", { class: "block" }, response.text ? long(response.text, { label: "Answer" }) : h("p", { class: "soft small" }, "An empty answer.")),
    response.cut && h("p", { class: "hint" }, "Only the beginning is shown."),
    h("details", { class: "block" }, h("summary", null, "Headers of the answer"), fieldsTable("Headers of the answer", response.headers)),
  ];
}

async function scale(described, done) {
  await askForm(`Scale ${described.name}`,
    field("Replicas", h("input", { name: "replicas", type: "number", min: 0, step: 1, required: true, value: String(described.replicas) })),
    "Scale",
    async (values) => {
      const path = `/system/scale-function/${encodeURIComponent(described.name)}?namespace=${encodeURIComponent(described.namespace)}`;
      await send("POST", path, { serviceName: described.name, namespace: described.namespace, replicas: Number(values.get("replicas")) });
      say("Scaled");
      await done();
    });
}

async function remove(described) {
  if (!await ask(`Remove ${described.name}?`, "Calls that run may finish; new ones get a 404, those that wait will fail. Its deployment is gone.", "Remove")) return;
  await attempt(() => send("DELETE", "/system/functions", { functionName: described.name, namespace: described.namespace }), "Removed", () => { location.hash = "#/functions"; });
}
