// All functions: are they there, how much are they called, do they fail, how long do they take.

import { button, field, h, keyed, show } from "../dom.js";
import { age, count, percentile, rate, share, shortName } from "../format.js";
import { empty, functionLink, head, follow, state, table } from "../parts.js";
import { deployingIsOff } from "./deploy.js";

const SHOWN_COUNT = 100;
const COLUMNS = [
  ["name", "Function"], ["state", "State"], ["replicas", "Replicas", "num wide"], ["per_minute", "Calls / min", "num"], ["errors", "Failed", "num"],
  ["p50_seconds", "p50", "num wide"], ["p95_seconds", "p95", "num wide"], ["in_flight", "In flight", "num wide"], ["queued", "Waiting", "num wide"],
];

export function stateOf(each) {
  if (!each.local) return ["elsewhere", "It answers at an address of its own; whether it does is seen when it is called"];
  if (each.replicas === 0) return ["stopped", "Scaled to none; it is started when a call comes"];
  return each.availableReplicas > 0 ? ["ready", "It answers, or is started when a call comes"] : ["starting", "Not there yet"];
}

export async function functions(context) {
  const found = context.query.get("text") ?? "";
  const body = h("tbody");
  const place = h("div");
  const more = h("p");
  const search = h("input", { type: "search", value: found, placeholder: "Part of a name", oninput: draw });
  const order = { by: "name", down: false };
  let limit = SHOWN_COUNT;
  let rows = [];
  let window = 300;
  const headings = COLUMNS.map(([key, label, kind]) => h("th", { scope: "col", class: kind },
    button(label, () => { order.down = order.by === key ? !order.down : key !== "name" && key !== "state"; order.by = key; draw(); })));
  const whole = table("Functions", headings, body);

  function value(row, key) {
    return row[key] ?? -1;
  }

  function draw() {
    const text = search.value.trim().toLowerCase();
    const chosen = rows.filter((row) => row.name.toLowerCase().includes(text));
    const sign = order.down ? -1 : 1;
    chosen.sort((one, other) => {
      const [a, b] = [value(one, order.by), value(other, order.by)];
      return (a < b ? -sign : a > b ? sign : 0) || (one.name < other.name ? -1 : 1);
    });
    COLUMNS.forEach(([key], index) => {
      if (key === order.by) headings[index].setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else headings[index].removeAttribute("aria-sort");
    });
    keyed(body, chosen.slice(0, limit), (row) => row.name, drawRow);
    show(more, chosen.length > limit && button(`Show the other ${count(chosen.length - limit)}`, () => { limit += 10 * SHOWN_COUNT; draw(); }));
    show(place, rows.length === 0 ? empty("No functions yet. Name some in ", h("code", null, "functions.toml"), ", which is followed as it changes, or deploy one.")
      : chosen.length === 0 ? empty("No function has this in its name.") : whole, more);
  }

  function drawRow(row) {
    return h("tr", null,
      h("td", null, functionLink(row.name)),
      h("td", null, state(...row.stateWords)),
      h("td", { class: "num wide" }, row.local ? `${row.available} / ${row.replicas}` : "–"),
      h("td", { class: `num ${row.calls ? "" : "soft"}`, title: `${count(row.calls)} calls in ${age(window)}` }, rate(row.per_minute)),
      h("td", { class: `num ${row.errors ? "bad" : "soft"}`, title: `${count(row.errors)} of ${count(row.calls)}` }, share(row.errors, row.calls)),
      h("td", { class: "num wide" }, percentile(row.p50_seconds)),
      h("td", { class: "num wide" }, percentile(row.p95_seconds)),
      h("td", { class: `num wide ${row.in_flight ? "" : "soft"}` }, count(row.in_flight)),
      h("td", { class: `num wide ${row.queued ? "" : "soft"}` }, count(row.queued)));
  }

  async function refresh() {
    const [listed, metrics] = await Promise.all([context.get("/system/functions?namespace=*"), context.get("/system/metrics")]);
    window = metrics.window_seconds;
    const nothing = { calls: 0, errors: 0, per_minute: 0, p50_seconds: null, p95_seconds: null, in_flight: 0, queued: metrics.queue ? 0 : null, running: 0 };
    const known = new Map(listed.map((each) => [`${each.name}.${each.namespace}`, each]));
    rows = [...known].map(([name, each]) => ({
      ...(metrics.functions[name] ?? nothing),
      name: shortName(name), local: each.local, replicas: each.replicas, available: each.availableReplicas,
      stateWords: stateOf(each), state: stateOf(each)[0],
    }));
    for (const [name, figures] of Object.entries(metrics.functions)) { // found by function_url, or removed by now
      if (!known.has(name) && name !== "other") rows.push({ ...figures, name: shortName(name), local: false, replicas: null, available: null, stateWords: ["unlisted", "Not listed: found by function_url, or removed"], state: "unlisted" });
    }
    draw();
  }

  await refresh();
  const off = await deployingIsOff(context);
  follow(context, refresh, 3000);
  return [
    head("Functions", { actions: off ? null : h("a", { class: "button", href: "#/deploy" }, "Deploy a function") }),
    h("div", { class: "filters" }, field("Find", search)),
    place,
    h("p", { class: "hint" }, "Calls, failures and times are those of the last five minutes; failed is status 408, or 500 and above."),
  ];
}
