// Completions: what is under the mask of an image is drawn anew, four times.
import { call } from "./api.js";
import { $, announce, counted, element, latest } from "./dom.js";
import { Mask } from "./mask.js";
import { source, squareOf } from "./pictures.js";
import {
  change, changes, model, nameOf, newSeed, onChange, sample, sampling, settings, subject, work,
} from "./state.js";

const COUNT = 4;

let mask = null;

/** Sets up the controls. */
export function startCompletions() {
  mask = new Mask(model.image_size, () => change({ mask: mask.text }));
  for (const button of document.querySelectorAll("[data-mask]")) {
    button.addEventListener("click", () => mask.fill(button.dataset.mask));
  }
  addClasses($("complete-class"), "as");
  $("complete-class-label").hidden = $("complete-class").hidden = !model.conditional;
  $("complete-again").addEventListener("click", () => change({ completions: newSeed() }));
  $("file").addEventListener("change", () => $("file").files[0] && take($("file").files[0]));
  $("mask").addEventListener("dragover", (event) => event.preventDefault());
  $("mask").addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  $("use-sample").addEventListener("click", () => work(sample));
  $("completions").append(...Array.from({ length: COUNT }, (_, i) => element("img", { alt: `Completion ${i + 1}` })));
  changes.addEventListener("subject", showSubject);
  onChange(["view", "mask", "as", "completions", "steps", "temperature", "guidance"], complete);
}

/** A list of the classes, which changes a setting. */
export function addClasses(select, setting) {
  const option = (label) => element("option", { value: label ?? "" }, nameOf(label));
  select.replaceChildren(option(null), ...model.classes.map((_, label) => option(label)));
  select.addEventListener("change", () => change({ [setting]: select.value ? Number(select.value) : null }));
}

function showSubject() {
  $("use-sample").hidden = !subject.own;
  $("mask-image").src = source(subject.png);
  $("mask-image").alt = subject.own ? "Your image" : "The chosen sample";
  complete();
}

const take = latest("mask", async (signal, file) => {
  const png = await squareOf(file, model.image_size);
  const { bits } = await call("v1/reconstructions", signal, { image: png });
  change({ flips: [] });
  work({ png, bits, own: true });
});

const complete = latest("completions", async (signal) => {
  if (settings.view !== "complete" || !subject) return;
  $("complete-class").value = settings.as ?? "";
  if (settings.mask === null) return mask.fill("middle"); // which asks again, with a mask
  mask.text = settings.mask;
  const tokens = mask.tokens(model.latent.width, model.latent.height);
  const all = model.latent.width * model.latent.height;
  $("mask-says").textContent = mask.empty
    ? "Nothing is covered yet: draw on the image, or take a ready mask."
    : `${tokens} of ${counted(all, "token")} are drawn anew: all that the mask touches.`;
  const images = $("completions").querySelectorAll("img");
  if (mask.empty) {
    for (const image of images) image.src = source(subject.png);
    return;
  }
  announce(`Drawing ${counted(COUNT, "completion")}`);
  const given = { image: subject.png, mask: mask.png, label: settings.as, seed: settings.completions };
  const answer = await call("v1/inpaintings", signal, { ...given, count: COUNT, ...sampling() });
  answer.images.forEach(({ png }, i) => (images[i].src = source(png)));
  announce(`${counted(COUNT, "completion")} drawn`);
});
