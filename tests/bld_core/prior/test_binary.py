"""The paper's prior behind the seam: how known tokens steer it, whatever its target; groups; older priors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from bld_core.diffusion.process import (
    CodeBatch,
    DiffusionConfig,
    Target,
    calibrate,
    reverse_flip_coefficients,
    reverse_flip_probability,
)
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.noise import uniform
from bld_core.prior.binary import BinaryModel
from bld_core.prior.older import SingleStepModel, SingleStepPrior
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import perturb, tiny_prior


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize(("share", "method"), [(0.5, "conditioned"), (0.0, "replacement")])
def test_auto_is_conditioned_where_the_prior_knows_marks_and_replacement_where_not(
    target: Target, share: float, method: Literal["conditioned", "replacement"]
) -> None:
    model = BinaryModel(PriorConfig(known_share=share), DiffusionConfig(steps=16, target=target), 4, 8)
    index = torch.arange(20)
    known = Known(torch.ones(20, 4, 8), torch.arange(80).view(20, 4) % 3 == 0)
    prior = tiny_prior(known_share=share)
    perturb(prior)

    def draw(inpainting: Literal["auto", "conditioned", "replacement"]) -> torch.Tensor:
        config = SamplingConfig(steps=16, guidance=1.0, inpainting=inpainting)
        return model.sample(prior, SampleSpec(index, index % 3), config, known)

    assert torch.equal(draw("auto"), draw(method))
    if method == "conditioned":
        assert not torch.equal(draw("auto"), draw("replacement"))
    else:
        with pytest.raises(ValueError, match=r"`known_share` 0.*replacement"):
            draw("conditioned")


# --- Groups -----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2}


def copies(index: Tensor) -> Tensor:
    """Codes of two tokens, each eight copies of a fair coin of its own: (B, 2, 8)."""
    return (uniform(0, "toy coins", index, 2) < 0.5).float()[..., None].expand(-1, -1, 8).contiguous()


def trained_on_copies(config: PriorConfig, steps: int) -> tuple[BinaryModel, nn.Module]:
    def batches() -> Iterator[Batch]:
        for step in range(steps):
            index = torch.arange(64) + step * 64
            yield Batch(copies(index), torch.full((64,), -1), index, [""] * 64)

    training = TrainingConfig(steps=steps, batch_size=64, warmup=10, learning_rate=2e-2, decay="cosine")
    model = BinaryModel(config, DiffusionConfig(steps=16), 2, 8)
    torch.manual_seed(0)
    state = make_state(model.network(), training)
    for _ in train(state, batches(), model.objective(0), training):
        pass
    return model, state.module.eval()


def test_a_prior_of_groups_draws_in_one_step_what_single_bits_cannot() -> None:
    model, network = trained_on_copies(PriorConfig(group=8, known_share=0.5, **TINY), 150)
    index, one = 10**6 + torch.arange(500), SamplingConfig(steps=1, temperature=1.0)
    codes = CodeBatch(copies(index), None, index)
    z = model.sample(network, SampleSpec(index), one)
    alike = (z == z[..., :1]).all(-1)
    assert float(alike.float().mean()) > 0.95
    assert float((z.mean((1, 2)) - 0.5).abs().mean()) > 0.1  # and tokens are not copies of one another
    assert 1 / 8 < model.bound(network, codes, 0, one).bits_per_bit < 0.25
    single = BinaryModel(PriorConfig(**TINY), DiffusionConfig(steps=16), 2, 8)
    assert single.bound(single.network(), codes, 0, one).bits_per_bit == pytest.approx(1)  # the best it can do
    # Known tokens stay, the others are still drawn as they should be.
    known = Known(copies(index), torch.tensor([True, False]).expand(500, 2))
    completed = model.sample(network, SampleSpec(index), one, known)
    assert torch.equal(completed[:, 0], known.z[:, 0])
    assert float((completed == completed[..., :1]).all(-1).float().mean()) > 0.95


def test_a_fresh_prior_of_groups_is_one_of_single_bits() -> None:
    diffusion, index = DiffusionConfig(steps=16), torch.arange(20)
    one, eight = (BinaryModel(PriorConfig(group=group, **TINY), diffusion, 4, 16) for group in (1, 8))
    networks = one.network(), eight.network()
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    z, time = (uniform(0, "z", index, 64) < 0.5).float().view(-1, 4, 16), torch.full((20,), 0.5)
    assert networks[0](z, time).shape == (20, 4, 16)
    assert networks[1](z, time).shape == (20, 4, 16 + 2 * 256)
    codes = CodeBatch.numbered(z)
    bounds = [model.bound(network, codes, 0) for model, network in zip((one, eight), networks, strict=True)]
    assert bounds[1].bits_per_bit == pytest.approx(bounds[0].bits_per_bit, rel=1e-5)
    eight_loss, one_loss = (
        model.objective(0)(make_state(network, TrainingConfig()), Batch(z, torch.full((20,), -1), index, [""] * 20))
        for model, network in ((eight, networks[1]), (one, networks[0]))
    )
    for name, term in one_loss.items():
        torch.testing.assert_close(eight_loss[name], term, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 4}, r"`group` is 4; it must be 1 .* or 8"),
        ({"group": 8, "model": "autoregressive"}, r"`group` is 8 with `model` autoregressive.*one after the"),
    ],
)
def test_groups_are_of_8_bits_and_of_binary_diffusion(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**settings)


# --- Priors of target z_prev from before ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_network_of_single_steps_says_the_evidence_of_its_change() -> None:
    model = SingleStepModel(PriorConfig(**TINY), DiffusionConfig(steps=16, target="z_prev"), 4, 8)
    network = model.network()
    assert isinstance(network, SingleStepPrior)
    assert network.state_dict().keys() == tiny_prior(classes=0).state_dict().keys()
    k = model.process.schedule.k.tolist()
    z, time = torch.rand(16, 4, 8).round(), torch.arange(1, 17) / 16
    for logit in (-100.0, -3.0, -0.5, 0.2, 30.0):
        network.head.bias.fill_(logit)  # the weights of a fresh head are 0: the output is its bias
        evidence = network(z, time).double()
        assert evidence.isfinite().all()
        for t in range(1, 17):
            A, B = reverse_flip_coefficients(k[t - 1], k[t])
            change = reverse_flip_probability(torch.sigmoid(calibrate(evidence[t - 1], k[t])), k[t - 1], k[t])
            said = min(max(1 / (1 + math.exp(-logit)), float(B)), float(A))  # what no posterior gives is the nearer end
            torch.testing.assert_close(change, torch.full_like(change, said), rtol=0, atol=1e-6)
