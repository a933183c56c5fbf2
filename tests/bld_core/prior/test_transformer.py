from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bld_core.diffusion.loss import Step, loss_terms
from bld_core.diffusion.process import CodeBatch, DiffusionConfig, Target
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig, sample_codes
from bld_core.noise import uniform
from bld_core.prior.binary import PriorObjective, draw_known
from bld_core.prior.blocks import Rotary, TrunkPart
from bld_core.prior.transformer import Prior, PriorConfig, drop_labels, time_features
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import perturb, tiny_prior, toy_process

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
        ({"width": 30, "heads": 4}, r"`width` is 30.*`heads` \(4\)"),
        ({"layers": 0}, "`layers` is 0"),
        ({"classes": -1}, "`classes` is -1"),
        ({"label_dropout": 1.0}, r"`label_dropout` is 1\.0"),
        ({"known_share": 1.5}, r"`known_share` is 1\.5"),
        ({"class_tokens": -1, "classes": 3}, "`class_tokens` is -1"),
        ({"class_tokens": 2}, "`class_tokens` is 2 with `classes` 0"),
    ],
)
def test_a_bad_field_is_named_with_its_value(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_an_unconditional_prior_has_no_class_weights() -> None:
    names = [name for name, _ in Prior(PriorConfig(layers=1, width=8, heads=1), 4, 8).named_parameters()]
    assert not any(name.startswith("label") for name in names)


# --- Class tokens -----------------------------------------------------------------------------------------------------


def fronted(class_tokens: int) -> Prior:
    torch.manual_seed(0)
    trunk: list[TrunkPart] = ["qk_norm", "adaln", "rotary"]
    return Prior(PriorConfig(layers=2, width=16, heads=2, classes=3, class_tokens=class_tokens, trunk=trunk), 4, 8)


def test_class_tokens_are_one_more_weight() -> None:
    names = [fronted(count).state_dict().keys() for count in (0, 5)]
    assert names[1] - names[0] == {"class_tokens"}
    assert fronted(5).class_tokens.shape == (5, 16)  # pyright: ignore[reportOptionalMemberAccess]


@torch.no_grad()
def test_class_tokens_are_told_the_class_and_heard_by_every_token() -> None:
    prior = fronted(2)
    perturb(prior)
    labels = torch.tensor([0, 1, 2, -1, 0])
    evidence = prior(Z, TIME, labels)
    assert evidence.shape == Z.shape
    together = torch.cat([prior(Z[i : i + 1], TIME[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(evidence, together, rtol=1e-5, atol=1e-6)
    told: list[tuple[Tensor, Tensor]] = []  # what the first block gets: tokens, and what all are told
    heard: list[Tensor] = []  # what its attention gives the tokens of the code
    prior.blocks[0].register_forward_pre_hook(lambda _, given: told.append(given))  # pyright: ignore
    prior.blocks[0].attention.register_forward_hook(lambda _, __, out: heard.append(out[:, 2:]))  # pyright: ignore
    prior(Z, TIME, labels)
    (h, condition), weights = told[0], prior.class_tokens
    assert weights is not None
    assert torch.equal(h[:, :2], weights + condition[:, None])
    prior(Z, TIME[:1].expand(5), labels)
    alike = [torch.allclose(told[1][1][0], condition) for condition in told[1][1]]
    assert alike == [True, False, False, False, True], "by their labels"
    heard.pop()
    weights[1] += 1
    assert (prior(Z, TIME, labels) != evidence).any(-1).all()
    assert (heard[0] != heard[1]).any(-1).all()


def test_class_tokens_get_a_gradient_and_stand_nowhere_on_the_grid() -> None:
    prior = fronted(2)
    perturb(prior)
    prior(Z, TIME, torch.tensor([0, 1, 2, -1, 0])).square().sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    rotary, x = Rotary(8, 16, front=3), torch.randn(1, 1, 19, 8)
    assert torch.equal(rotary(x)[:, :, :3], x[:, :, :3])
    assert torch.equal(rotary(x)[:, :, 3:], Rotary(8, 16)(x[:, :, 3:]))


# --- Known tokens -----------------------------------------------------------------------------------------------------


def test_without_a_known_share_there_is_no_mark_and_everything_else_is_the_same() -> None:
    plain, knowing = tiny_prior().state_dict(), tiny_prior(known_share=0.5).state_dict()
    assert knowing.keys() - plain.keys() == {"known"}
    for name, weight in plain.items():
        assert torch.equal(weight, knowing[name]), name


@torch.no_grad()
def test_a_mark_matters_where_it_is_and_no_mark_is_none() -> None:
    prior = tiny_prior(known_share=0.5)
    perturb(prior)
    none = prior(Z, TIME)
    assert torch.equal(prior(Z, TIME, None, torch.zeros(5, 4, dtype=torch.bool)), none)
    by_token = [prior(Z, TIME, None, (torch.arange(4) == token).expand(5, -1)) for token in range(4)]
    for marked in by_token:
        assert not torch.allclose(marked, none)
    assert not torch.allclose(by_token[0], by_token[1])


def test_known_tokens_are_drawn_for_each_sample_on_its_own() -> None:
    n, tokens, share = 40_000, 5, 0.3
    index = torch.arange(n)
    known = draw_known(index, tokens, share, seed=0)
    size = known.sum(1)
    given = size > 0
    assert abs(float(given.float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert int(size.max()) == tokens - 1
    each = torch.bincount(size[given], minlength=tokens)[1:] / given.sum()  # sizes 1..4 alike, and the tokens, too
    assert (each - 1 / 4).abs().max() < 4 * math.sqrt(0.25 * 0.75 / int(given.sum()))
    assert (known[given].float().mean(0) - 0.5).abs().max() < 4 * math.sqrt(0.25 / int(given.sum()))
    part = torch.arange(100, 200)
    assert torch.equal(draw_known(part, tokens, share, seed=0), known[part])
    assert not torch.equal(draw_known(index, tokens, share, seed=1), known)
    assert draw_known(index, tokens, 1.0, seed=0).any(1).all()
    with pytest.raises(ValueError, match="only 1 token"):
        draw_known(index, 1, share, seed=0)


def test_known_tokens_are_clean_marked_and_do_not_count() -> None:
    process, index = toy_process("linear", 16), torch.arange(40)
    z_0 = (uniform(0, "toy code", index, 32) < 0.5).float().view(-1, 4, 8)
    u, t = uniform(0, "toy flips", index, 32).view(-1, 4, 8), index % 16 + 1
    known = draw_known(index, 4, 1.0, seed=0)
    evidence = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    shift = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(1)) * known[..., None]

    def terms(evidence: Tensor, marks: Tensor | None) -> tuple[Tensor, Tensor]:
        def denoiser(z: Tensor, time: Tensor, labels: Tensor | None, given: Tensor | None = None) -> Tensor:
            assert given is marks
            if given is not None:
                assert torch.equal(z[given], z_0[given])
            assert not torch.equal(z, z_0)
            return evidence

        return loss_terms(denoiser, process, CodeBatch(z_0, None, index), Step(t, t - 1, u), known=marks)

    here, there = terms(evidence, known), terms(evidence + shift, known)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)  # what is said of known tokens changes nothing
    (gradient,) = torch.autograd.grad(here[0].sum() + here[1].sum(), evidence)
    assert (gradient[known] == 0).all()
    assert (gradient[~known] != 0).any(-1).all()
    # Each sample's term is the mean over its unknown tokens: that of those tokens alone.
    i = slice(3, 4)
    unknown = ~known[3]
    alone = loss_terms(
        lambda z, time, labels: evidence[i, unknown],
        process,
        CodeBatch(z_0[i, unknown], None, index[i]),
        Step(t[i], t[i] - 1, u[i, unknown]),
    )
    for one, whole in zip(alone, here, strict=True):
        torch.testing.assert_close(one, whole[i])
    nothing = torch.zeros(40, 4, dtype=torch.bool)
    for one, whole in zip(terms(evidence, None), terms(evidence, nothing), strict=True):
        torch.testing.assert_close(one, whole)


@pytest.mark.parametrize("target", ["flip", "z0"])
def test_a_prior_learns_to_complete_from_what_is_known(target: Target) -> None:
    # Token 2 copies token 1, a fair coin.
    def codes(index: Tensor) -> Tensor:
        first = (uniform(0, "toy copy", index, 1) < 0.5).float()
        return torch.stack([first, first], dim=1)

    def batches() -> Iterator[Batch]:
        for step in range(10_000):
            index = torch.arange(64) + step * 64
            yield Batch(codes(index), torch.full((64,), -1), index, [""] * 64)

    config = TrainingConfig(steps=400, batch_size=64, warmup=20, learning_rate=1e-2, decay="cosine")
    diffusion = DiffusionConfig(steps=16, target=target)
    state = make_state(tiny_prior(classes=0, tokens=2, bits=1, known_share=0.5), config)
    for _ in train(
        state, batches(), PriorObjective(diffusion, PriorConfig(label_dropout=0.0, known_share=0.5), 0), config
    ):
        pass
    state.module.eval()
    index = 10**6 + torch.arange(400)
    z_0, mask = codes(index), torch.stack([index % 2 == 0, index % 2 == 1], dim=1)
    known, sampling = (
        Known(torch.where(mask[..., None], z_0, 0.5), mask),
        SamplingConfig(steps=16, temperature=1.0, inpainting="conditioned"),
    )
    process = diffusion.make_process()
    z = sample_codes(state.module, process, (2, 1), SampleSpec(index), sampling, known)
    assert float((z == z_0).flatten(1).all(1).float().mean()) > 0.95
    free = sample_codes(state.module, process, (2, 1), SampleSpec(index), sampling)
    assert 0.4 < float(free.mean()) < 0.6  # and unconditional samples are still there
    assert float((free[:, 0] == free[:, 1]).float().mean()) > 0.9
