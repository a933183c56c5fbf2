// Samples: class, seed and settings -> a grid that appears while it is denoised, and the way there, step by step.
import { stream } from "./api.js";
import { $, announce, arrowKeys, counted, element, latest } from "./dom.js";
import { source } from "./pictures.js";
import { change, model, nameOf, newSeed, onChange, sampled, sampling, settings, work } from "./state.js";

const FRAME = 90; // milliseconds that a step is shown for
const SLIDERS = { steps: 0, temperature: 2, guidance: 2 }; // digits behind the point

const calm = matchMedia("(prefers-reduced-motion: reduce)");

let frames = []; // {step, of, images}: what the codes said after each step, PNGs
let drawn = []; // the samples, as the API has them
let playing = 0; // the timer that goes from frame to frame

/** Sets up the controls. */
export function startSampling() {
  addChips();
  $("steps").max = model.sampling.max_steps;
  $("guidance-field").hidden = !model.conditional;
  $("wanted").addEventListener("change", ({ target }) => {
    const label = target.value === "" ? null : Number(target.value);
    if (target.name === "class") ask({ class: label, as: label });
    else if (target.checkValidity()) ask({ seed: target.valueAsNumber || 0 });
  });
  $("wanted").addEventListener("submit", (event) => {
    event.preventDefault();
    ask({ seed: newSeed() });
  });
  for (const name of Object.keys(SLIDERS)) {
    $(name).addEventListener("input", () => showValue(name, $(name).valueAsNumber));
    $(name).addEventListener("change", () => ask({ [name]: $(name).valueAsNumber }));
  }
  $("side").addEventListener("input", () => ($("side-value").value = $("side").valueAsNumber ** 2));
  $("side").addEventListener("change", () => ask({ side: $("side").valueAsNumber, chosen: 0 }));
  $("defaults").addEventListener("click", () => {
    const { steps, temperature, guidance } = model.sampling;
    ask({ steps, temperature, guidance });
  });
  $("moment").addEventListener("input", () => showFrame($("moment").valueAsNumber));
  $("play").addEventListener("click", () => (playing ? stop() : play()));
  arrowKeys($("grid"), () => settings.side);
  onChange(["class", "seed", "steps", "temperature", "guidance", "side"], draw);
  onChange(["chosen"], () => drawn.length && work(choose()));
}

function addChips() {
  $("classes").hidden = !model.conditional;
  const chip = (label) =>
    element("label", { className: "chip" }, element("input", { type: "radio", name: "class", value: label ?? "" }),
      element("span", {}, nameOf(label)));
  $("class-list").append(chip(null), ...model.classes.map((_, label) => chip(label)));
}

/** Changes what is sampled: flipped bits were those of a sample before. */
const ask = (changed) => change({ ...changed, flips: [] });

/** Draws the samples that the settings ask for. */
export const draw = latest("grid", async (signal) => {
  stop();
  showSettings();
  const count = settings.side ** 2;
  layOut(count);
  announce(`Drawing ${counted(count, "image")}`);
  frames = [];
  $("process").disabled = true;
  const start = performance.now();
  const request = { label: settings.class, seed: settings.seed, count, ...sampling() };
  const answer = await stream("v1/samples/stream", signal, request, gather);
  drawn = answer.images;
  frames.at(-1).images = drawn.map(({ png }) => png); // in full size
  showFrame(frames.length - 1);
  $("process").disabled = false;
  announce(`${counted(count, "image")} drawn in ${((performance.now() - start) / 1000).toFixed(1)} seconds`);
  sampled(choose());
});

function showSettings() {
  for (const input of $("class-list").querySelectorAll("input")) {
    input.checked = input.value === `${settings.class ?? ""}`;
  }
  $("seed").value = settings.seed;
  for (const name of Object.keys(SLIDERS)) {
    $(name).value = settings[name];
    showValue(name, settings[name]);
  }
  $("guidance").disabled = settings.class === null;
  $("side").value = settings.side;
  $("side-value").value = settings.side ** 2;
}

function showValue(name, value) {
  $(`${name}-value`).value = value.toFixed(SLIDERS[name]);
}

function layOut(count) {
  const grid = $("grid");
  grid.style.setProperty("--columns", settings.side);
  grid.classList.toggle("dense", settings.side > 4);
  if (grid.childElementCount === count) return; // the old images stay until there are new ones
  grid.replaceChildren(...Array.from({ length: count }, (_, i) => {
    const image = element("img", { alt: `Sample ${i + 1}` });
    const button = element("button", { type: "button", tabIndex: i ? -1 : 0 }, image);
    button.addEventListener("click", () => ask({ chosen: i }));
    return button;
  }));
}

/** A step of some of the images, `first` and those after it: of the others it comes earlier, or later. */
function gather({ step, of, first, images }) {
  let number = frames.findIndex((frame) => frame.step === step);
  if (number < 0) number = frames.push({ step, of, images: [] }) - 1;
  images.forEach((image, i) => (frames[number].images[first + i] = image));
  if (calm.matches) showStep(frames[number]);
  else showFrame(number);
}

function showFrame(number) {
  const images = $("grid").querySelectorAll("img");
  frames[number].images.forEach((image, i) => (images[i].src = source(image)));
  $("moment").max = frames.length - 1;
  $("moment").value = number;
  showStep(frames[number]);
}

function showStep({ step, of }) {
  $("moment-says").value = step === 0 ? "coin tosses" : `step ${step} of ${of}`;
}

function play() {
  let number = 0;
  $("play").textContent = "Stop";
  showFrame(number);
  playing = setInterval(() => {
    if (number < frames.length - 1) showFrame(++number);
    else stop();
  }, FRAME);
}

function stop() {
  clearInterval(playing);
  playing = 0;
  $("play").textContent = "Play";
}

/** Shows which sample is chosen, and returns it as an image to work on. */
function choose() {
  const number = Math.min(settings.chosen, drawn.length - 1);
  const { png, bits } = drawn[number];
  $("grid").querySelectorAll("button").forEach((button, i) => {
    button.setAttribute("aria-pressed", i === number);
    button.tabIndex = i === number ? 0 : -1;
  });
  $("chosen").hidden = false;
  $("chosen-image").src = $("download").href = source(png);
  $("chosen-image").alt = `Sample ${number + 1}`;
  $("chosen-says").textContent =
    `Sample ${number + 1} of ${drawn.length}` + (settings.class === null ? "" : `, class ${nameOf(settings.class)}`);
  $("download").download = `sample-seed${settings.seed}-${number}.png`;
  return { png, bits, own: false };
}
