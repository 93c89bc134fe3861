// Drawing: one scatter/line chart as SVG from a plain description. No data, no page state.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "star"];
const COLOURS = 10;
const NAME_LENGTH = 18;

function svgElement(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function formatTick(value) {
  if (value === 0) return "0";
  if (Number.isInteger(value) && value >= 1990 && value <= 2100) return String(value);
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

// Make a legend's entry a switch for mouse and keyboard.
function button(item, pressed, action) {
  for (const [key, value] of Object.entries({ role: "button", tabindex: 0, "aria-pressed": pressed })) item.setAttribute(key, value);
  item.classList.add("switch");
  item.addEventListener("click", action);
  item.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action(); } });
}

// The value beyond which a few points are clipped, so that they do not squeeze all others: a third
// of the range of the rest beyond them. Only on the worse side; null if there are none.
function clipLimit(values, log, upper) {
  const f = (v) => (log ? Math.log(v) : v) * (upper ? 1 : -1);
  const sorted = values.filter((v) => Number.isFinite(v) && (!log || v > 0)).map((v) => [f(v), v]).sort((a, b) => a[0] - b[0]);
  if (sorted.length < 8) return null;
  const q = (share) => sorted[Math.floor(share * (sorted.length - 1))][0];
  const fence = q(0.75) + 2.5 * (q(0.75) - q(0.25));
  const kept = sorted.filter(([key]) => key <= fence);
  return kept.length < sorted.length && sorted.length - kept.length <= sorted.length / 8 ? kept[kept.length - 1][1] : null;
}

// Whether the group is one line: a family's many lines share no name.
function hasLine(group) {
  return group.points.length > 1 && group.points[0].line !== undefined && group.points.every((p) => p.line === group.points[0].line);
}

// Names at the right ends of lines, pushed apart; left out where there is no room for all.
function lineNames(groups, x, y, box) {
  const layer = svgElement("g", { class: "names" });
  const ends = groups.filter(hasLine).map((g) => {
    const last = g.points.reduce((a, b) => (b.x > a.x ? b : a));
    return { group: g, x: x.at(last.x), at: y.at(y.clamp(last.y)) };
  }).sort((a, b) => a.at - b.at);
  const gap = 13;
  if (!ends.length || ends.length * gap > box.bottom - box.top) return layer;
  for (let i = 1; i < ends.length; i++) ends[i].at = Math.max(ends[i].at, ends[i - 1].at + gap);
  ends[ends.length - 1].at = Math.min(ends[ends.length - 1].at, box.bottom);
  for (let i = ends.length - 2; i >= 0; i--) ends[i].at = Math.min(ends[i].at, ends[i + 1].at - gap);
  for (const end of ends) {
    const text = svgElement("text", { x: box.right + 8, y: end.at + 4, class: end.group.style });
    const name = end.group.name;
    text.textContent = name.length > NAME_LENGTH ? `${name.slice(0, NAME_LENGTH - 1)}…` : name;
    layer.append(text);
  }
  return layer;
}

// Lay the legend out in rows that fit `width`; returns its elements and height.
function legend(entries, width, top, left) {
  const group = svgElement("g", { class: "legend" });
  let x = left;
  let y = top;
  for (const entry of entries) {
    const text = entry.name.length > 34 ? entry.name.slice(0, 33) + "…" : entry.name;
    const size = 26 + text.length * 7.1;
    if (x > left && x + size > width) { x = left; y += 18; }
    const item = svgElement("g", { class: entry.hidden ? `${entry.style} off` : entry.style });
    if (entry.rule) item.append(svgElement("path", { class: entry.rule, d: `M${x},${y - 4}h14` }));
    else item.append(marker(entry.shape, x + 7, y - 4, 4, entry.hollow));
    const label = svgElement("text", { x: x + 19, y });
    label.textContent = text;
    item.append(label);
    if (entry.name !== text) {
      const whole = svgElement("title");
      whole.textContent = entry.name;
      item.append(whole);
    }
    if (entry.toggle) button(item, !entry.hidden, entry.toggle);
    group.append(item);
    x += size + 8;
  }
  return { group, bottom: entries.length ? y + 8 : top - 10 };
}

