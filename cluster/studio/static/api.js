// The server's API: requests, its errors in words, events while it works, the token that it may ask for.
import { $, counted, Refused, showProblem } from "./dom.js";

const TOKEN = "token"; // in sessionStorage: gone with the tab, and never in an address
const PATIENCE = 5; // how often a request that met a full queue is made again

/** The answer to a request, as JSON; without a body it is a GET. */
export async function call(path, signal, body) {
  return (await answered(path, signal, body)).json();
}

/** Whether requests carry a token: a link cannot. */
export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;

/** A page of the server, as an address that leads to what was read of it. */
export async function addressOfCopy(path, signal) {
  return URL.createObjectURL(await (await answered(path, signal)).blob());
}

/** The steps of a request that is answered by events: each is given to `onStep`; returns the last answer. */
export async function stream(path, signal, body, onStep) {
  const response = await answered(path, signal, body);
  for await (const { event, data } of events(response.body)) {
    if (event === "step") onStep(data);
    else if (event === "done") return data;
    else if (event === "error") throw new Refused(data.error);
  }
  throw new Refused({ message: "The server broke off before the images were done.", remedy: "Ask again." });
}

/** Server-sent events of a body that comes in pieces. */
async function* events(body) {
  let text = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const found = (text + piece.value).replaceAll("\r\n", "\n").split("\n\n");
    text = found.pop();
    for (const lines of found.map((each) => each.split("\n"))) {
      const said = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (said("data")) yield { event: said("event"), data: JSON.parse(said("data")) };
    }
  }
}

/** The response to a request; asks for a token where one is wanted, and waits where the queue is full. */
async function answered(path, signal, body) {
  for (let attempt = 1; ; attempt++) {
    const response = await sent(path, signal, body);
    if (response.ok) {
      seeVersion(response.headers.get("X-Model-Version"));
      return response;
    }
    if (response.status === 401) await askForToken();
    else if (response.status === 503 && attempt < PATIENCE) await pause(response.headers.get("Retry-After"), signal);
    else throw await refusal(response);
  }
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({})); // a proxy on the way may say it in HTML
  return new Refused(error ?? { message: `The server answered with status ${response.status}.` });
}

let version = null; // of the first answer: what the page says of the model is of this one

function seeVersion(now) {
  version ??= now;
  if (!now || now === version) return;
  $("notice").hidden = false;
  $("notice").textContent = `The server has taken up version ${now}: load this page again to see what it is.`;
}

async function sent(path, signal, body) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { signal, headers, ...(body && { method: "POST", body: JSON.stringify(body) }) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused({ message: "The server does not answer.", remedy: "See whether it still runs, then ask again." });
  }
}

function pause(retryAfter, signal) {
  const seconds = Number(retryAfter) || 1;
  showProblem({ message: "The server is busy.", remedy: `It is asked again in ${counted(seconds, "second")}.` });
  return new Promise((resolve, reject) => {
    setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });
}

let asking = null; // many requests may be refused at once; the token is asked for once

function askForToken() {
  asking ??= new Promise((resolve) => {
    const dialog = $("token");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(TOKEN, $("token-field").value);
      $("token-field").value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
  });
  return asking;
}
