// Pictures of the last hour, drawn as SVG. What is not known is a gap, never a line along the bottom.

import { h, s } from "./dom.js";
import { age, count, minute } from "./format.js";

const NARROW = matchMedia("(max-width: 860px)"); // there a picture is drawn smaller, not shrunk with its words
let width = 560;
const HEIGHT = 132;
const LEFT = 38;
const BOTTOM = 18;
const TOP = 8;
const HOUR_S = 3600;
const GAP_S = 45; // samples come every ten seconds; what is further apart was not known in between

function niceTop(value) {
  if (value <= 4) return 4;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * step).find((top) => top >= value);
}

function niceAge(seconds) {
  return [10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400].find((top) => top >= seconds) ?? Math.ceil(seconds / 86400) * 86400;
}

function scale(end, top) {
  return {
    x: (epoch) => LEFT + ((epoch - (end - HOUR_S)) / HOUR_S) * (width - LEFT),
    y: (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM),
  };
}

function axes(end, top, label, { x, y }) {
  const quarter = Math.ceil((end - HOUR_S) / 900) * 900;
  const ticks = [0, 1, 2, 3].map((index) => quarter + index * 900).filter((epoch) => x(epoch) > LEFT + 14 && x(epoch) < width - 14);
  return [
    [0, top / 2, top].map((value) => [
      s("line", { class: "grid", x1: LEFT, x2: width, y1: Math.round(y(value)), y2: Math.round(y(value)) }),
      s("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, label(value)),
    ]),
    ticks.map((epoch) => s("text", { x: x(epoch), y: HEIGHT - 3, "text-anchor": "middle" }, minute(epoch))),
  ];
}

function fit() {
  width = NARROW.matches ? 366 : 560;
}

function figure(title, legend, description, content) {
  return h("figure", null,
    h("figcaption", null, h("b", null, title), legend && h("span", { class: "legend" }, legend)),
    s("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": description }, content));
}

function runs(points) {
  const found = [];
  for (const point of points) {
    const last = found.at(-1);
    if (last && point[0] - last.at(-1)[0] <= GAP_S) last.push(point);
    else found.push([point]);
  }
  return found;
}

function curve(points, { x, y }) {
  const at = ([epoch, value]) => `${x(epoch).toFixed(1)},${y(value).toFixed(1)}`;
  return runs(points).map((run) => {
    const path = run.map(at).join("L");
    const edge = run.length === 1 ? `M${at(run[0])}h1.5` : `M${path}`;
    return [
      s("path", { class: "area", d: `M${x(run[0][0]).toFixed(1)},${y(0)}L${path}L${x(run.at(-1)[0]).toFixed(1)},${y(0)}Z` }),
      s("path", { class: "line", d: edge }),
    ];
  });
}

// What was before the first sample is not known.
function blank(points, { x, y }) {
  const until = points.length ? x(points[0][0]) : width;
  return until > LEFT + 2 && s("rect", { class: "unknown", x: LEFT, y: TOP, width: (until - LEFT).toFixed(1), height: (y(0) - TOP).toFixed(1) },
    s("title", null, "Not known: nothing was counted"));
}

// depth: [[epoch, queued, running, oldest], ...]
export function depthChart(depth, end) {
  fit();
  const points = depth.filter(([epoch]) => epoch > end - HOUR_S).map(([epoch, queued, running]) => [epoch, queued + running]);
  const most = Math.max(0, ...points.map(([, value]) => value));
  const to = scale(end, niceTop(most));
  const last = points.at(-1)?.[1] ?? null;
  return figure("Waiting and running", null, `Calls that wait or run, over the last hour: now ${count(last)}, at most ${count(most)}.`,
    [blank(points, to), axes(end, niceTop(most), count, to), curve(points, to)]);
}

export function ageChart(depth, end) {
  fit();
  const points = depth.filter(([epoch]) => epoch > end - HOUR_S).map(([epoch, , , oldest]) => [epoch, oldest ?? 0]);
  const most = Math.max(0, ...points.map(([, value]) => value));
  const top = niceAge(most);
  const to = scale(end, top);
  return figure("Age of the oldest that waits", null, `How long the oldest due call has waited, over the last hour: at most ${age(most)}.`,
    [blank(points, to), axes(end, top, (value) => (value ? age(value) : "0"), to), curve(points, to)]);
}

// minutes: [[epoch, calls, errors] | null, ...]
export function minutesChart(minutes, end, title = "Calls per minute") {
  fit();
  const known = minutes.filter(Boolean);
  const most = Math.max(0, ...known.map(([, calls]) => calls));
  const top = niceTop(most);
  const first = Math.floor(end / 60) * 60 - HOUR_S + 60;
  const to = scale(first + HOUR_S, top);
  const step = (width - LEFT) / 60;
  const bars = known.map(([epoch, calls, errors]) => {
    const x = to.x(epoch) + 0.75;
    const bar = (name, from, upTo) => upTo > from && s("rect", {
      class: name, x: x.toFixed(1), width: (step - 1.5).toFixed(1), y: to.y(upTo).toFixed(1), height: Math.max(to.y(from) - to.y(upTo), 1).toFixed(1),
    }, s("title", null, `${minute(epoch)}: ${count(calls)} calls, ${count(errors)} failed`));
    return [bar("strong", errors, calls), bar("red", 0, errors)];
  });
  const total = known.reduce((sum, [, calls]) => sum + calls, 0);
  const failed = known.reduce((sum, [, , errors]) => sum + errors, 0);
  const gaps = minutes.map((each, index) => each === null && s("rect", { class: "unknown", x: (LEFT + index * step).toFixed(1), y: TOP, width: (step + 0.2).toFixed(1), height: HEIGHT - TOP - BOTTOM },
    s("title", null, "Not known: nothing was counted")));
  return figure(title, [h("span", { class: "key" }, "answered"), h("span", { class: "key red" }, "failed")],
    `Calls per minute over the last hour: ${count(total)} in all, ${count(failed)} failed.`,
    [gaps, axes(first + HOUR_S, top, count, to), bars]);
}
