// What changes, as it changes: one stream of server-sent events for all views, read by fetch, which can send the password
// (EventSource cannot). Where it fails, views are told to read again every few seconds. A page that is not looked at
// lets go of its connection: a browser has six for each gateway.

import { Unreachable, open } from "./api.js";

const POLL_MS = 3000;
const AGAIN_MS = [1000, 2000, 5000, 10000];

const listeners = new Set();
let mark = null;
let run = null;
let poll = null;
let tellState = () => {};

export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(event) {
  for (const listener of [...listeners]) listener(event);
}

export function start(onState) {
  tellState = onState;
  stop();
  run = new AbortController();
  follow(run.signal);
}

export function stop() {
  run?.abort();
  run = null;
  setPolling(false);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (!run) {
    start(tellState);
    tell({ kind: "again" });
  }
});

function setPolling(on) {
  if (on === (poll !== null)) return;
  if (poll !== null) clearInterval(poll);
  poll = on ? setInterval(() => tell({ kind: "again" }), POLL_MS) : null;
}

async function follow(signal) {
  let failures = 0;
  while (!signal.aborted) {
    try {
      await readStream(signal, () => { failures = 0; });
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      const isLost = error instanceof Unreachable;
      tellState(isLost ? "lost" : "polling");
      setPolling(true);
    }
    if (signal.aborted) return;
    await sleep(AGAIN_MS[Math.min(failures, AGAIN_MS.length - 1)], signal);
    failures += 1;
  }
}

async function readStream(signal, onOpen) {
  const response = await open("/system/events", { signal, headers: mark ? { "Last-Event-ID": mark } : {} });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isOpen = false;
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      throw new Unreachable();
    });
    if (done) return;
    if (!isOpen) {
      isOpen = true;
      onOpen();
      const wasPolling = poll !== null;
      setPolling(false);
      tellState("live");
      if (wasPolling) tell({ kind: "again" });
    }
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    events.forEach(take);
  }
}

function take(text) {
  const fields = {};
  for (const line of text.split("\n")) {
    const at = line.indexOf(":");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 1).trimStart();
  }
  if ("id" in fields) mark = fields.id || null;
  if (!fields.event) return;
  tell({ kind: fields.event, data: JSON.parse(fields.data) });
}

function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
