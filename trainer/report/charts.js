// Charts with legends, a crosshair that all charts share, and values under the pointer or the arrow keys.

const HEIGHT = 196;
const WIDE_HEIGHT = 260;
const drawn = [];

function element(name, className, parent, content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  if (parent) parent.append(made);
  return made;
}

/** The position in a sorted list that is nearest to a value. */
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}

class Chart {
  constructor(figure, data) {
    this.figure = figure;
    this.data = data;
    this.isLog = false;
    this.title = figure.querySelector("figcaption").textContent;
    this.caption = figure.querySelector("figcaption");
    if (data.log) this.addLogButton();
    if (data.series && (data.series.length > 1 || data.showLegend)) this.addLegend();
    this.stage = element("div", "stage", figure);
    this.tip = element("div", "tip", figure);
    this.tip.hidden = true;
    this.at = null;
    this.draw();
    this.listen();
  }

  addLogButton() {
    const button = element("button", "log", this.caption, "log");
    button.type = "button";
    button.title = "Logarithmic scale";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      this.isLog = !this.isLog;
      button.setAttribute("aria-pressed", String(this.isLog));
      this.draw();
    });
  }

  addLegend() {
    const legend = element("ul", "legend", this.figure);
    for (const series of this.data.series) {
      const button = element("button", "", element("li", "", legend));
      button.type = "button";
      button.title = "Show or hide";
      button.setAttribute("aria-pressed", "true");
      const key = element("i", series.dashed ? "key dashed" : "key", button);
      key.style.setProperty("--colour", colour(series.colour));
      button.append(series.name);
      button.addEventListener("click", () => {
        series.isHidden = !series.isHidden;
        button.setAttribute("aria-pressed", String(!series.isHidden));
        this.draw();
      });
    }
  }

  draw() {
    const width = Math.max(Math.floor(this.stage.clientWidth), 240);
    this.width = width;
    const { kind } = this.data;
    const top = kind === "heat" || kind === "matrix" ? 8 : 20;
    this.height = width > 640 ? WIDE_HEIGHT : HEIGHT;
    this.area = { left: 52, right: width - 14, top, bottom: this.height - 34 };
    if (kind === "matrix") this.layOutMatrix(width);
    if (kind === "heat") this.layOutHeat();
    this.svg = svg("svg", { viewBox: `0 0 ${width} ${this.height}`, width, height: this.height, role: "img", tabindex: "0" });
    this.svg.setAttribute("aria-label", this.title);
    this.stage.replaceChildren(this.svg);
    if (kind === "matrix") {
      drawMatrix(this.svg, this.data, this.area, this.cell);
      return;
    }
    this.x = linearScale(...this.data.domain, [this.area.left, this.area.right], { count: Math.max(width / 90, 3), widen: false, whole: true });
    if (kind === "heat") {
      drawHeat(this.svg, this.data, this.area, this.x);
      drawXAxis(svg("g", { class: "axes" }, this.svg), this.area, this.x);
    } else if (kind === "area") this.drawAreas();
    else this.drawLines();
    this.cross = svg("g", { class: "cross" }, this.svg);
  }

  drawAreas() {
    this.y = linearScale(0, 1, [this.area.bottom, this.area.top], { count: 4 });
    drawAxes(this.svg, this.area, this.x, this.y, this.data);
    drawArea(this.svg, this.data, this.x, this.y);
  }

  drawLines() {
    const { data, area } = this;
    const shown = data.series.filter((series) => !series.isHidden);
    let values = shown.flatMap((series) => series.y).filter((value) => value !== null && (!this.isLog || value > 0));
    if (!values.length) values = this.isLog ? [1, 10] : [0, 1];
    let low = values.reduce((a, b) => Math.min(a, b));
    let high = values.reduce((a, b) => Math.max(a, b));
    const pixels = [area.bottom, area.top];
    if (this.isLog) this.y = logScale(low, high, pixels, { count: 5 });
    else {
      if (data.zero || (low > 0 && low < 0.3 * high)) low = Math.min(low, 0);
      if (data.top !== undefined) high = Math.max(high, data.top);
      this.y = linearScale(low, high, pixels, { count: 4 });
    }
    drawAxes(this.svg, area, this.x, this.y, data);
    for (const series of shown) drawLine(this.svg, series, this.x, this.y, this.isLog);
    for (const series of shown) {
      if (series.best && (!this.isLog || series.best.y > 0)) drawBest(this.svg, series.best, area, this.x, this.y, data.format, series.colour);
    }
  }

  layOutHeat() {
    const { rows } = this.data;
    this.area.left = Math.max(...rows.map((name) => name.length)) * 6.6 + 12;
    this.area.bottom = this.area.top + Math.min(rows.length * 18, 360);
    this.height = this.area.bottom + 34;
  }

  layOutMatrix(width) {
    const longest = Math.max(...this.data.classes.map((name) => Math.min(name.length, 14)));
    const margin = Math.max(longest * 6.4 + 12, 30);
    this.cell = Math.max(Math.min((width - margin - 8) / this.data.classes.length, 44), 4);
    const size = this.cell * this.data.classes.length;
    this.area = { left: margin, right: margin + size, top: 8, bottom: 8 + size };
    this.height = size + margin + 12;
  }

  // ---- what is under the pointer

  listen() {
    this.stage.addEventListener("pointermove", (event) => this.point(event));
    this.stage.addEventListener("pointerdown", (event) => this.point(event));
    this.stage.addEventListener("pointerleave", () => leave());
    this.stage.addEventListener("focusout", () => leave());
    this.stage.addEventListener("keydown", (event) => this.step(event));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const scale = this.width / box.width;
    const [left, top] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    if (this.data.kind === "matrix") this.showCell(left, top);
    else this.show(this.x.back(Math.min(Math.max(left, this.area.left), this.area.right)), top);
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || this.data.kind === "matrix") return;
    event.preventDefault();
    const steps = this.steps();
    const now = this.at === null ? (move > 0 ? -1 : steps.length) : nearest(steps, this.at);
    if (steps.length) this.show(steps[Math.min(Math.max(now + move, 0), steps.length - 1)], this.area.top);
  }

  /** All steps that have a value in a visible series. */
  steps() {
    if (this.data.x) return this.data.x;
    const all = this.data.series.filter((series) => !series.isHidden).flatMap((series) => series.x);
    return [...new Set(all)].sort((a, b) => a - b);
  }

  show(step, top) {
    const steps = this.steps();
    if (!steps.length) return;
    const isSpan = this.data.kind !== "lines";
    const i = isSpan ? Math.min(steps.findIndex((end) => end >= step) >>> 0, steps.length - 1) : nearest(steps, step);
    this.at = steps[i];
    for (const other of drawn) other.mark(this.at);
    const rows = this.data.kind === "heat" ? this.heatRows(i, top) : this.rows(i, this.at);
    this.tell(`step ${this.at.toLocaleString("en")}`, rows, this.x.at(this.at));
  }

  rows(i, step) {
    const rows = [];
    for (const series of this.data.series) {
      if (series.isHidden) continue;
      const steps = this.data.x ?? series.x;
      const j = this.data.x ? i : nearest(steps, step);
      if (j < 0 || !steps.length) continue;
      const value = series.y[j];
      // Series have values at steps of their own: one far away says nothing of this one.
      const away = Math.abs(steps[j] - step);
      const isNear = away === 0 || away <= (this.data.domain[1] - this.data.domain[0]) * 0.01;
      if (!isNear) continue;
      const isDot = this.data.kind === "lines" && value !== null && (!this.isLog || value > 0);
      if (isDot) svg("circle", { cx: px(this.x.at(steps[j])), cy: px(this.y.at(value)), r: 3.4, style: `fill:${colour(series.colour)}` }, this.cross);
      rows.push([series.colour, series.name, valueText(value, this.data.format)]);
    }
    return this.data.kind === "area" ? rows.reverse() : rows;
  }

  heatRows(i, top) {
    const num = this.data.rows.length;
    const row = Math.min(Math.max(Math.floor(((top - this.area.top) / (this.area.bottom - this.area.top)) * num), 0), num - 1);
    return [[null, this.data.rows[row], valueText(this.data.values[i][row], this.data.format)]];
  }

  showCell(left, top) {
    const [column, row] = [Math.floor((left - this.area.left) / this.cell), Math.floor((top - this.area.top) / this.cell)];
    const { classes, counts } = this.data;
    if (!(row in classes) || !(column in classes)) {
      leave();
      return;
    }
    const total = counts[row].reduce((sum, count) => sum + count, 0);
    const share = total ? valueText(counts[row][column] / total, "share") : "–";
    const what = row === column ? "recognised" : `taken for ${classes[column]}`;
    this.tell(classes[row], [[null, what, `${counts[row][column]} of ${total} (${share})`]], left);
  }

  /** Draws the crosshair at a step. */
  mark(step) {
    if (!this.cross) return;
    this.cross.replaceChildren();
    if (step === null) return;
    const at = px(this.x.at(step));
    if (at < this.area.left - 1 || at > this.area.right + 1) return;
    svg("line", { x1: at, x2: at, y1: this.area.top, y2: this.area.bottom }, this.cross);
  }

  tell(title, rows, left) {
    this.tip.replaceChildren();
    element("b", "", this.tip, title);
    for (const [name, label, value] of rows) {
      const row = element("div", "", this.tip);
      const key = element("i", name ? "key" : "", row);
      if (name) key.style.setProperty("--colour", colour(name));
      element("span", "", row, label);
      element("span", "value", row, value);
    }
    this.tip.hidden = false;
    const room = this.figure.clientWidth;
    const at = (left / this.width) * this.stage.clientWidth + this.stage.offsetLeft;
    const wide = this.tip.offsetWidth;
    const beside = at > room / 2 ? at - wide - 12 : at + 12;
    this.tip.style.left = `${Math.min(Math.max(beside, 0), Math.max(room - wide, 0))}px`;
    this.tip.style.top = `${this.stage.offsetTop + 6}px`;
  }
}

function leave() {
  for (const chart of drawn) {
    chart.tip.hidden = true;
    chart.at = null;
    chart.mark(null);
  }
}

function copyOnClick(button) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {  // no clipboard for a page from a file: select it instead
      getSelection().selectAllChildren(source);
    }
  });
}

const specs = new Map(JSON.parse(document.getElementById("charts").textContent).map((chart) => [chart.id, chart]));
for (const figure of document.querySelectorAll("figure[data-chart]")) drawn.push(new Chart(figure, specs.get(figure.dataset.chart)));
for (const button of document.querySelectorAll("button[data-copy]")) copyOnClick(button);

let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => {
    for (const chart of drawn) if (Math.floor(chart.stage.clientWidth) !== chart.width) chart.draw();
  });
});
document.documentElement.dataset.ready = String(drawn.length);
