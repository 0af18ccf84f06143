// Before the first paint: the theme this browser chose, if any; otherwise the system's.
"use strict";
try {
  const chosen = localStorage.getItem("tunesmith-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch { /* storage is closed: the system's theme */ }
