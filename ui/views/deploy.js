// Deploy a function, or change one that was deployed.

import { send } from "../api.js";
import { field, h, say, show } from "../dom.js";
import { head, note, problem, to } from "../parts.js";
import { namespaceField, readSecrets } from "./secrets.js";

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

// Names and values, a line each, and how they are read. What no line can hold is kept as it is, and named below.
function pairs(label, name, known) {
  const all = Object.entries(known ?? {});
  const kept = all.filter(([key, value]) => /^$|[\s=]/.test(key) || /[\r\n]/.test(value));
  const area = h("textarea", { name, spellcheck: "false", value: all.filter((pair) => !kept.includes(pair)).map((pair) => pair.join("=")).join("\n") });
  const hint = kept.length > 0 && h("p", { class: "hint" }, `Not shown, but kept unless a line has the name: ${kept.map(([key]) => key).join(", ")}`);
  return {
    node: h("div", null, field(`${label}, name=value, one a line`, area), hint),
    read: () => Object.fromEntries([...kept, ...area.value.split("\n").filter((line) => line.trim()).map((line) => {
      const at = line.indexOf("=");
      if (at < 1) throw new Error(`${label}: “${line}”; allowed: name=value, one a line`);
      return [line.slice(0, at).trim(), line.slice(at + 1)];
    })]),
  };
}

export async function deploy(context) {
  const name = context.parameter;
  const title = name ? `Change ${name}` : "Deploy a function";
  context.title(title);
  const off = await deployingIsOff(context);
  if (off) return [head(title, { crumb: h("a", { href: "#/functions" }, "Functions") }), problem(off)];
  const [[spaces, secrets], known] = await Promise.all([
    readSecrets(context),
    name ? context.get(`/system/function/${encodeURIComponent(name.includes(".") ? name : `${name}.openfaas-fn`)}`) : {},
  ]);
  const { faas_function: _, ...ownLabels } = known.labels ?? {};
  const environment = pairs("Environment and settings", "envVars", known.envVars);
  const annotations = pairs("Annotations", "annotations", known.annotations);
  const labels = pairs("Labels", "labels", ownLabels);
  const boxes = h("div");
  const trouble = h("div");
  const sender = h("button", { class: "main", type: "submit" }, name ? "Change" : "Deploy");
  const form = h("form", { class: "panel", onsubmit: submit },
    trouble,
    h("div", { class: "row" },
      field("Name", h("input", { name: "service", required: true, value: known.name ?? "", disabled: Boolean(name), autocomplete: "off", spellcheck: "false" })),
      namespaceField(spaces, { disabled: Boolean(name), onchange: (event) => drawBoxes(event.target.value) }, known.namespace),
      field("Image", h("input", { name: "image", required: true, value: known.image ?? "process", spellcheck: "false" }))),
    field("Command, which is run for each call", h("input", { name: "envProcess", value: known.envProcess ?? "", class: "mono", spellcheck: "false", placeholder: "python3 handler.py" })),
    environment.node, annotations.node, labels.node, boxes,
    h("p", { class: "hint" }, "It runs as this gateway's user. If it cannot start, the old one serves on."),
    h("div", { class: "actions" }, sender));

  drawBoxes(known.namespace ?? spaces[0], known.secrets);

  function drawBoxes(space, chosen = []) {
    const names = new Set([...secrets.filter((each) => each.namespace === space).map((each) => each.name), ...chosen]);
    show(boxes, names.size > 0 && h("fieldset", null, h("legend", null, "Secrets"), h("div", { class: "radios" }, [...names].map((each) =>
      h("label", { class: "inline" }, h("input", { type: "checkbox", name: "secrets", value: each, checked: chosen.includes(each) }), h("span", { class: "data" }, each))))));
  }

  async function submit(event) {
    event.preventDefault();
    const values = new FormData(form);
    sender.disabled = true;
    try {
      const service = name ? known.name : values.get("service").trim();
      const namespace = name ? known.namespace : values.get("namespace");
      await send(name ? "PUT" : "POST", "/system/functions", {
        service, namespace, image: values.get("image").trim(), envProcess: values.get("envProcess"), secrets: values.getAll("secrets"),
        envVars: environment.read(), annotations: annotations.read(), labels: labels.read(),
        limits: known.limits, requests: known.requests, constraints: known.constraints, // which have no field here
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
