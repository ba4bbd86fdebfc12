// Not a module, and in the head: it runs before anything is drawn, so that a chosen theme does not flash the other one first.
(() => {
  const KEY = "quantflow.theme";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const preferred = () => (dark.matches ? "dark" : "light");
  const shown = () => root.dataset.theme ?? preferred();

  try {
    const kept = localStorage.getItem(KEY);
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch {
    // No storage: the system's theme it is.
  }

  // A choice that agrees with the system is no choice: the page follows the system again.
  function choose(theme) {
    if (theme === preferred()) delete root.dataset.theme;
    else root.dataset.theme = theme;
    try {
      if (theme === preferred()) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {
      // It lasts until the page is closed.
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const tell = () => button.setAttribute("aria-pressed", String(shown() === "dark"));
    button.addEventListener("click", () => {
      choose(shown() === "dark" ? "light" : "dark");
      tell();
    });
    dark.addEventListener("change", tell);
    tell();
  });
})();
