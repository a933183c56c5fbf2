"""The perceptual term in the features of EfficientNet-lite0, whose weights come as a package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bld_core.autoencoder.efficientnet_lite0 import EfficientNetLite0
from bld_core.autoencoder.feature_distance import FeatureDistance, load_feature_distance
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.perceptual import load_perceptual


@pytest.fixture(scope="module")
def term() -> FeatureDistance:
    return load_feature_distance(torch.device("cpu"))


def smooth(count: int, channels: int = 3, side: int = 48) -> Tensor:
    """Images with some content, in [-1, 1]."""
    noise = torch.randn(count, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, side, mode="bicubic").clamp(-1, 1)


def test_the_distance_is_the_mean_of_what_two_directions_differ_at_each_position(term: FeatureDistance) -> None:
    x, y = smooth(2), smooth(2).flip(0)
    network, resolutions = term.network, list[Tensor]()
    for of_x, of_y in zip(*(network.maps((255 * (h + 1) / 2 - 127) / 128) for h in (x, y)), strict=True):
        cosine = nn.functional.cosine_similarity(of_x, of_y, dim=1, eps=1e-10)
        resolutions.append((2 - 2 * cosine).mean((1, 2)))
    assert [h.shape[1:] for h in network.maps(x)] == [
        (16, 24, 24), (24, 12, 12), (40, 6, 6), (112, 3, 3), (1280, 2, 2)
    ]  # fmt: skip
    torch.testing.assert_close(term.distance(x, y), torch.stack(resolutions).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_copy_is_at_distance_0_and_noise_moves_it_away(term: FeatureDistance, channels: int) -> None:
    x = smooth(3, channels)
    assert term.distance(x, x.clone()).tolist() == [0, 0, 0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    distances = torch.stack([term.distance(x, x + size * noise) for size in (0.01, 0.1, 0.5)])
    assert (distances.diff(dim=0) > 0).all()


def test_gradients_reach_the_reconstruction_alone_and_the_network_stays_frozen(term: FeatureDistance) -> None:
    x, y = (smooth(2).flip(k).requires_grad_() for k in (0, 1))
    holder = nn.ModuleList([term]).train()
    with torch.autocast("cpu", torch.bfloat16):
        distance = term.distance(x, y)
    assert distance.dtype == torch.float32
    distance.sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert y.grad.abs().sum() > 0
    assert not any(module.training for module in holder[0].modules())
    assert not any(weight.requires_grad for weight in term.parameters())


def test_features_of_0_give_no_nan() -> None:
    network = EfficientNetLite0()
    for weight in network.parameters():
        nn.init.zeros_(weight)
    y = smooth(1).requires_grad_()
    FeatureDistance(network).distance(smooth(1), y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()


def test_the_setting_names_the_network() -> None:
    config = LossConfig(perceptual=1.0, perceptual_network="efficientnet_lite0")
    assert isinstance(load_perceptual(config, torch.device("cpu")), FeatureDistance)
