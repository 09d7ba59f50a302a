"use strict";

// Judging: a name and a question, then pair after pair. Nothing here knows which model drew what.

const KEYS = { 1: "left", 0: "tie", 2: "right" };
const SEEN_MS = 160;  // how long a choice stays marked

let turn = null;  // what is shown, while it may be answered
let judge = "";
let seenAt = 0;

async function welcome() {
  for (const id of ["stage", "end"]) $(id).hidden = true;
  $("welcome").hidden = false;
  const questions = await ask("/api/judge");
  const before = new FormData($("start")).get("question") || sessionStorage.getItem("question");
  $("questions").querySelectorAll("label").forEach((label) => label.remove());
  for (const { question, text, comparisons } of questions) {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), {
      type: "radio", name: "question", value: question, required: true, checked: question === before,
    });
    const count = Object.assign(document.createElement("span"), { className: "soft small", textContent: `${comparisons} pairs` });
    label.append(radio, text, count);
    $("questions").append(label);
  }
  if (!$("questions").querySelector(":checked")) $("questions").querySelector("input").checked = true;
  $("judge").value ||= sessionStorage.getItem("judge") || "";
  $("judge").focus();
}

$("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  judge = $("judge").value.trim();
  const question = new FormData($("start")).get("question");
  try {
    const first = await ask("/api/judge/begin", { judge, question });
    sessionStorage.setItem("judge", judge);
    sessionStorage.setItem("question", question);
    showError($("start-error"), "");
    $("welcome").hidden = true;
    await show(first);
  } catch (error) {
    showError($("start-error"), error.message);
  }
});

/** Both sides appear at the same moment, once all their pictures are there: from then on time counts. */
async function show(next) {
  turn = null;
  $("stage").hidden = next.done;
  $("end").hidden = !next.done;
  showError($("error"), "");
  document.querySelectorAll(".chosen").forEach((element) => element.classList.remove("chosen"));
  if (next.done) {
    $("end-text").textContent = `${judge}, you have judged all ${next.comparisons} pairs of this question.`;
    return;
  }
  $("question").textContent = next.text;
  $("caption").textContent = next.caption;
  $("count").textContent = `${next.answered + 1} of ${next.comparisons}`;
  $("bar").style.width = `${(100 * next.answered) / next.comparisons}%`;
  $("sides").classList.add("waiting");
  const pictures = ["left", "right"].flatMap((side) => fill($(side), next[side]));
  try {
    await Promise.all(pictures.map((picture) => picture.decode()));
  } catch {
    showError($("error"), "a picture could not be shown; reload the page");
    return;
  }
  $("sides").classList.remove("waiting");
  seenAt = performance.now();
  turn = next;
}

function fill(side, sources) {
  side.style.setProperty("--columns", Math.round(Math.sqrt(sources.length)));
  const pictures = sources.map((src) => Object.assign(new Image(), { src, alt: "", draggable: false }));
  side.replaceChildren(...pictures);
  return pictures;
}

async function choose(choice) {
  if (!turn) return;
  const answered = turn;
  turn = null;  // a second key press is no second answer
  document.activeElement.blur();  // the next pair begins with nothing marked
  document.querySelectorAll(`[data-choice="${choice}"]`).forEach((element) => element.classList.add("chosen"));
  const marked = new Promise((resolve) => setTimeout(resolve, SEEN_MS));
  const ms = Math.round(performance.now() - seenAt);
  try {
    const next = await ask("/api/judge/answer", { judge, token: answered.token, turn: answered.turn, choice, ms });
    await marked;
    await show(next);
  } catch (error) {
    document.querySelectorAll(".chosen").forEach((element) => element.classList.remove("chosen"));
    showError($("error"), error.message);
    turn = answered;
  }
}

document.querySelectorAll("[data-choice]").forEach((button) =>
  button.addEventListener("click", () => choose(button.dataset.choice)));
document.addEventListener("keydown", (event) => {
  if (!$("stage").hidden && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey && KEYS[event.key]) {
    event.preventDefault();
    choose(KEYS[event.key]);
  }
});
$("again").addEventListener("click", () => welcome());
welcome().catch((error) => showError($("start-error"), error.message));
