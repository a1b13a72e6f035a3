// The names of secrets; their values are written, and never shown.

import { send } from "../api.js";
import { ask, askForm, button, field, h, keyed, say, show } from "../dom.js";
import { attempt, empty, head, problem, table } from "../parts.js";

// All namespaces, and the secrets of all of them: [{name, namespace}].
export async function readSecrets(context) {
  const spaces = await context.get("/system/namespaces");
  const found = await Promise.all(spaces.map((space) => context.get(`/system/secrets?namespace=${encodeURIComponent(space)}`)));
  return [spaces, found.flat()];
}

export function namespaceField(spaces, options, chosen) {
  return field("Namespace", h("select", { name: "namespace", ...options }, spaces.map((space) => h("option", { value: space, selected: space === chosen }, space))));
}

export async function secrets(context) {
  const place = h("div");
  const body = h("tbody");
  const whole = table("Secrets", ["Name", { label: "Namespace", class: "grow" }, { label: "What to do", class: "num" }], body);

  let spaces = [];

  async function refresh() {
    let rows;
    [spaces, rows] = await readSecrets(context);
    keyed(body, rows, (row) => `${row.name}.${row.namespace}`, (row) => h("tr", null,
      h("td", { class: "mono data" }, row.name), h("td", { class: "data" }, row.namespace),
      h("td", { class: "num nowrap" },
        button("New value", () => edit(row), "quiet"),
        button("Delete", () => remove(row), "quiet danger"))));
    show(place, rows.length ? whole : empty("No secrets. A function that names one finds it as a file."));
  }

  async function edit(row) {
    await askForm(row ? `New value of ${row.name}` : "New secret", [
      !row && [field("Name", h("input", { name: "name", required: true, autocomplete: "off", spellcheck: "false" })), namespaceField(spaces)],
      field("Value", h("textarea", { name: "value", required: true, autocomplete: "off", spellcheck: "false" })),
    ], "Save", async (values) => {
      await send(row ? "PUT" : "POST", "/system/secrets", { ...row, ...Object.fromEntries(values) });
      say("Saved");
      await refresh();
    });
  }

  async function remove(row) {
    if (!await ask(`Delete the secret ${row.name}?`, "Its value is gone then. This cannot be undone.", "Delete")) return;
    await attempt(() => send("DELETE", "/system/secrets", { name: row.name, namespace: row.namespace }), "Deleted", refresh);
  }

  try {
    await refresh();
  } catch (error) {
    if (!error.isOff && error.status !== 404) throw error;
    return [head("Secrets"), problem(error)];
  }
  return [head("Secrets", { actions: button("New secret", () => edit(null)) }), place];
}
