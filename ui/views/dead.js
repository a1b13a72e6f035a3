// Dead letters: calls that were given up, and results that could not be delivered. They wait for a decision.

import { send } from "../api.js";
import { ask, button, h, keyed, say, show } from "../dom.js";
import { count } from "../format.js";
import { callRow, callTable, deeds, empty, head, follow } from "../parts.js";

const PAGE = 50;

export async function dead(context) {
  const letters = list(context, "state=dead", "Calls that were given up", "None. A call that fails for good, after all its attempts, would wait here for you.");
  const results = list(context, "callback=dead", "Results that could not be delivered", "None. A call whose callback could not be delivered would wait here, with its result.");
  const refresh = async () => {
    await Promise.all([letters.refresh(), results.refresh()]);
    const metrics = await context.get("/system/metrics?minutes=1");
    if (metrics.queue) context.tellDeadCount(metrics.queue.dead + metrics.queue.callbacks_dead);
    show(actions, metrics.queue?.dead ? [
      button("Try all shown again", () => retryAll(letters.rows(), refresh)),
      button("Delete all", () => purgeAll(metrics.queue.dead, refresh), "danger")] : []);
  };
  const actions = h("div", { class: "actions" });
  letters.after = results.after = refresh;
  await refresh();
  follow(context, refresh, 1500, (event) => event.kind === "calls" || event.kind === "again");
  return [head("Dead letters", { actions }), letters.node, results.node];
}

function list(context, condition, title, nothing) {
  const body = h("tbody");
  const place = h("div");
  const older = h("p");
  let rows = [];
  let before = null;
  const part = { after: null, rows: () => rows, node: h("section", null, h("div", { class: "bar" }, h("h2", null, title)), place, older) };
  const whole = callTable(title, body, [{ label: "What to do", class: "num" }]);

  const actions = (call) => h("span", { class: "nowrap" },
    button(call.state === "dead" ? "Try again" : "Deliver again", () => deeds.retry(call, part.after), "quiet", { "data-focus": "retry" }),
    button("Delete", () => deeds.purge(call, part.after), "quiet danger", { "data-focus": "purge" }));

  function draw() {
    keyed(body, rows, (call) => call.id, (call) => callRow(call, actions));
    show(place, rows.length ? whole : empty(nothing));
    show(older, before && button("Older ones", async () => {
      const found = await context.get(`/system/calls?${condition}&limit=${PAGE}&before=${before}`);
      [rows, before] = [[...rows, ...found.calls], found.before ?? null];
      draw();
    }));
  }

  part.refresh = async () => {
    const found = await context.get(`/system/calls?${condition}&limit=${PAGE}`);
    [rows, before] = [found.calls, found.before ?? null];
    draw();
  };
  return part;
}

async function retryAll(rows, done) {
  let failed = 0;
  for (const call of rows) await send("POST", `/system/calls/${call.id}/retry`).catch(() => { failed += 1; });
  say(failed ? `${count(rows.length - failed)} queued again, ${count(failed)} not: they have changed meanwhile` : `${count(rows.length)} queued again`);
  await done();
}

async function purgeAll(number, done) {
  if (!await ask(`Delete ${number === 1 ? "the dead letter" : `all ${count(number)} dead letters`}?`, "Payloads, answers and histories are gone then. This cannot be undone.", "Delete all")) return;
  try {
    const { deleted } = await send("DELETE", "/system/calls?state=dead");
    say(`Deleted ${count(deleted)}`);
  } catch (error) {
    say(error.message);
  }
  await done();
}
