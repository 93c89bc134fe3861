// Downloads: lines of the files beside the page, for the rows that are selected.

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const selectedIds = () => new Set(selectedRows().map((row) => row.id));

function selectedCsv() {
  const ids = selectedIds();
  const [head, ...rest] = data.csv.split("\n");
  return [head, ...rest.filter((line) => ids.has(line.split(",", 1)[0]))].join("\n") + "\n";
}

function selectedLatex() {
  const ids = selectedIds();
  const kept = (line) => {
    const id = / % ([0-9a-z]+)$/.exec(line);
    return !id || ids.has(id[1]);
  };
  return data.latex.split("\n").filter(kept).join("\n");
}

// Every value in full, provenance resolved.
function selectedJson() {
  const pairs = (flat) => Object.fromEntries(Array.from({ length: flat.length / 2 }, (_, i) => [data.pool[flat[2 * i]], data.pool[flat[2 * i + 1]]]));
  const rows = selectedRows().map((row) => ({
    id: row.id, section: data.sections[row.section], label: row.label, kind: row.kind, family: row.family,
    conditional: row.conditional, nfe: row.nfe, parameters: row.parameters,
    metrics: Object.fromEntries(Object.entries(row.metrics).map(([name, [mean, low, high]]) => [name, { mean, low, high }])),
    reported: pairs(row.reported), provenance: pairs(row.provenance.common), cells: row.provenance.cells.map(pairs),
  }));
  return JSON.stringify({ dataset: data.dataset, rows }, null, 1) + "\n";
}

const DOWNLOADS = {
  csv: ["text/csv", selectedCsv],
  json: ["application/json", selectedJson],
  tex: ["application/x-tex", selectedLatex],
};

// A chart on its own: light colours, the page's chart style inside.
function saveChart(figure) {
  const drawing = figure.querySelector("svg");
  if (!drawing) return;
  const copy = drawing.cloneNode(true);
  copy.setAttribute("xmlns", SVG);
  const style = svgElement("style");
  style.textContent = byId("chart-style").textContent;
  copy.prepend(style);
  save(`${data.dataset}-${figure.id.replace("chart-", "")}.svg`, "image/svg+xml", new XMLSerializer().serializeToString(copy));
}
