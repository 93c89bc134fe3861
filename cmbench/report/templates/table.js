// The table: selection state, sorting, columns. The state lives in the URL's hash.

const byId = (id) => document.getElementById(id);
const bodies = [...document.querySelectorAll("tbody[data-section]")];
const lines = [...document.querySelectorAll("tr[data-row]")];
const headers = [...document.querySelectorAll("thead th[data-c]")];
const boxes = [...document.querySelectorAll("input[data-filter]")];
const columnBoxes = [...document.querySelectorAll("input[data-show]")];
// Names stand in the page by index: HTML changes some characters, JSON none.
const filterOf = (box) => data.filters[box.dataset.filter][box.dataset.index];
const pictures = [...document.querySelectorAll("figure[data-for]")];
const THEMES = ["auto", "light", "dark"];
const DEFAULTS = { metric: (metricOf(data.rank_metric) || data.metrics[0] || {}).name || "", scalar: firstScalar(), cost: (COST_CHARTS[0] || {}).name || "" };
let texts = null;
let sorted = false;
let arranged = false;

const state = { q: "", off: {}, sort: null, descending: false, columns: null, row: null, theme: "auto", ...DEFAULTS };

function firstScalar() {
  const names = scalarNames();
  return names.includes("loss") ? "loss" : names[0] || "";
}

function visibleColumns() {
  return state.columns || data.columns.filter((c) => c.shown).map((c) => c.key);
}

// A result that several tables print has several values of that filter.
function filterValues(row, filter) {
  if (filter === "conditional") return [row.conditional === null ? "not stated" : row.conditional ? "conditional" : "unconditional"];
  if (filter === "nfe") return [row.nfe_text || "not stated"];
  return Array.isArray(row[filter]) ? row[filter] : [String(row[filter])];
}

function isSelected(index) {
  const row = data.rows[index];
  for (const [filter, off] of Object.entries(state.off)) if (filterValues(row, filter).every((value) => off.includes(value))) return false;
  if (!state.q) return true;
  if (!texts) texts = textsOf();
  return texts[index].includes(state.q.toLowerCase());
}

// What the search looks at, by row: names, family, reference and note.
function textsOf() {
  return data.rows.map((row) => [row.label, row.method, row.family, row.words].join(" ").toLowerCase());
}

function selectedRows() {
  return data.rows.filter((row, index) => isSelected(index));
}

function applySelection() {
  let count = 0;
  const shown = new Set();
  for (const line of lines) {
    const index = Number(line.dataset.row);
    line.hidden = !isSelected(index);
    if (!line.hidden) { count += 1; shown.add(data.rows[index].id); }
  }
  for (const body of bodies) body.classList.toggle("empty", ![...body.rows].some((r) => r.dataset.row && !r.hidden));
  for (const picture of pictures) picture.hidden = !shown.has(picture.dataset.for);
  for (const panel of document.querySelectorAll(".panel")) panel.hidden = ![...panel.querySelectorAll("figure")].some((f) => !f.hidden);
  byId("count").textContent = `${count} of ${lines.length} rows`;
}

// Rows are sorted within their section: sections never mix. Missing values go last either way.
function applySort() {
  const at = data.columns.findIndex((c) => c.key === state.sort);
  const sign = state.descending ? -1 : 1;
  const value = (line) => (at < 0 ? Number(line.dataset.row) : data.rows[line.dataset.row].sort[at]);
  if (at < 0 && !sorted) return; // the page comes in this order
  sorted = true;
  const compare = (x, y) => (typeof x === "number" && typeof y === "number" ? x - y : x < y ? -1 : 1);
  for (const body of bodies) {
    const own = [...body.rows].filter((r) => r.dataset.row).map((line) => [value(line), line]);
    own.sort(([x, a], [y, b]) => {
      if (x === y) return a.dataset.row - b.dataset.row;
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * compare(x, y);
    });
    body.append(...own.map(([, line]) => line));
  }
  for (const header of headers) {
    const own = at >= 0 && Number(header.dataset.c) === at;
    if (own) header.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
}

function applyColumns() {
  if (!state.columns && !arranged) return; // the page comes with these columns
  arranged = true;
  const shown = new Set(visibleColumns());
  const off = data.columns.map((column) => !shown.has(column.key));
  off[0] = false; // a row without its method's name would be no row
  for (const cell of document.querySelectorAll("[data-c]")) cell.hidden = off[cell.dataset.c];
  for (const head of document.querySelectorAll("tr.section th")) head.colSpan = off.filter((o) => !o).length;
  for (const box of columnBoxes) box.checked = !off[box.dataset.show];
}

// Where higher is better the first click shows the best on top.
function firstDirection(column) {
  const metric = metricOf(column.key.replace(/^metric:/, ""));
  return Boolean(metric && metric.higher);
}

function sortBy({ key }) {
  const first = firstDirection(data.columns.find((c) => c.key === key));
  if (state.sort !== key) { state.sort = key; state.descending = first; }
  else if (state.descending === first) state.descending = !first;
  else { state.sort = null; state.descending = false; }
}

// Once per event, however many steps it has.
let writing = false;
function writeHash() {
  if (!writing) queueMicrotask(writeHashNow);
  writing = true;
}

function writeHashNow() {
  writing = false;
  const parts = new URLSearchParams();
  if (state.q) parts.set("q", state.q);
  for (const [filter, off] of Object.entries(state.off)) for (const value of off) parts.append(`-${filter}`, value);
  if (state.sort) parts.set("sort", (state.descending ? "-" : "") + state.sort);
  if (state.columns) parts.set("columns", JSON.stringify(state.columns));
  for (const key of ["metric", "scalar", "cost"]) if (state[key] !== DEFAULTS[key]) parts.set(key, state[key]);
  if (state.theme !== "auto") parts.set("theme", state.theme);
  if (state.row) parts.set("row", state.row);
  const text = parts.toString();
  // A page opened from a file may not change its address; a link's hash still works there.
  try { history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search); } catch { location.hash = text; }
}

function readColumns(text) {
  try {
    const keys = new Set(data.columns.map((c) => c.key));
    const found = JSON.parse(text);
    return Array.isArray(found) ? found.filter((key) => keys.has(key)) : null;
  } catch {
    return null;
  }
}

// The hash is untrusted: only known columns, metrics, rows and filters are taken from it.
function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.q = parts.get("q") || "";
  state.off = {};
  for (const box of boxes) {
    const filter = box.dataset.filter;
    box.checked = !parts.getAll(`-${filter}`).includes(filterOf(box));
    if (!box.checked) state.off[filter] = (state.off[filter] || []).concat(filterOf(box));
  }
  const sort = parts.get("sort") || "";
  state.descending = sort.startsWith("-");
  const key = sort.replace(/^-/, "");
  state.sort = data.columns.some((c) => c.key === key) ? key : null;
  state.columns = parts.has("columns") ? readColumns(parts.get("columns")) : null;
  state.metric = metricOf(parts.get("metric")) ? parts.get("metric") : DEFAULTS.metric;
  state.scalar = scalarNames().includes(parts.get("scalar")) ? parts.get("scalar") : DEFAULTS.scalar;
  state.cost = costOf(parts.get("cost")) ? parts.get("cost") : DEFAULTS.cost;
  state.theme = THEMES.includes(parts.get("theme")) ? parts.get("theme") : "auto";
  state.row = rowById.has(parts.get("row")) ? parts.get("row") : null;
  byId("search").value = state.q;
  byId("metric").value = state.metric;
  byId("scalar").value = state.scalar;
  byId("cost").value = state.cost;
}
