"""The network of EfficientNet-lite0 (Tan and Le 2019; the lite variant: Google, 2020), whose weights come as a package.

EfficientNet-B0 without squeeze-and-excitation and with ReLU6 for swish. As in TensorFlow, where it was trained, a
convolution of stride s gives ceil(side / s) positions, and pads one pixel more after the image than before it where it
cannot pad evenly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.storage.weights import EFFICIENTNET_LITE0

PIXELS = 224  # the side of the images that it was trained on
_FEATURES = 1280
_CLASSES = 1000
_STEM = 32
# Stages of inverted bottlenecks: how many, side of the depthwise kernel, stride of the first, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, side, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # its name in the base class
        before_and_after: list[int] = []
        for pixels, side, stride in zip(input.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max(0, (-(-pixels // stride) - 1) * stride + side - pixels)
            before_and_after += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, before_and_after) if any(before_and_after) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018): wide, depthwise, narrow, beside a skip where shapes allow one."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * inputs
        self.skips = stride == 1 and inputs == outputs
        self.stride = stride
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = _Conv(inputs, width)
            self._bn0 = _norm(width)
        self._depthwise_conv = _Conv(width, width, side, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = _Conv(width, outputs)
        self._bn2 = _norm(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x_BCHW))) if self.expands else x_BCHW
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x_BCHW + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """Parameters are named as in the file of the package, which it loads as it is; to be used in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, _STEM, 3, 2), _norm(_STEM)
        blocks: list[_Block] = []
        width = _STEM
        for count, side, stride, expansion, channels in _STAGES:
            for number in range(count):
                blocks.append(_Block(width, channels, side, 1 if number else stride, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(width, _FEATURES), _norm(_FEATURES)
        self._fc = nn.Linear(_FEATURES, _CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images, float32 (B, 3, H, W), (grey level - 127) / 128, best of 224 x 224 pixels -> features (B, 1280)."""
        return self.maps(x_BCHW)[-1].mean((2, 3))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Such images of any size -> what the network makes of them at 1/2, 1/4, 1/8, 1/16 and 1/32 of it, before each
        halving and at the end: (B, 16, ...), (B, 24, ...), (B, 40, ...), (B, 112, ...), (B, 1280, ...).
        """
        h = F.relu6(self._bn0(self._conv_stem(x_BCHW)))
        found: list[Tensor] = []
        for block in self._blocks:
            assert isinstance(block, _Block)
            if block.stride > 1:
                found.append(h)
            h = block(h)
        return [*found, F.relu6(self._bn1(self._conv_head(h)))]

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, 1280) -> logits of the classes of ImageNet, (B, 1000)."""
        return self._fc(features)


def load_efficientnet_lite0(device: torch.device) -> EfficientNetLite0:
    """The network with its weights, frozen, in evaluation mode.

    Raises:
        UserError: the package of the weights is not installed, or holds other ones.
    """
    weights = EFFICIENTNET_LITE0.load()
    with torch.device("meta"):  # no random numbers for weights that the file replaces
        network = EfficientNetLite0()
    network = network.to_empty(device="cpu")
    network.load_state_dict(weights)
    network = network.to(memory_format=torch.channels_last)  # faster, above all for convolutions of one channel each
    return network.requires_grad_(False).eval().to(device)
