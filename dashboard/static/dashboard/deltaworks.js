// What htmx does not do by itself: conditional polling (304), keys, and saying to a screen reader what changed.
// Every page reads and every form works without this file.
"use strict";

(() => {
  const etags = new Map();
  const open = new Set();

  const token = () => document.querySelector("meta[name=csrf-token]")?.content || "";

  document.addEventListener("htmx:configRequest", (event) => {
    const { verb, path, headers } = event.detail;
    if (verb !== "get") headers["X-CSRFToken"] = token();
    else if (etags.has(path)) headers["If-None-Match"] = etags.get(path);
  });

  document.addEventListener("htmx:beforeSwap", (event) => {
    const { xhr, pathInfo, target } = event.detail;
    if (xhr.status === 304) {
      event.detail.shouldSwap = false;
      event.detail.isError = false;
      return;
    }
    const etag = xhr.getResponseHeader("ETag");
    if (etag) etags.set(pathInfo.requestPath, etag);
    open.clear();
    target?.querySelectorAll("details[open][id]").forEach((one) => open.add(one.id));
  });

  document.addEventListener("htmx:afterSettle", () => {
    open.forEach((id) => document.getElementById(id)?.setAttribute("open", ""));
    announce();
  });

  let said = "";
  const announce = () => {
    const words = [...document.querySelectorAll("[data-announce]")].map((one) => one.dataset.announce).join(". ");
    const voice = document.getElementById("announcements");
    if (voice && words !== said && said) voice.textContent = words;
    said = words;
  };
  announce();

  const places = { o: "overview", r: "registry", j: "jobs", e: "evaluations", a: "approvals", d: "releases", h: "history" };
  const typing = (element) => element.matches("input, select, textarea, [contenteditable]");
  let waiting = false;

  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    if (waiting) {
      waiting = false;
      const link = document.querySelector(`[data-place="${places[event.key]}"]`);
      if (link) link.click();
      return;
    }
    if (event.key === "/") {
      const search = document.getElementById("search");
      if (search) { event.preventDefault(); search.focus(); }
    } else if (event.key === "?") {
      document.getElementById("keys")?.showModal();
    } else if (event.key === "g") {
      waiting = true;
      setTimeout(() => { waiting = false; }, 1500);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      move(event);
    }
  });

  // Arrow keys walk the links of the first column of the table that has the focus.
  const move = (event) => {
    const row = event.target.closest("tbody tr");
    if (!row) return;
    const next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
    const link = next?.querySelector("a");
    if (link) { event.preventDefault(); link.focus(); }
  };

  document.addEventListener("click", (event) => {
    if (event.target.matches("[data-close]")) event.target.closest("dialog")?.close();
  });
})();
