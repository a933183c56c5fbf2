// The code of an image: its bits as a picture, what a flipped bit changes, and the way to another image.
import { call } from "./api.js";
import { $, arrowKeys, counted, element, latest } from "./dom.js";
import { addClasses } from "./complete.js";
import { blockOf, differenceOf, packBits, source, unpackBits } from "./pictures.js";
import { change, changes, model, onChange, sampling, settings, subject } from "./state.js";

const CELL = 6; // pixels of the picture of a bit
const GAP = 4; // pixels around a token
const WAY = 8; // images from one to the other

let bits = new Uint8Array(); // of the image, none flipped
let before = { bits: null, png: null }; // what they say
let end = { key: null, bits: null }; // of the way to another image: what it was asked for by, and its code

/** Sets up the controls. */
export function startCode() {
  const { height, width, bits: depth } = model.latent;
  const block = blockOf(depth);
  $("code-size").textContent = `${height} × ${width} tokens of ${depth} bits`;
  const [cellWidth, cellHeight] = [block.columns * CELL + 2 * GAP, block.rows * CELL + 2 * GAP];
  Object.assign($("tokens-canvas"), { width: width * cellWidth, height: height * cellHeight });
  $("tokens").style.setProperty("--w", width);
  $("tokens").style.setProperty("--shape", `${cellWidth} / ${cellHeight}`);
  for (let token = 0; token < height * width; token++) {
    const button = element("button", { type: "button" });
    button.addEventListener("click", () => change({ at: token }));
    $("tokens").append(button);
  }
  arrowKeys($("tokens"), () => width);
  $("bits").style.setProperty("--columns", Math.min(8, depth));
  for (let bit = 0; bit < depth; bit++) {
    const button = element("button", { type: "button" });
    button.addEventListener("click", () => flip([settings.at * depth + bit]));
    $("bits").append(button);
  }
  arrowKeys($("bits"), () => Math.min(8, depth));
  $("flip-token").addEventListener("click", () => {
    flip(Array.from({ length: depth }, (_, bit) => settings.at * depth + bit));
  });
  $("undo").addEventListener("click", () => change({ flips: [] }));
  $("patch").style.setProperty("--w", width);
  $("patch").style.setProperty("--h", height);
  addClasses($("to-class"), "to");
  $("to-class-label").hidden = $("to-class").hidden = !model.conditional;
  $("to-seed").addEventListener("change", () => {
    if ($("to-seed").checkValidity()) change({ toseed: $("to-seed").valueAsNumber || 0 });
  });
  changes.addEventListener("subject", () => {
    bits = unpackBits(subject.bits);
    showCode();
    decode();
    interpolate();
  });
  onChange(["at", "flips", "view"], showCode);
  onChange(["flips", "view"], decode);
  onChange(["flips", "view", "to", "toseed"], interpolate);
}

/** Flips bits by their positions in the code; what was flipped before is as it was. */
function flip(positions) {
  const flips = new Set(settings.flips);
  for (const position of positions) flips.delete(position) || flips.add(position);
  change({ flips: [...flips].sort((a, b) => a - b) });
}

function changedBits() {
  const changed = bits.slice();
  for (const position of settings.flips) changed[position] ^= 1;
  return changed;
}

function showCode() {
  if (settings.view !== "code" || !subject) return;
  const { width, bits: depth } = model.latent;
  const [shown, flipped] = [changedBits(), new Set(settings.flips)];
  paint(shown, flipped);
  const ones = (token) => shown.subarray(token * depth, (token + 1) * depth).reduce((sum, bit) => sum + bit, 0);
  const place = (token) => `row ${Math.floor(token / width) + 1}, column ${(token % width) + 1}`;
  $("tokens").querySelectorAll("button").forEach((button, token) => {
    button.setAttribute("aria-label", `Token in ${place(token)}: ${ones(token)} of ${depth} bits are 1`);
    button.setAttribute("aria-pressed", token === settings.at);
    button.tabIndex = token === settings.at ? 0 : -1;
  });
  $("token-title").textContent = `Token in ${place(settings.at)}`;
  $("bits").querySelectorAll("button").forEach((button, bit) => {
    const position = settings.at * depth + bit;
    button.textContent = shown[position];
    button.setAttribute("aria-label", `Bit ${bit + 1}: ${shown[position]}${flipped.has(position) ? ", flipped" : ""}`);
    button.setAttribute("aria-pressed", shown[position] === 1);
    button.classList.toggle("flipped", flipped.has(position));
    if (!$("bits").contains(document.activeElement)) button.tabIndex = bit ? -1 : 0;
  });
  $("undo").disabled = !settings.flips.length;
  $("patch").style.setProperty("--x", settings.at % width);
  $("patch").style.setProperty("--y", Math.floor(settings.at / width));
}

