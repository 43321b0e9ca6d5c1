"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], initial = [...body.rows];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", next);
    const key = row => {
      const cell = row.cells[column];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const missing = value => value === "-" || Number.isNaN(value);
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      // What is missing stays at the end either way.
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return next === "descending" ? -order : order;
    };
    body.append(...(next === "none" ? initial : [...initial].sort(compare)));
  }));
}
