"""A perceptual term of Eq. 2 whose network comes as a package: a distance in the features of EfficientNet-lite0.

Shapes: x_BCHW images, y_BCHW reconstructions, both in [-1, 1] (y only about).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bld_core.autoencoder.efficientnet_lite0 import EfficientNetLite0, load_efficientnet_lite0

_EPSILON = 1e-10  # a position whose features are all 0 has no direction, and no NaN in its gradient


class FeatureDistance(nn.Module):
    """Squared distance between unit feature vectors, at each resolution of EfficientNet-lite0; not LPIPS.

    LPIPS (Zhang et al. 2018) has the same form with VGG16 and weights of its channels that people's judgements taught;
    here all channels count alike. Images are read at their own size. Frozen, in evaluation mode, in float32.
    """

    def __init__(self, network: EfficientNetLite0) -> None:
        """With a network of any weights; see `load_feature_distance`."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode, whatever the mode asked for."""
        return super().train(False)

    def _features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Unit feature vectors, one map for each resolution."""
        levels = ((x_BCHW.float() + 1) * 127.5 - 127) / 128  # as the network was trained
        maps = self.network.maps(levels.expand(-1, 3, -1, -1))
        return [h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + _EPSILON) for h in maps]

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """The distance of each reconstruction from its image.

        Args:
            x_BCHW: images, float (B, 1 or 3, H, W) in [-1, 1]; one channel stands for three equal ones. They get no
                gradient.
            y_BCHW: reconstructions, the same shape, of any finite value.

        Returns:
            float32 (B,), in [0, 4]: the mean over resolutions of the mean over positions; exactly 0 for a copy.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            with torch.no_grad():
                of_x = self._features(x_BCHW)
            of_y = self._features(y_BCHW)
            pairs = zip(of_x, of_y, strict=True)
            return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


def load_feature_distance(device: torch.device) -> FeatureDistance:
    """The distance with the weights of the package, on a device; see `load_efficientnet_lite0` for the errors."""
    return FeatureDistance(load_efficientnet_lite0(device)).to(device)
