// What is drawn: SVG elements, axes, lines with gaps, stacked areas, heat maps. Knows no pointer.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function text(parent, x, y, content, attributes = {}) {
  const element = svg("text", { x, y, ...attributes }, parent);
  element.textContent = content;
  return element;
}

const px = (value) => Math.round(value * 10) / 10;
const colour = (name) => `var(--${name})`;

/** Draws both axes with their grid, and the unit over the y axis. */
function drawAxes(parent, area, x, y, chart) {
  const axes = svg("g", { class: "axes" }, parent);
  const texts = tickTexts(y.ticks, chart.format);
  y.ticks.forEach((tick, i) => {
    const at = px(y.at(tick));
    svg("line", { x1: area.left, x2: area.right, y1: at, y2: at, class: "rule" }, axes);
    text(axes, area.left - 6, at + 3.5, texts[i], { "text-anchor": "end" });
  });
  svg("line", { x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom, class: "axis" }, axes);
  drawXAxis(axes, area, x);
  const unit = { share: "", percent: "" }[chart.format] ?? chart.format;
  text(axes, area.left - 6, area.top - 8, unit, { "text-anchor": "end", class: "unit" });
}

function drawXAxis(axes, area, x) {
  const texts = tickTexts(x.ticks, "");
  x.ticks.forEach((tick, i) => {
    const at = px(x.at(tick));
    svg("line", { x1: at, x2: at, y1: area.bottom, y2: area.bottom + 4, class: "axis" }, axes);
    text(axes, at, area.bottom + 16, texts[i], { "text-anchor": "middle" });
  });
  text(axes, area.right, area.bottom + 30, "step", { "text-anchor": "end", class: "unit" });
}

/** Draws one series as a line that breaks where a value is not known; few points, and lone ones, are dots too. */
function drawLine(parent, series, x, y, isLog) {
  const group = svg("g", { class: "series" }, parent);
  group.style.setProperty("--colour", colour(series.colour));
  let path = "";
  let isOpen = false;
  const dots = [];
  const isKnown = (value) => value !== null && value !== undefined && (!isLog || value > 0);
  const showAll = series.x.length <= 40;
  series.y.forEach((value, i) => {
    if (!isKnown(value)) {
      isOpen = false;
      return;
    }
    const [left, top] = [px(x.at(series.x[i])), px(y.at(value))];
    path += `${isOpen ? "L" : "M"}${left},${top}`;
    const isLone = !isOpen && !isKnown(series.y[i + 1]);
    isOpen = true;
    if (showAll || isLone) dots.push([left, top]);
  });
  if (path) svg("path", { d: path, class: series.dashed ? "line dashed" : "line" }, group);
  for (const [cx, cy] of dots) svg("circle", { cx, cy, r: showAll ? 2.4 : 1.5, class: "dot" }, group);
}

/** Marks the best point with a ring, and says its value unless there are several such marks. */
function drawBest(parent, best, area, x, y, format, colourName) {
  const [cx, cy] = [px(x.at(best.x)), px(y.at(best.y))];
  const group = svg("g", { class: "best" }, parent);
  group.style.setProperty("--colour", colour(colourName));
  svg("circle", { cx, cy, r: 4.5 }, group);
  if (best.isQuiet) return;
  const isRight = cx > (area.left + area.right) / 2;
  const below = cy - 10 < area.top + 6 || (y.at(0) > y.at(1) ? best.isLow : !best.isLow);
  const label = `best ${valueText(best.y, format)}`;
  const top = below && cy + 18 < area.bottom - 2 ? cy + 17 : cy - 10;
  text(group, cx + (isRight ? 5 : -5), top, label, { "text-anchor": isRight ? "end" : "start" });
}

/** Draws shares on top of one another, each constant since the report before. */
function drawArea(parent, chart, x, y) {
  const base = chart.x.map(() => 0);
  const starts = chart.x.map((step, i) => (i ? chart.x[i - 1] : Math.max(0, step - (chart.x[1] - step || step))));
  for (const series of chart.series) {
    if (series.isHidden) continue;
    let [top, bottom] = ["", ""];
    series.y.forEach((value, i) => {
      const [from, to] = [px(x.at(starts[i])), px(x.at(chart.x[i]))];
      const [low, high] = [px(y.at(base[i])), px(y.at(base[i] + (value ?? 0)))];
      top += `${i ? "L" : "M"}${from},${high}L${to},${high}`;
      bottom = `L${to},${low}L${from},${low}${bottom}`;
      base[i] += value ?? 0;
    });
    const path = svg("path", { d: `${top}${bottom}Z`, class: "area" }, parent);
    path.style.setProperty("--colour", colour(series.colour));
  }
}

/** Draws a value per row and column; the darker, the larger within `low` to `high`. */
function drawHeat(parent, chart, area, x) {
  const height = (area.bottom - area.top) / chart.rows.length;
  const span = chart.high - chart.low || 1;
  const group = svg("g", { class: "heat" }, parent);
  chart.values.forEach((column, i) => {
    const from = x.at(i ? chart.x[i - 1] : Math.max(0, chart.x[0] - (chart.x[1] - chart.x[0] || chart.x[0])));
    const width = Math.max(x.at(chart.x[i]) - from, 0.5);
    column.forEach((value, row) => {
      if (value === null) return;
      const opacity = px(Math.max(0, (value - chart.low) / span) * 90) / 100 + 0.04;
      svg("rect", { x: px(from), y: px(area.top + row * height), width: px(width) + 0.3, height: px(height), "fill-opacity": px(opacity * 100) / 100 }, group);
    });
  });
  const every = Math.ceil(13 / height);
  chart.rows.forEach((name, row) => {
    if (row % every === 0) text(parent, area.left - 6, area.top + (row + 0.5) * height + 3.5, name, { "text-anchor": "end" });
  });
}

function shortened(name, length) {
  return name.length > length ? `${name.slice(0, length - 1)}…` : name;
}

/** Draws a confusion matrix: a row per class, the shares of what it was taken for; what is right in another colour. */
function drawMatrix(parent, chart, area, cell) {
  const num = chart.classes.length;
  const every = Math.ceil(11 / cell);
  chart.counts.forEach((row, i) => {
    const total = row.reduce((sum, count) => sum + count, 0);
    row.forEach((count, j) => {
      const share = total ? count / total : 0;
      const [left, top] = [area.left + j * cell, area.top + i * cell];
      const rect = svg("rect", { x: px(left), y: px(top), width: px(cell - 0.6), height: px(cell - 0.6), class: i === j ? "right" : "wrong" }, parent);
      rect.setAttribute("fill-opacity", count ? px((0.12 + 0.88 * Math.sqrt(share)) * 100) / 100 : 0);
      if (count && cell >= 22) {
        const isDark = Math.sqrt(share) > 0.6;
        text(parent, left + cell / 2, top + cell / 2 + 3.5, shortNumber(count), { "text-anchor": "middle", class: isDark ? "on-dark" : "" });
      }
    });
    if (i % every) return;
    text(parent, area.left - 5, area.top + (i + 0.5) * cell + 3.5, shortened(chart.classes[i], 14), { "text-anchor": "end" });
    const [x, y] = [area.left + (i + 0.5) * cell + 3.5, area.top + num * cell + 6];
    text(parent, x, y, shortened(chart.classes[i], 14), { "text-anchor": "end", transform: `rotate(-90 ${px(x)} ${px(y)})` });
  });
  svg("rect", { x: area.left, y: area.top, width: num * cell, height: num * cell, class: "frame" }, parent);
}
