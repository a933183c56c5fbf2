// Pictures and codes as the API has them: PNG and packed bits, both in base64.
import { Refused } from "./dom.js";

/** The address of a PNG in base64, for an <img>. */
export const source = (png) => `data:image/png;base64,${png}`;

/** Base64 -> bits, 0 or 1, the most significant of each byte first, as numpy.packbits has them. */
export function unpackBits(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  return Uint8Array.from({ length: 8 * bytes.length }, (_, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1);
}

/** The inverse of `unpackBits`; a last byte that is not full ends in zeros. */
export function packBits(bits) {
  const bytes = new Uint8Array(Math.ceil(bits.length / 8));
  bits.forEach((bit, i) => (bytes[i >> 3] |= bit << (7 - (i & 7))));
  return btoa(String.fromCharCode(...bytes));
}

/** Columns and rows of the block of cells that a token of so many bits is shown as: about square. */
export function blockOf(bits) {
  let rows = Math.floor(Math.sqrt(bits));
  while (bits % rows) rows -= 1;
  return { columns: bits / rows, rows };
}

/** A canvas of this size, and its context. */
export function canvasOf(width, height = width) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  return { canvas, context: canvas.getContext("2d", { willReadFrequently: true }) };
}

/** What a canvas shows, as PNG in base64. */
export const pngOf = (canvas) => canvas.toDataURL("image/png").split(",")[1];

/** The pixels of a PNG in base64. */
async function pixelsOf(png) {
  const image = Object.assign(new Image(), { src: source(png) });
  await image.decode();
  const { context } = canvasOf(image.naturalWidth, image.naturalHeight);
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.naturalWidth, image.naturalHeight);
}

/**
 * The difference of two pictures, 128 + after - before: grey where nothing changed.
 * Returns it as PNG, with how many of its pixels changed, of how many.
 */
export async function differenceOf(before, after) {
  const [old, made] = await Promise.all([pixelsOf(before), pixelsOf(after)]);
  const { canvas, context } = canvasOf(old.width, old.height);
  const shown = context.createImageData(old.width, old.height);
  let changed = 0;
  for (let i = 0; i < shown.data.length; i += 4) {
    let differs = false;
    for (let channel = i; channel < i + 3; channel++) {
      shown.data[channel] = 128 + made.data[channel] - old.data[channel];
      differs ||= made.data[channel] !== old.data[channel];
    }
    shown.data[i + 3] = 255;
    changed += differs;
  }
  context.putImageData(shown, 0, 0);
  return { png: pngOf(canvas), changed, pixels: old.width * old.height };
}

/** A file of the user's, its middle cut to a square of this size: PNG in base64. */
export async function squareOf(file, size) {
  const image = await createImageBitmap(file).catch(() => {
    const message = `${file.name} is no image that this browser can read.`;
    throw new Refused({ message, remedy: "Take a PNG or JPEG file." });
  });
  const side = Math.min(image.width, image.height);
  const { canvas, context } = canvasOf(size);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, size, size);
  return pngOf(canvas);
}
