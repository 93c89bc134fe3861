// Drawing: one scatter/line chart as SVG from a plain description. No data, no page state.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "star"];
const COLOURS = 10;

function svgElement(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function formatTick(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e12 || size < 1e-4) return value.toExponential(0);
  for (const [limit, suffix] of [[1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return String(+(value / (suffix === "k" ? 1e3 : limit)).toPrecision(3)) + suffix;
  }
  return String(+value.toPrecision(3));
}

// A scale maps values to pixels and knows its ticks.
function makeScale(values, log, from, to, ticks) {
  let usable = values.filter((v) => Number.isFinite(v) && (!log || v > 0));
  if (!usable.length) usable = log ? [1, 10] : [0, 1];
  let low = Math.min(...usable);
  let high = Math.max(...usable);
  if (log) {
    if (high / low < 1.5) { low /= 1.5; high *= 1.5; }
    const margin = Math.pow(high / low, 0.06);
    low /= margin;
    high *= margin;
  } else {
    if (high === low) { low -= 0.5; high += 0.5; }
    const margin = (high - low) * 0.06;
    low -= margin;
    high += margin;
  }
  const f = log ? Math.log : (v) => v;
  const at = (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
  const clamp = (v) => (v === null || !(v > low) ? low : Math.min(v, high));
  const length = Math.abs(to - from);
  return { low, high, at, clamp, ticks: ticks ? spread(ticks, at, 26) : niceTicks(low, high, log, length, at) };
}

// Keep ticks that are at least `gap` pixels apart, the outer ones first.
function spread(ticks, at, gap) {
  const kept = [];
  for (const tick of ticks) {
    if (!kept.length || Math.abs(at(tick) - at(kept[kept.length - 1])) >= gap) kept.push(tick);
  }
  return kept;
}

function niceTicks(low, high, log, length, at) {
  if (!log) {
    const raw = (high - low) / Math.max(2, length / 70);
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  }
  const decades = Math.log10(high / low);
  const perDecade = length / decades;
  const mantissas = perDecade > 320 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : perDecade > 66 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of mantissas) {
      const value = +(m * Math.pow(10, e)).toPrecision(6);
      if (value >= low && value <= high) ticks.push(value);
    }
  }
  return spread(ticks, at, 22);
}

function marker(shape, x, y, r, hollow) {
  const attributes = { class: hollow ? "mark hollow" : "mark", "vector-effect": "non-scaling-stroke" };
  const path = {
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    triangle: `M${x},${y - 1.25 * r}l${1.2 * r},${2.1 * r}h${-2.4 * r}z`,
    diamond: `M${x},${y - 1.35 * r}l${1.35 * r},${1.35 * r}l${-1.35 * r},${1.35 * r}l${-1.35 * r},${-1.35 * r}z`,
    cross: `M${x - r},${y - 0.4 * r}h${0.6 * r}v${-0.6 * r}h${0.8 * r}v${0.6 * r}h${0.6 * r}v${0.8 * r}h${-0.6 * r}v${0.6 * r}h${-0.8 * r}v${-0.6 * r}h${-0.6 * r}z`,
    star: `M${x},${y - 1.3 * r}l${0.45 * r},${0.85 * r}l${0.95 * r},${0.45 * r}l${-0.95 * r},${0.45 * r}l${-0.45 * r},${0.85 * r}l${-0.45 * r},${-0.85 * r}l${-0.95 * r},${-0.45 * r}l${0.95 * r},${-0.45 * r}z`,
  }[shape];
  return path ? svgElement("path", { ...attributes, d: path }) : svgElement("circle", { ...attributes, cx: x, cy: y, r });
}

// Lay the legend out in rows that fit `width`; returns its elements and height.
function legend(entries, width, top, left) {
  const group = svgElement("g", { class: "legend" });
  let x = left;
  let y = top;
  for (const entry of entries) {
    const text = entry.name.length > 34 ? entry.name.slice(0, 33) + "…" : entry.name;
    const size = 24 + text.length * 6.6;
    if (x > left && x + size > width) { x = left; y += 18; }
    const item = svgElement("g", { class: entry.style });
    if (entry.rule) item.append(svgElement("path", { class: entry.rule, d: `M${x},${y - 4}h14` }));
    else item.append(marker(entry.shape, x + 7, y - 4, 4, entry.hollow));
    const label = svgElement("text", { x: x + 19, y });
    label.textContent = text;
    item.append(label);
    group.append(item);
    x += size + 8;
  }
  return { group, bottom: entries.length ? y + 8 : top - 10 };
}

// spec: {title, summary, x:{label,log,ticks}, y:{label,log}, groups:[{name,style,shape,points}],
//        rules:[{value,label}], front:[[x,y]], frontLabel, diagonal, dotless, legend, open(row)};
// a point is {x, y, low, high, hollow, faint, label, row, line, dash}: points of one line are joined.
function drawChart(spec, width) {
  const height = Math.round(Math.min(440, Math.max(260, width * 0.62)));
  const box = { left: 56, right: width - 12, top: 12, bottom: height - 44 };
  const points = spec.groups.flatMap((g) => g.points);
  const ys = points.map((p) => p.y).concat(spec.rules.map((r) => r.value));
  const whiskers = points.flatMap((p) => [p.low, p.high]).filter((v) => Number.isFinite(v) && (!spec.y.log || v > 0));
  const base = ys.filter((v) => v > 0);
  const reach = spec.y.log && base.length ? whiskers.filter((v) => v > Math.min(...base) / 3) : whiskers;
  const x = makeScale(points.map((p) => p.x), spec.x.log, box.left, box.right, spec.x.ticks);
  const y = makeScale(ys.concat(reach), spec.y.log, box.bottom, box.top);
  const root = svgElement("svg", { class: "chart", role: "img", "aria-label": `${spec.title}. ${spec.summary}` });
  root.append(axes(x, y, box, spec, width), overlays(spec, x, y, box));
  for (const group of spec.groups) root.append(drawGroup(group, x, y, spec));
  const entries = spec.groups.map((g) => ({ name: g.name, style: g.style, shape: g.shape, hollow: g.points.every((p) => p.hollow), rule: spec.dotless ? "line" : undefined }));
  for (const rule of spec.rules.slice(0, 1)) entries.push({ name: rule.label, style: "", rule: "rule" });
  if (spec.front && spec.front.length) entries.push({ name: spec.frontLabel, style: "", rule: "front" });
  for (const entry of spec.legend || []) entries.push(entry);
  const { group, bottom } = legend(entries, width - 8, height + 10, box.left - 40);
  root.append(group);
  root.setAttribute("viewBox", `0 0 ${width} ${bottom}`);
  root.setAttribute("width", width);
  root.setAttribute("height", bottom);
  return root;
}

function axes(x, y, box, spec, width) {
  const group = svgElement("g", { class: "axes" });
  for (const tick of x.ticks) {
    const at = x.at(tick);
    group.append(svgElement("path", { class: "grid", d: `M${at},${box.top}V${box.bottom}` }));
    const text = svgElement("text", { x: at, y: box.bottom + 16, "text-anchor": "middle" });
    text.textContent = formatTick(tick);
    group.append(text);
  }
  for (const tick of y.ticks) {
    const at = y.at(tick);
    group.append(svgElement("path", { class: "grid", d: `M${box.left},${at}H${box.right}` }));
    const text = svgElement("text", { x: box.left - 6, y: at + 4, "text-anchor": "end" });
    text.textContent = formatTick(tick);
    group.append(text);
  }
  group.append(svgElement("path", { class: "axis", d: `M${box.left},${box.top}V${box.bottom}H${box.right}` }));
  const xLabel = svgElement("text", { class: "label", x: (box.left + box.right) / 2, y: box.bottom + 34, "text-anchor": "middle" });
  xLabel.textContent = spec.x.label;
  const middle = (box.top + box.bottom) / 2;
  const yLabel = svgElement("text", { class: "label", x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` });
  yLabel.textContent = spec.y.label;
  group.append(xLabel, yLabel);
  return group;
}

function overlays(spec, x, y, box) {
  const group = svgElement("g");
  for (const rule of spec.rules) {
    const at = y.at(rule.value);
    group.append(svgElement("path", { class: "rule", d: `M${box.left},${at}H${box.right}` }));
  }
  if (spec.diagonal) {
    const low = Math.max(x.low, y.low);
    const high = Math.min(x.high, y.high);
    if (low < high) group.append(svgElement("path", { class: "front", d: `M${x.at(low)},${y.at(low)}L${x.at(high)},${y.at(high)}` }));
  }
  if (spec.front && spec.front.length) {
    // The front goes on to the right of its last point: nothing there is better for its cost.
    const steps = spec.front.map(([a, b], i) => (i ? `H${x.at(a)}V${y.at(b)}` : `M${x.at(a)},${y.at(b)}`));
    group.append(svgElement("path", { class: "front", d: `${steps.join("")}H${box.right}` }));
  }
  return group;
}

function drawGroup(group, x, y, spec) {
  const layer = svgElement("g", { class: group.style });
  const lines = new Map();
  for (const point of group.points) {
    if (point.line !== undefined) {
      if (!lines.has(point.line)) lines.set(point.line, []);
      lines.get(point.line).push(point);
    }
  }
  for (const members of lines.values()) {
    members.sort((a, b) => a.x - b.x);
    const d = members.map((p, i) => `${i ? "L" : "M"}${x.at(p.x).toFixed(1)},${y.at(p.y).toFixed(1)}`).join("");
    const dash = members[0].dash ? ` dash${members[0].dash}` : "";
    layer.append(svgElement("path", { class: (members[0].hollow ? "line thin" : "line") + dash, d }));
  }
  for (const point of group.points) {
    const px = x.at(point.x);
    const item = svgElement("g", { class: point.faint ? "point faint" : "point" });
    if (point.high !== null && point.high !== undefined) {
      const top = y.at(y.clamp(point.high));
      const bottom = y.at(y.clamp(point.low));
      item.append(svgElement("path", { class: "whisker", d: `M${px - 3},${top}h6M${px},${top}V${bottom}M${px - 3},${bottom}h6` }));
    }
    if (!spec.dotless) item.append(marker(group.shape, px, y.at(point.y), 4.2, point.hollow));
    const label = svgElement("title");
    label.textContent = point.label;
    item.append(label);
    if (spec.open && point.row !== undefined) item.addEventListener("click", () => spec.open(point.row));
    layer.append(item);
  }
  return layer;
}
