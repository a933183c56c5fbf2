"""The terms of Eq. 2 beside plain reconstruction error: perceptual, adversarial, and the adaptive weight between them.

Shapes: x_BCHW images, y_BCHW reconstructions, both in [-1, 1] (y only about); a critic's map is (B, 1, h, w) of logits.

The perceptual term needs the packages lpips and torchvision, which are imported only when it is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.replicas import place, sum_over_replicas
from bld_core.weights import PublishedWeights

VGG16 = PublishedWeights(
    "VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", "loss.vgg_weights"
)

_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 among torchvision's `features`
_SMALLEST = 16  # pixels: the trunk halves its input four times
_RANGE = 1.0001  # rounding may carry an image a little beyond 1


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Eq. 2 as a weighted collection; a term of weight 0 is not computed, and what it needs is not loaded.

    Args:
        l1: weight of the mean absolute error.
        mse: weight of the mean squared error.
        perceptual: weight of LPIPS (VGG16).
        vgg_weights: local file of torchvision's VGG16 ImageNet weights; empty downloads it.
        vgg_sha256: sha256 of that file in lower-case hex, or its first digits, at least 8.
        adversarial: weight of the generator's hinge loss, beside its adaptive weight.
        adversarial_start: step from which the adversarial term counts; before it the weight is 0.
        adversarial_limit: upper clamp of the adaptive weight.
        critic_channels: feature channels of the critic's first layer.
        critic_layers: convolutions of the critic that halve the resolution; 3 judge patches of 70 x 70 pixels.
        critic_learning_rate: step size of the critic's optimizer.
        entropy: weight of the quantizer's entropy regulariser: surer bits, each of them used half of the time.
    """

    l1: float = 1.0
    mse: float = 0.0
    perceptual: float = 0.0
    vgg_weights: str = ""
    vgg_sha256: str = VGG16.sha256
    adversarial: float = 0.0
    adversarial_start: int = 0
    adversarial_limit: float = 1e4
    critic_channels: int = 64
    critic_layers: int = 3
    critic_learning_rate: float = 2e-4
    entropy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "perceptual", "adversarial", "adversarial_start", "entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        for name in ("adversarial_limit", "critic_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be above 0, and finite")
        for name in ("critic_channels", "critic_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be at least 1")
        if self.l1 == self.mse == 0:
            raise ValueError(
                "loss.l1 and loss.mse are both 0; one must be above 0, or nothing ties pixels to the image"
            )
        VGG16.check_settings(self.vgg_weights, self.vgg_sha256)


# --- The perceptual term --------------------------------------------------------------------------------------------


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
            ImportError: lpips or torchvision is not installed.
            ValueError: the file's sha256 is another; nothing was loaded.
        """
        super().__init__()
        try:
            import lpips
            from torchvision.models.vgg import cfgs, make_layers
        except ImportError as error:
            raise ImportError(
                f"loss.perceptual above 0 needs lpips and torchvision ({error}): pip install "
                "'binary-latent-diffusion[losses]'"
            ) from error
        state = VGG16.load(weights, sha256)
        with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces
            trunk = make_layers(cfgs["D"])[: _TAPS[-1] + 1]
        self.trunk = trunk.to_empty(device="cpu")
        prefix = "features."
        self.trunk.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        heads = torch.load(heads_file, weights_only=True, map_location="cpu")
        self.heads = nn.ParameterList(heads[f"lin{i}.model.1.weight"] for i in range(len(_TAPS)))  # each (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

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
                ones. They get no gradient. To check them costs one wait for the device.
            y_BCHW: reconstructions, the same shape, of any finite value.

        Returns:
            float32 (B,), 0 or more; exactly 0 for a copy.

        Raises:
            ValueError: the shapes differ, do not fit, or an image leaves [-1, 1] or is NaN.
        """
        if x_BCHW.shape != y_BCHW.shape or x_BCHW.ndim != 4 or x_BCHW.shape[1] not in (1, 3):
            raise ValueError(
                f"the perceptual loss got images {tuple(x_BCHW.shape)} and reconstructions {tuple(y_BCHW.shape)}; "
                "both must be (B, 1 or 3, H, W)"
            )
        if min(x_BCHW.shape[2:]) < _SMALLEST:
            raise ValueError(
                f"the perceptual loss got images of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels; VGG16 needs at least "
                f"{_SMALLEST} x {_SMALLEST}: raise data.image_size, or set loss.perceptual to 0"
            )
        low, high = (float(v) for v in x_BCHW.detach().aminmax())
        if not (x_BCHW.is_floating_point() and low >= -_RANGE and high <= _RANGE):
            raise ValueError(
                f"the perceptual loss got {x_BCHW.dtype} images from {low:g} to {high:g}; they must be floats in "
                "[-1, 1]: convert uint8 images with bld_core.autoencoder.to_float (x / 127.5 - 1; not to [0, 1], a "
                "common mistake that no check can see)"
            )
        with torch.autocast(x_BCHW.device.type, enabled=False):
            with torch.no_grad():
                of_x = self._features(x_BCHW)
            of_y = self._features(y_BCHW)
            layers = [
                F.conv2d((a - b).square(), w).mean((1, 2, 3)) for a, b, w in zip(of_x, of_y, self.heads, strict=True)
            ]
            return torch.stack(layers).sum(0)


