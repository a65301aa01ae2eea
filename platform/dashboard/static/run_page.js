// The page of one run: what a person who watches it for months wants to know, the most urgent first.
import { LineChart } from "./charts.js";
import { ago, around, badge, color, compact, duration, el, minute, day, moment, mood, now, onThemeChange, percent, plural, progress, renew, setServerTime, spoken, whole } from "./format.js";
import { HeatMap, loadLegend } from "./heatmap.js";

const SHOWN_INCARNATIONS = 8;
// How a cause is drawn: what counts, what was lost, what was not held; the rest is work around the steps.
const SPENT = { step: "counts", redone: "lost", idle: "lost", unrecorded: "lost", capacity: "free", absent: "free", stopped: "free" };
const SHOWN_EVALUATIONS = 6;

export class RunPage {
  constructor(main) {
    this.axis = "step";
    this.status = el("section", { id: "status" });
    this.jobs = el("section", { id: "jobs", hidden: true });
    this.loss = new LineChart({ title: "Is it learning?", note: "cross-entropy, sentinels left out", unit: "nats", height: 300, format: (v) => v.toFixed(3), tick: compact, trend: true });
    this.speed = new LineChart({ title: "How fast?", unit: "tokens/s", height: 190, zero: true });
    this.drops = new LineChart({ title: "Are experts too full?", unit: "choices dropped", height: 190, format: (v) => percent(v, 1), tick: (v) => percent(v), zero: true });
    this.entropy = new LineChart({ title: "Do all routers choose?", note: "entropy, least layer", unit: "of an even choice", height: 190, format: (v) => percent(v, 1), tick: (v) => percent(v), zero: true });
    this.gradients = new LineChart({ title: "Is it stable?", unit: "gradient norm", height: 190, zero: true });
    this.loss.box.id = "loss";
    this.loss.box.querySelector("header").append(this.#axisSwitch());
    this.timeline = el("section", { id: "timeline" });
    this.account = el("section", { id: "account" });
    this.load = el("section", { id: "load" });
    this.story = el("section", { id: "story" });
    this.heldOut = el("section", { id: "held-out", hidden: true });
    this.samples = el("section", { id: "samples", hidden: true });
    this.facts = el("section", { id: "facts" });
    const small = el("section", { class: "bare columns" }, this.speed.box, this.drops.box, this.entropy.box, this.gradients.box);
    main.replaceChildren(this.status, this.jobs, this.loss.box, small, this.heldOut, this.timeline, this.account, this.load, this.story, this.samples, this.facts);
    this.heatMaps = [];
    onThemeChange(() => this.snapshot && this.#showTimeline());
  }

  show(snapshot) {
    this.snapshot = snapshot;
    if (snapshot.now_s) setServerTime(snapshot.now_s);
    this.#showFigures();
    this.#showJobs();
    this.#showCharts();
    this.#showLoad();
    this.#showHistory();
  }

  // A change as the server sends it; returns whether so much was added that a new snapshot is due.
  update(change) {
    setServerTime(change.now_s);
    const { curves, load } = this.snapshot;
    if (change.points) append(curves.line, change.points);
    if (change.load) mergeColumns(load, change.load);
    for (const part of ["figures", "history", "jobs"]) if (change[part]) this.snapshot[part] = change[part];
    if (change.figures) this.#showFigures();
    if (change.jobs) this.#showJobs();
    if (change.history) this.#showHistory();
    if (change.points || change.history || change.figures?.unigram_entropy) this.#showCharts();
    if (change.points) this.#showTimeline();
    if (change.load) this.#showLoad();
    return curves.line.step.length > 6000;
  }

  tick() {
    if (this.snapshot) this.#showFigures();
  }

  #axisSwitch() {
    const choose = (axis) => () => {
      this.axis = axis;
      for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.axis === axis);
      this.#showCharts();
    };
    const buttons = ["step", "time"].map((axis) =>
      el("button", { type: "button", "data-axis": axis, "aria-pressed": axis === this.axis, onclick: choose(axis) }, `by ${axis}`),
    );
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.axis === this.axis);
    return el("span", { class: "switch", role: "group", "aria-label": "x axis" }, buttons);
  }

  #showFigures() {
    const f = this.snapshot.figures;
    document.title = `${f.name}: ${f.steps ? percent(f.step / f.steps) : whole(f.step)} ${spoken(f.state)}`;
    document.getElementById("name").textContent = f.name;
    document.getElementById("state").replaceChildren(badge(f.state));
    const done = f.steps ? `${whole(f.step)} of ${whole(f.steps)} steps` : `${whole(f.step)} steps`;
    const tokens = f.tokens_per_step ? `${compact(f.step * f.tokens_per_step)} tokens` : "";
    const share = f.steps ? percent(f.step / f.steps, f.steps > 2000 ? 1 : 0) : "";
    const parts = [
      el("div", { class: "headline" }, el("strong", { class: "num" }, [share, done].filter(Boolean).join(" · ")), el("span", { class: "note num" }, [tokens, headline(f)].filter(Boolean).join(" · "))),
      progress(f.step, f.steps),
    ];
    if (f.reason) parts.push(el("p", { class: "note said" }, f.reason));
    if (f.problem) parts.push(el("p", { class: "problem said" }, `Its files cannot be read on: ${f.problem}`));
    if (!f.read_all && !f.problem) parts.push(el("p", { class: "note said" }, `Its history is being read; so far up to step ${whole(f.step)}.`));
    renew(this.status, ...parts, tiles(f));
  }

  #showJobs() {
    const jobs = this.snapshot.jobs;
    this.jobs.hidden = jobs.length === 0;
    if (!jobs.length) return;
    const rows = jobs.slice(0, 5).map((job) =>
      el("tr", {}, el("td", { class: "mono" }, job.id), el("td", {}, badge(job.cluster_lost ? "cluster_lost" : job.state)), el("td", { class: "num" }, String(job.attempt)), el("td", {}, job.cluster), el("td", { class: "note" }, job.reason), el("td", { class: "note num" }, moment(job.changed_s))),
    );
    renew(
      this.jobs,
      el("header", {}, el("h2", {}, "What does the controller want?"), jobs.length > 5 ? el("p", { class: "note" }, `newest 5 of ${jobs.length} jobs`) : null),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["job", "state", "attempt", "cluster", "reason", "changed"].map((name) => el("th", { scope: "col", class: ["attempt", "changed"].includes(name) ? "num" : null }, name)))), el("tbody", {}, rows))),
    );
  }

  #showCharts() {
    const { curves, figures, history } = this.snapshot;
    const marks = [...marksOf(history.incarnations), ...stageMarks(history.stages, curves.line)];
    const model = (name, more = {}) => ({ axis: this.axis, line: curves.line, values: curves.line[name], marks, undone: null, reference: null, ...more });
    const unigram = figures.unigram_entropy;
    this.loss.show(model("text_loss", { heldOut: history.held_out, undone: curves.undone.step.length ? curves.undone : null, reference: unigram ? { label: "unigram entropy", value: unigram } : null }));
    this.speed.show(model("tokens_per_s"));
    this.gradients.show(model("grad_norm"));
    // A dense model has neither; a run from before the routers' entropy was measured has no curve of it.
    for (const [chart, name] of [[this.drops, "drop_fraction"], [this.entropy, "router_entropy"]]) {
      chart.box.hidden = curves.line.step.length > 0 && curves.line[name].mean.every((value) => value === null);
      if (!chart.box.hidden) chart.show(model(name));
    }
  }

  #showLoad() {
    const load = this.snapshot.load;
    const layers = load.columns.length ? load.columns[0][1].length : 0;
    if (layers !== this.heatMaps.length || !this.load.childElementCount) {
      this.heatMaps = Array.from({ length: layers }, (_, layer) => new HeatMap(layer, layers));
      const heading = el("header", {}, el("h2", {}, "Are all experts used?"), el("p", { class: "note" }, "share of a layer's choices that ask for each expert, by step"), layers ? loadLegend() : null);
      const body = layers ? el("div", { class: "load-grid" }, this.heatMaps.map((map) => map.box)) : el("p", { class: "empty" }, "No step of a layer with experts has been recorded yet.");
      this.load.replaceChildren(heading, body);
    }
    for (const map of this.heatMaps) map.show(load, this.snapshot.figures.step);
  }

  #showHeldOut() {
    const evaluations = this.snapshot.history.held_out.slice(-SHOWN_EVALUATIONS).toReversed();
    this.heldOut.hidden = evaluations.length === 0;
    if (!evaluations.length) return;
    const names = [...new Set(evaluations.flatMap(([, , losses]) => Object.keys(losses)))];
    const rows = evaluations.map(([step, , losses]) => el("tr", {}, [whole(step), ...names.map((name) => losses[name]?.toFixed(3) ?? "")].map((text) => el("td", { class: "num" }, text))));
    const heads = ["step", ...names.map((name) => ({ loss: "all", text_loss: "without sentinels" })[name] ?? name.replace("loss/", ""))];
    renew(
      this.heldOut,
      el("header", {}, el("h2", {}, "What of text it has never read?"), el("p", { class: "note" }, "cross-entropy in nats, by source and denoiser")),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col", class: "num" }, name)))), el("tbody", {}, rows))),
    );
  }

  #showHistory() {
    this.#showTimeline();
    this.#showAccount();
    this.#showHeldOut();
    const { story, story_left_out: leftOut, samples, facts, spec, result } = this.snapshot.history;
    const sentences = story.toReversed().map((s) =>
      el("li", {}, el("time", {}, moment(s.time_s)), el("span", { class: s.kind }, s.text), s.evidence.map((line) => el("span", { class: "note" }, line))),
    );
    const note = leftOut ? `newest first; ${whole(leftOut)} older ones are left out` : "newest first";
    renew(
      this.story,
      el("header", {}, el("h2", {}, "What happened?"), el("p", { class: "note" }, note)),
      sentences.length ? el("ol", { class: "story", tabindex: "0", "data-key": "story", "aria-label": "story" }, sentences) : el("p", { class: "empty" }, "Nothing yet: the story begins with the first worker group."),
    );
    this.samples.hidden = samples.length === 0;
    renew(
      this.samples,
      el("header", {}, el("h2", {}, "What does it write?"), el("p", { class: "note" }, "prompt in bold, continuation of the final state")),
      el("div", { class: "samples" }, samples.map(([prompt, text]) => el("pre", {}, el("b", {}, prompt), text))),
    );
    renew(
      this.facts,
      el("header", {}, el("h2", {}, "What is it?")),
      el("dl", { class: "facts" }, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { class: "mono" }, value)])),
      result.length ? el("details", { open: true, "data-key": "report" }, el("summary", {}, "report"), el("pre", {}, result.join("\n"))) : null,
      el("details", { "data-key": "spec" }, el("summary", {}, "run file, every setting written out"), el("pre", {}, spec)),
    );
  }

  #showAccount() {
    const { account } = this.snapshot.history;
    this.account.hidden = !account;
    if (!account) return;
    const figures = `${percent(account.of_held, 1)} of held capacity went into steps; a perfect controller: ${percent(account.of_held_perfect, 1)}`;
    renew(this.account, el("header", {}, el("h2", {}, "Where did the time go?"), el("p", { class: "note" }, figures)), ...stacked(account.causes), restarts(account.restarts));
  }

  #showTimeline() {
    const { history, figures } = this.snapshot;
    const incarnations = history.incarnations.map((view) => soFar(view, figures));
    const heading = el("header", {}, el("h2", {}, "When did it run, and what stopped it?"), el("p", { class: "note" }, "each bar a worker group; hatched: steps that were trained again; its right edge: how it ended"));
    if (!incarnations.length) return renew(this.timeline, heading, el("p", { class: "empty" }, "No worker group has started yet."));
    const showAll = () => {
      this.allShown = true;
      this.#showTimeline();
    };
    renew(this.timeline, heading, track(incarnations, figures), incarnationTable(incarnations, this.allShown, showAll));
  }
}

