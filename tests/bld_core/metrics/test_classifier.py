from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bld_core.metrics.classifier import Classifier, accuracy, train_classifier


def squares(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright square in the corner that the class names."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 16, 16, 1), generator=generator).byte()
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 8 * (label // 2), 8 * (label % 2)
        image[top : top + 8, left : left + 8] += 100
    return images, labels


def test_a_classifier_learns_and_is_a_function_of_its_arguments() -> None:
    images, labels = squares(64, 0)
    before = torch.random.get_rng_state()
    first, second, other = (train_classifier(images, labels, 4, 40, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert accuracy(first, *squares(300, 1)) > 0.9
    weights, again, others = (network.state_dict() for network in (first, second, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["head.weight"], others["head.weight"])


@pytest.mark.parametrize(("size", "features"), [(4, 32), (8, 32), (16, 64), (32, 128), (64, 128)])
def test_features_are_a_vector_for_images_of_any_size(size: int, features: int) -> None:
    classifier, images = Classifier(size, 3, 5), torch.zeros(2, size, size, 3).byte()
    assert classifier.features(images).shape == (2, features)
    assert classifier(images).shape == (2, 5)
