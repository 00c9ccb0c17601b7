"use strict";
(() => {
  // Tables: sort by a click on a heading, filter by a text.
  const key = (row, column) => row.cells[column].dataset.key;
  const compare = (a, b, number) => number ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
      const falls = heading.getAttribute("aria-sort") === "descending" || (heading.getAttribute("aria-sort") === null && button.dataset.kind !== "number");
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", falls ? "ascending" : "descending");
      const column = Number(button.dataset.column), number = button.dataset.kind === "number";
      const rows = [...body.rows].sort((a, b) => (falls ? 1 : -1) * compare(key(a, column), key(b, column), number));
      body.append(...rows);
    });
  }
  for (const input of document.querySelectorAll("[data-filters]")) {
    const table = document.getElementById(input.dataset.filters);
    const output = document.querySelector(`[data-counts="${input.dataset.filters}"]`);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += row.hidden ? 0 : 1;
      }
      output.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
    });
  }
  // Charts: a point shows its row in the panel.
  for (const drawing of document.querySelectorAll("[data-chart]")) {
    const panel = document.getElementById(`${drawing.dataset.chart}-panel`);
    const show = (event) => {
      const point = event.target.closest(".point");
      const template = point && document.getElementById(point.dataset.shows);
      if (!template) return;
      for (const other of drawing.querySelectorAll(".chosen")) other.classList.remove("chosen");
      point.classList.add("chosen");
      const label = document.createElement("p");
      label.className = "headline";
      label.textContent = point.getAttribute("aria-label");
      panel.replaceChildren(label, template.content.cloneNode(true));
    };
    for (const kind of ["pointerover", "focusin", "click"]) drawing.addEventListener(kind, show);
  }
  // Colours: as the system, light, dark.
  const names = { "": "Colours: as the system", light: "Colours: light", dark: "Colours: dark" };
  const order = ["", "light", "dark"];
  for (const button of document.querySelectorAll("[data-theme-button]")) {
    button.addEventListener("click", () => {
      const root = document.documentElement;
      const next = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
      if (next) root.dataset.theme = next; else delete root.dataset.theme;
      button.textContent = names[next];
    });
  }
})();
