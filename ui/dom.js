// The only place that makes elements. Children are texts or nodes: a text becomes a text node, with what cannot be seen
// in it made visible, so nothing that a function, a header or a caller wrote is ever markup, here or anywhere.

import { clip, clock, exact, visible } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const LISTENER = /^on[a-z]+$/;
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open"]);
const SHOWN_CHARS = 2000;
const FRESH_COUNT = 5; // rows that are pointed out when they change; more at once would only flicker

function fill(element, options, children) {
  for (const [name, value] of Object.entries(options ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (LISTENER.test(name)) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (name === "href" && !String(value).startsWith("#")) throw new Error("links lead to views of this page only");
    else element.setAttribute(name, name === "title" || name === "aria-label" ? visible(value) : value === true ? "" : value);
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(visible(child))));
}

export function h(tag, options, ...children) {
  return fill(document.createElement(tag), options, children);
}

export function button(label, onclick, kind, options) {
  return h("button", { type: "button", class: kind, onclick, ...options }, label);
}

export function field(label, control) {
  return h("label", null, h("span", null, label), control);
}

export function s(tag, options, ...children) {
  return fill(document.createElementNS(SVG, tag), options, children);
}

export function show(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

const drawn = new WeakMap();

// Draw a part anew if what it shows has changed. What the reader has opened stays open, and the focus stays where it was.
export function redraw(place, data, draw) {
  const print = JSON.stringify(data);
  if (drawn.get(place) === print) return;
  drawn.set(place, print);
  const opened = new Set([...place.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
  const focused = place.contains(document.activeElement) ? nameOf(document.activeElement) : null;
  show(place, draw(data));
  for (const summary of place.querySelectorAll("summary")) if (opened.has(summary.textContent)) summary.parentElement.open = true;
  if (focused) [...place.querySelectorAll("a, button, summary")].find((each) => nameOf(each) === focused)?.focus();
}

function nameOf(element) {
  return `${element.tagName} ${element.getAttribute("href") ?? element.textContent}`;
}

// Put items into a parent, keeping the node of each that has not changed, and with it focus and selection.
export function keyed(parent, items, key, draw) {
  const known = new Map([...parent.children].filter((node) => node.dataset.key).map((node) => [node.dataset.key, node]));
  const fresh = [];
  const isFirst = parent.dataset.drawn !== "yes";
  const wanted = items.map((item) => {
    const id = String(key(item));
    const print = JSON.stringify(item);
    const old = known.get(id);
    if (old && old.dataset.print === print) return old;
    const node = draw(item);
    node.dataset.key = id;
    node.dataset.print = print;
    if (!isFirst) fresh.push(node);
    if (old) {
      const focused = old.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
      old.replaceWith(node);
      if (focused) node.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
    }
    return node;
  });
  parent.dataset.drawn = "yes";
  if (fresh.length <= FRESH_COUNT) for (const node of fresh) node.classList.add("fresh");
  const keep = new Set(wanted);
  for (const node of [...parent.children]) if (!keep.has(node)) node.remove();
  wanted.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
}

export function time(iso) {
  if (!iso) return "–";
  const moment = new Date(iso);
  return Number.isNaN(moment.valueOf()) ? String(iso) : h("time", { datetime: iso, title: exact(moment) }, clock(moment));
}

// A text of any length: its beginning, and the rest when it is asked for.
export function long(text, options = {}) {
  const block = h("pre", { tabindex: 0, role: "region", "aria-label": options.label ?? "Text", class: options.class });
  if (text.length <= SHOWN_CHARS) return show(block, text);
  const more = button(`Show all ${text.length.toLocaleString("en")} characters`, () => { show(block, text); more.remove(); block.focus(); }, "quiet");
  return h("div", null, show(block, clip(text, SHOWN_CHARS)), more);
}

export function say(text) {
  const place = document.getElementById("say");
  show(place, text);
  clearTimeout(say.timer);
  say.timer = setTimeout(() => show(place), 5000);
}

export function copyButton(text, what) {
  return button("Copy", () => copy(text, what), "quiet copy", { "data-focus": "copy", "aria-label": `Copy ${what}` });
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // pages that come over plain HTTP from another machine have no clipboard; a selection can still be copied
    const area = h("textarea", { value: text, "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`Copied ${what}`);
}

// Ask before what cannot be undone; resolves to whether it is wanted.
export function ask(question, consequence, verb) {
  return new Promise((resolve) => {
    let answer = false;
    const dialog = h("dialog", { "aria-labelledby": "question" },
      h("h2", { id: "question" }, question),
      h("p", { class: "soft" }, consequence),
      h("div", { class: "actions" },
        button("Keep", () => dialog.close()),
        button(verb, () => { answer = true; dialog.close(); }, "danger")));
    dialog.addEventListener("close", () => { dialog.remove(); resolve(answer); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

// A form in a dialog; `send` may throw, and then the form stays and says why. Resolves when it is closed.
export function askForm(title, fields, verb, send) {
  return new Promise((resolve) => {
    const problem = h("p", { class: "note bad", role: "alert", hidden: true });
    const dialog = h("dialog", { "aria-labelledby": "dialog-title" },
      h("h2", { id: "dialog-title" }, title),
      h("form", {
        onsubmit: async (event) => {
          event.preventDefault();
          try {
            await send(new FormData(event.target));
            dialog.close();
          } catch (error) {
            problem.hidden = false;
            show(problem, error.message);
          }
        },
      }, problem, fields, h("div", { class: "actions" },
        button("Close", () => dialog.close()),
        h("button", { class: "main", type: "submit" }, verb))));
    dialog.addEventListener("close", () => { dialog.remove(); resolve(); });
    document.body.append(dialog);
    dialog.showModal();
  });
}