// spec: {title, summary, x:{label,log,ticks,whole}, y:{label,log,worse}, groups:[{name,style,shape,points,hidden,toggle}],
//        rules:[{value,label}], front:[[x,y]], frontLabel, diagonal, dotless, named, legend, open(row)};
// a point is {x, y, low, high, hollow, faint, label, row, line, dash}: points of one line are joined.
function drawChart(spec, width) {
  const height = Math.round(Math.min(440, Math.max(260, width * 0.62)));
  const shown = spec.groups.filter((g) => !g.hidden);
  const longest = Math.max(0, ...shown.filter(hasLine).map((g) => Math.min(g.name.length, NAME_LENGTH)));
  const named = spec.named && width >= 480 && longest > 0;
  const box = { left: 56, right: width - (named ? 20 + longest * 6.6 : 12), top: 12, bottom: height - 44 };
  const points = shown.flatMap((g) => g.points);
  const limit = spec.y.worse ? clipLimit(points.map((p) => p.y), spec.y.log, spec.y.worse === "high") : null;
  const within = (v) => limit === null || (spec.y.worse === "high" ? v <= limit : v >= limit);
  const ys = points.map((p) => p.y).concat(spec.rules.map((r) => r.value)).filter(within);
  const whiskers = points.filter((p) => within(p.y)).flatMap((p) => [p.low, p.high]).filter((v) => Number.isFinite(v) && (!spec.y.log || v > 0));
  const base = ys.filter((v) => v > 0);
  const near = (v) => (v > Math.min(...base) / 3 && v < Math.max(...base) * 1.5);
  const reach = spec.y.log && base.length ? whiskers.filter(near) : whiskers;
  const x = makeScale(points.map((p) => p.x), spec.x.log, box.left, box.right, spec.x.ticks);
  if (spec.x.whole) x.ticks = x.ticks.filter(Number.isInteger);
  const y = makeScale(ys.concat(reach), spec.y.log, box.bottom, box.top);
  const root = svgElement("svg", { class: "chart", role: "group", "aria-label": `${spec.title}. ${spec.summary}` });
  root.append(axes(x, y, box, spec, width), overlays(spec, x, y, box));
  for (const group of shown) root.append(drawGroup(group, x, y, spec, within));
  if (named) root.append(lineNames(shown, x, y, box));
  const entries = spec.groups.map((g) => ({ name: g.name, style: g.style, shape: g.shape, hidden: g.hidden, toggle: g.toggle, hollow: g.points.every((p) => p.hollow), rule: spec.dotless ? "line" : undefined }));
  for (const rule of spec.rules.slice(0, 1)) entries.push({ name: rule.label, style: "", rule: "rule" });
  if (spec.front && spec.front.length) entries.push({ name: spec.frontLabel, style: "", rule: "front" });
  for (const entry of spec.legend || []) entries.push(entry);
  const clipped = points.filter((p) => !within(p.y)).length;
  if (clipped) entries.push({ name: `${clipped} beyond the axis, clipped`, style: "s7", shape: "triangle", hollow: true });
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

function drawGroup(group, x, y, spec, within) {
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
    const d = members.map((p, i) => `${i ? "L" : "M"}${x.at(p.x).toFixed(1)},${y.at(y.clamp(p.y)).toFixed(1)}`).join("");
    const dash = members[0].dash ? ` dash${members[0].dash}` : "";
    layer.append(svgElement("path", { class: (members[0].hollow ? "line thin" : "line") + dash, d }));
  }
  for (const point of group.points) {
    const px = x.at(point.x);
    const item = svgElement("g", { class: point.faint ? "point faint" : "point" });
    const inside = within(point.y);
    if (inside && point.high !== null && point.high !== undefined) {
      const top = y.at(y.clamp(point.high));
      const bottom = y.at(y.clamp(point.low));
      item.append(svgElement("path", { class: "whisker", d: `M${px - 3},${top}h6M${px},${top}V${bottom}M${px - 3},${bottom}h6` }));
    }
    if (!inside) item.append(marker("triangle", px, y.at(y.clamp(point.y)) + 5, 4.2, true));
    else if (!spec.dotless) item.append(marker(group.shape, px, y.at(point.y), 4.2, point.hollow));
    const label = svgElement("title");
    label.textContent = point.label;
    item.append(label);
    if (spec.open && point.row !== undefined) item.addEventListener("click", () => spec.open(point.row));
    layer.append(item);
  }
  return layer;
}

// spec of a strip: {title, summary, x:{label,log}, lines:[{name, style, shape, point}], left, open(row)}: a name, a mark.
function drawStrip(spec, width) {
  const gap = 19;
  const names = Math.min(190, width * 0.42);
  const length = Math.floor(names / 7.3);
  const box = { left: names + 8, right: width - 16, top: 6, bottom: 12 + spec.lines.length * gap };
  const values = spec.lines.map((l) => l.point.x);
  const x = makeScale(values, spec.x.log, box.left, box.right);
  const root = svgElement("svg", { class: "chart", role: "group", "aria-label": `${spec.title}. ${spec.summary}` });
  root.append(axes(x, { ticks: [] }, box, { x: spec.x, y: { label: "" } }, width));
  spec.lines.forEach((line, i) => {
    const at = box.top + (i + 0.7) * gap;
    const item = svgElement("g", { class: `${line.style} point` });
    const text = svgElement("text", { x: box.left - 8, y: at + 4, "text-anchor": "end" });
    text.textContent = line.name.length > length ? `${line.name.slice(0, length - 1)}…` : line.name;
    item.append(svgElement("path", { class: "grid", d: `M${box.left},${at}H${box.right}` }), text);
    if (Number.isFinite(line.point.high) && line.point.high !== null) item.append(svgElement("path", { class: "whisker", d: `M${x.at(x.clamp(line.point.low))},${at}H${x.at(x.clamp(line.point.high))}` }));
    item.append(marker(line.shape, x.at(line.point.x), at, 4.2, line.point.hollow));
    const label = svgElement("title");
    label.textContent = line.point.label;
    item.append(label);
    item.addEventListener("click", () => spec.open(line.point.row));
    root.append(item);
  });
  const bottom = box.bottom + 42;
  root.setAttribute("viewBox", `0 0 ${width} ${bottom}`);
  root.setAttribute("width", width);
  root.setAttribute("height", bottom);
  return root;
}
