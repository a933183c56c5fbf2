"""The pictures of the README, from two finished experiments: `python docs/make_pictures.py`.

From runs/demo and runs/fashion_mnist: docs/images.png; with Debian's `chromium`, docs/report.png and docs/studio.png,
too. Nothing is chosen: the first images of the validation shards, the first samples of seed 0.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser, sync_playwright
from torch import Tensor

import bld_core
from bld_core.data.images import ImageConfig, first_images
from bld_core.data.pictures import picture, png
from cluster.studio.app import make_app
from cluster.studio.config import ServeConfig
from cluster.studio.engine import Engine
from cluster.studio.pair import open_folder

COLUMNS = 8
TITLES = {"demo": "Handwritten digits", "fashion_mnist": "Fashion-MNIST"}
SIDE, GAP, PANEL_GAP, ROW_GAP, MARGIN, LABELS, HEAD = 96, 6, 54, 26, 30, 256, 66  # pixels; shown at about half the size
WINDOW, PHONE = (1150, 900), (400, 900)
FLIPPED = f"at=5&flips={'.'.join(str(bit) for bit in range(80, 96))}"  # the sixth token, all of it
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


def screenshot(browser: Browser, address: str, size: tuple[int, int], ready: str = "body") -> Image.Image:
    """The top of a page, once it has an element: width and height in pixels, and a selector."""
    with browser.new_page(viewport={"width": size[0], "height": size[1]}) as page:
        page.goto(address)
        page.wait_for_selector(ready, state="attached")
        return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


@contextmanager
def served(folder: Path) -> Generator[str]:
    """The address of the studio of an experiment, in a thread."""
    engine = Engine(open_folder(str(folder), folder.name, "", "cpu"), ServeConfig())
    server = uvicorn.Server(uvicorn.Config(make_app(engine, 1), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.1)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def studio(browser: Browser, folder: Path) -> Image.Image:
    """What flipped bits do, on a wide screen; samples, on a phone."""
    with served(folder) as address:
        left = screenshot(browser, f"{address}?view=code&class=3&{FLIPPED}&to=8", WINDOW, "#strip[aria-busy=false]")
        right = screenshot(browser, f"{address}?class=3", PHONE, "#grid[aria-busy=false]")
    canvas = Image.new("RGB", (left.width + PANEL_GAP + right.width, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + PANEL_GAP, 0))
    return canvas


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
    if path := shutil.which("chromium"):
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = given.root / "demo/evaluation/report.html"
            save(screenshot(browser, page.absolute().as_uri(), WINDOW), given.output / "report.png")
            save(studio(browser, given.root / "demo"), given.output / "studio.png")
            browser.close()
    else:
        print("report.png and studio.png are left out: they need Debian's chromium")


if __name__ == "__main__":
    main()
