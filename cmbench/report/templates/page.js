// Wiring: drawer, charts, downloads, events.

const drawer = byId("drawer");

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showValue(value) {
  if (value !== null && typeof value === "object") {
    const block = element("pre", JSON.stringify(value, null, 1));
    block.tabIndex = 0;
    return block;
  }
  return element("span", String(value));
}

function definitions(pairs) {
  const list = element("dl");
  for (const [key, value] of pairs) {
    const item = element("dd");
    item.append(showValue(data.pool[value]));
    list.append(element("dt", data.pool[key]), item);
  }
  return list;
}

// Everything in the drawer is set as text: records are not trusted.
function openDrawer(row) {
  byId("drawer-title").textContent = `${row.title}, NFE ${row.nfe_text}`;
  const body = byId("drawer-body");
  body.replaceChildren();
  const find = (pairs, name) => pairs.filter(([key]) => data.pool[key] === name).map(([, value]) => data.pool[value]);
  const { common, cells } = row.provenance;
  const commands = find(common, "command").concat(cells.flatMap((cell) => find(cell, "command")));
  if (commands.length) {
    body.append(element("h3", "Reproduce"));
    const block = element("pre", commands.join("\n"));
    block.tabIndex = 0;
    body.append(block);
  }
  body.append(element("h3", cells.length > 1 ? "Equal for all seeds" : "Record"), definitions(common));
  cells.forEach((cell, i) => {
    if (!cell.length) return;
    const part = element("details");
    part.append(element("summary", `Cell ${i + 1}: ${find(cell, "cell")[0] || ""}`), definitions(cell));
    body.append(part);
  });
  state.row = row.id;
  writeHash();
  if (!drawer.open) drawer.showModal();
}

function drawCharts() {
  const rows = selectedRows();
  const metric = metricOf(state.metric);
  if (!metric) return;
  for (const view of VIEWS) {
    const figure = byId(view.id);
    if (!figure) continue;
    figure.hidden = !view.exists();
    if (figure.hidden) continue;
    const spec = view.draw(rows, metric);
    const holder = figure.querySelector(".plot");
    const empty = !spec.groups.some((g) => g.points.length);
    figure.querySelector("figcaption span").textContent = spec.title;
    holder.replaceChildren(empty ? element("p", "No selected row has these values.", "none") : drawChart(spec, Math.max(280, holder.clientWidth)));
  }
}

function update(what) {
  if (what !== "sort" && what !== "columns") applySelection();
  if (what !== "filter" && what !== "columns") applySort();
  if (what === undefined || what === "columns") applyColumns();
  if (what !== "sort" && what !== "columns") drawCharts();
  if (what !== undefined) writeHash();
}

function fillSelect(select, options, value, changed) {
  select.replaceChildren(...options.map(([key, title]) => new Option(title, key, false, key === value)));
  select.closest("label").hidden = options.length < 2;
  select.addEventListener("change", () => changed(select.value));
}

function start() {
  readHash();
  fillSelect(byId("metric"), data.metrics.map((m) => [m.name, m.title]), state.metric, (v) => { state.metric = v; drawCharts(); writeHash(); });
  fillSelect(byId("scalar"), scalarNames().map((n) => [n, n]), state.scalar, (v) => { state.scalar = v; drawCharts(); writeHash(); });
  byId("search").addEventListener("input", (event) => { state.q = event.target.value; update("filter"); });
  for (const box of boxes) {
    box.addEventListener("change", () => {
      const filter = box.dataset.filter;
      state.off[filter] = boxes.filter((b) => b.dataset.filter === filter && !b.checked).map((b) => b.value);
      update("filter");
    });
  }
  for (const box of columnBoxes) {
    box.addEventListener("change", () => { state.columns = columnBoxes.filter((b) => b.checked).map((b) => b.dataset.show); update("columns"); });
  }
  for (const header of headers) header.querySelector("button").addEventListener("click", () => { sortBy(header.dataset.column); update("sort"); });
  for (const line of lines) line.querySelector(".details").addEventListener("click", () => openDrawer(data.rows[line.dataset.row]));
  byId("reset").addEventListener("click", () => { history.replaceState(null, "", location.pathname + location.search); readHash(); update(); });
  drawer.addEventListener("close", () => { state.row = null; writeHash(); });
  byId("drawer-close").addEventListener("click", () => drawer.close());
  drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); });
  window.addEventListener("hashchange", () => { readHash(); update(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; drawCharts(); } });
  document.documentElement.classList.add("live");
  update();
  const open = state.row && data.rows.find((r) => r.id === state.row);
  if (open) openDrawer(open);
}

start();
