"use strict";

const live = document.getElementById("live");
const connection = document.getElementById("connection");
const log = document.getElementById("log");
const MOST_CHARACTERS = 500000;

function tell(text, isLost) {
  connection.textContent = text;
  connection.classList.toggle("lost", isLost);
}

// What has the focus, and what a person has opened, stays so.
function show(html) {
  const focused = live.contains(document.activeElement) ? document.activeElement.id : "";
  const summary = live.contains(document.activeElement) && document.activeElement.tagName === "SUMMARY"
    ? document.activeElement.parentElement.id : "";
  const open = [...live.querySelectorAll("details[open]")].map((each) => each.id);
  live.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus();
  if (summary) document.getElementById(summary)?.querySelector("summary")?.focus();
}

function follow() {
  const source = new EventSource(live.dataset.changes);
  source.onopen = () => tell("live", false);
  source.addEventListener("content", (event) => show(JSON.parse(event.data)));
  source.addEventListener("over", () => { source.close(); location.reload(); });
  source.onerror = () => {
    tell("no connection: trying again", true);
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 5000);
  };
}

async function readLog() {
  const answer = await fetch(log.dataset.log);
  if (!answer.ok) {
    log.textContent = `(${(await answer.json()).errors.detail})`;
    return;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    log.append(value);
    while (log.textContent.length > MOST_CHARACTERS) log.firstChild.remove();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

if (live) follow();
if (log) readLog().catch(() => log.append("\n(the connection broke off: reload to go on)"));
