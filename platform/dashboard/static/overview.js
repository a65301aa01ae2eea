// The first page: what is asked for, where it can run, and how far every run is.
import { sparkline } from "./charts.js";
import { ago, around, badge, compact, duration, el, now, onThemeChange, percent, plural, progress, renew, setServerTime, whole } from "./format.js";

const main = document.getElementById("page");
const live = document.getElementById("live");
let page = null;

const cell = (content, kind = "") => el("td", { class: kind }, content);
const code = (text) => el("code", {}, text);

function section(title, note, ...body) {
  return el("section", {}, el("header", {}, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null), body);
}

function table(heads, rows) {
  const head = heads.map(([name, kind]) => el("th", { scope: "col", class: kind }, name));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
}

function runs() {
  const order = { training: 0, starting: 1, restarting: 2, preparing: 3, silent: 4, failed: 5, unreadable: 6, stopped: 7, finished: 8 };
  const sorted = page.runs.toSorted((a, b) => order[a.state] - order[b.state] || b.updated_s - a.updated_s);
  const rows = sorted.map((run) => {
    const speed = run.step_s && run.tokens_per_step ? `${compact(run.tokens_per_step / run.step_s)} tokens/s` : "";
    const steps = run.steps ? `${percent(run.step / run.steps)} · ${whole(run.step)} / ${whole(run.steps)}` : whole(run.step);
    const problem = run.problem || run.reason || (run.read_all ? "" : "its history is being read");
    return el("tr", {},
      cell([el("a", { href: `/runs/${run.key}`, "data-key": `run-${run.key}` }, run.name), el("div", { class: "note" }, run.path), problem ? el("div", { class: run.problem ? "note problem" : "note" }, problem) : null]),
      cell(badge(run.state)),
      cell([el("span", { class: "num" }, steps), progress(run.step, run.steps)], "wide"),
      cell(sparkline(run.spark), "hide-small"),
      cell(run.loss === null ? "" : run.loss.toFixed(3), "num"),
      cell(speed, "num"),
      cell(run.left_s === null ? "" : duration(run.left_s), "num"),
      cell(run.updated_s ? ago(run.updated_s) : "", "num"));
  });
  const missing = Object.values(page.unlisted).map((problem) => el("p", { class: "problem" }, problem));
  if (!rows.length)
    return section("Which runs are there?", "", missing, el("p", { class: "empty" }, "No run in ", page.folders.join(", ") || "any folder", " yet. ", code("openmoe quickstart"), " trains a small one in a few minutes; ", code("openmoe dashboard FOLDER"), " looks at the runs of another folder."));
  const heads = [["run"], ["state"], ["progress"], ["loss so far", "hide-small"], ["loss, nats", "num"], ["speed", "num"], ["left", "num"], ["last sign", "num"]];
  return section("Which runs are there?", plural(rows.length, "run"), missing, table(heads, rows));
}

function jobs() {
  if (!page.controller)
    return section("What is asked for?", "", el("p", { class: "empty" }, "No controller has run on this machine. ", code("openmoe up"), " starts a cluster and a controller; ", code("openmoe submit RUN.yaml"), " asks it for a run."));
  if (page.jobs_problem)
    return section("What is asked for?", "", el("p", { class: "problem" }, page.jobs_problem));
  if (!page.jobs.length)
    return section("What is asked for?", "", el("p", { class: "empty" }, "No job. ", code("openmoe submit RUN.yaml"), " asks for one."));
  const byKey = new Map(page.runs.map((run) => [run.key, run]));
  const newestOf = new Map(page.jobs.toReversed().map((job) => [job.run, job.id])); // older ones are not about how far it is now
  const rows = page.jobs.slice(0, 50).map((job) => {
    const run = newestOf.get(job.run) === job.id ? byKey.get(job.run) : null;
    const name = job.run ? el("a", { href: `/runs/${job.run}`, "data-key": `job-${job.id}` }, job.id) : job.id;
    return el("tr", {},
      cell([name, job.schedule ? el("div", { class: "note" }, `schedule ${job.schedule}`) : null]),
      cell(badge(job.cluster_lost ? "cluster_lost" : job.state)),
      cell(run ? [el("span", { class: "num" }, `${whole(run.step)}${run.steps ? ` / ${whole(run.steps)}` : ""}`), progress(run.step, run.steps)] : "", "wide"),
      cell(job.attempt ? String(job.attempt) : "", "num"),
      cell(job.cluster),
      cell(job.reason, "note"),
      cell(ago(job.changed_s), "num"));
  });
  const note = page.jobs.length > 50 ? `newest 50 of ${page.jobs.length}` : plural(page.jobs.length, "job");
  return section("What is asked for?", note, table([["job"], ["state"], ["progress"], ["attempt", "num"], ["cluster"], ["reason"], ["changed", "num"]], rows));
}

function schedules() {
  if (!page.schedules.length) return null;
  const rows = page.schedules.map((s) =>
    el("tr", {}, cell(s.name), cell(s.run_name), cell(`${s.cron} (${s.timezone})`, "mono"), cell(s.problem ? el("span", { class: "problem" }, s.problem) : s.paused ? badge("paused") : s.next_s ? `${around(s.next_s)}, in ${duration(s.next_s - now())}` : "", "num"), cell(s.last_result, "note")),
  );
  return section("What starts by the clock?", "", table([["schedule"], ["run"], ["cron"], ["next", "num"], ["last firing"]], rows));
}

function clusters() {
  if (!page.clusters.length) return null;
  const rows = page.clusters.map((cluster) =>
    el("tr", {}, cell(cluster.name), cell(cluster.provider), cell(cluster.problem ? el("span", { class: "problem" }, cluster.problem) : badge(cluster.head_alive ? "ready" : "broken")),
      cell(el("div", { class: "slices" }, cluster.slices.map((slice) => el("span", { class: "note" }, `${slice.name} (${plural(slice.hosts, "host")}) `, badge(slice.state)))))),
  );
  return section("Where can it run?", "clusters of this machine", table([["cluster"], ["provider"], ["head"], ["slices"]], rows));
}

function show() {
  const empty = (section) => section.querySelectorAll(".empty").length;
  renew(main, ...[jobs(), schedules(), clusters(), runs()].filter(Boolean).toSorted((a, b) => empty(a) - empty(b)));
}

function take(newest) {
  page = newest;
  setServerTime(page.now_s);
  show();
}

function say(text, kind) {
  live.textContent = text;
  live.className = `live ${kind}`;
}

const events = new EventSource("/api/overview/events");
events.addEventListener("open", () => say("live", "on"));
events.addEventListener("update", (event) => take(JSON.parse(event.data)));
events.addEventListener("error", () => say(events.readyState === EventSource.CLOSED ? "closed; open the address with the token again" : "no connection; trying again", "off"));
onThemeChange(() => page && show());
