// All at a glance: does it work, how much is called, what waits, what failed last.

import { ageChart, depthChart, minutesChart } from "../chart.js";
import { h, keyed, redraw, show } from "../dom.js";
import { age, count, percentile, rate, share, shortName } from "../format.js";
import { callRow, callTable, empty, figures, functionLink, head, follow, rates, table } from "../parts.js";

const FAILING_COUNT = 5;

export async function overview(context) {
  const wellness = h("div");
  const strip = h("div");
  const pictures = h("div", { class: "columns" });
  const letters = h("tbody");
  const lettersPlace = h("div");
  let unhealthy = null;

  async function refresh() {
    const [metrics, dead, health] = await Promise.all([
      context.get("/system/metrics"), context.get(`/system/calls?state=dead&limit=${FAILING_COUNT}`), readHealth(context),
    ]);
    if (metrics.queue) context.tellDeadCount(metrics.queue.dead + metrics.queue.callbacks_dead);
    unhealthy = health;
    drawWellness(wellness, metrics, unhealthy);
    redraw(strip, metrics, drawFigures);
    redraw(pictures, metrics, drawPictures);
    keyed(letters, dead.calls, (call) => call.id, (call) => callRow(call));
    show(lettersPlace, dead.calls.length ? callTable("Latest dead letters", letters)
      : empty("None. A call that fails for good would stand here, with its reason and a button to try it again."));
  }

  await refresh();
  follow(context, refresh, 2000, (event) => event.kind !== "functions");
  return [
    head("Overview"), wellness, strip, pictures,
    h("section", null, h("div", { class: "bar" }, h("h2", null, "Latest dead letters"), h("a", { href: "#/dead", class: "small" }, "All of them")), lettersPlace),
  ];
}

function drawPictures(metrics) {
  const end = new Date(metrics.time) / 1000;
  return [
    h("section", null, minutesChart(metrics.minutes, end)), h("section", null, drawFailing(metrics)),
    h("section", null, depthChart(metrics.depth, end)), h("section", null, ageChart(metrics.depth, end)),
  ];
}

async function readHealth(context) {
  const response = await fetch("/healthz", { credentials: "omit", cache: "no-store", signal: context.signal });
  return { ok: response.ok, text: (await response.text()).trim() };
}

function drawWellness(place, metrics, health) {
  const troubles = [];
  if (!health.ok) troubles.push(health.text);
  if (!metrics.queue) troubles.push("the queue cannot be asked");
  const warnings = health.ok ? health.text.split("; ").filter((part) => part && part !== "OK") : [];
  if (metrics.queue?.dead) warnings.push(`${count(metrics.queue.dead)} dead ${metrics.queue.dead === 1 ? "letter waits" : "letters wait"} for a decision`);
  if (metrics.queue?.callbacks_dead) warnings.push(`${count(metrics.queue.callbacks_dead)} ${metrics.queue.callbacks_dead === 1 ? "result" : "results"} could not be delivered`);
  const kind = troubles.length ? "bad" : warnings.length ? "warn" : "";
  const words = [...troubles, ...warnings].join("; ");
  place.className = `wellness ${kind}`;
  place.setAttribute("role", "status");
  show(place, words ? `${troubles.length ? "Not well" : "Working"}: ${words}.` : "All is well.");
}

function drawFigures({ totals, queue, window_seconds: window, workers }) {
  const over = `over the last ${age(window)}`;
  return [
    figures([
      ...rates(totals, over),
      ["Waiting", count(queue?.queued)],
      ["Running", count(queue?.running), { title: "Asynchronous calls" }],
      ["Oldest", queue ? (queue.oldest_due_seconds === null ? "0 s" : age(queue.oldest_due_seconds)) : "–"],
    ]),
    workers === "unknown" && h("p", { class: "hint" }, "Calls that some workers make by themselves are not counted here."),
  ];
}

function drawFailing({ functions }) {
  const found = Object.entries(functions).filter(([, figures]) => figures.errors)
    .sort(([, one], [, other]) => other.errors - one.errors).slice(0, FAILING_COUNT);
  const busy = Object.entries(functions).filter(([, figures]) => figures.calls).sort(([, one], [, other]) => other.calls - one.calls).slice(0, FAILING_COUNT);
  const rows = found.length ? found : busy;
  return [
    h("div", { class: "bar" }, h("h2", null, found.length ? "Functions that fail" : "Busiest functions"), h("a", { href: "#/functions", class: "small" }, "All functions")),
    rows.length ? table("Functions", ["Function", { label: "Calls / min", class: "num" }, { label: "Failed", class: "num" }, { label: "p95", class: "num" }],
      h("tbody", null, rows.map(([name, figures]) => h("tr", null, h("td", { class: "data" }, name === "other" ? "unknown names" : functionLink(shortName(name))),
        h("td", { class: "num" }, rate(figures.per_minute)), h("td", { class: `num ${figures.errors ? "bad" : ""}` }, share(figures.errors, figures.calls)),
        h("td", { class: "num", title: "95 of 100 calls took no longer" }, percentile(figures.p95_seconds))))))
      : empty("No function was called in the last five minutes. ", h("a", { href: "#/functions" }, "Call one"), "."),
  ];
}
