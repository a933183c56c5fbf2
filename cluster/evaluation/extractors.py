"""The extractors in whose features images are compared, and what a metric in the features of each may be called."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.autoencoder.efficientnet_lite0 import PIXELS, load_efficientnet_lite0
from bld_core.metrics.dinov2 import DINOv2
from bld_core.precision import ieee_float32
from bld_core.storage.weights import DINOV2, INCEPTION, VGG16

SpaceName = Literal["inception", "dinov2", "efficientnet_lite0", "vgg16", "classifier"]
_DINOV2_PIXELS = 224
_IMAGES_AT_ONCE = 4  # on a CPU: of 96 images at once most of the time goes into fresh pages of memory
_IN_THE_FIELD = {"fd": "fid", "rfd": "rfid", "kd": "kid", "is": "inception_score"}


class Extractor(Protocol):
    """Images to features: deterministic, always in float32; what it makes of an image depends on no other image."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, F), on the extractor's device."""
        ...


class Inception:
    """The 2,048 features of FID: TensorFlow's Inception of 2015 with its own resizing, by torch-fidelity.

    Args:
        path: local file of the weights; empty downloads them.
        sha256: of that file, or its first digits.
        device: where it runs; always in float32.

    Raises:
        UserError: as `PublishedWeights.find`.
    """

    def __init__(self, path: str, sha256: str, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = INCEPTION.find(path, sha256)
        INCEPTION.load(file, sha256)  # nothing but tensors: torch-fidelity itself would run what is in the file
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
        self.network.to(device)
        self.device = device

    @ieee_float32()
    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, 2048); one channel stands for three equal ones."""
        return self.network(_planes(images, self.device))[0]

    @ieee_float32()
    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Features (B, 2048) -> the logits of the Inception score, float32 (B, 1008), without the layer's bias."""
        return features.mm(self.network.fc.weight.T)


class VGG16Features:
    """The 4,096 features of the last but one layer of VGG16, by torch-fidelity, for precision and recall.

    Args:
        path: local file of torchvision's weights; empty downloads them.
        sha256: of that file, or its first digits.
        device: where it runs; always in float32.

    Raises:
        UserError: as `PublishedWeights.find`.
    """

    def __init__(self, path: str, sha256: str, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        file = VGG16.find(path, sha256)
        VGG16.load(file, sha256)  # nothing but tensors
        self.network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(file))
        self.network.to(device)
        self.device = device

    @ieee_float32()
    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, 4096); one channel stands for three equal ones."""
        return self.network(_planes(images, self.device))[0]


class DINOv2Features:
    """The 1,024 features of DINOv2, ViT-L/14, of images that are resized and scaled as torch-fidelity does for it.

    torch-fidelity itself takes this network from the internet alone, code and weights, so the network is our own: the
    authors' code gives the same features to 1e-7.

    Args:
        path: local file of the authors' weights; empty downloads them.
        sha256: of that file, or its first digits.
        device: where it runs; always in float32.

    Raises:
        UserError: as `PublishedWeights.find`.
    """

    def __init__(self, path: str, sha256: str, device: torch.device) -> None:
        with torch.device("meta"):  # no random numbers for weights that the file replaces
            network = DINOv2()
        self.network = network.to_empty(device="cpu")
        self.network.load_state_dict(DINOV2.load(DINOV2.find(path, sha256), sha256))
        self.network.requires_grad_(False).eval().to(device)
        self.device = device
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self._mean, self._deviation = (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, deviation))

    @ieee_float32()
    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, 1024); one channel stands for three equal ones."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        size = (_DINOV2_PIXELS, _DINOV2_PIXELS)
        x = interpolate_bilinear_2d_like_tensorflow1x(_planes(images, self.device).float(), size, align_corners=False)
        return self.network((x - self._mean) / self._deviation)


class EfficientNetLite0Features:
    """The 1,280 features of EfficientNet-lite0, whose weights come in a package, of images resized to 224 x 224.

    The resizing is bicubic and antialiased, as Pillow's is, which the network is at its best with.

    Args:
        device: where it runs; always in float32.

    Raises:
        UserError: as `load_efficientnet_lite0`.
    """

    def __init__(self, device: torch.device) -> None:
        self.network = load_efficientnet_lite0(device)
        self.device = device

    @ieee_float32()
    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 (B, H, W, 1 or 3) -> features, float32 (B, 1280); one channel stands for three equal ones."""
        planes = _planes(images, self.device)
        at_once = _IMAGES_AT_ONCE if self.device.type == "cpu" else len(planes)
        return torch.cat([self._features(some.float()) for some in planes.split(at_once)])

    def _features(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (PIXELS, PIXELS):
            x = F.interpolate(x, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network((x - 127) / 128)


def _planes(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def metric_name(metric: str, space: SpaceName, sha256: str = "") -> str:
    """What a metric in the features of an extractor may be called; the field's own names need the true weights.

    Args:
        metric: fd (Frechet distance), rfd (that of reconstructions), fdr (that of samples by that of held-out images),
            kd (kernel distance), mind, is (Inception score), precision or recall.
        space: the extractor.
        sha256: of its weights, where they are published ones.

    Returns:
        fid, rfid, fdr, kid, mind, inception_score, precision, recall in the true Inception's features; anything else
        names its space, and weights other than the published ones by their hash: fd_inception_0123abcd, recall_vgg16.
    """
    if space == "inception" and sha256.startswith(INCEPTION.sha256):
        return _IN_THE_FIELD.get(metric, metric)
    known = space in ("classifier", "efficientnet_lite0") or (space == "vgg16" and sha256.startswith(VGG16.sha256))
    return f"{metric}_{space}" if known else f"{metric}_{space}_{sha256[:8]}"