function stacked(causes) {
  const all = causes.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  const parts = causes.map(([cause, ms, meaning]) => {
    const part = el("i", { class: SPENT[cause] ?? "work", title: `${spoken(cause)}: ${duration(ms / 1000)}, ${percent(ms / all, 1)}. ${meaning}` });
    part.style.width = percent(ms / all, 3);
    return part;
  });
  const rows = causes.map(([cause, ms, meaning]) => el("tr", {}, el("td", {}, el("i", { class: SPENT[cause] ?? "work" }), spoken(cause)), el("td", { class: "num" }, duration(ms / 1000)), el("td", { class: "num" }, percent(ms / all, 1)), el("td", { class: "note hide-small" }, meaning)));
  return [el("div", { class: "spent", "aria-hidden": "true" }, parts), el("details", { "data-key": "account" }, el("summary", { class: "note" }, "each cause"), el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, rows))))];
}

function restarts(found) {
  if (!found.length) return null;
  const rows = found.map(([number, attempt, ms, causes]) => el("tr", {}, el("td", { class: "num" }, whole(number)), el("td", { class: "num" }, duration(ms / 1000)), el("td", { class: "note" }, causes.map(([cause, part]) => `${spoken(cause)} ${(part / 1000).toFixed(1)} s`).join(", ")), el("td", { class: "note hide-small" }, attempt ? "new attempt, from its begin" : "new worker group, from the last step before")));
  return el("details", { "data-key": "restarts" }, el("summary", { class: "note" }, "each start, until its first new step"), el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, rows))));
}

