// Requests to /system, and to functions. The password is in one variable of this module: it is in no address, no cookie
// and no storage, goes to /system and /async-function only (never to a function), and is gone with the page.

let authorization = null;
let onLogin = () => {};

export class Failure extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }

  get isOff() { // the gateway does not have it, or it is turned off
    return this.status === 501;
  }
}

export class Unreachable extends Failure {
  constructor() {
    super(0, "The gateway cannot be reached; it is asked again soon.");
  }
}

export function whenLoginIsNeeded(callback) {
  onLogin = callback;
}

export function isLoggedIn() {
  return authorization !== null;
}

export function logout() {
  authorization = null;
}

// Try a name and a password; throws Failure if they are wrong.
export async function login(user, password) {
  const utf8 = new TextEncoder().encode(`${user}:${password}`);
  const before = authorization;
  authorization = `Basic ${btoa(String.fromCharCode(...utf8))}`;
  try {
    await (await open("/system/info", {}, true)).text();
  } catch (error) {
    authorization = before;
    if (error.status === 401) throw new Failure(401, "That name and password do not fit: basic-auth-users has them, or basic-auth-user and basic-auth-password.");
    throw error;
  }
}

// `credentials: omit` keeps the browser from asking for a password by itself, and from sending one that it knows.
export async function open(path, options = {}, isLogin = false) {
  const headers = { ...options.headers };
  if (authorization) headers.Authorization = authorization;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable();
  }
  if (response.ok) return response;
  const text = (await response.text()).trim();
  if (response.status === 401 && !isLogin) onLogin();
  throw new Failure(response.status, text || `The gateway answered ${response.status}.`);
}

export async function get(path, options) {
  return (await open(path, options)).json();
}

export async function send(method, path, document) {
  const options = { method };
  if (document !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(document);
  }
  const text = await (await open(path, options)).text();
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

const SHOWN_BYTES = 262144; // of a function's answer

// Call a function as any client does, without our password; the answer is data, cut where it gets long.
export async function invoke(path, { method, headers, body, signal }) {
  const started = performance.now();
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: method === "GET" || method === "HEAD" ? undefined : body,
      credentials: "omit", cache: "no-store", redirect: "manual",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "No answer came: the gateway cannot be reached, or the connection was cut.");
  }
  if (response.type === "opaqueredirect") {
    return { status: "3xx", headers: [], text: "A redirection, which is not followed here.", seconds: (performance.now() - started) / 1000, cut: false };
  }
  const { text, cut } = await readStart(response);
  return { status: response.status, headers: [...response.headers], text, cut, seconds: (performance.now() - started) / 1000 };
}

async function readStart(response) {
  if (!response.body) return { text: "", cut: false };
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return { text: text + decoder.decode(), cut: false };
    length += value.length;
    text += decoder.decode(value, { stream: true });
    if (length > SHOWN_BYTES) {
      await reader.cancel();
      return { text: text.slice(0, SHOWN_BYTES), cut: true };
    }
  }
}
