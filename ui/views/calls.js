// Calls, newest first, live; what is looked for stands in the address.

import { send } from "../api.js";
import { ask, button, field, h, keyed, say, show } from "../dom.js";
import { count, shortName } from "../format.js";
import { STATES, callRow, callTable, empty, head, letGo, problem, throttled, withQuery } from "../parts.js";

const PAGE = 50;
const KEPT_COUNT = 1000; // rows in the page; older ones are a click away again
const ID = /^[0-9a-f-]{8,36}$/;

export async function calls(context) {
  const wanted = { state: context.query.get("state") ?? "", function: context.query.get("function") ?? "", id: context.query.get("id") ?? "" };
  const body = h("tbody");
  const place = h("div");
  const older = h("p");
  const whole = callTable("Calls", body);
  let rows = [];
  let before = null;
  let pages = 1;

  function address(more = {}) {
    return withQuery("/system/calls", { ...wanted, id: wanted.id.toLowerCase(), limit: PAGE, ...more });
  }

  function draw() {
    keyed(body, rows, (call) => call.id, (call) => callRow(call));
    show(place, rows.length ? whole : empty(wanted.state || wanted.function || wanted.id
      ? ["No such calls. ", h("a", { href: "#/calls" }, "Show all")] : ["No calls yet. ", h("a", { href: "#/functions" }, "Choose a function"), " and call it later, or send a request to ", h("code", null, "/async-function/NAME"), "."]));
    show(older, before && (rows.length < KEPT_COUNT
      ? button("Older calls", readOlder)
      : h("span", { class: "soft small" }, `Only ${count(KEPT_COUNT)} are shown at once; a filter finds others.`)));
  }

  async function readOlder() {
    const found = await context.get(address({ before }));
    rows = [...rows, ...found.calls];
    before = found.before ?? null;
    pages += 1;
    draw();
  }

  // The first page again: what is new comes on top, what is known is brought up to date, what was read besides stays.
  async function refresh() {
    const found = await context.get(address());
    if (pages === 1) {
      rows = found.calls;
      before = found.before ?? null;
    } else {
      const fresh = new Set(found.calls.map((call) => call.id));
      const oldest = found.calls.at(-1)?.id;
      const at = rows.findIndex((call) => call.id === oldest);
      rows = at < 0 ? found.calls : [...found.calls, ...rows.slice(at + 1).filter((call) => !fresh.has(call.id))];
      if (at < 0) [before, pages] = [found.before ?? null, 1];
      rows = rows.slice(0, KEPT_COUNT);
    }
    draw();
  }

  function fits(call) {
    return (!wanted.state || call.state === wanted.state) && (!wanted.id || call.id.startsWith(wanted.id.toLowerCase()))
      && (!wanted.function || shortName(call.function) === shortName(wanted.function));
  }

  const soon = throttled(() => refresh().catch(letGo), 2000);
  function onEvent(event) {
    if (event.kind === "again") return soon();
    if (event.kind !== "calls") return undefined;
    if (event.data.more) return soon();
    const known = new Map(rows.map((call, index) => [call.id, index]));
    let isNew = false;
    for (const call of event.data.calls) {
      if (known.has(call.id)) {
        if (fits(call)) rows[known.get(call.id)] = call;
        else isNew = true;
      } else if (fits(call)) isNew = true;
    }
    return isNew ? soon() : draw();
  }

  const form = h("form", { class: "filters", role: "search", onsubmit: apply, onchange: apply },
    field("Function", h("input", { name: "function", value: wanted.function, list: "function-names", autocomplete: "off" })),
    h("datalist", { id: "function-names" }),
    field("State", h("select", { name: "state" }, h("option", { value: "" }, "any"),
      STATES.map((each) => h("option", { value: each, selected: each === wanted.state }, each)))),
    field("Id, or how it begins", h("input", { name: "id", type: "search", value: wanted.id, spellcheck: "false", autocomplete: "off", class: "mono" })));

  function apply(event) {
    event.preventDefault();
    const values = Object.fromEntries(new FormData(form));
    const next = withQuery("#/calls", { function: values.function.trim(), state: values.state, id: values.id.trim() });
    if (next !== location.hash) location.hash = next;
  }

  const isAskable = !wanted.id || ID.test(wanted.id.toLowerCase());
  if (isAskable) {
    try {
      await refresh();
      context.listen(onEvent);
    } catch (error) {
      if (error.status !== 400 && error.status !== 404) throw error;
      show(place, problem(error));
    }
  } else show(place, empty("An id is found by the first eight of its characters or more: 0-9, a-f and dashes; on NATS by the whole of it."));
  const limits = h("p", { class: "hint" });
  offerNames(context, form);
  tellOfQueue(context, limits);
  return [
    head("Calls", { actions: wanted.state === "queued" && rows.length ? button("Cancel all that are queued", () => cancelAll(wanted.function, refresh), "danger") : null }),
    form, place, older, limits,
  ];
}

// What NATS keeps no index of, or writes nowhere, is said rather than guessed.
async function tellOfQueue(context, place) {
  try {
    const { queue } = await context.get("/system/metrics?minutes=1");
    if (queue?.kind === "nats") {
      show(place, "The queue is on NATS: what waits is listed before what has ended, and an id is found when it is whole. That a call runs is known to its worker only: ask for the state “running”; elsewhere it is queued until it ends.");
    }
  } catch (error) {
    letGo(error);
  }
}

async function offerNames(context, form) {
  try {
    const listed = await context.get("/system/functions?namespace=*");
    show(form.querySelector("datalist"), listed.map((each) => h("option", { value: shortName(`${each.name}.${each.namespace}`) })));
  } catch (error) {
    letGo(error);
  }
}

async function cancelAll(name, done) {
  const whose = name ? `of ${name}` : "of every function";
  if (!await ask(`Cancel all queued calls ${whose}?`, "None of them will run. This cannot be undone.", "Cancel them")) return;
  try {
    const { cancelled } = await send("POST", withQuery("/system/calls/cancel", { function: name }));
    say(`Cancelled ${count(cancelled)}`);
    await done();
  } catch (error) {
    say(error.message);
  }
}
