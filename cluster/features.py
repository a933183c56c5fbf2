"""Feature extractors, by which Frechet distances are named: the Inception network of torch-fidelity."""

from __future__ import annotations

import torch
from torch import Tensor

from bld_core.weights import PublishedWeights

INCEPTION = PublishedWeights(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "evaluation.inception_weights",
)


class Inception:
    """The 2,048 features of FID: TensorFlow's Inception of 2015 with its own resizing, by torch-fidelity.

    Args:
        path: local file of the weights; empty downloads them.
        sha256: of that file, or its first digits.
        device: where it runs; always in float32.

    Raises:
        FileNotFoundError, ValueError: as `PublishedWeights.find`.
    """

    def __init__(self, path: str, sha256: str, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = INCEPTION.find(path, sha256)
        INCEPTION.load(file, sha256)  # nothing but tensors: torch-fidelity itself would run what is in the file
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
        self.network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, 2048); one channel stands for three equal ones."""
        return self.network(images.to(self.device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))[0]


def frechet_name(prefix: str, sha256: str) -> str:
    """What a Frechet distance in these features may be called: FID only with the true weights."""
    return f"{prefix}fid" if sha256.startswith(INCEPTION.sha256) else f"{prefix}fd_inception_{sha256[:8]}"
