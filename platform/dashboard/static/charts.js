// A line chart that answers one question: mean with the range it stands for, trend, undone steps, and marks of what happened.
import { color, compact, day, el, minute, moment, onThemeChange, second, whole } from "./format.js";

const MARK_REACH = 7; // px

export class LineChart {
  // title, unit, height in px; format, tick: value to text; trend: also draw a smoothed curve; zero: the axis begins at 0.
  constructor({ title, note = "", unit, height, format = compact, tick = format, trend = false, zero = false }) {
    Object.assign(this, { title, unit, height, format, tick, trend, zero });
    this.readout = el("span", { class: "readout" });
    this.plotBox = el("div", { class: "plot", tabindex: "0", role: "img" });
    this.tip = el("div", { class: "tip", hidden: true });
    const heading = el("header", {}, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null, this.readout);
    this.key = el("p", { class: "key note", "aria-hidden": "true" });
    this.box = el("section", { class: "chart" }, heading, this.plotBox, this.key, this.tip);
    this.plot = null;
    this.plotBox.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["pointerenter", "focus"]) this.plotBox.addEventListener(name, () => (this.active = true));
    for (const name of ["pointerleave", "blur"])
      this.plotBox.addEventListener(name, () => {
        this.active = false;
        this.tip.hidden = true;
      });
    new ResizeObserver(() => this.plot?.setSize(this.#size())).observe(this.plotBox);
    onThemeChange(() => this.model && this.show(this.model, true));
  }

  // model: {axis: "step" | "time", line, values, undone, reference: {label, value}, marks, heldOut}, see run_page.js
  show(model, anew = false) {
    const rebuild = anew || !this.plot || model.axis !== this.model.axis;
    this.model = model;
    if (model.line.step.length === 0) return this.#showEmpty();
    const data = this.#data();
    if (rebuild) {
      this.plot?.destroy();
      this.plotBox.replaceChildren();
      this.plot = new uPlot(this.#options(), data, this.plotBox);
    } else {
      const { min, max } = this.plot.scales.x;
      const [from, to] = [this.plot.data[0][0], this.plot.data[0].at(-1)];
      const zoomed = min > from || max < to;
      this.plot.setData(data, !zoomed);
      if (zoomed) this.plot.redraw();
    }
    this.#read(null);
    if (this.trend) this.key.replaceChildren(...this.#keyEntries());
    this.plotBox.dataset.points = model.line.step.length;
    const last = model.values.mean.at(-1);
    const text = last === null ? "not a finite number" : `${this.format(last)} ${this.unit}`;
    this.plotBox.setAttribute("aria-label", `${this.title} Newest: ${text}. Arrow keys move along the curve.`);
  }

  #showEmpty() {
    this.plot?.destroy();
    this.plot = null;
    this.readout.textContent = "";
    this.plotBox.replaceChildren(el("p", { class: "empty" }, "Nothing yet: the first point comes with the first step."));
  }

  #size() {
    return { width: Math.max(this.plotBox.clientWidth, 200), height: this.height };
  }

  #data() {
    const { axis, line, values, undone, reference, heldOut } = this.model;
    const rows = { x: [], low: [], high: [], mean: [] };
    const push = (x, mean, low, high) => {
      rows.x.push(x);
      rows.mean.push(mean);
      rows.low.push(low);
      rows.high.push(high);
    };
    const xs = axis === "time" ? line.time_s : line.step;
    for (let i = 0; i < xs.length; i++) {
      const before = rows.x.at(-1);
      if (before !== undefined && xs[i] <= before) continue; // the clocks of two hosts may differ
      if (axis === "time" && i && line.incarnation[i] !== line.incarnation[i - 1])
        push((before + xs[i]) / 2, null, null, null); // nobody trained in between
      push(xs[i], values.mean[i], values.low?.[i] ?? values.mean[i], values.high?.[i] ?? values.mean[i]);
    }
    const constant = rows.x.map(() => reference?.value ?? null);
    const tables = [[rows.x, rows.low, rows.high, rows.mean, this.trend ? trendOf(rows.x, rows.mean) : constant, constant]];
    tables.push(undone ? undonePoints(undone, axis) : [[rows.x[0]], [null]]);
    tables.push(heldOut?.length ? [heldOut.map((e) => (axis === "time" ? e[1] : e[0])), heldOut.map((e) => e[2].text_loss ?? null)] : [[rows.x[0]], [null]]);
    const wideGaps = tables.map((table) => table.map(() => 2)); // a null also covers points that only the other table has
    return uPlot.join(tables, wideGaps);
  }

