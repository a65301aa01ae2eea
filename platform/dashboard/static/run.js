// Feeds the page of a run: from the server as it happens, or from the snapshot that the file carries with it.
import { around } from "./format.js";
import { RunPage } from "./run_page.js";

const page = new RunPage(document.getElementById("page"));
const live = document.getElementById("live");
const carried = document.getElementById("snapshot");

function say(text, kind) {
  live.textContent = text;
  live.className = `live ${kind}`;
}

async function follow() {
  const address = `/api${location.pathname}`;
  let snapshot;
  try {
    const answer = await fetch(address);
    if (answer.status === 401) return say("open the address with the token again", "off");
    if (answer.status === 404) return say("this run is gone", "off");
    snapshot = await answer.json();
  } catch {
    say("no connection; trying again", "off");
    return void setTimeout(follow, 3000);
  }
  page.show(snapshot);
  say("live", "on");
  const events = new EventSource(`${address}/events?after=${encodeURIComponent(snapshot.cursor)}`);
  const again = () => {
    events.close();
    setTimeout(follow, 500);
  };
  events.addEventListener("open", () => say("live", "on"));
  events.addEventListener("update", (event) => page.update(JSON.parse(event.data)) && again());
  events.addEventListener("reset", again);
  events.addEventListener("error", () => {
    say("no connection; trying again", "off");
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  });
}

if (carried) {
  const snapshot = JSON.parse(carried.textContent);
  page.show(snapshot);
  say(`as of ${around(snapshot.figures.updated_s)}`, "");
} else {
  follow();
  setInterval(() => page.tick(), 5000);
}
