// The page: opens the model, sets up the four views, and shows the one that the address names.
import { call } from "./api.js";
import { startCode } from "./code.js";
import { startCompletions } from "./complete.js";
import { $, announce, counted, element, latest, showProblem } from "./dom.js";
import { showModel } from "./model.js";
import { draw, startSampling } from "./sample.js";
import { addressOf, change, changes, model, onChange, read, reread, settings } from "./state.js";

const SMOOTH = 128; // images of fewer pixels a side are shown as the pixels they are

function showView() {
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== settings.view;
  for (const link of document.querySelectorAll(".tabs a")) {
    link.toggleAttribute("aria-current", link.dataset.view === settings.view);
    if (link.dataset.view === settings.view) link.setAttribute("aria-current", "page");
  }
  linkViews();
}

function linkViews() {
  for (const link of document.querySelectorAll("a[data-view]")) link.href = addressOf({ view: link.dataset.view });
}

function showFacts() {
  const { name, version, image_size: size, channels, bits_per_image: bits } = model;
  $("name").textContent = name;
  document.title = `${name} – binary latent diffusion`;
  const colours = channels === 1 ? "grey" : "colour";
  const code = `${counted(bits, "bit")} (${counted(Math.ceil(bits / 8), "byte")})`;
  $("facts").textContent = `${size} × ${size} ${colours} images from ${code} each · version ${version}`;
  document.body.classList.toggle("pixels", size < SMOOTH);
}

async function share() {
  const address = new URL(addressOf(), location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    $("share").textContent = "Copied";
    announce("The link is in the clipboard");
    setTimeout(() => ($("share").textContent = "Copy link"), 2000);
  } catch {
    const remedy = "Copy the address of this page: it is the link.";
    showProblem({ message: "This browser keeps its clipboard to itself.", remedy });
  }
}

const open = latest("views", async (signal) => {
  read(await call("v1/model", signal));
  showFacts();
  $("notice").hidden = !settings.version || settings.version === model.version;
  $("notice").textContent = `This link was made with version ${settings.version}: its images may have been others.`;
  showModel();
  startSampling();
  startCompletions();
  startCode();
  onChange(["view"], showView);
  changes.addEventListener("settings", linkViews);
  showView();
  draw();
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-view]");
  if (!link || !model || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  change({ view: link.dataset.view });
});
addEventListener("popstate", reread);
$("share").addEventListener("click", share);
$("problem-close").addEventListener("click", () => showProblem(null));
open();
