addEventListener("error", ({ target }) => {
  if (target.tagName !== "SCRIPT") return;
  if (performance.getEntriesByType("navigation")[0].type !== "reload") location.reload();
  else document.getElementById("main").textContent = "Part of this page is missing. Reload it.";
}, true);
