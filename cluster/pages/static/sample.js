"use strict";

// Drawing: a form of settings, and the jobs that came of it, newest first.

const POLL_MS = 300;
const ENDED = ["done", "failed", "cancelled"];

async function open() {
  const about = await ask("/api/sample");
  $("model").replaceChildren(...about.models.map(({ name, side }) => new Option(`${name} (${side} px)`, name)));
  $("sampler").replaceChildren(...about.samplers.map((name) => new Option(name, name, name === "ddim", name === "ddim")));
  $("enlarge-row").hidden = !about.enlarged_side;
  $("enlarge").checked = Boolean(about.enlarged_side);
  $("enlarge-text").textContent = `Enlarge to ${about.enlarged_side} px`;
  for (const id of ["guidance", "strength"]) {
    const tell = () => { $(`${id}-value`).textContent = $(id).value; };
    $(id).addEventListener("input", tell);
    tell();
  }
  take(null);
  for (const job of (await ask("/api/sample/jobs")).reverse()) follow(job);
}

function wish() {
  const form = new FormData($("wish"));
  const found = {
    model: form.get("model"), prompt: form.get("prompt"), guidance: Number(form.get("guidance")),
    steps: form.get("steps").trim(), sampler: form.get("sampler"), pictures: Number(form.get("pictures")),
    seed: Number(form.get("seed")), enlarge: $("enlarge").checked,
  };
  if (!easel.side) return found;
  found.image = base64($("picture"));
  if (form.get("way") === "vary") return { ...found, strength: Number($("strength").value) };
  if (!easel.painted) throw new Error("nothing is painted yet; paint over what is to be drawn anew");
  return { ...found, mask: maskPicture() };
}

$("wish").addEventListener("submit", async (event) => {
  event.preventDefault();
  showError($("error"), "");
  try {
    follow(await ask("/api/sample/jobs", wish()));
  } catch (error) {
    showError($("error"), error.message);
  }
});
$("wish").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("wish").requestSubmit();
});

// The picture to start from.

function take(image) {
  place(image);
  for (const id of ["edit", "easel", "remove"]) $(id).hidden = !image;
  $("choose").hidden = Boolean(image);
  $("file").value = "";
  showWay();
}

function showWay() {
  const painting = new FormData($("wish")).get("way") === "paint";
  $("brushes").hidden = !easel.side || !painting;
  $("mask").hidden = !painting;
  $("strength-row").hidden = !easel.side || painting;
}

async function takeFrom(source) {
  const image = Object.assign(new Image(), { src: source });
  try {
    await image.decode();
  } catch {
    showError($("error"), "this file is no picture that the browser can show; choose a PNG, JPEG or WebP");
    $("file").value = "";
    return;
  }
  take(image);
  showError($("error"), "");
}

document.querySelectorAll("[name=way]").forEach((radio) => radio.addEventListener("change", showWay));
$("remove").addEventListener("click", () => take(null));
$("file").addEventListener("change", async () => {
  if (!$("file").files.length) return;
  const url = URL.createObjectURL($("file").files[0]);
  await takeFrom(url);
  URL.revokeObjectURL(url);
});

// The jobs.

async function follow(job) {
  $("empty").hidden = true;
  const card = document.createElement("article");
  card.className = "job";
  $("results").prepend(card);
  for (;;) {
    render(card, job);
    if (ENDED.includes(job.state)) return;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    try {
      job = await ask(`/api/sample/jobs/${job.id}`);
    } catch (error) {
      job = { ...job, state: "failed", error: error.message };
    }
  }
}

function render(card, job) {
  const head = element("div", "row");
  head.append(element("h2", "", job.wish.prompt));
  const parts = [head, element("p", "soft small", settingsLine(job))];
  if (!ENDED.includes(job.state)) {
    const cancel = Object.assign(element("button", "quiet small", "Cancel"), { type: "button" });
    cancel.addEventListener("click", () => ask(`/api/sample/jobs/${job.id}/cancel`, {}).catch((error) => showError($("error"), error.message)));
    head.append(cancel);
    const progress = element("div", "progress");
    const bar = element("div");
    bar.style.width = `${job.steps ? (100 * job.done) / job.steps : 0}%`;
    progress.append(bar);
    const note = job.state === "waiting" ? "waits for the one before it"
      : job.steps ? `${job.note}, step ${job.done} of ${job.steps}` : "reads the model";
    parts.push(progress, element("p", "soft small", note));
  }
  if (job.state === "cancelled") parts.push(element("p", "soft small", "cancelled"));
  for (const line of job.warnings) parts.push(element("p", "soft small", line));
  if (job.error) parts.push(Object.assign(element("p", "error", job.error), { role: "alert" }));
  if (job.pictures.length) parts.push(pictures(job));
  card.replaceChildren(...parts);
}

function settingsLine({ wish, edited }) {
  const parts = [wish.model, `guidance ${wish.guidance}`, `${wish.steps} steps`, wish.sampler, `seed ${wish.seed}`];
  if (wish.enlarge) parts.push("enlarged");
  if (edited === "painted") parts.push("a part redrawn");
  if (edited === "varied") parts.push(`a picture varied by ${wish.strength}`);
  return parts.join("  ·  ");
}

function pictures(job) {
  const grid = element("div", "pictures");
  for (const src of job.pictures) {
    const cell = element("div", "picture");
    const edit = Object.assign(element("button", "", "Edit"), { type: "button", title: "Start from this picture" });
    edit.addEventListener("click", () => takeFrom(src));
    cell.append(Object.assign(new Image(), { src, alt: job.wish.prompt }), edit);
    grid.append(cell);
  }
  return grid;
}

function element(name, className = "", text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}

open().catch((error) => showError($("error"), error.message));
