// What the page shows, as its address says it, and the image that is being worked on.

const VIEWS = ["sample", "complete", "code", "model"];
const LARGEST_SEED = 2 ** 31 - 1;

/** What /v1/model says. */
export let model = null;

/** All that a link hands on; `read` fills it, `change` changes it. */
export const settings = {};

/** The image that is being worked on: {png, bits, own}; `own` is an image of the user's. */
export let subject = null;

/** The chosen sample, in the same form. */
export let sample = null;

/** Tells of changes: "settings", with the names of those that changed, and "subject". */
export const changes = new EventTarget();

// Each setting: how it is read from its text in an address; anything that makes no sense is as if it were left out.
const whole = (low, high) => (text) => (/^\d{1,10}$/.test(text) && text >= low && text <= high ? Number(text) : null);
const number = (low, high) => (text) => (text?.trim() && text >= low && text <= high ? Number(text) : null);
const positions = (text) => {
  const found = /^\d+(\.\d+)*$/.test(text ?? "") ? text.split(".").map(Number) : [];
  return found.filter((position) => position < model.bits_per_image);
};
const label = (text) => whole(0, model.classes.length - 1)(text);

const fields = () => ({
  view: [(text) => (VIEWS.includes(text) ? text : null), "sample"],
  class: [label, null],
  seed: [whole(0, LARGEST_SEED), 0],
  steps: [whole(1, model.sampling.max_steps), model.sampling.steps],
  temperature: [number(0.1, 1.5), model.sampling.temperature],
  guidance: [number(0, 5), model.sampling.guidance],
  side: [whole(1, 8), 4],
  chosen: [whole(0, 63), 0],
  mask: [(text) => (/^[\w-]+$/.test(text ?? "") ? text : null), null],
  as: [label, null],
  completions: [whole(0, LARGEST_SEED), 0],
  at: [whole(0, model.latent.height * model.latent.width - 1), 0],
  flips: [positions, []],
  to: [label, null],
  toseed: [whole(0, LARGEST_SEED), 1],
  version: [(text) => text || null, null],
});

/** The settings that the address asks for. */
export function read(found = model) {
  model = found;
  const given = new URLSearchParams(location.search);
  for (const [name, [parse, fallback]] of Object.entries(fields())) settings[name] = parse(given.get(name)) ?? fallback;
}

/** The address is another one, by Back or Forward. */
export function reread() {
  const old = { ...settings };
  read();
  tell(Object.keys(settings).filter((name) => `${old[name]}` !== `${settings[name]}`));
}

function tell(names) {
  changes.dispatchEvent(Object.assign(new Event("settings"), { names }));
}

/** The address of this page with some settings changed. */
export function addressOf(changed = {}) {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...settings, version: model.version, ...changed })) {
    const text = Array.isArray(value) ? value.join(".") : value;
    if (text !== null && text !== "") found.set(name, text);
  }
  return `${location.pathname}?${found}`;
}

/** Changes settings, in the address, too; another view is a page of its own for Back and Forward. */
export function change(changed) {
  const address = addressOf(changed);
  if ((changed.view ?? settings.view) === settings.view) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  Object.assign(settings, changed);
  tell(Object.keys(changed));
}

/** Calls `listener` when one of these settings changes. */
export function onChange(names, listener) {
  changes.addEventListener("settings", (event) => event.names.some((name) => names.includes(name)) && listener());
}

/** Works on another image. */
export function work(on) {
  subject = on;
  if (!on.own) sample = on;
  changes.dispatchEvent(new Event("subject"));
}

/** There are new samples, one of them chosen: it is worked on, unless an image of the user's is. */
export function sampled(chosen) {
  if (subject?.own) sample = chosen;
  else work(chosen);
}

/** What sampling is asked for, in the API's names. */
export const sampling = () => ({
  steps: settings.steps, temperature: settings.temperature, guidance: model.conditional ? settings.guidance : 0,
});

/** A seed that nobody has chosen. */
export const newSeed = () => Math.floor(Math.random() * 1e6);

/** What a class is called. */
export const nameOf = (label) => (label === null ? "any" : model.classes[label] ?? `${label}`);
