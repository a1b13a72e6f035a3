// What is called by the clock.

import { h, keyed, show, time } from "../dom.js";
import { shortName } from "../format.js";
import { callLink, empty, functionLink, head, follow, problem, table } from "../parts.js";

export async function schedules(context) {
  const place = h("div");
  const body = h("tbody");
  const whole = table("Schedules", ["Function", "Schedule", "Next", "Last", { label: "Last call", class: "grow" }], body);

  async function refresh() {
    const rows = await context.get("/system/schedules");
    keyed(body, rows, (row) => `${row.function}.${row.namespace} ${row.schedule}`, (row) => h("tr", null,
      h("td", null, functionLink(shortName(`${row.function}.${row.namespace}`))),
      h("td", { class: "mono data nowrap" }, row.schedule),
      h("td", { class: "nowrap" }, row.next ? time(row.next) : "never"),
      h("td", { class: "nowrap" }, row.last ? time(row.last) : "not yet"),
      h("td", { class: "mono" }, row.lastCallId ? callLink({ id: row.lastCallId }) : "")));
    show(place, rows.length ? whole : empty("Nothing is scheduled. A function with the annotations ", h("code", null, "topic: cron-function"), " and ", h("code", null, 'schedule: "*/5 * * * *"'), " is called by the clock."));
  }

  try {
    await refresh();
    follow(context, refresh, 5000);
  } catch (error) {
    if (!error.isOff && error.status !== 404) throw error;
    show(place, problem(error));
  }
  return [head("Schedules"), place];
}
