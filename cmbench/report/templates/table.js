// The table: selection state, sorting, columns. The state lives in the URL's hash.

const byId = (id) => document.getElementById(id);
const bodies = [...document.querySelectorAll("tbody[data-section]")];
const lines = [...document.querySelectorAll("tr[data-row]")];
const headers = [...document.querySelectorAll("th[data-column]")];
const boxes = [...document.querySelectorAll("input[data-filter]")];
const columnBoxes = [...document.querySelectorAll("input[data-show]")];
const DEFAULTS = { metric: data.rank_metric || (data.metrics[0] || {}).name || "", scalar: firstScalar() };

const state = { q: "", off: {}, sort: null, descending: false, columns: null, ...DEFAULTS };

function firstScalar() {
  const names = scalarNames();
  return names.includes("loss") ? "loss" : names[0] || "";
}

function scalarNames() {
  return [...new Set(data.curves.flatMap((c) => Object.keys(c.scalars)))];
}

function visibleColumns() {
  return state.columns || data.columns.filter((c) => c.shown).map((c) => c.key);
}

function filterValue(row, filter) {
  if (filter === "conditional") return row.conditional === null ? "not stated" : row.conditional ? "conditional" : "unconditional";
  if (filter === "nfe") return row.nfe_text || "not stated";
  return String(row[filter]);
}

function isSelected(row, line) {
  for (const [filter, off] of Object.entries(state.off)) {
    if (off.includes(filterValue(row, filter))) return false;
  }
  return !state.q || line.textContent.toLowerCase().includes(state.q.toLowerCase());
}

function selectedRows() {
  return lines.filter((line) => !line.hidden).map((line) => data.rows[line.dataset.row]);
}

function applySelection() {
  let count = 0;
  for (const line of lines) {
    line.hidden = !isSelected(data.rows[line.dataset.row], line);
    if (!line.hidden) count += 1;
  }
  for (const body of bodies) body.classList.toggle("empty", ![...body.rows].some((r) => r.dataset.row && !r.hidden));
  byId("count").textContent = `${count} of ${lines.length} rows`;
}

// Rows are sorted within their section: sections never mix. Missing values go last either way.
function applySort() {
  const at = data.columns.findIndex((c) => c.key === state.sort);
  const sign = state.descending ? -1 : 1;
  const value = (line) => (at < 0 ? Number(line.dataset.row) : data.rows[line.dataset.row].sort[at]);
  for (const body of bodies) {
    const own = [...body.rows].filter((r) => r.dataset.row);
    own.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      if (x === y) return a.dataset.row - b.dataset.row;
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
    });
    body.append(...own);
  }
  for (const header of headers) {
    const own = header.dataset.column === state.sort && at >= 0;
    if (own) header.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
}

function applyColumns() {
  const shown = new Set(visibleColumns());
  data.columns.forEach((column, i) => {
    const off = !shown.has(column.key);
    for (const cell of document.querySelectorAll(`[data-c="${i}"]`)) cell.hidden = off;
  });
  for (const box of columnBoxes) box.checked = shown.has(box.dataset.show);
}

function sortBy(key) {
  const column = data.columns.find((c) => c.key === key);
  if (state.sort === key && state.descending === firstDirection(column)) state.descending = !state.descending;
  else if (state.sort === key) { state.sort = null; state.descending = false; }
  else { state.sort = key; state.descending = firstDirection(column); }
}

// Where higher is better the first click shows the best on top.
function firstDirection(column) {
  const metric = metricOf(column.key.replace(/^metric:/, ""));
  return Boolean(metric && metric.higher);
}

function writeHash() {
  const parts = new URLSearchParams();
  if (state.q) parts.set("q", state.q);
  for (const [filter, off] of Object.entries(state.off)) for (const value of off) parts.append(`-${filter}`, value);
  if (state.sort) parts.set("sort", (state.descending ? "-" : "") + state.sort);
  if (state.columns) parts.set("columns", state.columns.join(" "));
  for (const key of ["metric", "scalar"]) if (state[key] !== DEFAULTS[key]) parts.set(key, state[key]);
  if (state.row) parts.set("row", state.row);
  const text = parts.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

// The hash is untrusted: only known columns, metrics, rows and filters are taken from it.
function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.q = parts.get("q") || "";
  state.off = {};
  for (const box of boxes) {
    const filter = box.dataset.filter;
    if (parts.getAll(`-${filter}`).includes(box.value)) state.off[filter] = (state.off[filter] || []).concat(box.value);
    box.checked = !(state.off[filter] || []).includes(box.value);
  }
  const sort = parts.get("sort") || "";
  state.descending = sort.startsWith("-");
  const key = sort.replace(/^-/, "");
  state.sort = data.columns.some((c) => c.key === key) ? key : null;
  const keys = new Set(data.columns.map((c) => c.key));
  state.columns = parts.has("columns") ? parts.get("columns").split(" ").filter((c) => keys.has(c)) : null;
  state.metric = metricOf(parts.get("metric")) ? parts.get("metric") : DEFAULTS.metric;
  state.scalar = scalarNames().includes(parts.get("scalar")) ? parts.get("scalar") : DEFAULTS.scalar;
  state.row = parts.get("row");
  byId("search").value = state.q;
}
