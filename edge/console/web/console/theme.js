// Before the first paint: the theme that was chosen here, if one was. Everything else is the browser's preference.
(() => {
  try {
    const chosen = localStorage.getItem("weft.theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage is forbidden; the browser's preference holds.
  }
})();