  #options() {
    const [soft, grid, accent] = [color("soft"), color("grid"), color("accent")];
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: soft, font, labelFont: font, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    const byTime = this.model.axis === "time";
    const ranged = Boolean(this.model.values.low);
    const quiet = { points: { show: false } };
    return {
      ...this.#size(),
      legend: { show: false },
      padding: [10, 14, 0, 0],
      cursor: { sync: { key: `run-${this.model.axis}` }, y: false, points: { size: 7 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false, range: (u, min, max) => [min, max > min ? max : min + 1] },
        y: { range: (u, min, max) => range(min, max, this.zero) },
      },
      axes: [
        {
          ...axis, label: byTime ? "time" : "step", labelSize: 18, size: 26, space: byTime ? 80 : 60,
          incrs: byTime ? TIME_INCREMENTS : undefined,
          values: (u, splits, _, __, step) => splits.map((x) => (byTime ? timeTick(x, step) : whole(x) === String(x) || x >= 1000 ? compactStep(x) : x % 1 ? "" : String(x))),
        },
        { ...axis, label: this.unit, labelSize: 18, size: 52, values: (u, splits) => splits.map((y) => this.tick(y)) },
      ],
      series: [
        {},
        { stroke: null, width: 0, ...quiet },
        { stroke: null, width: 0, ...quiet },
        { stroke: this.trend ? color("accent-soft") : accent, width: this.trend ? 1 : 1.25, ...quiet },
        { show: this.trend, stroke: accent, width: 2, ...quiet },
        { stroke: soft, width: 1, dash: [6, 4], ...quiet },
        { stroke: color("warn"), width: 1.25, dash: [3, 3], ...quiet },
        { stroke: color("good"), width: 1.5, points: { show: true, size: 5, fill: color("good") } },
      ],
      bands: ranged ? [{ series: [2, 1], fill: `${color("accent-soft")}55` }] : [],
      hooks: { draw: [(u) => this.#drawMarks(u)], setCursor: [(u) => this.#read(u.cursor.idx, u)] },
    };
  }

  #keyEntries() {
    const { values, undone, reference, marks, heldOut } = this.model;
    const entries = [["mean", values.low ? "mean and range of some steps" : "each step"], ["trend", "trend"]];
    if (reference) entries.push(["reference", reference.label]);
    if (heldOut?.length) entries.push(["held-out", "text it has never read"]);
    if (undone) entries.push(["undone", "trained again later"]);
    if (marks.some((mark) => !mark.mood)) entries.push(["start", "a worker group or a stage starts"]);
    if (marks.some((mark) => mark.mood)) entries.push(["incident", "an incident; hover for its cause"]);
    return entries.map(([kind, text]) => el("span", {}, el("i", { class: kind }), text));
  }

  #drawMarks(u) {
    const { ctx, bbox } = u;
    const places = this.model.marks.map((mark) => [u.valToPos(mark[this.model.axis], "x", true), mark]);
    const visible = places.filter(([x]) => x >= bbox.left - 1 && x <= bbox.left + bbox.width + 1);
    const crowded = visible.length > 60 * (bbox.width / devicePixelRatio / 1000);
    ctx.save();
    for (const [x, mark] of visible) {
      if (crowded && !mark.mood) continue;
      ctx.strokeStyle = ctx.fillStyle = mark.mood ? color(mark.mood) : color("faint");
      ctx.globalAlpha = crowded ? 0.6 : 0.85;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash(mark.mood ? [] : [4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + (crowded ? 8 * devicePixelRatio : bbox.height));
      ctx.stroke();
      if (!mark.mood || crowded) continue;
      const half = 4.5 * devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(x - half, bbox.top - half);
      ctx.lineTo(x + half, bbox.top - half);
      ctx.lineTo(x, bbox.top + half);
      ctx.fill();
    }
    ctx.restore();
  }

