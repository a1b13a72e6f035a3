// Deploy a function, or change one that was deployed.

import { send } from "../api.js";
import { field, h, say, show } from "../dom.js";
import { head, note, problem, to } from "../parts.js";

// Why nothing can be deployed here, or null: the route of secrets is there if and only if deploying is.
export async function deployingIsOff(context) {
  try {
    await context.get("/system/secrets");
    return null;
  } catch (error) {
    if (!error.isOff && error.status !== 404) throw error;
    return error;
  }
}

function lines(object, without = []) {
  return Object.entries(object ?? {}).filter(([key]) => !without.includes(key)).map(([key, value]) => `${key}=${value}`).join("\n");
}

function readLines(text, what) {
  const found = {};
  for (const line of text.split("\n").filter((each) => each.trim())) {
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`${what}: “${line}”; allowed: name=value, one a line`);
    found[line.slice(0, at).trim()] = line.slice(at + 1);
  }
  return found;
}

export async function deploy(context) {
  const name = context.parameter;
  const title = name ? `Change ${name}` : "Deploy a function";
  context.title(title);
  const off = await deployingIsOff(context);
  if (off) return [head(title, { crumb: h("a", { href: "#/functions" }, "Functions") }), problem(off)];
  const [spaces, secrets, known] = await Promise.all([
    context.get("/system/namespaces"), context.get("/system/secrets"),
    name ? context.get(`/system/function/${encodeURIComponent(name.includes(".") ? name : `${name}.openfaas-fn`)}`) : {},
  ]);
  const trouble = h("div");
  const sender = h("button", { class: "main", type: "submit" }, name ? "Change" : "Deploy");
  const form = h("form", { class: "panel", onsubmit: submit },
    trouble,
    h("div", { class: "row" },
      field("Name", h("input", { name: "service", required: true, value: known.name ?? "", disabled: Boolean(name), autocomplete: "off", spellcheck: "false" })),
      field("Namespace", h("select", { name: "namespace", disabled: Boolean(name) }, spaces.map((space) => h("option", { value: space, selected: space === known.namespace }, space)))),
      field("Image", h("input", { name: "image", required: true, value: known.image ?? "process", spellcheck: "false" }))),
    field("Command, which is run for each call", h("input", { name: "envProcess", value: known.envProcess ?? "", class: "mono", spellcheck: "false", placeholder: "python3 handler.py" })),
    field("Environment and settings, name=value, one a line", h("textarea", { name: "envVars", spellcheck: "false", value: lines(known.envVars) })),
    field("Annotations", h("textarea", { name: "annotations", spellcheck: "false", value: lines(known.annotations) })),
    field("Labels", h("textarea", { name: "labels", spellcheck: "false", value: lines(known.labels, ["faas_function"]) })),
    secrets.length > 0 && h("fieldset", null, h("legend", null, "Secrets"), h("div", { class: "radios" }, secrets.map((each) =>
      h("label", { class: "inline" }, h("input", { type: "checkbox", name: "secrets", value: each.name, checked: (known.secrets ?? []).includes(each.name) }), h("span", { class: "data" }, each.name))))),
    h("p", { class: "hint" }, "It runs as this gateway's user. If it cannot start, the old one serves on."),
    h("div", { class: "actions" }, sender));

  async function submit(event) {
    event.preventDefault();
    const values = new FormData(form);
    sender.disabled = true;
    try {
      const service = name ? known.name : values.get("service").trim();
      const namespace = name ? known.namespace : values.get("namespace");
      await send(name ? "PUT" : "POST", "/system/functions", {
        service, namespace, image: values.get("image").trim(), envProcess: values.get("envProcess"),
        envVars: readLines(values.get("envVars"), "Environment"), annotations: readLines(values.get("annotations"), "Annotations"),
        labels: readLines(values.get("labels"), "Labels"), secrets: values.getAll("secrets"),
      });
      say(name ? "Changed" : "Deployed");
      location.hash = to("functions", namespace === "openfaas-fn" ? service : `${service}.${namespace}`);
    } catch (error) {
      show(trouble, note(error.message, "bad"));
      trouble.scrollIntoView({ block: "nearest" });
    } finally {
      sender.disabled = false;
    }
  }

  return [head(title, { crumb: h("a", { href: "#/functions" }, "Functions") }), form];
}
