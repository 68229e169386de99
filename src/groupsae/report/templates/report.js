"use strict";

// Tables whose headers hold buttons sort by that column; cells without a value stay last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const table = button.closest("table");
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");

    const column = Number(button.dataset.column);
    const key = (row) => row.cells[column].dataset.value;
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => {
      if (key(a) === "" || key(b) === "") return Number(key(a) === "") - Number(key(b) === "");
      const difference = Number(key(a)) - Number(key(b));
      return descending ? -difference : difference;
    });
    table.tBodies[0].append(...rows);
  });
}

document.documentElement.dataset.ready = "true";
