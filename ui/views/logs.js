// Lines of a function, or of one of its calls.

import { open } from "../api.js";
import { button, h, show, time } from "../dom.js";
import { empty, problem } from "../parts.js";

const TAIL = 200;

export function logs(context, { name, namespace, call }) {
  const place = h("div");
  const parameters = new URLSearchParams({ name, namespace, tail: TAIL, ...(call ? { call } : {}) });

  async function refresh() {
    try {
      const text = await (await open(`/system/logs?${parameters}`, { signal: context.signal })).text();
      const lines = text.split("\n").filter(Boolean).map((line) => JSON.parse(line));
      show(place, lines.length ? h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log lines" },
        lines.map((line) => [time(line.timestamp), ` ${line.text}\n`])) : empty(call ? "This call left no lines." : "No lines yet: what the function writes to stderr will be here."));
      const block = place.querySelector("pre");
      if (block) block.scrollTop = block.scrollHeight;
    } catch (error) {
      if (error.name === "AbortError" || error.status === 401) return;
      show(place, problem(error));
    }
  }

  refresh();
  return h("section", null, h("div", { class: "bar" }, h("h2", null, call ? "Log lines of this call" : "Log lines"),
    button("Read again", refresh, "quiet")), place);
}
