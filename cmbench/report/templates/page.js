// Wiring: drawer, charts, events.

const drawer = byId("drawer");

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function block(text) {
  const made = element("pre", text);
  made.tabIndex = 0;
  return made;
}

function definitions(flat) {
  const list = element("dl");
  for (let i = 0; i < flat.length; i += 2) {
    const value = data.pool[flat[i + 1]];
    const item = element("dd");
    if (data.pool[flat[i]] === "arXiv" && /^\d{4}\.\d{4,5}$/.test(value)) {
      const link = element("a", value);
      link.href = `https://arxiv.org/abs/${value}`;
      item.append(link);
    } else item.append(value !== null && typeof value === "object" ? block(JSON.stringify(value, null, 1)) : element("span", String(value)));
    list.append(element("dt", data.pool[flat[i]]), item);
  }
  return list;
}

function find(flat, name) {
  for (let i = 0; i < flat.length; i += 2) if (data.pool[flat[i]] === name) return data.pool[flat[i + 1]];
  return undefined;
}

// Everything in the drawer is set as text: records are not trusted.
function openDrawer(row) {
  byId("drawer-title").textContent = `${row.label}, NFE ${row.nfe_text}`;
  const body = byId("drawer-body");
  const { common, cells } = row.provenance;
  const commands = [...new Set([common, ...cells].map((flat) => find(flat, "command")).filter(Boolean))];
  const made = commands.length ? [element("h3", "Reproduce"), block(commands.join("\n"))] : [];
  if (row.reported.length) made.push(element("h3", "Reported by others"), definitions(row.reported));
  made.push(element("h3", isReported(row) ? "Source" : cells.length > 1 ? "Equal for all seeds" : "Record"), definitions(common));
  cells.forEach((cell, i) => {
    if (!cell.length) return;
    const part = element("details");
    part.append(element("summary", `Cell ${i + 1}: ${find(cell, "cell") || ""}`), definitions(cell));
    made.push(part);
  });
  body.replaceChildren(...made);
  state.row = row.id;
  writeHash();
  if (!drawer.open) drawer.showModal();
  drawer.scrollTop = 0;
}

function drawCharts() {
  const rows = selectedRows();
  const metric = metricOf(state.metric);
  const views = VIEWS.filter((view) => byId(view.id));
  // All figures take their places first: the width of each depends on how many there are.
  for (const view of views) byId(view.id).hidden = !metric || !view.exists();
  for (const view of views) {
    const figure = byId(view.id);
    if (figure.hidden) continue;
    const spec = view.draw(rows, metric);
    const holder = figure.querySelector(".plot");
    const empty = !spec.groups.some((g) => g.points.length);
    figure.querySelector("figcaption span").textContent = spec.title;
    const nothing = element("p", "No selected row has these values.");
    nothing.className = "none";
    holder.replaceChildren(empty ? nothing : (spec.strip ? drawStrip : drawChart)(spec, Math.max(280, holder.clientWidth)));
  }
}

function applyTheme() {
  if (state.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  byId("theme").textContent = `Theme: ${state.theme}`;
}

function applyAll() {
  applyTheme();
  applySelection();
  applySort();
  applyColumns();
  drawCharts();
}

function changed(...steps) {
  for (const step of steps) step();
  writeHash();
}

function options(select, names) {
  select.replaceChildren(...names.map(([key, title]) => new Option(title, key)));
  select.closest("label").hidden = names.length < 2;
}

function filtered(filter) {
  state.off[filter] = boxes.filter((b) => b.dataset.filter === filter && !b.checked).map(filterOf);
  changed(applySelection, drawCharts);
}

function listen() {
  const on = (target, event, action) => target.addEventListener(event, action);
  on(byId("metric"), "change", (event) => { state.metric = event.target.value; changed(drawCharts); });
  on(byId("scalar"), "change", (event) => { state.scalar = event.target.value; changed(drawCharts); });
  on(byId("cost"), "change", (event) => { state.cost = event.target.value; changed(drawCharts); });
  on(byId("search"), "input", (event) => { state.q = event.target.value; changed(applySelection, drawCharts); });
  for (const box of boxes) {
    on(box, "change", () => filtered(box.dataset.filter));
  }
  for (const box of columnBoxes) {
    on(box, "change", () => { state.columns = columnBoxes.filter((b) => b.checked).map((b) => data.columns[b.dataset.show].key); changed(applyColumns); });
  }
  for (const header of headers) on(header.querySelector("button"), "click", () => { sortBy(data.columns[header.dataset.c]); changed(applySort); });
  for (const line of lines) on(line.querySelector(".details"), "click", () => openDrawer(data.rows[line.dataset.row]));
  for (const button of document.querySelectorAll("[data-open]")) on(button, "click", () => { const row = rowById.get(button.dataset.open); if (row) openDrawer(row); });
  for (const button of document.querySelectorAll(".pivot .all")) on(button, "click", () => { button.closest(".pivot").querySelector("table").classList.add("open"); button.hidden = true; });
  const choose = (filter, wanted) => {
    for (const box of boxes) if (box.dataset.filter === filter) box.checked = wanted(box);
    filtered(filter);
  };
  for (const button of document.querySelectorAll("[data-only]")) on(button, "click", () => choose(button.dataset.only, (box) => box.dataset.index === button.dataset.index));
  for (const button of document.querySelectorAll("[data-every]")) on(button, "click", () => choose(button.dataset.every, () => true));
  for (const button of document.querySelectorAll("[data-none]")) on(button, "click", () => choose(button.dataset.none, () => false));
  for (const button of document.querySelectorAll("[data-save]")) {
    on(button, "click", () => { const [type, text] = DOWNLOADS[button.dataset.save]; save(`${data.dataset}.${button.dataset.save}`, type, text()); });
  }
  for (const figure of document.querySelectorAll(".charts figure")) {
    const button = figure.querySelector(".save");
    if (button) on(button, "click", () => saveChart(figure));
  }
  on(byId("theme"), "click", () => { state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]; changed(applyTheme); });
  on(byId("reset"), "click", () => { try { history.replaceState(null, "", location.pathname + location.search); } catch { location.hash = ""; } readHash(); applyAll(); });
  on(drawer, "close", () => { state.row = null; writeHash(); });
  on(byId("drawer-close"), "click", () => drawer.close());
  on(drawer, "click", (event) => { if (event.target === drawer) drawer.close(); });
  on(window, "hashchange", () => { readHash(); applyAll(); });
  on(document, "click", (event) => { for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false; });
  on(document, "keydown", (event) => { if (event.key === "Escape") for (const menu of document.querySelectorAll(".menu[open]")) { menu.open = false; menu.querySelector("summary").focus(); } });
  let width = window.innerWidth;
  on(window, "resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; drawCharts(); } });
}

function start() {
  options(byId("metric"), data.metrics.map((m) => [m.name, m.title]));
  options(byId("cost"), COST_CHARTS.map((c) => [c.name, c.name]));
  options(byId("scalar"), scalarNames().map((n) => [n, n.replaceAll("_", " ")]));
  readHash();
  document.documentElement.classList.add("live");
  applyAll();
  listen();
  if (state.row) openDrawer(rowById.get(state.row));
}

start();
