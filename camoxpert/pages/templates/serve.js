"use strict";
// The page of `camoxpert serve`: sends an image, draws what was found. Loads nothing from elsewhere;
// text from files and from the server is only ever set as text.
const TINT = [63, 185, 80], TINT_ALPHA = 115;
const STEPS = 100, MOST_TRIES = 5;
// A pixel as one number, in the byte order of this machine.
const pixel = (...bytes) => new Uint32Array(new Uint8ClampedArray(bytes).buffer)[0];
const INSIDE = pixel(...TINT, TINT_ALPHA), EDGE = pixel(...TINT, 255);
const GREYS = Uint32Array.from({ length: 256 }, (_, level) => {
  const grey = 2.55 * Math.min(level, STEPS);
  return pixel(grey, grey, grey, 255);
});
const at = (id) => document.getElementById(id);
const app = at("app"), slider = at("threshold");
let shown = null;
let running = null;
let due = 0;

class Told extends Error {}

function say(text, busy = false) {
  at("status").textContent = text;
  at("status").classList.toggle("busy", busy);
}

function fail(text) {
  say("");
  at("error").textContent = text;
  at("error").hidden = false;
}

function pause(seconds, signal) {
  return new Promise((done, stop) => {
    const timer = setTimeout(done, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); stop(signal.reason); });
  });
}

// Returns the answer to a file; waits and tries again where the server has too much to do.
async function post(path, file, signal) {
  for (let tries = 1; ; tries++) {
    let answer;
    try {
      answer = await fetch(path, {
        method: "POST", body: file, signal,
        headers: { "Content-Type": "application/octet-stream" },
      });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Told("The server does not answer. Is `camoxpert serve` still running?");
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({}));
    const seconds = Number(answer.headers.get("Retry-After"));
    if (answer.status !== 503 || !seconds || tries === MOST_TRIES)
      throw new Told(told.error || `The server answered with code ${answer.status}.`);
    say(`Others are waiting; trying again in ${seconds} s.`, true);
    await pause(seconds, signal);
  }
}

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Takes a file, and shows what was found in it.
async function open(file) {
  if (running) running.abort();
  at("error").hidden = true;
  if (file.size > Number(app.dataset.bytes)) {
    fail(`The file has ${(file.size / 1e6).toFixed(1)} MB; at most ${app.dataset.megabytes} MB ` +
      "are taken. Save the image smaller, or as JPEG.");
    return;
  }
  if (!file.size) {
    fail("The file is empty. Choose an image.");
    return;
  }
  const own = running = new AbortController();
  say("Looking at the image ...", true);
  buttons(false);
  try {
    const found = await (await post("/api/view", file, own.signal)).json();
    const levels = await inflated(found.view.levels);
    if (running !== own) return;
    shown = { file, found, ...prepared(levels, found.view) };
    await show();
    say(`${found.width} × ${found.height} pixels, done in ${seconds(found.seconds.total)}.`);
  } catch (error) {
    if (own.signal.aborted) return;
    if (shown) say("");
    fail(error instanceof Told ? error.message : `The answer could not be shown: ${error.message}`);
  } finally {
    if (running === own) {
      running = null;
      buttons(true);
    }
  }
}

const seconds = (value) => value < 0.995 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

function buttons(enabled) {
  for (const button of document.querySelectorAll("[data-kind]")) button.disabled = !enabled;
}

async function show() {
  const { found } = shown, { view } = found;
  at("image").src = `data:image/jpeg;base64,${view.image}`;
  await at("image").decode();
  at("stage").style.setProperty("--ratio", view.width / view.height);
  at("overlay").width = view.width;
  at("overlay").height = view.height;
  if (at("presence") && found.presence !== null) at("presence").textContent = percent(found.presence);
  at("forward").textContent = seconds(found.seconds.forward);
  at("experts-section").hidden = !found.experts.length;
  at("experts").replaceChildren(...found.experts.map(levelOf));
  at("result").hidden = false;
  app.classList.add("shown");
  at("choose").textContent = "Choose another image";
  draw();
}

function made(tag, name, ...inside) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...inside);
  return element;
}

