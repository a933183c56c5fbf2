"""Plots as pictures, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

_DEAD_BELOW = 0.01
_FAIR = 0.5
_DEAD, _ALIVE, _LINE = "#d62728", "#4c78a8", "#555555"


def bit_usage_plot(usage: Tensor) -> Image.Image:
    """How often each bit channel of the code is one: a bar from 1/2, a fair bit, to the share.

    So a fair bit is flat, and a bit that is always the same fills half of the height, whichever value it is stuck at.
    Shares below 0.01 and above 0.99 are dead bits: red, and counted in the title.

    Args:
        usage: (c,), the share of ones of each channel, in [0, 1]; drawn in the order of the code.

    Returns:
        RGB, 960 x 360 pixels.

    Raises:
        ValueError: not a share for each channel.
    """
    share = usage.detach().cpu().double().numpy()
    if share.ndim != 1 or not len(share) or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(
            f"bit usage has shape {tuple(share.shape)} and values {share.flatten()[:4].tolist()}...; it must be (c,), "
            "shares in [0, 1]: take the mean of the codes over images and positions"
        )
    dead = (share < _DEAD_BELOW) | (share > 1 - _DEAD_BELOW)
    figure = Figure(figsize=(9.6, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(
        np.arange(len(share)), share - _FAIR, 0.8, bottom=_FAIR, color=np.where(dead, _DEAD, _ALIVE).tolist(), zorder=2
    )
    axes.axhline(_FAIR, color=_LINE, linewidth=0.8, zorder=3)
    for line in (_DEAD_BELOW, 1 - _DEAD_BELOW):
        axes.axhline(line, color=_DEAD, linewidth=0.8, linestyle="--", zorder=3)
    axes.set_xlim(-0.7, len(share) - 0.3)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([_DEAD_BELOW, 0.25, _FAIR, 0.75, 1 - _DEAD_BELOW])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, steps=[1, 2, 4, 8, 10]))
    axes.set_xlabel("bit channel")
    axes.set_ylabel("share of ones")
    axes.set_title(f"Bit usage: {dead.sum()} of {len(share)} channels dead (red)")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