function headline(f) {
  if (f.state === "finished") return `finished ${around(f.updated_s)}`;
  if (f.state === "training" && f.left_s !== null) return `done ${around(now() + f.left_s)} if nothing interrupts it`;
  return f.updated_s ? `last sign of life ${ago(f.updated_s)}` : "";
}

function tiles(f) {
  const tile = (name, value, ...notes) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value), el("dd", {}, notes.filter(Boolean).join("; ")));
  const speed = f.step_s && f.tokens_per_step ? f.tokens_per_step / f.step_s : null;
  const p = f.period;
  const endings = Object.entries(p?.endings ?? {}).map(([cause, n]) => `${n} ${spoken(cause)}`);
  const gain = f.unigram_entropy && f.final_loss ? `${(f.unigram_entropy - f.final_loss).toFixed(3)} below the unigram entropy` : "";
  const found = [
    tile("loss, newest step", f.loss === null ? (f.step ? "not finite" : "none yet") : f.loss.toFixed(3), f.final_loss ? `final ${f.final_loss.toFixed(3)}, mean of the last steps` : f.all_loss === null ? "" : `${f.all_loss.toFixed(3)} with the sentinels`, gain),
    tile("speed", speed ? `${compact(speed)} tokens/s` : "none yet", f.step_s ? `${duration(f.step_s)} a step` : ""),
  ];
  if (f.left_s !== null) found.push(tile("time left", duration(f.left_s), "at this speed"));
  if (p && f.read_all) found.push(tile(p.whole_run ? (f.state === "finished" ? "the whole run" : "so far") : "last 24 hours", p.training_share === null ? `${whole(p.steps)} steps` : `${percent(p.training_share)} training`, `${whole(p.steps)} steps`, endings.join(", ") || "no interruption", p.undone_steps ? `${plural(p.undone_steps, "step")} trained again` : ""));
  if (f.checkpoint_step !== null) found.push(tile("checkpoint", `step ${whole(f.checkpoint_step)}`, f.state === "finished" ? `accepted ${moment(f.checkpoint_s)}` : `accepted ${ago(f.checkpoint_s)}`, f.step > f.checkpoint_step ? `${plural(f.step - f.checkpoint_step, "step")} at risk` : "", f.cadence && `saves ${f.cadence}`));
  return el("dl", { class: "tiles" }, found);
}

