from __future__ import annotations

import math

import pytest
import torch

from bld_core.prior import Prior, PriorConfig, drop_labels, time_features
from tests.bld_core.toys import perturb, tiny_prior

Z = torch.randint(0, 2, (5, 4, 8), generator=torch.Generator().manual_seed(0)).float()
TIME = torch.linspace(0.1, 1, 5)


def test_a_fresh_prior_has_no_evidence() -> None:
    for classes in (0, 3):
        assert (tiny_prior(classes=classes)(Z, TIME, torch.tensor([-1, 0, 1, 2, -1])) == 0).all()


@torch.no_grad()
def test_no_labels_are_the_null_class_for_all() -> None:
    prior = tiny_prior()
    perturb(prior)
    none = prior(Z, TIME, None)
    assert torch.equal(none, prior(Z, TIME, torch.full((5,), -1)))
    by_class = [prior(Z, TIME, torch.full((5,), label)) for label in range(3)]
    for evidence in by_class:  # -1 is a class of its own, not the first nor the last
        assert not torch.allclose(evidence, none)
    assert not torch.allclose(by_class[0], by_class[1])


@torch.no_grad()
def test_each_sample_has_its_own_label_and_time() -> None:
    prior = tiny_prior()
    perturb(prior)
    labels = torch.tensor([2, -1, 0, 1, 1])
    together = prior(Z, TIME, labels)
    alone = torch.cat([prior(Z[i : i + 1], TIME[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_time_matters_and_tokens_see_each_other_and_their_position() -> None:
    prior = tiny_prior(classes=0)
    perturb(prior)
    evidence = prior(Z, TIME)
    assert not torch.allclose(prior(Z, TIME / 2), evidence)
    changed = Z.clone()
    changed[:, 3] = 1 - changed[:, 3]
    assert (prior(changed, TIME)[:, 0] != evidence[:, 0]).any(-1).all()
    assert not torch.allclose(prior(Z.flip(1), TIME).flip(1), evidence)


def test_time_features_are_sines_and_cosines_from_1_to_1000_radians() -> None:
    features = time_features(torch.tensor([0.0, 0.3, 1.0]), 8)
    assert features[0].tolist() == [0] * 4 + [1] * 4
    truth = [math.sin(0.3 * 1000 ** (i / 3)) for i in range(4)] + [math.cos(0.3 * 1000 ** (i / 3)) for i in range(4)]
    torch.testing.assert_close(features[1], torch.tensor(truth), rtol=0, atol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    prior = tiny_prior()
    perturb(prior)
    prior(Z, TIME, torch.tensor([0, 1, 2, -1, 0])).square().sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_labels_drop_for_each_sample_on_its_own() -> None:
    n, probability = 50_000, 0.1
    labels, index = torch.arange(n) % 7, torch.arange(n)
    kept = drop_labels(labels, index, probability, seed=0)
    dropped = kept == -1
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert abs(float(dropped.float().mean()) - probability) < 4 * math.sqrt(probability * (1 - probability) / n)
    part = torch.arange(100, 200)  # keyed on the index: any batch drops the same samples
    assert torch.equal(drop_labels(labels[part], part, probability, seed=0), kept[part])
    assert not torch.equal(drop_labels(labels, index, probability, seed=1), kept)
    assert torch.equal(drop_labels(labels, index, 0.0, seed=0), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "heads": 4}, r"width is 30.*heads \(4\)"),
        ({"layers": 0}, "layers is 0"),
        ({"classes": -1}, "classes is -1"),
        ({"label_dropout": 1.0}, r"label_dropout is 1\.0"),
    ],
)
def test_a_bad_field_is_named_with_its_value(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_an_unconditional_prior_has_no_class_weights() -> None:
    names = [name for name, _ in Prior(PriorConfig(layers=1, width=8, heads=1), 4, 8).named_parameters()]
    assert not any(name.startswith("label") for name in names)
