// What the pages do beyond HTML: fresh figures without reloading, the theme, tips of charts, forms that send once.
"use strict";

const live = document.querySelector("[data-live]");
const beat = document.querySelector(".beat");

// The live part of a page is asked for again, alone, while the page is seen and nobody works in it.
async function refresh() {
  if (!live || document.hidden) return;
  const selected = getSelection();
  const busy = live.contains(document.activeElement) && document.activeElement !== document.body;
  if (selected && !selected.isCollapsed && live.contains(selected.anchorNode)) { tell("off", "Paused while you are in it"); return; }
  try {
    const answer = await fetch(location.href, { headers: { "x-live": "1" }, cache: "no-store" });
    if (answer.redirected || answer.status === 401) { location.reload(); return; }
    if (!answer.ok) throw new Error(String(answer.status));
    const text = await answer.text();
    if (text !== live.dataset.text && !busy) {
      const open = [...live.querySelectorAll("details[open][id]")].map((d) => d.id);
      const scrolled = [...live.querySelectorAll(".scroll")].map((s) => s.scrollLeft);
      live.innerHTML = text;
      live.dataset.text = text;
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      [...live.querySelectorAll(".scroll")].forEach((s, i) => { s.scrollLeft = scrolled[i] || 0; });
      hide();
    }
    if (text !== live.dataset.text) tell("off", "Paused while you are in it"); else tell("on", "Live");
  } catch {
    tell("off", "No answer, trying again");
  }
}
function tell(state, words) {
  if (!beat) return;
  beat.className = `beat ${state}`;
  if (beat.textContent !== words) beat.textContent = words;
}
if (live) {
  tell("on", "Live");
  setInterval(refresh, 1000 * (Number(live.dataset.live) || 5));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
}

// Dark and light.
document.querySelector(".theme")?.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("tunesmith-theme", root.dataset.theme); } catch { /* for this page only */ }
});

// A tip follows the pointer over whatever carries one.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
function hide() { tip.hidden = true; }
function show(event) {
  const owner = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  if (!owner) { hide(); return; }
  tip.textContent = owner.getAttribute("data-tip");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, Math.min(innerHeight - box.height - 6, event.clientY + 14))}px`;
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", hide, { passive: true, capture: true });

// A form is sent once, and a filter as soon as it is chosen.
document.addEventListener("submit", (event) => {
  const button = event.target.querySelector("button[type=submit]");
  if (button) setTimeout(() => { button.disabled = true; }, 0);
});
addEventListener("pageshow", () => document.querySelectorAll("button[type=submit]").forEach((b) => { b.disabled = false; }));
document.querySelectorAll("form.filters:not([method=post]) select").forEach((select) => {
  select.addEventListener("change", () => select.form.requestSubmit());
});
