"""The perceptual term of Eq. 2: LPIPS with VGG16.

Shapes: x_BCHW images, y_BCHW reconstructions, both in [-1, 1] (y only about).

It needs the packages lpips and torchvision, which are imported only when it is built.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.autoencoder.feature_distance import FeatureDistance, load_feature_distance
from bld_core.autoencoder.losses import LossConfig
from bld_core.errors import UserError
from bld_core.storage.weights import VGG16

_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 among torchvision's `features`


_SMALLEST = 16  # pixels: the trunk halves its input four times


_RANGE = 1.0001  # rounding may carry an image a little beyond 1


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018), version 0.1, VGG16: weighted squared distance between unit feature vectors.

    The values are those of the package lpips, which brings the layer weights. Its constructor is not used: it draws a
    whole VGG16, 138M weights, from the global random stream before the trunk can be filled, and asks torchvision for it
    by a keyword that is to be removed. No NaN arises in the backward pass either where all features of a position are
    0, so anomaly detection stays usable.

    Frozen, always in evaluation mode, always in float32. It is a yardstick, not a part of the network: keep it out of
    what is trained, averaged and saved.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path, sha256: str) -> None:
        """Load the trunk from a verified file, and the layer weights from the package lpips.

        Args:
            weights: state_dict of torchvision's VGG16, of which `features.*` are used; see `PublishedWeights.find`.
            sha256: the file's sha256, or its first digits.

        Raises:
            UserError: lpips or torchvision is not installed; or the file's sha256 is another, and nothing was loaded.
        """
        super().__init__()
        try:
            import lpips
            from torchvision.models.vgg import cfgs, make_layers
        except ImportError as error:
            raise UserError(
                f"the perceptual distance needs lpips and torchvision ({error}): pip install "
                "'binary-latent-diffusion[losses]'"
            ) from error
        state = VGG16.load(weights, sha256)
        with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces
            trunk = make_layers(cfgs["D"])[: _TAPS[-1] + 1]
        self.trunk = trunk.to_empty(device="cpu")
        prefix = "features."
        self.trunk.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.trunk = self.trunk.to(memory_format=torch.channels_last)  # convolutions are faster
        heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        heads = torch.load(heads_file, weights_only=True, map_location="cpu")
        self.heads = nn.ParameterList(heads[f"lin{i}.model.1.weight"] for i in range(len(_TAPS)))  # each (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def without_weights(cls) -> Perceptual:
        """The network with weights of any value and no file read: to count what it costs."""
        from torchvision.models.vgg import cfgs, make_layers

        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.trunk = make_layers(cfgs["D"])[: _TAPS[-1] + 1]
        made.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in (64, 128, 256, 512, 512))
        made.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        made.register_buffer("scale", torch.ones(1, 3, 1, 1))
        made.requires_grad_(False)
        return made.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode, whatever the mode asked for."""
        return super().train(False)

    def _features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Unit feature vectors at the five taps."""
        h = (x_BCHW.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        found: list[Tensor] = []
        for i, layer in enumerate(self.trunk):
            h = layer(h)
            if i in _TAPS:
                found.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """LPIPS distance of each reconstruction from its image.

        The range of the images is enforced, that of the reconstructions is not: a decoder may overshoot, early in
        training by far, and a clamp would stop the very gradient that brings it back. Images in [0, 1] lie within the
        range too, so they pass: nothing here can tell them from dim ones.

        Args:
            x_BCHW: images, float (B, 1 or 3, H, W) in [-1, 1], at least 16 x 16; one channel stands for three equal
                ones. They get no gradient. To check their range waits for the device: see `distance`.
            y_BCHW: reconstructions, the same shape, of any finite value.

        Returns:
            float32 (B,), 0 or more; exactly 0 for a copy.

        Raises:
            ValueError: the shapes differ or do not fit, or an image leaves [-1, 1] or is NaN.
        """
        if x_BCHW.shape != y_BCHW.shape or x_BCHW.ndim != 4 or x_BCHW.shape[1] not in (1, 3):
            raise ValueError(
                f"the perceptual loss got images {tuple(x_BCHW.shape)} and reconstructions {tuple(y_BCHW.shape)}; "
                "both must be (B, 1 or 3, H, W)"
            )
        if min(x_BCHW.shape[2:]) < _SMALLEST:
            raise UserError(
                f"the perceptual loss got images of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels; VGG16 needs at least "
                f"{_SMALLEST} x {_SMALLEST}: raise `image_size`, or set `perceptual` to 0"
            )
        low, high = (float(v) for v in x_BCHW.detach().aminmax())
        if not (x_BCHW.is_floating_point() and low >= -_RANGE and high <= _RANGE):
            raise ValueError(
                f"the perceptual loss got {x_BCHW.dtype} images from {low:g} to {high:g}; they must be floats in "
                "[-1, 1]: convert uint8 images with bld_core.data.tensors.to_float (x / 127.5 - 1; not to [0, 1], a "
                "common mistake that no check can see)"
            )
        return self.distance(x_BCHW, y_BCHW)

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """The same, of images whose shape and range are known to be right, as those of uint8 images are."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            with torch.no_grad():
                of_x = self._features(x_BCHW)
            of_y = self._features(y_BCHW)
            layers = [
                F.conv2d((a - b).square(), w).mean((1, 2, 3)) for a, b, w in zip(of_x, of_y, self.heads, strict=True)
            ]
            return torch.stack(layers).sum(0)


def load_lpips(config: LossConfig, device: torch.device) -> Perceptual:
    """LPIPS on a device, with the weights that `config` names. See `PublishedWeights.find` for the errors."""
    return Perceptual(VGG16.find(config.vgg_weights, config.vgg_sha256), config.vgg_sha256).to(device)


def load_perceptual(config: LossConfig, device: torch.device) -> Perceptual | FeatureDistance:
    """The perceptual term that `config` names; see `load_lpips` and `load_feature_distance` for the errors."""
    return load_lpips(config, device) if config.perceptual_network == "vgg16" else load_feature_distance(device)


def lpips_name(sha256: str) -> str:
    """What the distance in features of VGG16 may be called: LPIPS with its true weights, others carry their hash."""
    return "lpips" if sha256.startswith(VGG16.sha256) else f"lpips_{sha256[:8]}"
