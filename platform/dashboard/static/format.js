// Words and numbers for people, and elements made of text only: nothing that comes from a run is ever parsed as HTML.

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Replaces what is in an element, and leaves alone what a reader has opened, focused or scrolled to in it.
export function renew(box, ...children) {
  const key = (element) => element?.dataset?.key;
  const opened = new Map([...box.querySelectorAll("details[data-key]")].map((details) => [key(details), details.open]));
  const focused = box.contains(document.activeElement) ? key(document.activeElement) : null;
  const scrolled = new Map([...box.querySelectorAll(".story, .scroll")].map((e, i) => [i, [e.scrollLeft, e.scrollTop]]));
  box.replaceChildren(...children.filter(Boolean));
  for (const details of box.querySelectorAll("details[data-key]")) details.open = opened.get(key(details)) ?? details.open;
  box.querySelectorAll(".story, .scroll").forEach((e, i) => e.scrollTo(...(scrolled.get(i) ?? [0, 0])));
  if (focused) box.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

export const whole = (value) => Math.round(value).toLocaleString("en-US");
export const plural = (n, word, many = `${word}s`) => `${whole(n)} ${n === 1 ? word : many}`;
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;

export function compact(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * (letter === "k" ? 10 : 1)) return `${+(value / unit).toPrecision(3)}${letter}`;
  return size >= 1000 || Number.isInteger(value) ? whole(+value.toPrecision(4)) : `${+value.toPrecision(3)}`;
}

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 90) return `${s < 10 && s % 1 ? s.toFixed(1) : Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  return hours % 24 ? `${days} d ${hours % 24} h` : `${days} d`;
}

const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const LONG_DAY = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short" });
const MINUTE = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const SECOND = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const day = (seconds) => DAY.format(seconds * 1000);
export const minute = (seconds) => MINUTE.format(seconds * 1000);
export const second = (seconds) => SECOND.format(seconds * 1000);
export const moment = (seconds) => `${day(seconds)} ${second(seconds)}`;
export const around = (seconds) => `${LONG_DAY.format(seconds * 1000)}, ${minute(seconds)}`;

// Time as the server has it: its clock and the browser's may differ.
let serverAhead = 0;
export function setServerTime(seconds) {
  serverAhead = seconds - Date.now() / 1000;
}
export const now = () => Date.now() / 1000 + serverAhead;
export const ago = (seconds) => (now() - seconds < 2 ? "just now" : `${duration(Math.round(now() - seconds))} ago`);

const KINDS = {
  good: ["training", "finished", "running", "succeeded", "ready", "done"],
  warn: ["starting", "restarting", "stopping", "silent", "preemption", "preempted", "lost_slice", "unseen", "cluster_lost", "stopped",
    "operator"],
  bad: ["failed", "broken", "unreadable", "host_fault", "hang", "out_of_memory", "bad_numbers", "bad_code", "bad_input",
    "damaged_checkpoint", "superseded", "unknown"],
};
const WORDS = { unseen: "no verdict", unknown: "cause unknown", out_of_memory: "out of memory", cluster_lost: "cluster lost",
  lost_slice: "slice lost" };

export const mood = (word) => Object.keys(KINDS).find((kind) => KINDS[kind].includes(word)) ?? "";
export const spoken = (word) => WORDS[word] ?? word.replaceAll("_", " ");
export const badge = (word) => el("span", { class: `badge ${mood(word)}` }, spoken(word));

export function progress(step, steps) {
  const bar = el("i");
  const share = steps ? Math.min(step / steps, 1) : 0;
  bar.style.width = percent(share, 2);
  const text = steps ? `${whole(step)} of ${whole(steps)} steps` : `${whole(step)} steps`;
  return el("div", { class: "progress", role: "progressbar", "aria-label": text, "aria-valuemin": 0, "aria-valuemax": steps ?? 0, "aria-valuenow": step }, bar);
}

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export function onThemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
