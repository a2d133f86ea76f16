// Keeps a page current: listens to the event stream, fetches the page again and carries over what changed.
// Focus, typed text, open details and scrolling stay. Without this script every page still works.
"use strict";
(() => {
  const body = document.body;
  const linkState = document.getElementById("link-state");
  const kinds = (body.dataset.kinds || "").split(" ").filter(Boolean);
  const QUIET_MS = 250, FALLBACK_MS = 15000;
  let timer = 0, busy = false, again = false;

  const say = (text) => { if (linkState && linkState.textContent !== text) linkState.textContent = text; };

  function age(seconds) {
    if (seconds < 5) return "just now";
    if (seconds < 90) return `${Math.round(seconds)} s ago`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  }
  function showAges() {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const at = Date.parse(time.dateTime);
      if (Number.isNaN(at)) continue;
      if (!time.title) time.title = time.textContent;
      const seconds = (Date.now() - at) / 1000;
      time.textContent = seconds < -5 ? time.title : age(seconds);
    }
  }

  // Details that a person opened or closed stay as they are.
  const touched = new WeakSet();
  document.addEventListener("click", (event) => {
    const summary = event.target.closest("summary");
    if (summary) touched.add(summary.parentElement);
    for (const open of document.querySelectorAll("details.confirm[open]")) if (!open.contains(event.target)) open.open = false;
  });
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && document.querySelector("details.confirm[open]");
    if (open) { open.open = false; open.querySelector("summary").focus(); }
  });

  // Make `old` equal to `fresh`, touching only what differs; children with ids are matched by id.
  function morph(old, fresh) {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) { old.replaceWith(fresh); return; }
    if (old.nodeType === Node.TEXT_NODE) { if (old.data !== fresh.data) old.data = fresh.data; return; }
    if (old.nodeType !== Node.ELEMENT_NODE) return;
    if (old.nodeName === "TIME" && old.dateTime === fresh.dateTime) return;
    if (old.contains(document.activeElement) && /^(INPUT|SELECT|TEXTAREA)$/.test(old.nodeName)) return;
    for (const { name, value } of fresh.attributes) {
      if (name === "open" && touched.has(old)) continue;
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !["open", "title", "hidden"].includes(name)) old.removeAttribute(name);
    }
    let place = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const own = child.id ? [...old.children].find((one) => one.id === child.id) : null;
      if (own && own !== place) { old.insertBefore(own, place); morph(own, child); continue; }
      if (!place || (place.id && !own)) { old.insertBefore(child, place); continue; }
      const next = place.nextSibling;
      morph(place, child);
      place = next;
    }
    while (place) { const next = place.nextSibling; place.remove(); place = next; }
  }

  // Parts that people type into are outside the sections that are refreshed, except the create form, which is skipped.
  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const response = await fetch(location.href, { credentials: "same-origin" });
      if (response.redirected && new URL(response.url).pathname === "/login") { location.assign(response.url); return; }
      if (!response.ok) { say(`Not live: the server answered ${response.status}`); return; }
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
      for (const part of document.querySelectorAll("main section[id], main div[id]")) {
        if (part.id === "new" || part.closest("#new") || part.parentElement.closest("main section[id], main div[id]")) continue;
        const twin = fresh.getElementById(part.id);
        if (twin) morph(part, document.importNode(twin, true));
      }
      enhance();
    } catch {
      say("Offline");
    } finally {
      busy = false;
      if (again) { again = false; soon(); }
    }
  }
  function soon() { clearTimeout(timer); timer = setTimeout(refresh, QUIET_MS); }

  function filter() {
    const input = document.querySelector("[data-filter]");
    if (!input) return;
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of document.querySelectorAll(`#${input.dataset.filter} [data-row]`)) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) shown += 1;
    }
    const count = document.getElementById("filter-count");
    const text = shown === 1 ? "1 device" : `${shown} devices`;
    if (count && count.textContent !== text) count.textContent = text;
  }

  function enhance() {
    showAges();
    filter();
    for (const button of document.querySelectorAll("button.copy")) button.hidden = !navigator.clipboard;
  }

  document.addEventListener("input", (event) => { if (event.target.matches("[data-filter]")) filter(); });
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    try { await navigator.clipboard.writeText(button.dataset.copy); button.textContent = "Copied"; }
    catch { button.textContent = "Copy failed"; }
  });

  enhance();
  const wanted = new URLSearchParams(location.search).get("release");
  const release = document.getElementById("release");
  if (wanted && release && [...release.options].some((option) => option.value === wanted)) release.value = wanted;
  setInterval(showAges, 5000);

  if (body.dataset.events && kinds.length) {
    const source = new EventSource(body.dataset.events);
    source.onopen = () => { say("Live"); soon(); };
    source.onerror = () => say("Reconnecting");
    for (const kind of [...kinds, "reset"]) source.addEventListener(kind, soon);
    setInterval(() => { if (source.readyState !== EventSource.OPEN) refresh(); }, FALLBACK_MS);
    addEventListener("pagehide", () => source.close());
    addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  }
})();
