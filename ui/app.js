// The frame: addresses, navigation, login, and what every view shares. Each view is a function of a context that returns
// its nodes, after it has asked for what it shows; it may listen to what changes until `context.signal` says that the
// reader has gone elsewhere.

import { get, isLoggedIn, login, logout, whenLoginIsNeeded } from "./api.js";
import { button, field, h, show } from "./dom.js";
import { count } from "./format.js";
import * as live from "./live.js";
import { head, problem } from "./parts.js";
import { call } from "./views/call.js";
import { calls } from "./views/calls.js";
import { dead } from "./views/dead.js";
import { deploy } from "./views/deploy.js";
import { oneFunction } from "./views/function.js";
import { functions } from "./views/functions.js";
import { overview } from "./views/overview.js";
import { schedules } from "./views/schedules.js";
import { secrets } from "./views/secrets.js";

const ROUTES = [
  [/^\/$/, overview, "Overview", "/"],
  [/^\/functions$/, functions, "Functions", "/functions"],
  [/^\/functions\/([^/]+)$/, oneFunction, "Function", "/functions"],
  [/^\/deploy(?:\/([^/]+))?$/, deploy, "Deploy", "/functions"],
  [/^\/calls$/, calls, "Calls", "/calls"],
  [/^\/calls\/([^/]+)$/, call, "Call", "/calls"],
  [/^\/dead$/, dead, "Dead letters", "/dead"],
  [/^\/schedules$/, schedules, "Schedules", "/schedules"],
  [/^\/secrets$/, secrets, "Secrets", "/secrets"],
];
const TABS = [["/", "Overview"], ["/functions", "Functions"], ["/calls", "Calls"], ["/dead", "Dead letters"], ["/schedules", "Schedules"], ["/secrets", "Secrets"]];
const LINK_WORDS = { live: "Live", polling: "Asking every 3 s", lost: "No connection" };

const main = document.getElementById("main");
let current = null;
let isAsking = false;

function readAddress() {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  return { path: path || "/", query: new URLSearchParams(query) };
}

function decode(part) {
  try {
    return decodeURIComponent(part ?? "");
  } catch {
    return part;
  }
}

function drawNavigation(tab) {
  show(document.getElementById("nav"), TABS.map(([path, name]) => h("li", null,
    h("a", { href: `#${path}`, "aria-current": path === tab ? "page" : null }, name, path === "/dead" && h("span", { class: "count", id: "dead-count" })))));
  drawDeadCount();
}

let deadCount = null;

// Views that know how many dead letters there are say so; the navigation shows it.
export function tellDeadCount(found) {
  deadCount = found;
  drawDeadCount();
}

function drawDeadCount() {
  const place = document.getElementById("dead-count");
  if (place) show(place, deadCount ? count(deadCount) : "");
  document.querySelector("#nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

async function route() {
  if (isAsking) return;
  const { path, query } = readAddress();
  const found = ROUTES.map(([pattern, view, title, tab]) => [pattern.exec(path), view, title, tab]).find(([match]) => match);
  current?.abort();
  const controller = current = new AbortController();
  drawNavigation(found?.[3]);
  document.title = `${found?.[2] ?? "Not found"} · faashound`;
  if (!found) {
    show(main, h("h1", { tabindex: -1 }, "There is no such view"), h("p", null, h("a", { href: "#/" }, "To the overview")));
    return;
  }
  const [match, view] = found;
  const context = {
    parameter: decode(match[1]),
    query,
    signal: controller.signal,
    listen: (listener) => controller.signal.addEventListener("abort", live.listen(listener)),
    get: (address) => get(address, { signal: controller.signal }),
    title: (text) => { document.title = `${text} · faashound`; },
    tellDeadCount,
    fail: (error) => {
      if (controller.signal.aborted) return;
      controller.abort();
      show(main, head(found[2]), problem(error), button("Try again", route));
    },
  };
  try {
    const nodes = await view(context);
    if (!controller.signal.aborted) show(main, nodes);
  } catch (error) {
    if (controller.signal.aborted || error.status === 401) return;
    context.fail(error);
    if (error.status === undefined) throw error; // a fault of this page, for the console as well
  }
  main.querySelector("h1")?.focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function askForLogin() {
  if (isAsking) return;
  isAsking = true;
  current?.abort();
  live.stop();
  tellLink("");
  drawNavigation(null);
  const refused = h("p", { class: "note bad", role: "alert", hidden: true });
  const form = h("form", { onsubmit: tryLogin },
    refused,
    field("Name", h("input", { name: "user", autocomplete: "username", required: true })),
    field("Password", h("input", { name: "password", type: "password", autocomplete: "current-password", required: true })),
    h("div", { class: "actions" }, h("button", { class: "main", type: "submit" }, "Log in")),
    h("p", { class: "hint" }, "It is kept until this page is closed or loaded anew."));
  show(main, h("div", { class: "login" }, head("Log in"), form));
  form.elements.user.focus();

  async function tryLogin(event) {
    event.preventDefault();
    const sender = form.querySelector("button");
    sender.disabled = true;
    try {
      await login(form.elements.user.value, form.elements.password.value);
      isAsking = false;
      begin();
    } catch (error) {
      refused.hidden = false;
      show(refused, error.message);
      form.elements.password.select();
    } finally {
      sender.disabled = false;
    }
  }
}

function tellLink(word) {
  const place = document.getElementById("link");
  place.className = word;
  show(place, LINK_WORDS[word] ?? "");
}

function begin() {
  document.getElementById("logout").hidden = !isLoggedIn();
  live.start(tellLink);
  route();
  countDead();
}

document.getElementById("logout").addEventListener("click", () => {
  logout();
  document.getElementById("logout").hidden = true;
  askForLogin();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const search = main.querySelector("input[type=search]");
  if (search) {
    event.preventDefault();
    search.focus();
  }
});
window.addEventListener("hashchange", route);
whenLoginIsNeeded(askForLogin);

// The count of dead letters is in sight everywhere.
async function countDead() {
  const metrics = await get("/system/metrics?minutes=1").catch(() => null);
  if (metrics?.queue) tellDeadCount(metrics.queue.dead + metrics.queue.callbacks_dead);
}

live.listen((event) => {
  if (event.kind === "depth") countDead();
});
begin();