function levelOf({ level, experts }) {
  const rows = experts.map(({ name, weight }) => {
    const bar = made("i", "");
    bar.style.width = `${100 * weight}%`;
    return made("div", "expert", made("span", "", name), made("span", "bar", bar),
      made("span", "weight", `${Math.round(100 * weight)} %`));
  });
  return made("div", "level", made("h3", "", level), ...rows);
}

// Returns what every redraw of an image needs, so that the slider only compares numbers:
// lowest: the least of the four levels that decide about a pixel of the outline;
// above: how many pixels lie above each threshold.
function prepared(levels, { width, height }) {
  // Pixels of the outline, as in the pictures that `predict` writes.
  const wide = Math.max(1, Math.round(Math.max(width, height) / 300)), down = wide * width;
  const lowest = new Uint8Array(levels.length), above = new Uint32Array(STEPS + 2);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      let least = levels[i];
      above[Math.min(least, STEPS + 1)]++;
      if (x >= wide && levels[i - wide] < least) least = levels[i - wide];
      if (x < width - wide && levels[i + wide] < least) least = levels[i + wide];
      if (y >= wide && levels[i - down] < least) least = levels[i - down];
      if (y < height - wide && levels[i + down] < least) least = levels[i + down];
      lowest[i] = least;
    }
  }
  for (let cut = STEPS, sum = above[STEPS + 1]; cut >= 0; cut--) {
    const at_cut = above[cut];
    above[cut] = sum;
    sum += at_cut;
  }
  const context = at("overlay").getContext("2d"), picture = context.createImageData(width, height);
  return { levels, lowest, above, picture, pixels: new Uint32Array(picture.data.buffer) };
}

// Asks for a redraw with the next frame: a slider reports more movements than a screen can show.
function redraw() {
  due = due || requestAnimationFrame(draw);
}

// Draws over the image: the mask above the slider's threshold with its outline, or probabilities.
function draw() {
  cancelAnimationFrame(due);
  due = 0;
  const cut = Number(slider.value);
  at("threshold-value").textContent = (cut / STEPS).toFixed(2);
  if (!shown) return;
  const { levels, lowest, above, picture, pixels } = shown;
  const mode = document.querySelector("[name=show]:checked").value;
  if (mode === "probability") {
    for (let i = 0; i < levels.length; i++) pixels[i] = GREYS[levels[i]];
  } else if (mode === "mask") {
    for (let i = 0; i < levels.length; i++)
      pixels[i] = levels[i] > cut ? (lowest[i] > cut ? INSIDE : EDGE) : 0;
  } else pixels.fill(0);
  at("overlay").getContext("2d").putImageData(picture, 0, 0);
  at("share").textContent = percent(above[cut] / levels.length);
}

// Saves what `predict` would write for the image; the server makes it, at the image's own size.
async function download(kind) {
  const { file } = shown;
  const query = kind === "mask" ? `?threshold=${Number(slider.value) / STEPS}` : "";
  const own = running = new AbortController();
  at("error").hidden = true;
  buttons(false);
  say("Making the file ...", true);
  try {
    const blob = await (await post(`/api/${kind}${query}`, file, own.signal)).blob();
    if (running !== own) return;
    const link = made("a", "");
    link.href = URL.createObjectURL(blob);
    link.download = `${(file.name || "image").replace(/\.[^.]*$/, "")}-${kind}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`${link.download} is saved.`);
  } catch (error) {
    if (!own.signal.aborted) fail(error instanceof Told ? error.message : String(error.message));
  } finally {
    if (running === own) {
      running = null;
      buttons(true);
    }
  }
}

function take(files) {
  if (files.length) open(files[0]);
  else fail("That was not an image file. Save the picture, and drop or choose the file.");
}

at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  if (at("file").files.length) open(at("file").files[0]);
  at("file").value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files]));
slider.addEventListener("input", redraw);
for (const radio of document.querySelectorAll("[name=show]")) radio.addEventListener("change", redraw);
for (const button of document.querySelectorAll("[data-kind]"))
  button.addEventListener("click", () => download(button.dataset.kind));
// Browsers restore a slider after a reload; the image is gone.
slider.value = slider.dataset.first;
draw();
