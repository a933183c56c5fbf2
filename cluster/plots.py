"""Plots as pictures, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from bld_core.errors import UserError

_DEAD_BELOW = 0.01
_FAIR = 0.5
_DEAD, _ALIVE, _LINE = "#d62728", "#4c78a8", "#888888"
_PROFILE_BINS = 64
_PANEL_INCHES = 4.8, 3.6
_MARKED = 24  # points that are few enough to be seen one by one


def bit_usage_figure(usage: Tensor, inches: tuple[float, float] = (9.6, 3.6)) -> Figure:
    """How often each bit channel of the code is one: a bar from 1/2, a fair bit, to the share.

    So a fair bit is flat, and a bit that is always the same fills half of the height, whichever value it is stuck at.
    Shares below 0.01 and above 0.99 are dead bits: red, and counted in the title.

    Args:
        usage: (c,), the share of ones of each channel, in [0, 1]; drawn in the order of the code.
        inches: width and height, 100 pixels each.

    Raises:
        UserError: not a share for each channel.
    """
    share = usage.detach().cpu().double().numpy()
    if share.ndim != 1 or not len(share) or not ((share >= 0) & (share <= 1)).all():
        raise UserError(
            f"bit usage has shape {tuple(share.shape)} and values {share.flatten()[:4].tolist()}...; it must be (c,), "
            "shares in [0, 1]: take the mean of the codes over images and positions"
        )
    dead = (share < _DEAD_BELOW) | (share > 1 - _DEAD_BELOW)
    figure = Figure(figsize=inches, dpi=100, layout="constrained")
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
    return figure


def bit_usage_plot(usage: Tensor) -> Image.Image:
    """`bit_usage_figure` as a picture, RGB, 960 x 360 pixels."""
    return _picture(bit_usage_figure(usage))


@dataclass(frozen=True)
class Line:
    """Points of a panel that belong together.

    Attributes:
        x: numbers, or names, whose points are not joined.
        y: a figure at each x.
        error: standard error of each figure; empty draws none.
        name: for the legend; empty stays out of it.
        joined: whether a line goes from point to point.
        faint: whether it is there for comparison alone, in grey.
    """

    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    error: Sequence[float] = ()
    name: str = ""
    joined: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One diagram of a picture: a title, what the axes show, its lines, and whether x doubles at each step."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    doubling: bool = False


def panels_figure(panels: Sequence[Panel], inches: tuple[float, float] = _PANEL_INCHES) -> Figure:
    """Diagrams beside one another, each so many inches wide and high, of 100 pixels."""
    width, height = inches
    figure = Figure(figsize=(width * len(panels), height), dpi=100, layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for line in panel.lines:
            joined = "-" if line.joined and not any(isinstance(x, str) for x in line.x) else "none"
            marker = "o" if len(line.x) <= _MARKED else ""
            axes.errorbar(
                line.x,
                line.y,
                line.error or None,
                label=line.name,
                linestyle=joined,
                marker=marker,
                markersize=4,
                linewidth=1.5,
                capsize=3,
                color=_LINE if line.faint else None,
                alpha=0.5 if line.faint else None,
            )
        if panel.doubling:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1 and any(line.name for line in panel.lines):
            axes.legend(fontsize="small", frameon=False)
    return figure


@dataclass(frozen=True)
class Axis:
    """One of several parallel axes: its name, where each line crosses it, from 0 to 1, and its ticks."""

    name: str
    positions: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def parallel_figure(axes: Sequence[Axis], shades: Sequence[float], inches: tuple[float, float]) -> Figure:
    """Parallel coordinates: a line for each drawn thing across all axes; the first is drawn above the others.

    Args:
        axes: from left to right.
        shades: of the lines, from 0, the darkest, to 1.
        inches: width and height, 100 pixels each.
    """
    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    drawn = figure.add_subplot()
    colours = mpl.colormaps["viridis"]
    for number in reversed(range(len(shades))):
        y = [axis.positions[number] for axis in axes]
        drawn.plot(
            range(len(axes)),
            y,
            color=_DEAD if number == 0 else colours(0.9 * shades[number]),
            linewidth=2.4 if number == 0 else 1.2,
            alpha=1.0 if number == 0 else 0.7,
        )
    for number, axis in enumerate(axes):
        drawn.axvline(number, color=_LINE, linewidth=0.8, zorder=0)
        for y, text in axis.ticks:
            drawn.annotate(text, (number, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    drawn.set_xticks(range(len(axes)), [axis.name for axis in axes])
    drawn.tick_params("x", length=0)
    drawn.set_xlim(-0.1, len(axes) - 0.6)
    drawn.set_yticks([])
    drawn.spines[:].set_visible(False)
    return figure


def shares_figure(shares: Mapping[str, float], inches: tuple[float, float]) -> Figure:
    """Shares of a whole as bars from the left, the largest on top."""
    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    names = sorted(shares, key=lambda name: shares[name])
    axes.barh(names, [shares[name] for name in names], color=_ALIVE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share")
    return figure


def panels_plot(panels: Sequence[Panel]) -> Image.Image:
    """`panels_figure` as a picture, RGB, 480 x 360 pixels each."""
    return _picture(panels_figure(panels))


def profile_plot(profile: Sequence[float]) -> Image.Image:
    """Where a likelihood bound comes from: what it gains for each unit of t/T, neighbouring steps taken together.

    Args:
        profile: of a `Bound` over all T steps: what each t adds to it, from t = 1 on.
    """
    steps = len(profile)
    bins = min(steps, _PROFILE_BINS)
    edges = np.linspace(0, steps, bins + 1).round().astype(int)
    sums = np.add.reduceat(np.asarray(profile), edges[:-1])
    density = sums * steps / np.diff(edges)
    centre = (edges[:-1] + edges[1:] + 1) / (2 * steps)
    title = f"Likelihood bound {sum(profile):.4f} bits a bit: the area"
    return panels_plot(
        [Panel(title, "t / T", "bits a bit, for each unit of t / T", [Line(centre.tolist(), density.tolist())])]
    )


def svg(figure: Figure) -> str:
    """A figure as an element of an HTML page: its ink has the colour of the text around it, its ground is clear."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text, in the fonts of the page
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"])
        )
    text = out.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _picture(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
