// What is known of the model: its sizes, what its evaluation has found, the weights that it is.
import { addressOfCopy, hasToken } from "./api.js";
import { $, element, latest } from "./dom.js";
import { model } from "./state.js";

const percent = (value) => `${(100 * value).toFixed(1)} %`;
// The metrics that say most, in words; the report has all of them.
const TITLES = {
  psnr: ["PSNR of reconstructions", (value) => `${value.toFixed(2)} dB`],
  ssim: ["SSIM of reconstructions", (value) => value.toFixed(3)],
  code_bits_bound: ["Bound, bits an image", (value) => value.toFixed(1)],
  dead_bits: ["Dead bits", percent],
  fid: ["FID of samples", (value) => value.toFixed(2)],
  fd_classifier: ["Frechet distance of samples", (value) => value.toFixed(3)],
  recall_classifier: ["Recall of samples", percent],
  class_accuracy: ["Samples of the class asked for", percent],
};

/** Fills the view: once, for a page is of one version. */
export function showModel() {
  const { latent, classes, conditional, metrics, hashes, report } = model;
  const grid = `${latent.height} × ${latent.width} tokens of ${latent.bits} bits`;
  const asked = conditional ? `drawn by class, one of ${classes.length}` : "drawn without a class";
  $("model-says").textContent = `An image is a code of ${grid}, ${asked}.`;
  const entry = (title, value) => element("div", {}, element("dt", {}, title), element("dd", {}, value));
  $("tiles").append(
    ...Object.entries(TITLES)
      .filter(([name]) => Number.isFinite(metrics[name]))
      .map(([name, [title, form]]) => entry(title, form(metrics[name]))),
  );
  for (const [name, hash] of Object.entries({ version: model.version, ...hashes })) {
    $("hashes").append(element("dt", {}, name), element("dd", {}, hash));
  }
  if (!report) return;
  $("report").hidden = false;
  $("report").href = report;
  $("report").addEventListener("click", (event) => {
    if (!hasToken()) return; // it opens as any page does
    event.preventDefault();
    save(report);
  });
}

/** Saves the report as a file, where a link is not let in. */
const save = latest("report", async (signal, report) => {
  const link = element("a", { href: await addressOfCopy(report, signal), download: "report.html" });
  link.click();
  URL.revokeObjectURL(link.href);
});