  #read(index, u = this.plot) {
    const { axis, line, reference } = this.model;
    const data = u.data;
    let i = index;
    if (i === null || i === undefined) i = data[3].findLastIndex((value) => value !== null && value !== undefined);
    if (i < 0) return void (this.readout.textContent = "");
    const at = axis === "time" ? moment(data[0][i]) : `step ${whole(data[0][i])}`;
    const [low, high, mean, trend, , undone, heldOut] = data.slice(1).map((column) => column[i]);
    const parts = [at];
    if (mean !== null && mean !== undefined) parts.push(`${this.format(mean)} ${this.unit}`);
    if (high > low) parts.push(`${this.format(low)} to ${this.format(high)}`);
    if (this.trend && trend) parts.push(`trend ${this.format(trend)}`);
    if (heldOut) parts.push(`held out ${this.format(heldOut)}`);
    if (undone) parts.push(`undone ${this.format(undone)}`);
    if (reference && line.step.length) parts.push(`${reference.label} ${this.format(reference.value)}`);
    this.readout.textContent = parts.join(" · ");
    if (this.active) this.#showTip(u);
  }

  #showTip(u) {
    const left = u.cursor.left;
    const near = this.model.marks
      .map((mark) => [Math.abs(u.valToPos(mark[this.model.axis], "x") - left), mark])
      .filter(([distance]) => left >= 0 && distance <= MARK_REACH)
      .sort((a, b) => a[0] - b[0])
      .slice(0, 3);
    this.tip.hidden = near.length === 0;
    if (!near.length) return;
    this.tip.replaceChildren(...near.flatMap(([, mark]) => [el("p", {}, el("b", {}, mark.title)), el("p", {}, mark.text)]));
    const room = this.box.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.left = `${Math.max(8, Math.min(left + 64, room))}px`;
    this.tip.style.top = "3.4rem";
  }

  #key(event) {
    if (!this.plot) return;
    const xs = this.plot.data[0];
    const at = this.plot.cursor.idx ?? xs.length - 1;
    const stride = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
    const to = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: xs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.active = true;
    const x = xs[Math.max(0, Math.min(to, xs.length - 1))];
    this.plot.setCursor({ left: this.plot.valToPos(x, "x"), top: this.height / 3 });
  }
}

// The mean over a window around each point: as narrow as what lies before it, so that a steep beginning is followed.
// A point that stands for many steps weighs as much as it spans.
function trendOf(xs, values) {
  const widest = (xs.at(-1) - xs[0]) / 60;
  const [sums, spans] = [[0], [0]];
  values.forEach((value, i) => {
    const span = value === null ? 0 : i ? xs[i] - xs[i - 1] : 1;
    sums.push(sums.at(-1) + (value ?? 0) * span);
    spans.push(spans.at(-1) + span);
  });
  let [from, to] = [0, 0];
  return values.map((value, i) => {
    const half = Math.min(widest, xs[i] - xs[0]);
    while (xs[from] < xs[i] - half) from++;
    while (to < xs.length && xs[to] <= xs[i] + half) to++;
    return value === null ? null : (sums[to] - sums[from]) / (spans[to] - spans[from]);
  });
}

const TIME_INCREMENTS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000];

function timeTick(seconds, increment) {
  if (increment >= 86400) return day(seconds);
  const midnight = new Date(seconds * 1000).getHours() === 0 && new Date(seconds * 1000).getMinutes() === 0;
  return midnight ? day(seconds) : increment < 60 ? second(seconds) : minute(seconds);
}

const compactStep = (step) => (step % 1 ? "" : step >= 100000 ? compact(step) : whole(step));

function range(min, max, zero) {
  if (min === null || max === null) return [0, 1];
  const room = (max - min || Math.abs(max) || 1) * 0.06;
  return [zero ? 0 : min - room, max + room];
}

function undonePoints(undone, axis) {
  const newest = new Map();
  undone.step.forEach((step, i) => newest.set(axis === "time" ? undone.time_s[i] : step, i));
  const [xs, ys] = [[], []];
  let before = null;
  for (const x of [...newest.keys()].sort((a, b) => a - b)) {
    const i = newest.get(x);
    if (before !== null && undone.incarnation[before] !== undone.incarnation[i]) {
      xs.push((xs.at(-1) + x) / 2);
      ys.push(null); // they belong to different worker groups
    }
    xs.push(x);
    ys.push(undone.text_loss.mean[i]);
    before = i;
  }
  return [xs, ys];
}

// A curve without axes, for a row of a table.
export function sparkline(values) {
  const canvas = el("canvas", { class: "spark", width: "220", height: "52", role: "img", "aria-label": "loss so far" });
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return canvas;
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const context = canvas.getContext("2d");
  context.strokeStyle = color("accent");
  context.lineWidth = 3;
  context.lineJoin = "round";
  context.beginPath();
  values.forEach((value, i) => {
    if (value === null) return;
    context.lineTo(4 + (212 * i) / (values.length - 1), 46 - (40 * (value - low)) / (high - low || 1));
  });
  context.stroke();
  return canvas;
}
