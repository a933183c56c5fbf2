// The mask: cells of the image that are to be made anew, drawn by mouse, finger or arrow keys.
import { $ } from "./dom.js";
import { canvasOf, packBits, pngOf, unpackBits } from "./pictures.js";

const FINEST = 32; // cells a side at most: so a mask fits into an address

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const READY = {
  middle: (x, y) => Math.abs(x - 0.5) < 0.25 && Math.abs(y - 0.5) < 0.25,
  right: (x) => x > 0.5,
  bottom: (_, y) => y > 0.5,
  none: () => false,
};

/** A mask of an image of `size` pixels; `onDrawn` is called when a stroke or a key has changed it. */
export class Mask {
  constructor(size, onDrawn) {
    this.size = size;
    this.side = FINEST;
    while (size % this.side) this.side -= 1;
    this.cells = new Uint8Array(this.side ** 2); // 1 is made anew
    this.box = { x: this.side >> 2, y: this.side >> 2, width: this.side >> 1, height: this.side >> 1 };
    this.boxShown = false;
    this.onDrawn = onDrawn;
    this.stage = $("mask");
    this.canvas = Object.assign($("mask-canvas"), { width: 24 * this.side, height: 24 * this.side });
    this.#listen();
  }

  get empty() {
    return !this.cells.includes(1);
  }

  /** The cells as text for an address. */
  get text() {
    return packBits(this.cells).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  }

  set text(text) {
    try {
      const cells = unpackBits(text.replaceAll("-", "+").replaceAll("_", "/"));
      if (cells.length >= this.cells.length) this.cells.set(cells.subarray(0, this.cells.length));
    } catch (error) {
      if (error.name !== "InvalidCharacterError") throw error; // a link that was cut off: the mask stays as it is
    }
    this.show();
  }

  /** One of the ready masks, by name; "invert" exchanges known and unknown. */
  fill(name) {
    this.cells.forEach((cell, i) => {
      const [x, y] = [(i % this.side) + 0.5, Math.floor(i / this.side) + 0.5].map((place) => place / this.side);
      this.cells[i] = name === "invert" ? 1 - cell : READY[name](x, y);
    });
    this.show();
    this.onDrawn();
  }

  /** The mask as the API has it, PNG in base64: white is known, black is made anew. */
  get png() {
    const { canvas, context } = canvasOf(this.size);
    this.#paint(context, this.size / this.side, "black", "white");
    return pngOf(canvas);
  }

  /** How many of a grid of tokens are made anew: all that the mask touches. */
  tokens(width, height) {
    const touched = new Set();
    this.cells.forEach((cell, i) => {
      if (!cell) return;
      const [x, y] = [i % this.side, Math.floor(i / this.side)];
      for (let row = Math.floor((y * height) / this.side); row < ((y + 1) * height) / this.side; row++)
        for (let column = Math.floor((x * width) / this.side); column < ((x + 1) * width) / this.side; column++)
          touched.add(row * width + column);
    });
    return touched.size;
  }

  show() {
    const context = this.canvas.getContext("2d");
    const cell = this.canvas.width / this.side;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#paint(context, cell, `rgb(${getComputedStyle(this.canvas).getPropertyValue("--anew")} / .72)`);
    if (!this.boxShown) return;
    const { x, y, width, height } = this.box;
    context.lineWidth = cell / 4;
    context.strokeStyle = getComputedStyle(this.canvas).getPropertyValue("--accent");
    context.strokeRect(x * cell, y * cell, width * cell, height * cell);
  }

  #paint(context, cell, anew, known) {
    this.cells.forEach((value, i) => {
      if (!(context.fillStyle = value ? anew : known) || (!value && !known)) return;
      context.fillRect((i % this.side) * cell, Math.floor(i / this.side) * cell, cell, cell);
    });
  }

  #listen() {
    let last = null;
    const place = (event) => {
      const { left, top, width } = this.stage.getBoundingClientRect();
      return [event.clientX - left, event.clientY - top].map((distance) => (distance / width) * this.side);
    };
    this.stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.stage.setPointerCapture(event.pointerId);
      this.boxShown = false;
      this.#stroke((last = place(event)), last);
    });
    this.stage.addEventListener("pointermove", (event) => {
      if (last) this.#stroke(last, (last = place(event)));
    });
    for (const end of ["pointerup", "pointercancel"])
      this.stage.addEventListener(end, () => {
        if (last) this.onDrawn();
        last = null;
      });
    this.stage.addEventListener("keydown", (event) => this.#key(event));
    this.stage.addEventListener("blur", () => {
      this.boxShown = false;
      this.show();
    });
  }

  /** A straight stroke of the brush, between two places in cells. */
  #stroke([fromX, fromY], [toX, toY]) {
    const radius = (Number(document.querySelector("input[name=brush]:checked").value) * this.side) / 64;
    const value = $("erase").checked ? 0 : 1;
    const points = 1 + Math.ceil(2 * Math.hypot(toX - fromX, toY - fromY));
    for (let n = 0; n <= points; n++) {
      const [x, y] = [fromX + ((toX - fromX) * n) / points, fromY + ((toY - fromY) * n) / points];
      this.#each((column, row) => Math.hypot(column + 0.5 - x, row + 0.5 - y) <= Math.max(radius, 0.71), value);
    }
    this.show();
  }

  #each(inside, value) {
    this.cells.forEach((_, i) => {
      if (inside(i % this.side, Math.floor(i / this.side))) this.cells[i] = value;
    });
  }

  #key(event) {
    const box = this.box;
    const [right, down] = ARROWS[event.key] ?? [0, 0];
    const clamp = (value, low, high) => Math.max(low, Math.min(value, high));
    if (right || down) {
      if (event.shiftKey) {
        box.width = clamp(box.width + right, 1, this.side - box.x);
        box.height = clamp(box.height + down, 1, this.side - box.y);
      } else {
        box.x = clamp(box.x + right, 0, this.side - box.width);
        box.y = clamp(box.y + down, 0, this.side - box.height);
      }
      const [columns, rows] = [`${box.x + 1} to ${box.x + box.width}`, `${box.y + 1} to ${box.y + box.height}`];
      $("mask-says").textContent = `Box: columns ${columns}, rows ${rows}, of ${this.side}.`;
    } else if (["Enter", " ", "Backspace", "Delete"].includes(event.key)) {
      const inside = (x, y) => x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height;
      this.#each(inside, event.key === "Enter" || event.key === " " ? 1 : 0);
      this.onDrawn();
    } else return;
    event.preventDefault();
    this.boxShown = true;
    this.show();
  }
}