// The newest worker group goes on while its history stands still: its last step is in the figures.
const soFar = (view, f) => (view.ending || view.number !== f.incarnations || view.last_step === null ? view : { ...view, last_step: Math.max(view.last_step, f.step), kept_step: Math.max(view.kept_step, f.step), last_s: Math.max(view.last_s, f.updated_s) });

function marksOf(incarnations) {
  return incarnations.flatMap((view) => {
    const found = [];
    if (view.number > 1) found.push({ step: view.start_step, time: view.claimed_s, mood: "", title: `incarnation ${view.number} starts`, text: `${moment(view.claimed_s)}, goes on from step ${whole(view.start_step)}` });
    const end = view.ending;
    if (end && end.cause !== "done") found.push({ step: view.last_step ?? view.start_step, time: end.time_s, mood: mood(end.cause) || "warn", title: `${spoken(end.cause)}: incarnation ${view.number} ended`, text: `${moment(end.time_s)}, step ${whole(view.last_step ?? view.start_step)}: ${end.reason}` });
    return found;
  });
}

function stageMarks(stages, line) {
  return stages.flatMap((stage) => {
    const i = line.step.findIndex((step) => step >= stage.first_step);
    if (i < 0) return [];
    return [{ step: stage.first_step, time: line.time_s[i], mood: "", title: `stage ${stage.number} begins`, text: `step ${whole(stage.first_step)}: ${stage.mixture}` }];
  });
}

