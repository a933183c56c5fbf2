from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from cluster.plots import Line, Panel, bit_usage_plot, panels_plot, profile_plot


def usage(count: int) -> Tensor:
    return torch.linspace(0.3, 0.8, count)


def red(picture: Image) -> int:
    """Red pixels: the two dashed lines, and dead bits."""
    pixels = np.asarray(picture).astype(int)
    return int(((pixels[:, :, 0] > 180) & (pixels[:, :, 1] < 80) & (pixels[:, :, 2] < 80)).sum())


@pytest.mark.parametrize("count", [1, 8, 16, 32, 64, 128])
def test_dead_bits_have_another_colour_whichever_value_they_are_stuck_at(count: int) -> None:
    alive = bit_usage_plot(usage(count))
    assert (alive.mode, alive.size) == ("RGB", (960, 360))
    assert len(np.unique(np.asarray(alive).reshape(-1, 3), axis=0)) > 10
    for value in (0.0, 1.0):
        dead = usage(count)
        dead[count // 2] = value
        assert red(bit_usage_plot(dead)) > red(alive) + 400


def test_bits_inside_the_lines_are_alive() -> None:
    assert red(bit_usage_plot(torch.tensor([0.011, 0.989, 0.5]))) == red(bit_usage_plot(torch.tensor([0.4, 0.6, 0.5])))
    assert red(bit_usage_plot(torch.tensor([0.009, 0.991, 0.5]))) > red(bit_usage_plot(torch.tensor([0.4, 0.6, 0.5])))


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(0), torch.tensor([0.5, 1.1]), torch.tensor([np.nan])])
def test_what_is_no_share_is_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bit usage has shape .*; it must be \(c,\), shares in \[0, 1\]"):
        bit_usage_plot(wrong)


@pytest.mark.parametrize("steps", [1, 4, 64, 1000])
def test_a_profile_of_any_number_of_steps_is_a_picture_that_shows_it(steps: int) -> None:
    flat, falling = (profile_plot([weight / steps for weight in weights]) for weights in ([1.0] * steps, range(steps)))
    assert (flat.mode, flat.size) == ("RGB", (480, 360))
    assert flat.tobytes() != falling.tobytes()


def test_panels_lie_side_by_side_with_numbers_or_names() -> None:
    names = Panel("a", "x", "y", [Line(["flip", "z0"], [1.0, 2.0], [0.1, 0.2])])
    numbers = Panel("b", "x", "y", [Line([4, 8], [1.0, 2.0], name="ours"), Line([4, 8], [2.0, 1.0])], doubling=True)
    picture = panels_plot([names, numbers])
    assert picture.size == (960, 360)
    assert picture.crop((0, 0, 400, 360)).tobytes() != picture.crop((480, 0, 880, 360)).tobytes()


def test_no_global_state_of_matplotlib_is_touched() -> None:
    code = (
        "import sys, torch; from cluster.plots import bit_usage_plot; bit_usage_plot(torch.rand(8)); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
