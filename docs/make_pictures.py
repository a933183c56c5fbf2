"""The pictures of the README, from two finished experiments: `python docs/make_pictures.py`.

From runs/demo and runs/fashion_mnist: docs/images.png; with Debian's `chromium`, docs/report.png, too. Nothing is
chosen: the first images of the validation shards, the first samples of seed 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bld_core
from bld_core.data.images import ImageConfig, first_images
from bld_core.data.pictures import picture, png

COLUMNS = 8
TITLES = {"demo": "Handwritten digits", "fashion_mnist": "Fashion-MNIST"}
SIDE, GAP, PANEL_GAP, ROW_GAP, MARGIN, LABELS, HEAD = 96, 6, 54, 26, 30, 256, 66  # pixels; shown at about half the size
WINDOW = 1150, 900
INK = "#1f2328"


@dataclass(frozen=True)
class Panel:
    """What is shown of an experiment: rows of images, uint8 (COLUMNS, height, width, channels), by label."""

    title: str
    rows: dict[str, list[Tensor]]


def panel_of(folder: Path, title: str) -> Panel:
    """The panel of a finished experiment."""
    generator = bld_core.load(str(folder))
    settings: dict[str, Any] = json.loads((folder / "autoencoder/stage.json").read_text())["fingerprint"]
    known = {f.name: settings[f"data.{f.name}"] for f in fields(ImageConfig) if f"data.{f.name}" in settings}
    found = first_images(known["validation"], ImageConfig(**known), COLUMNS)
    images = torch.from_numpy(np.stack([image.pixels for image in found]))
    bits = generator.encode(images)
    labels = [i % max(1, generator.classes) for i in range(2 * COLUMNS)]
    samples = generator.sample(labels=labels, seed=0)
    process = generator.process(labels[:2], COLUMNS, seed=0)
    rows = {
        "original": [images],
        "its bits": [bits_as_images(bits)],
        "reconstruction": [generator.decode(bits)],
        "samples": list(samples.split(COLUMNS)),
        "noise to sample": list(process),
    }
    return Panel(f"{title}, {bits[0].numel()} bits each", rows)


def bits_as_images(bits_BHWC: Tensor) -> Tensor:
    """Codes (B, h, w, c) -> dark and light images (B, 4 h, w c/4, 1): each token is a block, four bits high."""
    B, h, w, c = bits_BHWC.shape
    blocks = bits_BHWC.view(B, h, w, 4, c // 4).permute(0, 1, 3, 2, 4)
    return blocks.reshape(B, 4 * h, w * c // 4, 1) * 185 + 40  # not quite black and white: a 1 shows on a white page


def compose(panels: list[Panel]) -> Image.Image:
    """One panel beside the other, with the labels of their rows on the left."""
    panel_width = COLUMNS * (SIDE + GAP) - GAP
    heights = [len(rows) * (SIDE + GAP) - GAP for rows in panels[0].rows.values()]
    width = 2 * MARGIN + LABELS + len(panels) * (panel_width + PANEL_GAP) - PANEL_GAP
    canvas = Image.new("RGB", (width, 2 * MARGIN + HEAD + sum(heights) + (len(heights) - 1) * ROW_GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for n, panel in enumerate(panels):
        left, top = MARGIN + LABELS + n * (panel_width + PANEL_GAP), MARGIN + HEAD
        draw.text((left, MARGIN), panel.title, INK, ImageFont.load_default(36))
        for (label, rows), height in zip(panel.rows.items(), heights, strict=True):
            if n == 0:
                draw.text((MARGIN, top + SIDE / 2), label, INK, ImageFont.load_default(32), anchor="lm")
            for j, row in enumerate(rows):
                for i, image in enumerate(row):
                    shown = picture(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                    canvas.paste(shown, (left + i * (SIDE + GAP), top + j * (SIDE + GAP)))
            top += height + ROW_GAP
    return canvas


def screenshot(browser: str, page: Path, width: int, height: int) -> Image.Image:
    """The top of a page as Chromium shows it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        command += [f"--screenshot={folder}/page.png", page.absolute().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return Image.open(f"{folder}/page.png").convert("RGB")


def save(made: Image.Image, file: Path) -> None:
    """Write a PNG of few colours, which makes it small."""
    file.write_bytes(png(made.quantize(128)))
    print(f"{file}: {made.width} x {made.height}, {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """The command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--root", type=Path, default=Path("runs"), help="where the two experiments are")
    flags.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    given = flags.parse_args()
    panels = [panel_of(given.root / name, title) for name, title in TITLES.items()]
    save(compose(panels), given.output / "images.png")
    if browser := shutil.which("chromium"):
        page = given.root / "demo/evaluation/report.html"
        save(screenshot(browser, page, *WINDOW), given.output / "report.png")
    else:
        print("report.png is left out: it needs Debian's chromium")


if __name__ == "__main__":
    main()