function track(incarnations, figures) {
  const from = incarnations[0].claimed_s;
  const to = Math.max(...incarnations.map((view) => view.ending?.time_s ?? view.last_s ?? view.claimed_s), from + 1);
  const at = (seconds) => (100 * (seconds - from)) / (to - from);
  const bars = incarnations.map((view) => {
    const end = view.ending?.time_s ?? view.last_s ?? to;
    const steps = view.last_step === null ? "no step" : `steps ${whole(view.start_step + 1)} to ${whole(view.last_step)}`;
    const why = view.ending ? `${spoken(view.ending.cause)}: ${view.ending.reason}` : spoken(figures.state);
    const text = `incarnation ${view.number}, ${moment(view.claimed_s)} to ${moment(end)}, ${steps}. ${why}`;
    const bar = el("button", { type: "button", class: view.ending ? mood(view.ending.cause) : "", title: text, "aria-label": text, "data-key": `bar-${view.number}`, tabindex: "-1", onclick: () => document.getElementById(`incarnation-${view.number}`)?.scrollIntoView({ block: "nearest" }) });
    bar.style.left = `${at(view.claimed_s)}%`;
    bar.style.width = `${Math.max(at(end) - at(view.claimed_s), 0.15)}%`;
    const trained = (view.last_step ?? 0) - view.start_step;
    if (trained > 0 && view.last_step > view.kept_step) {
      const undone = el("i");
      undone.style.width = percent((view.last_step - view.kept_step) / trained);
      bar.append(undone);
    }
    if (view.ending) bar.append(el("b"));
    return bar;
  });
  bars.at(-1).tabIndex = 0;
  const box = el("div", { class: "track", role: "group", "aria-label": "worker groups over time; arrow keys move" }, bars);
  box.addEventListener("keydown", (event) => {
    const i = bars.indexOf(document.activeElement);
    const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: bars.length - 1 }[event.key];
    if (to === undefined || !bars[to]) return;
    event.preventDefault();
    bars[i].tabIndex = -1;
    bars[to].tabIndex = 0;
    bars[to].focus();
  });
  const label = (seconds) => `${day(seconds)} ${minute(seconds)}`;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => el("span", {}, label(from + share * (to - from))));
  return el("div", {}, box, el("div", { class: "ticks", "aria-hidden": "true" }, ticks));
}

function incarnationTable(incarnations, all, showAll) {
  const newest = incarnations.toReversed();
  const shown = all ? newest : newest.slice(0, SHOWN_INCARNATIONS);
  const rows = shown.map((view) => {
    const end = view.ending;
    const undone = view.last_step !== null && view.last_step > view.kept_step ? `, ${whole(view.last_step - view.kept_step)} trained again` : "";
    const shown = [...(end?.evidence ?? []), end?.trace].filter(Boolean);
    const details = shown.length ? el("details", { "data-key": `evidence-${view.number}` }, el("summary", { class: "note" }, "evidence"), shown.map((text) => el("pre", {}, text))) : null;
    const hosts = view.hosts.toSorted().slice(0, 4).map((host) => el("div", { class: "host" }, host));
    if (view.hosts.length > hosts.length) hosts.push(`and ${view.hosts.length - hosts.length} more`);
    const where = hosts.length ? hosts : view.processes ? `${plural(view.processes, "process", "processes")}, ${plural(view.devices, "device")}` : "";
    return el("tr", { id: `incarnation-${view.number}` },
      el("td", { class: "num" }, String(view.number)),
      el("td", { class: "num" }, moment(view.claimed_s)),
      el("td", { class: "num" }, view.last_s === null ? "" : duration(view.last_s - view.claimed_s)),
      el("td", { class: "num" }, view.last_step === null ? `from ${whole(view.start_step + 1)}` : `${whole(view.start_step + 1)} to ${whole(view.last_step)}${undone}`),
      el("td", { class: "hide-small" }, where),
      el("td", {}, end ? badge(end.cause) : ""),
      el("td", { class: "note" }, end ? el("div", {}, end.reason, end.action === "stop" ? " (the driver gave up)" : "") : "", details));
  });
  const heads = ["incarnation", "began", "lasted", "steps", "where", "ended by", "reason"];
  const head = el("thead", {}, el("tr", {}, heads.map((name, i) => el("th", { scope: "col", class: i < 4 ? "num" : i === 4 ? "hide-small" : null }, name))));
  const more = newest.length > shown.length ? el("p", {}, el("button", { type: "button", class: "more", "data-key": "all", onclick: showAll }, `show all ${newest.length}`)) : null;
  return el("div", { class: "scroll" }, el("table", {}, head, el("tbody", {}, rows)), more);
}

function append(line, points) {
  const last = line.step.at(-1) ?? 0;
  const start = points.step.findIndex((step) => step > last);
  if (start < 0) return;
  for (const name of ["incarnation", "step", "time_s"]) line[name].push(...points[name].slice(start));
  for (const [name, curve] of Object.entries(line)) {
    if (Array.isArray(curve) || !points[name]) continue;
    const mean = points[name].mean.slice(start);
    if (curve.low) {
      curve.low.push(...(points[name].low?.slice(start) ?? mean));
      curve.high.push(...(points[name].high?.slice(start) ?? mean));
    }
    curve.mean.push(...mean);
  }
}

function mergeColumns(load, newer) {
  const first = newer.columns[0]?.[0] ?? Infinity;
  load.width = newer.width;
  load.columns = [...load.columns.filter(([column]) => column < first), ...newer.columns];
}
