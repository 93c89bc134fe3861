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

// Labels of one colour take different shapes as long as there are any.
function shapesByLabel() {
  const found = new Map();
  const used = new Array(COLOURS).fill(0);
  for (const row of data.rows) {
    if (found.has(row.label)) continue;
    const colour = methodIndex.get(row.method) % COLOURS;
    found.set(row.label, colour + used[colour]);
    used[colour] += 1;
  }
  return found;
}

function styleGroups(rows, nameOf = (r) => r.label) {
  const count = (list) => new Set(list.map((r) => r.method)).size;
  const few = count(rows) <= METHODS_IN_LEGEND;
  const fewMeasured = count(rows.filter((r) => !isReported(r))) <= METHODS_IN_LEGEND;
  const groups = new Map();
  for (const row of rows) {
    const named = few || (fewMeasured && !isReported(row));
    const name = named ? nameOf(row) : row.family;
    if (!groups.has(name)) {
      const colour = named ? methodIndex.get(row.method) : familyIndex.get(row.family);
      const shape = named ? labelShape.get(row.label) : colour;
      groups.set(name, { name, style: `s${colour % COLOURS}`, shape: SHAPES[shape % SHAPES.length], rows: [], points: [] });
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
  const points = groups.flatMap((g) => g.points);
  // Only rows that compare with each other have a front: the first ranked section, or what was reported.
  const main = points.filter((p) => isMain(p.row) && !p.hollow);
  const log = points.length > 0 && !metric.higher && points.every((p) => p.y > 0);
  const ticks = options.ticks ? [...new Set(usable.map(xOf))].sort((a, b) => a - b) : undefined;
  return {
    title: options.title,
    summary: summarise(usable, metric),
    x: { label: options.x, log: true, ticks: ticks && ticks.length <= 12 ? ticks : undefined },
    y: { label: `${metric.title} ${metric.higher ? "↑" : "↓"}`, log },
    groups,
    rules: metric.name === data.rank_metric ? data.floors.filter((floor) => !log || floor.value > 0) : [],
    front: paretoFront(main.length ? main : points.filter((p) => p.hollow), metric.higher),
    frontLabel: main.length ? "Pareto front, measured" : "Pareto front, reported",
    open: openDrawer,
  };
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
  return { title: `Training: ${title}`, summary: `${curves.length} runs.`, x: { label: "images seen", log: false },
    y: { label: title, log: ys.length > 0 && low > 0 && Math.max(...ys) / low > 20 }, groups, rules: [], dotless: true,
    legend: parts.length > 1 ? BINS.map((bin, i) => ({ name: `${bin} t`, style: "s7", rule: `line${i ? ` dash${i}` : ""}` })) : [] };
}

// Every figure of the page: the element's id, whether its data exist, and its chart.
const VIEWS = [
  { id: "chart-nfe", exists: () => data.rows.some((r) => r.nfe > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.nfe, { title: `${metric.title} against NFE`, x: "NFE", line: true, ticks: true }) },
  { id: "chart-steps", exists: () => data.metrics.some((m) => stepPairs(data.rows, m).length), draw: stepScatter },
  { id: "chart-compute", exists: () => new Set(data.rows.map((r) => r.parameters).filter(Boolean)).size > 1,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.compute, { title: `${metric.title} against effective sampling compute`, x: "parameters (billions) × NFE", line: true }) },
  { id: "chart-images", exists: () => new Set(data.rows.map((r) => r.images_seen).filter(Boolean)).size > 1,
    draw: (rows, metric) => scatter(rows, metric, (r) => r.images_seen, { title: `${metric.title} against training images`, x: "images seen in training" }) },
  { id: "chart-time", exists: () => data.rows.some((r) => r.training_h > 0),
    draw: (rows, metric) => scatter(rows, metric, (r) => r.training_h, { title: `${metric.title} against training time`, x: "device-hours (GPU-hours on GPUs)" }) },
  { id: "chart-curves", exists: () => data.curves.length > 0, draw: curveChart },
];
