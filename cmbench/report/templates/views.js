// Which charts the page shows and what they draw from the selected rows.

const data = JSON.parse(document.getElementById("data").textContent);
const metricOf = (name) => data.metrics.find((m) => m.name === name);
const isReported = (row) => row.kind === "reported";

// Up to ten methods get a style each; more are grouped by family so that the legend stays readable.
function styleGroups(rows) {
  const methods = [...new Set(rows.map((r) => r.title))];
  const by = methods.length <= 10 ? (r) => r.title : (r) => r.family;
  const names = [...new Set(data.rows.map(by))];
  const groups = new Map();
  for (const row of rows) {
    const name = by(row);
    const i = names.indexOf(name);
    if (!groups.has(name)) groups.set(name, { name, style: `s${i % COLOURS}`, shape: SHAPES[i % SHAPES.length], points: [] });
    groups.get(name).rows = (groups.get(name).rows || []).concat(row);
  }
  return [...groups.values()];
}

function describe(row, metric) {
  const [mean, low, high] = row.metrics[metric.name];
  const range = high === null ? "" : ` [${low.toPrecision(4)}, ${high.toPrecision(4)}]`;
  const recipe = row.recipe ? `, ${row.recipe}` : "";
  return `${row.title}${recipe}, NFE ${row.nfe_text}: ${metric.title} ${mean.toPrecision(4)}${range} (${row.kind})`;
}

// Points no other point beats in both directions; x is always better when smaller.
function paretoFront(points, higher) {
  const sorted = [...points].sort((a, b) => a.x - b.x || (higher ? b.y - a.y : a.y - b.y));
  const front = [];
  for (const p of sorted) {
    const last = front[front.length - 1];
    if (!last || (higher ? p.y > last[1] : p.y < last[1])) front.push([p.x, p.y]);
  }
  return front;
}

function scatter(rows, metric, xOf, options) {
  const usable = rows.filter((r) => r.metrics[metric.name] && xOf(r) > 0);
  const groups = styleGroups(usable);
  for (const group of groups) {
    group.points = group.rows.map((row) => {
      const [mean, low, high] = row.metrics[metric.name];
      const line = options.line ? [row.title, row.recipe, row.sampler, row.conditional, row.kind, row.section].join("|") : undefined;
      return { x: xOf(row), y: mean, low, high, hollow: isReported(row), label: describe(row, metric), row, line };
    });
  }
  const values = usable.map((r) => r.metrics[metric.name][0]);
  const log = values.length > 0 && Math.min(...values) > 0 && !metric.higher;
  const measured = groups.flatMap((g) => g.points).filter((p) => !p.hollow);
  const front = paretoFront(measured.length ? measured : groups.flatMap((g) => g.points), metric.higher);
  return {
    title: options.title,
    summary: summarise(usable, metric),
    x: { label: options.x, log: true, ticks: options.ticks ? [...new Set(usable.map(xOf))].sort((a, b) => a - b) : undefined },
    y: { label: `${metric.title} ${metric.higher ? "↑" : "↓"}`, log },
    groups,
    rules: metric.name === data.rank_metric ? data.floors.map((value) => ({ value, label: "floor: two real halves" })) : [],
    front,
    open: openDrawer,
  };
}

function summarise(rows, metric) {
  if (!rows.length) return "No rows selected.";
  const sorted = [...rows].sort((a, b) => (a.metrics[metric.name][0] - b.metrics[metric.name][0]) * (metric.higher ? -1 : 1));
  const best = sorted[0];
  return `${rows.length} rows; best ${describe(best, metric)}. The table below holds every number.`;
}

function stepPairs(rows, metric) {
  const byRun = new Map();
  for (const row of rows) {
    if (!row.metrics[metric.name] || (row.nfe !== 1 && row.nfe !== 2)) continue;
    const key = [row.title, row.recipe, row.sampler, row.conditional, row.kind, row.section].join("|");
    if (!byRun.has(key)) byRun.set(key, {});
    byRun.get(key)[row.nfe] = row;
  }
  return [...byRun.values()].filter((pair) => pair[1] && pair[2]);
}

function stepScatter(rows, metric) {
  const pairs = stepPairs(rows, metric);
  const groups = styleGroups(pairs.map((p) => p[1]));
  const two = new Map(pairs.map((p) => [p[1].id, p[2]]));
  for (const group of groups) {
    group.points = group.rows.map((row) => {
      const other = two.get(row.id);
      const [mean, low, high] = other.metrics[metric.name];
      return { x: row.metrics[metric.name][0], y: mean, low, high, hollow: isReported(row), row,
        label: `${describe(row, metric)}; ${describe(other, metric)}` };
    });
  }
  const log = !metric.higher && groups.flatMap((g) => g.points).every((p) => p.x > 0 && p.y > 0);
  return { title: `One step against two steps, ${metric.title}`, summary: `${pairs.length} pairs; below the diagonal two steps are better.`,
    x: { label: `${metric.title} at NFE 1`, log }, y: { label: `${metric.title} at NFE 2`, log },
    groups, rules: [], diagonal: true, open: openDrawer };
}

function curveChart(rows, name) {
  const shown = new Set(rows.map((r) => r.id));
  const titles = new Map(data.rows.map((r) => [r.id, r]));
  const curves = data.curves.filter((c) => shown.has(c.row) && c.scalars[name]);
  const groups = styleGroups(curves.map((c) => titles.get(c.row)));
  for (const group of groups) {
    const ids = new Set(group.rows.map((r) => r.id));
    group.points = curves.filter((c) => ids.has(c.row)).flatMap((c) => c.nimg.map((n, i) => ({
      x: n, y: c.scalars[name][i], label: `${c.run}: ${c.scalars[name][i]} at ${n} images`, line: c.run }))
      .filter((p) => p.y !== null));
  }
  const ys = groups.flatMap((g) => g.points.map((p) => p.y));
  return { title: `Training: ${name}`, summary: `${curves.length} runs.`, x: { label: "images seen", log: false },
    y: { label: name, log: ys.length > 0 && Math.min(...ys) > 0 && Math.max(...ys) / Math.min(...ys) > 20 }, groups, rules: [], dotless: true };
}

// Every figure of the page: the element's id, whether its data exist, and its chart.
const VIEWS = [
  { id: "chart-nfe", exists: () => data.rows.some((r) => r.nfe > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.nfe, { title: `${metric.title} against NFE`, x: "NFE (network evaluations per image)", line: true, ticks: true }) },
  { id: "chart-compute", exists: () => new Set(data.rows.map((r) => r.parameters).filter(Boolean)).size > 1,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.compute, { title: `${metric.title} against sampling compute`, x: "effective sampling compute (parameters in billions × NFE)", line: true }) },
  { id: "chart-images", exists: () => data.rows.some((r) => r.images_seen > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.images_seen, { title: `${metric.title} against training images`, x: "images seen in training" }) },
  { id: "chart-time", exists: () => data.rows.some((r) => r.training_s > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.training_s / 3600, { title: `${metric.title} against training time`, x: "training time in hours" }) },
  { id: "chart-steps", exists: () => data.metrics.some((m) => stepPairs(data.rows, m).length), draw: stepScatter },
  { id: "chart-curves", exists: () => data.curves.length > 0, draw: (rows) => curveChart(rows, state.scalar) },
];
