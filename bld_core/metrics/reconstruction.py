"""How close reconstructions are to their images: PSNR, SSIM (Table 4) and LPIPS; and the bits that they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.autoencoder.network import Autoencoder
from bld_core.autoencoder.perceptual import Perceptual, lpips_name
from bld_core.autoencoder.quantizer import BernoulliBottleneck
from bld_core.data.tensors import to_float, to_uint8
from bld_core.metrics.code_health import CodeHealth
from bld_core.precision import ieee_float32

_WINDOW = 11
_SIGMA = 1.5


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(255^2 / MSE), in dB.

    Args:
        images: uint8 (B, H, W, channels).
        reconstructions: the same shape.

    Returns:
        float64 (B,); an exact copy counts as an error of half a grey level in one pixel value, not as infinity.
    """
    error = (images.double() - reconstructions.double()).square().flatten(1)
    floor = 0.25 / error.shape[1]
    return 10 * torch.log10(255.0**2 / error.mean(1).clamp_min(floor))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5, K = .01, .03.

    Args:
        images: uint8 (B, H, W, channels); smaller images take the largest odd window that fits.
        reconstructions: the same shape.

    Returns:
        float64 (B,), 1 for equal images; the mean over positions and channels.
    """
    x, y = (t.double().permute(0, 3, 1, 2) for t in (images, reconstructions))
    side = min(_WINDOW, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)
    offset = torch.arange(side, dtype=torch.float64, device=x.device) - side // 2
    line = torch.exp(-offset.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def blur(t: Tensor) -> Tensor:
        """The window is a product of two lines: each channel is blurred down, then across."""
        planes = t.flatten(0, 1)[:, None]
        planes = F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return planes.view(*t.shape[:2], *planes.shape[2:])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


@dataclass
class Moments:
    """Mean and standard deviation of a metric, from sums that merge: add the parts of all workers."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Add the values of some images."""
        values = values.double()
        self.merge(Moments(len(values), float(values.sum()), float(values.square().sum())))

    def merge(self, other: Moments) -> None:
        """Add another worker's part."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        """The mean; NaN over nothing."""
        return self.total / self.count if self.count else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation over the images (n - 1); 0 of one image, which differs from no other; NaN of none."""
        if self.count < 2:
            return 0.0 if self.count else math.nan
        return math.sqrt(max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1))


@dataclass
class ReconstructionQuality:
    """PSNR and SSIM over a set of images."""

    psnr: Moments = field(default_factory=Moments)
    ssim: Moments = field(default_factory=Moments)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch, uint8 (B, H, W, channels) each."""
        self.psnr.update(psnr(images, reconstructions))
        self.ssim.update(ssim(images, reconstructions))

    def merge(self, other: ReconstructionQuality) -> None:
        """Add another worker's part."""
        self.psnr.merge(other.psnr)
        self.ssim.merge(other.ssim)


@dataclass
class ReconstructionMetrics:
    """Held-out images and their reconstructions, without the noise of the latent, from sums that merge.

    Attributes:
        quality: PSNR and SSIM.
        lpips: the perceptual distance, where it is measured.
        health: of the bits, where the latent has some.
    """

    quality: ReconstructionQuality = field(default_factory=ReconstructionQuality)
    lpips: Moments = field(default_factory=Moments)
    health: CodeHealth = field(default_factory=CodeHealth)

    @ieee_float32()
    @torch.no_grad()
    def update(self, network: Autoencoder, images: Tensor, perceptual: Perceptual | None = None) -> Tensor:
        """Reconstruct a batch and add it.

        Args:
            network: in evaluation mode.
            images: uint8 (B, H, W, channels); PSNR and SSIM are measured on their device.
            perceptual: measures LPIPS, too.

        Returns:
            The reconstructions, uint8 like the images, on the device of the network.
        """
        x = to_float(images.to(next(network.parameters()).device))
        features = network.encode(x)
        reconstructed = to_uint8(network.decode(network.bottleneck(features)[0]))
        self.quality.update(images, reconstructed.to(images.device))
        if isinstance(network.bottleneck, BernoulliBottleneck):
            self.health.update(features)
        if perceptual is not None:
            self.lpips.update(perceptual(x, to_float(reconstructed)).cpu())
        return reconstructed

    def merge(self, other: ReconstructionMetrics) -> None:
        """Add another worker's part."""
        self.quality.merge(other.quality)
        self.lpips.merge(other.lpips)
        self.health.merge(other.health)

    def metrics(self, vgg_sha256: str) -> dict[str, float]:
        """The means by name, `_std` their deviations over images; LPIPS is named by the weights of VGG16."""
        moments = {"psnr": self.quality.psnr, "ssim": self.quality.ssim, lpips_name(vgg_sha256): self.lpips}
        found: dict[str, float] = {}
        for name, values in moments.items():
            if values.count:
                found |= {name: values.mean, f"{name}_std": values.deviation}
        return found | (self.health.metrics() if self.health.count else {})