function paint(shown, flipped) {
  const { width, bits: depth } = model.latent;
  const block = blockOf(depth);
  const canvas = $("tokens-canvas");
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const [one, zero, changed] = ["--ink", "--card", "--flip"].map((name) => style.getPropertyValue(name));
  context.clearRect(0, 0, canvas.width, canvas.height);
  shown.forEach((bit, i) => {
    const [token, number] = [Math.floor(i / depth), i % depth];
    const x = (token % width) * (block.columns * CELL + 2 * GAP) + GAP + (number % block.columns) * CELL;
    const y =
      Math.floor(token / width) * (block.rows * CELL + 2 * GAP) + GAP + Math.floor(number / block.columns) * CELL;
    context.fillStyle = bit ? one : zero;
    context.fillRect(x, y, CELL, CELL);
    if (!flipped.has(i)) return;
    context.fillStyle = changed;
    context.fillRect(x + 1, y + 1, CELL - 2, CELL - 2);
  });
}

/** The image of packed bits, PNG in base64. */
const decoded = async (signal, packed) => (await call("v1/reconstructions", signal, { bits: packed })).png;

const decode = latest("decoded", async (signal) => {
  if (settings.view !== "code" || !subject) return;
  if (before.bits !== subject.bits) {
    before = { bits: subject.bits, png: await decoded(signal, subject.bits) };
  }
  const flips = settings.flips.length;
  const after = flips ? await decoded(signal, packBits(changedBits())) : before.png;
  const { png, changed, pixels } = await differenceOf(before.png, after);
  if (signal.aborted) return;
  $("before").src = source(before.png);
  $("after").src = source(after);
  $("difference").src = source(png);
  const all = counted(model.bits_per_image, "bit");
  $("code-says").textContent = flips
    ? `${flips} of ${all} flipped: ${changed.toLocaleString("en")} of ${counted(pixels, "pixel")} changed.`
    : `${all}, ${counted(Math.ceil(model.bits_per_image / 8), "byte")}: all that the image is made of. Flip one and see.`;
});

const interpolate = latest("strip", async (signal) => {
  if (settings.view !== "code" || !subject) return;
  $("to-class").value = settings.to ?? "";
  $("to-seed").value = settings.toseed;
  const from = changedBits();
  const drawn = { label: settings.to, seed: settings.toseed };
  const key = JSON.stringify({ ...drawn, ...sampling() });
  const to = key === end.key ? { bits: end.bits } : drawn;
  const request = { from: { bits: packBits(from) }, to, count: WAY, ...sampling() };
  const answer = await call("v1/interpolations", signal, request);
  end = { key, bits: answer.images.at(-1).bits };
  const other = unpackBits(end.bits);
  const apart = from.reduce((sum, bit, i) => sum + (bit ^ other[i]), 0);
  $("strip").replaceChildren(...answer.images.map((image, i) => {
    const flipped = unpackBits(image.bits).reduce((sum, bit, j) => sum + (bit ^ from[j]), 0);
    const alt = `Image ${i + 1} of ${WAY}, ${counted(flipped, "bit")} from the first`;
    const shown = element("img", { src: source(image.png), alt });
    return element("figure", { role: "listitem" }, shown, element("figcaption", {}, `${flipped}`));
  }));
  $("strip-says").textContent =
    `They differ in ${apart} of ${counted(from.length, "bit")}; below each image is how many are flipped.`;
});
