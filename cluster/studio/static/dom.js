// The few things that every part of the page does with the document.

/** The element of an id. */
export const $ = (id) => document.getElementById(id);

/** A new element: its properties (aria-, data- and role are attributes) and what it holds. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (/^(aria-|data-|role|for$)/.test(key)) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** What a screen reader is told, when it has time. */
export function announce(text) {
  $("status").textContent = text;
}

/** What the server, or the browser, refused: it is told to the user, and is no bug. */
export class Refused extends Error {
  constructor({ message, remedy }) {
    super(message);
    this.remedy = remedy ?? "";
  }
}

let culprit = null; // the task whose problem is shown, if it is one's

/** What went wrong with a task, in words; null when it is over. */
export function showProblem(error, task = null) {
  culprit = error && task;
  $("problem").hidden = error === null;
  $("problem-message").textContent = error?.message ?? "";
  $("problem-remedy").textContent = error?.remedy ?? "";
}

/** "1 image", "2 images", "1,024 pixels". */
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/**
 * A task that runs again and again: when it starts, the run before it is given up, and what that asked of the server is
 * aborted. It takes an AbortSignal; while it runs, the element of the id `region` is busy; what goes wrong is shown.
 */
export function latest(region, task) {
  let running = new AbortController();
  return async (...given) => {
    running.abort();
    const { signal } = (running = new AbortController());
    $(region).setAttribute("aria-busy", true);
    try {
      await task(signal, ...given);
      if (culprit === task || culprit === null) showProblem(null);
    } catch (error) {
      if (signal.aborted) return;
      showProblem(error, task);
      if (!(error instanceof Refused)) throw error; // a bug of this page: the console has where
    } finally {
      if (!signal.aborted) $(region).setAttribute("aria-busy", false);
    }
  };
}

/** Arrow keys among the buttons of a grid: one of them is in the tab order, the others a key away. */
export function arrowKeys(grid, columns) {
  grid.addEventListener("keydown", (event) => {
    const buttons = [...grid.querySelectorAll("button")];
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    const next = buttons[buttons.indexOf(event.target) + step];
    if (!step || !next) return;
    event.preventDefault();
    for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  });
}
