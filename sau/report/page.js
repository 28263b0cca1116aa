"use strict";
// Each cell is a <tbody> of two rows, the figures and the hidden drill-down; sorting moves whole bodies.
const all = (where, what) => [...where.querySelectorAll(what)];
const value = (body, column) => body.rows[0].cells[column].dataset.v ?? body.rows[0].cells[column].textContent.trim();

function sort(head, column) {
  const table = head.closest("table"), button = head.querySelector("button");
  const first = button.dataset.first ?? "ascending", other = first === "ascending" ? "descending" : "ascending";
  const way = head.getAttribute("aria-sort") === first ? other : first;
  all(table, "th[aria-sort]").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", way);
  const turn = way === "ascending" ? 1 : -1;
  const known = v => v !== "" && v !== "–";
  const bodies = [...table.tBodies].sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    if (known(x) !== known(y)) return known(x) ? -1 : 1; // what has no figure stays below
    const both = !isNaN(x) && !isNaN(y) && known(x);
    return turn * (both ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  });
  table.append(...bodies);
}

function open(body, want) {
  const button = body.querySelector(".open");
  body.rows[1].hidden = !want;
  button.setAttribute("aria-expanded", want);
}

const text = document.getElementById("filter"), state = document.getElementById("state");
function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, total = 0;
  all(document, ".board > tbody").forEach(body => {
    const has = body.dataset.f.toLowerCase(), status = body.dataset.s;
    const fits = state.value === "all" || (state.value === "ran" ? status !== "not run" : status === state.value);
    body.hidden = !(fits && words.every(word => has.includes(word)));
    if (!body.dataset.pair) { total += 1; shown += body.hidden ? 0 : 1; }
  });
  document.getElementById("count").textContent = `${shown} of ${total} cells`;
}

function jump() {
  const body = document.getElementById(location.hash.slice(1));
  if (!body?.matches?.(".board > tbody")) return;
  if (body.hidden) { text.value = ""; state.value = "all"; filter(); }
  open(body, true);
  body.scrollIntoView({ block: "start" });
  body.querySelector(".open").focus({ preventScroll: true });
}

all(document, ".board").forEach(table => {
  [...[...table.tHead.rows].at(-1).cells].forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sort(head, column)));
  table.addEventListener("click", event => {
    const row = event.target.closest("tr.row"), body = row?.closest("tbody");
    if (!body?.querySelector(".open") || getSelection().type === "Range") return;
    open(body, body.rows[1].hidden);
  });
  table.addEventListener("keydown", event => {
    const button = event.target.closest(".board > thead button"), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!button || !step) return;
    const buttons = all(table.tHead, "button");
    buttons[(buttons.indexOf(button) + step + buttons.length) % buttons.length].focus();
    event.preventDefault();
  });
});
text.addEventListener("input", filter);
state.addEventListener("change", filter);
document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.closest("input, select")) { text.focus(); event.preventDefault(); }
  if (event.key === "Escape" && event.target === text) { text.value = ""; filter(); }
});
addEventListener("hashchange", jump);
document.querySelector(".tools").hidden = false;
filter();
jump();
