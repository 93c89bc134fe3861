// Which charts the page shows and what they draw from the selected rows.

const data = JSON.parse(document.getElementById("data").textContent);
// Names of metrics and scalars come from records: "constructor" is one like any other, and what an
// object inherits is no value of it.
const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);
const metricOf = (name) => data.metrics.find((m) => m.name === name);
const isReported = (row) => row.kind === "reported";
const isMain = (row) => row.section === 0 && data.ranked[0];
const isApart = (row) => !isMain(row) && !isReported(row);
const rowById = new Map(data.rows.map((r) => [r.id, r]));

// A method has a colour on every chart, whoever measured it; a series of it (another sampler or
// recipe) has its own mark. With more methods than a legend can hold, families take the place of
// reported ones; measured ones keep their names as long as they fit.
const METHODS_IN_LEGEND = 16;
const indexOf = (values) => new Map([...new Set(values)].map((value, i) => [value, i]));
const methodIndex = indexOf(data.rows.map((r) => r.method));
const labelShape = shapesByLabel();
const familyIndex = indexOf(data.rows.map((r) => r.family));

// A sampler has its own shape; labels that would share colour and shape take the next free one.
function shapesByLabel() {
  const samplers = indexOf(data.rows.map((r) => r.sampler || ""));
  const found = new Map();
  const used = new Set();
  for (const row of data.rows) {
    if (found.has(row.label)) continue;
    const colour = methodIndex.get(row.method) % COLOURS;
    let shape = samplers.get(row.sampler || "") % SHAPES.length;
    for (let i = 0; i < SHAPES.length && used.has(`${colour} ${shape}`); i++) shape = (shape + 1) % SHAPES.length;
    used.add(`${colour} ${shape}`);
    found.set(row.label, shape);
  }
  return found;
}

// Entries of legends that the reader has switched off, in all charts.
const hiddenGroups = new Set();

function toggleGroup(name) {
  if (!hiddenGroups.delete(name)) hiddenGroups.add(name);
  const id = document.activeElement && document.activeElement.closest("figure")?.id;
  drawCharts();
  const again = id && [...byId(id).querySelectorAll(".switch")].find((item) => item.textContent.includes(name));
  if (again) again.focus();
}

function styleGroups(rows, nameOf = (r) => r.label) {
  const count = (list) => new Set(list.map((r) => r.method)).size;
  const few = count(rows) <= METHODS_IN_LEGEND;
  const fewMeasured = count(rows.filter((r) => !isReported(r))) <= METHODS_IN_LEGEND;
  const groups = new Map();
  const taken = new Set();
  for (const row of rows) {
    const named = few || (fewMeasured && !isReported(row));
    const name = named ? nameOf(row) : row.family;
    if (!groups.has(name)) {
      let colour = (named ? methodIndex.get(row.method) : familyIndex.get(row.family)) % COLOURS;
      let shape = named ? labelShape.get(row.label) : 0;
      // With more labels than colours and shapes, the entries of one chart still differ.
      for (let i = 1; taken.has(`${colour} ${shape}`) && i < COLOURS * SHAPES.length; i++) {
        shape = (shape + 1) % SHAPES.length;
        if (i % SHAPES.length === 0) colour = (colour + 1) % COLOURS;
      }
      taken.add(`${colour} ${shape}`);
      groups.set(name, { name, hidden: hiddenGroups.has(name), toggle: () => toggleGroup(name), style: `s${colour}`, shape: SHAPES[shape], rows: [], points: [] });
    }
    groups.get(name).rows.push(row);
  }
  return [...groups.values()];
}