def load_perceptual(config: LossConfig, device: torch.device) -> Perceptual:
    """LPIPS on a device, with the weights that `config` names. See `PublishedWeights.find` for the errors."""
    return Perceptual(VGG16.find(config.vgg_weights, config.vgg_sha256), config.vgg_sha256).to(device)


# --- The adversarial term -------------------------------------------------------------------------------------------


class PatchCritic(nn.Module):
    """PatchGAN discriminator (Isola et al. 2017): one logit for each patch, above 0 for "real".

    4 x 4 convolutions with LeakyReLU(0.2): `layers` of stride 2, one of stride 1, one to the logits. GroupNorm stands
    in for BatchNorm: batch statistics would tie an image's score to the rest of its batch, and so to the number of
    workers that the batch is split over. Convolutions start at N(0, 0.02), biases at 0.
    """

    def __init__(self, config: LossConfig, image_channels: int) -> None:
        super().__init__()
        self.layers = config.critic_layers
        width = config.critic_channels
        body: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.critic_layers + 1):
            wider = config.critic_channels * min(2**level, 8)
            stride = 2 if level < config.critic_layers else 1
            body += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        body.append(nn.Conv2d(width, 1, 4, padding=1))
        self.body = nn.Sequential(*body)
        for layer in body:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """*Logits* (B, 1, H / 2^layers - 2, W / 2^layers - 2) of images (B, channels, H, W), about [-1, 1].

        Raises:
            ValueError: the images are too small to leave a logit.
        """
        smallest = 3 * 2**self.layers
        if min(x_BCHW.shape[2:]) < smallest:
            raise ValueError(
                f"the critic got images of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} pixels; its {self.layers} layers need "
                f"at least {smallest} x {smallest}: lower loss.critic_layers, or set loss.adversarial to 0"
            )
        return self.body(x_BCHW)


def hinge_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Eq. 2, what the critic minimises: (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2; a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Eq. 2, the adversarial term of the autoencoder: -E[fake]; a scalar."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, limit: float) -> Tensor:
    """The adversarial weight: ||d rec / d last|| / (||d adv / d last|| + 1e-4), clamped to [0, limit].

    Where torch.distributed runs with several workers, both gradients are first averaged over all of them, so every
    replica uses the weight of the global batch. It is then a collective call: every worker makes it, at the same step.

    Args:
        reconstruction_loss: scalar, the mean over this worker's share of the batch; all terms but the adversarial one.
        adversarial_loss: scalar, likewise: `hinge_generator_loss`, before any weight.
        last_layer: weight of the decoder's last layer, on which both losses depend.
        limit: upper clamp.

    Returns:
        Scalar without gradient. Both graphs are kept for the backward pass, and no `.grad` is touched. It costs a
        backward pass through the perceptual network and one through the critic, beside those of the step itself.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
            for loss in (reconstruction_loss, adversarial_loss)
        ]
    )
    gradients = sum_over_replicas(gradients) / place()[1]
    reconstruction, adversarial = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return (reconstruction / (adversarial + 1e-4)).clamp(0, limit).detach()
