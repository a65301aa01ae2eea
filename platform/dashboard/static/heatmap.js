// How a layer's choices are shared among its experts, over the steps: one row an expert, one column some steps.
import { color, el, onThemeChange, percent, whole } from "./format.js";

export class HeatMap {
  // layer: from 0, of `layers`
  constructor(layer, layers) {
    this.layer = layer;
    this.canvas = el("canvas", { tabindex: "0", role: "img" });
    this.readout = el("span", { class: "note num" });
    this.rows = el("div", { class: "rows", "aria-hidden": "true" });
    this.steps = el("div", { class: "steps" });
    const title = el("div", { class: "title" }, el("h3", {}, `MoE layer ${layer + 1} of ${layers}`), this.readout);
    this.box = el("div", { class: "load" }, title, this.rows, this.canvas, this.steps);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#read(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("blur", () => this.#read(null));
    onThemeChange(() => this.load && this.show(this.load, this.step));
  }

  // load: {width: steps a column, columns: [[column, [layer][expert] percent of an even share]]}; step: the newest one
  show(load, step) {
    Object.assign(this, { load, step });
    const [first, experts] = [load.columns[0][0], load.columns[0][1][this.layer].length];
    const wide = load.columns.at(-1)[0] - first + 1;
    Object.assign(this, { first, experts, wide });
    this.canvas.width = wide;
    this.canvas.height = experts;
    this.canvas.style.height = `${Math.min(Math.max(experts * 9, 96), 320)}px`;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(wide, experts);
    const scale = colors();
    for (const [column, layers] of load.columns)
      layers[this.layer].forEach((value, expert) =>
        image.data.set(scale(value), 4 * (expert * wide + column - first)),
      );
    context.putImageData(image, 0, 0);
    this.rows.replaceChildren(...(experts > 1 ? ["0", String(experts - 1)] : ["0"]).map((n) => el("span", {}, n)));
    const last = Math.min((load.columns.at(-1)[0] + 1) * load.width, step);
    this.steps.replaceChildren(el("span", {}, `step ${whole(first * load.width + 1)}`), el("span", {}, whole(last)));
    this.#read(this.cell ?? null);
  }

  #read(cell) {
    this.cell = cell;
    const columns = this.load.columns;
    if (cell === null) {
      const newest = columns.at(-1)[1][this.layer];
      this.readout.textContent = `now ${ratio(Math.min(...newest))} to ${ratio(Math.max(...newest))} of an even share`;
    } else {
      const found = columns.find(([column]) => column === this.first + cell.column);
      const from = (this.first + cell.column) * this.load.width + 1;
      const steps = this.load.width > 1 ? `steps ${whole(from)} to ${whole(from + this.load.width - 1)}` : `step ${whole(from)}`;
      const value = found?.[1][this.layer][cell.expert];
      const text = value === undefined ? "no record" : `${ratio(value)} of an even share, ${percent(value / 100 / this.experts, 1)}`;
      this.readout.textContent = `expert ${cell.expert}, ${steps}: ${text}`;
    }
    this.canvas.setAttribute("aria-label", `Load of the experts of MoE layer ${this.layer + 1}: ${this.readout.textContent}. Arrow keys move.`);
  }

  #point(event) {
    const { width, height } = this.canvas.getBoundingClientRect();
    const at = (offset, size, n) => Math.max(0, Math.min(Math.floor((offset / size) * n), n - 1));
    this.#read({ column: at(event.offsetX, width, this.wide), expert: at(event.offsetY, height, this.experts) });
  }

  #key(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const from = this.cell ?? { column: this.wide, expert: 0 };
    const inside = (value, n) => Math.max(0, Math.min(value, n - 1));
    this.#read({ column: inside(from.column + move[0], this.wide), expert: inside(from.expert + move[1], this.experts) });
  }
}

const ratio = (value) => `${(value / 100).toFixed(2)}x`;

// Returns percent of an even share -> [r, g, b, a]: one colour for none, another for twice the even share or more.
function colors() {
  const [none, even, much] = ["load-none", "load-even", "load-much"].map((name) => rgb(color(name)));
  return (value) => {
    const share = Math.min(value / 100, 2);
    const [from, to, t] = share < 1 ? [none, even, share] : [even, much, share - 1];
    return [...from.map((channel, i) => channel + (to[i] - channel) * t), 255];
  };
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

export function loadLegend() {
  const canvas = el("canvas", { width: "200", height: "1", role: "img", "aria-label": "colour scale" });
  const draw = () => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(200, 1);
    const scale = colors();
    for (let i = 0; i < 200; i++) image.data.set(scale(i), 4 * i);
    context.putImageData(image, 0, 0);
  };
  draw();
  onThemeChange(draw);
  return el("span", { class: "legend grow" }, "nobody asks", canvas, "twice its share or more; the middle is even");
}