function describe(row, metric) {
  const [mean, low, high] = row.metrics[metric.name];
  const range = high === null || high === low ? "" : ` [${low.toPrecision(4)}, ${high.toPrecision(4)}]`;
  return `${row.label}, NFE ${row.nfe_text}: ${metric.title} ${+mean.toPrecision(5)}${range} (${row.kind})`;
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

function summarise(rows, metric) {
  if (!rows.length) return "No rows selected.";
  const sign = metric.higher ? -1 : 1;
  const best = rows.reduce((a, b) => ((a.metrics[metric.name][0] - b.metrics[metric.name][0]) * sign <= 0 ? a : b));
  return `${rows.length} rows; lowest mean: ${describe(best, metric)}. The table below holds every number.`.replace("lowest", metric.higher ? "highest" : "lowest");
}

function scatter(rows, metric, xOf, options) {
  const usable = rows.filter((r) => own(r.metrics, metric.name) && xOf(r) > 0);
  const groups = styleGroups(usable);
  for (const group of groups) {
    group.points = group.rows.map((row) => {
      const [mean, low, high] = row.metrics[metric.name];
      return { x: xOf(row), y: mean, low, high, hollow: isReported(row), faint: isApart(row), label: describe(row, metric), row, line: options.line ? row.series : undefined };
    });
  }
  const points = groups.filter((g) => !g.hidden).flatMap((g) => g.points);
  // Only rows that compare with each other have a front: the first ranked section, or what was reported.
  const main = points.filter((p) => isMain(p.row) && !p.hollow);
  const log = points.length > 0 && !metric.higher && points.every((p) => p.y > 0);
  const ticks = options.ticks ? [...new Set(usable.map(xOf))].sort((a, b) => a - b) : undefined;
  return {
    title: options.title,
    summary: summarise(usable, metric),
    x: { label: options.x, log: !options.whole, whole: options.whole, ticks: ticks && ticks.length <= 12 ? ticks : undefined },
    y: { label: `${metric.title} ${metric.higher ? "↑" : "↓"}`, log, worse: metric.higher ? "low" : "high" },
    named: options.line,
    groups,
    rules: metric.name === data.rank_metric ? data.floors.filter((floor) => !log || floor.value > 0) : [],
    front: options.whole ? [] : paretoFront(main.length ? main : points.filter((p) => p.hollow), metric.higher),
    frontLabel: main.length ? "Pareto front, measured" : "Pareto front, reported",
    open: openDrawer,
  };
}

// Costs that differ between rows; a chart holds points of one hardware and metric key only.
const COST_CHARTS = data.costs.filter((c) => new Set(c.points.map((p) => p[1])).size > 1);
const costOf = (name) => COST_CHARTS.find((c) => c.name === name);

// The page's rank metric against one cost. The front is that of all rows: a selection shows the part
// of it that is left and never calls another row undominated.
function costChart(rows) {
  const metric = metricOf(data.rank_metric);
  const chart = costOf(state.cost);
  const costs = new Map(chart.points.map(([id, cost]) => [id, cost]));
  const where = chart.hardware ? ` on ${chart.hardware}` : "";
  const spec = scatter(rows, metric, (r) => costs.get(r.id), { title: `${metric.title} against cost${where}`, x: chart.title, line: true });
  const points = spec.groups.filter((g) => !g.hidden).flatMap((g) => g.points);
  const at = new Map(points.map((p) => [p.row.id, [p.x, p.y]]));
  for (const point of points) point.label += `; ${chart.title} ${+point.x.toPrecision(4)}${where}`;
  return { ...spec, front: chart.front.filter((id) => at.has(id)).map((id) => at.get(id)), frontLabel: "Pareto front, measured" };
}

// Most names that the strip of NFE 1 shows, and fewest that are worth one.
const STRIP = { most: 25, fewest: 8 };
const atOne = (rows, metric) => rows.filter((r) => r.nfe === 1 && own(r.metrics, metric.name));

function oneStep(rows, metric) {
  const all = atOne(rows, metric).sort((a, b) => (a.metrics[metric.name][0] - b.metrics[metric.name][0]) * (metric.higher ? -1 : 1));
  const best = all.slice(0, STRIP.most);
  const lines = best.map((row) => {
    const [mean, low, high] = row.metrics[metric.name];
    const style = `s${familyIndex.get(row.family) % COLOURS}`;
    return { name: row.label, style, shape: "circle", point: { x: mean, low, high, hollow: isReported(row), label: describe(row, metric), row } };
  });
  const rest = all.length > best.length ? `, the best ${best.length} of ${all.length}` : "";
  return { title: `${metric.title} at NFE 1${rest}`, summary: summarise(best, metric), strip: true, lines,
    groups: [{ points: lines }], x: { label: `${metric.title} ${metric.higher ? "↑" : "↓"}; colours are families`, log: !metric.higher && lines.every((l) => l.point.x > 0) }, open: openDrawer };
}

function stepPairs(rows, metric) {
  const pairs = new Map();
  for (const row of rows) {
    if (!own(row.metrics, metric.name) || (row.nfe !== 1 && row.nfe !== 2)) continue;
    if (!pairs.has(row.series)) pairs.set(row.series, {});
    if (!pairs.get(row.series)[row.nfe]) pairs.get(row.series)[row.nfe] = row;
  }
  return [...pairs.values()].filter((pair) => pair[1] && pair[2]);
}

function stepScatter(rows, metric) {
  const pairs = stepPairs(rows, metric);
  const two = new Map(pairs.map((pair) => [pair[1].id, pair[2]]));
  const groups = styleGroups(pairs.map((pair) => pair[1]));
  for (const group of groups) {
    group.points = group.rows.map((row) => {
      const other = two.get(row.id);
      const [mean, low, high] = other.metrics[metric.name];
      return { x: row.metrics[metric.name][0], y: mean, low, high, hollow: isReported(row), faint: isApart(row), row,
        label: `${describe(row, metric)}; ${describe(other, metric)}` };
    });
  }
  const points = groups.flatMap((g) => g.points);
  const log = !metric.higher && points.every((p) => p.x > 0 && p.y > 0);
  const better = metric.higher ? "above" : "below";
  return { title: `${metric.title}: one step against two`, summary: `${pairs.length} pairs; ${better} the dashed diagonal two steps are better.`,
    x: { label: `${metric.title} at NFE 1`, log }, y: { label: `${metric.title} at NFE 2`, log },
    groups, rules: [], diagonal: true, legend: [{ name: "equal", style: "", rule: "front" }], open: openDrawer };
}

// ---- training curves

const UNITS = { lr: " (per step)", learning_rate: " (per step)", seconds: " (s)", images_per_s: " (images/s)" };
const BINS = ["small", "middle", "large"];

function scalarNames() {
  const names = [...new Set(data.curves.flatMap((c) => Object.keys(c.scalars)))];
  const bases = new Set(names.map((n) => /^(.+)_small_t$/.exec(n)).filter(Boolean).map((m) => m[1]));
  return [...bases].map((base) => `${base} by time`).concat(names);
}

// A curve is drawn as it is, or, "by time", as three: small, middle and large t.
function scalarParts(name) {
  const base = / by time$/.test(name) ? name.replace(/ by time$/, "") : null;
  return base === null ? [[name, 0]] : BINS.map((bin, i) => [`${base}_${bin}_t`, i]);
}

function curveChart(rows) {
  const parts = scalarParts(state.scalar);
  const shown = new Set(rows.map((r) => r.id));
  const curves = data.curves.filter((c) => shown.has(c.row) && parts.some(([name]) => own(c.scalars, name)));
  // Lines have no marks: where a method has several configurations, each has its own colour.
  const names = [...new Set(data.curves.map((c) => c.name))];
  const several = names.length > new Set(data.curves.map((c) => rowById.get(c.row).method)).size;
  const nameOf = new Map(data.curves.map((c) => [c.row, c.name]));
  const groups = styleGroups(curves.map((c) => rowById.get(c.row)), (r) => nameOf.get(r.id));
  for (const group of groups) {
    if (several && names.includes(group.name)) group.style = `s${names.indexOf(group.name) % COLOURS}`;
    const ids = new Set(group.rows.map((r) => r.id));
    group.points = curves.filter((c) => ids.has(c.row)).flatMap((c) => parts.flatMap(([name, dash]) => (own(c.scalars, name) || [])
      .map((y, i) => ({ x: c.nimg[i], y, dash, label: `${c.run}: ${name} ${y} at ${c.nimg[i]} images`, line: `${c.run} ${name}` }))
      .filter((p) => p.y !== null)));
  }
  const ys = groups.flatMap((g) => g.points.map((p) => p.y));
  const low = Math.min(...ys);
  const title = state.scalar.replaceAll("_", " ");
  return { title: `Training: ${title}`, summary: `${curves.length} runs.`, x: { label: "training images seen (k: thousand, M: million)", log: false },
    y: { label: `${title}${UNITS[state.scalar] || " (as logged, no unit)"}`, log: ys.length > 0 && low > 0 && Math.max(...ys) / low > 20 }, groups, rules: [], dotless: true,
    legend: parts.length > 1 ? BINS.map((bin, i) => ({ name: `${bin} t`, style: "s7", rule: `line${i ? ` dash${i}` : ""}` })) : [] };
}

// Every figure of the page: the element's id, whether its data exist, and its chart.
const VIEWS = [
  { id: "chart-nfe", exists: () => data.rows.some((r) => r.nfe > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.nfe, { title: `${metric.title} against NFE`, x: "NFE", line: true, ticks: true }) },
  { id: "chart-one", exists: () => data.metrics.some((m) => atOne(data.rows, m).length >= STRIP.fewest), draw: oneStep },
  { id: "chart-cost", exists: () => COST_CHARTS.length > 0, draw: costChart },
  { id: "chart-year", exists: () => new Set(data.rows.map((r) => r.year).filter(Boolean)).size > 2,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.year, { title: `${metric.title} against year`, x: "year of publication", whole: true }) },
  { id: "chart-steps", exists: () => data.metrics.some((m) => stepPairs(data.rows, m).length), draw: stepScatter },
  { id: "chart-compute", exists: () => new Set(data.rows.map((r) => r.parameters).filter(Boolean)).size > 1,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.compute, { title: `${metric.title} against effective sampling compute`, x: "parameters (billions) × NFE", line: true }) },
  { id: "chart-images", exists: () => new Set(data.rows.map((r) => r.images_seen).filter(Boolean)).size > 1,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.images_seen, { title: `${metric.title} against training images`, x: "images seen in training" }) },
  { id: "chart-curves", exists: () => data.curves.length > 0, draw: curveChart },
];
