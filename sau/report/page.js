"use strict";
// Each cell is a <tbody> of two rows, the figures and the hidden drill-down; sorting moves whole bodies.
const all = (where, what) => [...where.querySelectorAll(what)];
const value = (body, column) => body.rows[0].cells[column].dataset.v ?? body.rows[0].cells[column].textContent.trim();

function sort(head, column) {
  const table = head.closest("table"), first = head.querySelector("button").dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const way = head.getAttribute("aria-sort") === first ? other : first;
  all(table, "th[aria-sort]").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", way);
  const turn = way === "ascending" ? 1 : -1;
  const bodies = [...table.tBodies].sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // what has no figure stays below
    return turn * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
  });
  table.append(...bodies);
}

function open(body, want) {
  body.rows[1].hidden = !want;
  body.querySelector(".open").setAttribute("aria-expanded", want);
}

const text = document.getElementById("filter");
function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean), cells = all(document, ".board > tbody");
  cells.forEach(body => { body.hidden = !words.every(word => body.dataset.f.toLowerCase().includes(word)); });
  const own = cells.filter(body => !body.dataset.pair);
  document.getElementById("count").textContent = `${own.filter(body => !body.hidden).length} of ${own.length} rows`;
}

function jump() {
  const body = document.getElementById(location.hash.slice(1));
  if (!body?.matches?.(".board > tbody")) return;
  if (body.hidden) { text.value = ""; filter(); }
  open(body, true);
  body.scrollIntoView({ block: "start" });
  body.querySelector(".open").focus({ preventScroll: true });
}

all(document, ".board").forEach(table => {
  [...[...table.tHead.rows].at(-1).cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(head, column)));
  table.addEventListener("click", event => {
    const body = event.target.closest("tr.row")?.closest("tbody");
    if (body?.querySelector(".open") && getSelection().type !== "Range") open(body, body.rows[1].hidden);
  });
});
text.addEventListener("input", filter);
document.addEventListener("keydown", event => {
  if (event.key === "/" && event.target !== text) { text.focus(); event.preventDefault(); }
  if (event.key === "Escape" && event.target === text) { text.value = ""; filter(); }
});
addEventListener("hashchange", jump);
document.querySelector(".tools").hidden = false;
filter();
jump();
