"""What Table 5 compares with: exact likelihoods and laws, by counting every code of small toys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from bld_core.diffusion.bound import merge_bounds
from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.noise import uniform
from bld_core.prior.baselines.absorbing import AbsorbingPrior, absorbing_bound, random_order, sample_unmasking
from bld_core.prior.baselines.autoregressive import AutoregressivePrior
from bld_core.prior.baselines.chained import ChainedHead, token_nll
from bld_core.prior.blocks import Cache
from bld_core.prior.model import PriorModel, make_model
from bld_core.prior.transformer import ModelName, PriorConfig, drop_labels
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import STATES, perturb, state_number, total_variation, toy_codes, toy_distribution

Comparator = Literal["autoregressive", "absorbing"]
BOTH: tuple[Comparator, ...] = ("autoregressive", "absorbing")
each = pytest.mark.parametrize("name", BOTH)
PLAIN = SamplingConfig(steps=64, temperature=1.0)


def small(name: Comparator, tokens: int, bits: int, classes: int = 0, **settings: Any) -> tuple[PriorModel, nn.Module]:
    """A model and its network, every weight moved at random."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2} | settings
    config = PriorConfig(model=name, classes=classes, **fields)
    model = make_model(config, DiffusionConfig(), tokens, bits)
    network = model.network().eval()
    perturb(network)
    with torch.no_grad():  # far from the uniform law
        for parameter in network.get_submodule("head").parameters():
            parameter.mul_(4)
    return model, network


def every_code(tokens: int, bits: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=tokens * bits))).view(-1, tokens, bits)


def law_of(z: Tensor) -> Tensor:
    """How often each code came out, in the order of `every_code`."""
    weights = 2 ** torch.arange(z[0].numel() - 1, -1, -1)
    number = (z.flatten(1).long() * weights).sum(1)
    return torch.bincount(number, minlength=2 ** z[0].numel()).double() / len(z)


def allowed(cells: int, count: int) -> float:
    """TV of a sample to its own law: mean at most sqrt(cells / n) / 2, and changing one draw moves it by 1 / n."""
    return math.sqrt(cells / count) / 2 + 3 / math.sqrt(2 * count)


@torch.no_grad()
def absorbing_law(network: nn.Module, tokens: int, bits: int, grid: Sequence[int]) -> Tensor:
    """The exact law of the sampler that visits a grid: the mean over all orders, in the order of `every_code`."""
    codes, orders = every_code(tokens, bits), list(itertools.permutations(range(tokens)))
    total = torch.zeros(len(codes), dtype=torch.float64)
    for order in orders:
        whole = torch.zeros_like(total)
        for t, s in itertools.pairwise(grid):
            masked = torch.zeros(len(codes), tokens, dtype=torch.bool)
            masked[:, list(order[tokens - t :])] = True
            nll = token_nll(network(codes, masked), codes).double() * bits
            part = nll[:, list(order[tokens - t : tokens - s])].sum(1)
            whole = whole + part
        total += whole.neg().exp() / len(orders)
    return total


# --- The chain of a token's bits --------------------------------------------------------------------------------------


def made(bits: int) -> ChainedHead:
    torch.manual_seed(0)
    head = ChainedHead(16, bits)
    perturb(head)
    return head


@pytest.mark.parametrize("bits", [1, 5, 24])
def test_a_bit_is_judged_from_every_bit_before_it_and_from_no_other(bits: int) -> None:
    head = made(bits)
    h, z = torch.randn(4, 3, 16), (torch.rand(4, 3, bits) < 0.5).float()
    logits = head(h, z)
    for bit in range(bits):
        other = z.clone()
        other[..., bit] = 1 - other[..., bit]
        changed = (head(h, other) != logits).all(0).all(0)
        assert changed.tolist() == [later > bit for later in range(bits)]


@pytest.mark.parametrize("bits", [1, 5, 24])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_bits_are_drawn_from_the_logits_that_score_them(bits: int, guidance: float) -> None:
    head = made(bits)
    h, null, u = torch.randn(50, 3, 16), torch.randn(50, 3, 16), torch.rand(50, 3, bits)
    with torch.no_grad():
        z = head.draw(torch.cat([h, null]) if guidance else h, u, 0.7, guidance)
        logits = (1 + guidance) * head(h, z) - guidance * head(null, z)
    assert float((z == (u < torch.sigmoid(logits / 0.7)).float()).float().mean()) > 0.999


# --- Autoregressive: an exact likelihood ------------------------------------------------------------------------------


@torch.no_grad()
def test_autoregressive_probabilities_sum_to_one_for_every_class() -> None:
    _, network = small("autoregressive", 3, 2, classes=2)
    codes = every_code(3, 2)
    laws = [(-6 * token_nll(network(codes, torch.full((64,), label)), codes).mean(1)).exp() for label in (-1, 0, 1)]
    for law in laws:
        assert float(law.sum()) == pytest.approx(1, abs=1e-5)
        assert float(law.max()) > 2 / 64
    for first, second in itertools.combinations(laws, 2):
        assert not torch.allclose(first, second)
    none = network(codes, None)
    assert torch.equal(none, network(codes, torch.full((64,), -1)))


@torch.no_grad()
def test_a_token_sees_every_token_before_it_and_no_other() -> None:
    _, network = small("autoregressive", 5, 3)
    z = (uniform(0, "toy", torch.arange(4), 15) < 0.5).float().view(4, 5, 3)
    logits = network(z)
    for token in range(5):
        other = z.clone()
        other[:, token] = 1 - other[:, token]
        changed = (network(other) != logits).any(-1).all(0)
        assert changed.tolist() == [later >= token for later in range(5)]
        assert torch.equal(network(other)[:, token, 0], logits[:, token, 0])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"class_tokens": 3, "trunk": ["rotary", "adaln"]}], ids=["plain", "front"])
def test_token_by_token_with_a_cache_is_the_plain_pass(settings: dict[str, Any]) -> None:
    _, network = small("autoregressive", 16, 8, classes=3, layers=3, **settings)
    assert isinstance(network, AutoregressivePrior)
    z, labels = (uniform(0, "toy", torch.arange(6), 128) < 0.5).float().view(6, 16, 8), torch.arange(6) % 4 - 1
    caches = [Cache(network.front + 16) for _ in network.blocks]
    features = [network.next_features(z[:, n - 1], labels, caches) for n in range(16)]
    logits = network.head(torch.stack(features, dim=1), z)
    torch.testing.assert_close(logits, network(z, labels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autoregressive_samples_follow_their_likelihood() -> None:
    model, network = small("autoregressive", 2, 3)
    codes, count = every_code(2, 3), 40_000
    z = model.sample(network, SampleSpec(torch.arange(count), seed=1), PLAIN)
    truth = (-6 * token_nll(network(codes), codes).mean(1)).exp().double()
    assert total_variation(law_of(z), truth) < allowed(64, count)
    assert total_variation(law_of(z), torch.full((64,), 1 / 64).double()) > 0.1
    bound = model.bound(network, CodeBatch.numbered(z), seed=0)  # of its own samples it is the entropy
    assert abs(bound.bits_per_bit + float((truth * truth.log2()).sum()) / 6) < 4 * bound.standard_error
    assert bound.profile == (pytest.approx(bound.bits_per_bit, rel=1e-9),)


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "class_tokens"), [(0.0, 0), (2.0, 0), (2.0, 2)])
def test_every_autoregressive_bit_is_its_uniform_against_its_guided_tempered_probability(
    guidance: float, class_tokens: int
) -> None:
    model, network = small("autoregressive", 6, 4, classes=3, layers=2, class_tokens=class_tokens)
    index, labels = torch.arange(100, 150), torch.arange(50) % 3
    z = model.sample(network, SampleSpec(index, labels, 5), SamplingConfig(temperature=0.8, guidance=guidance))
    null = torch.full_like(labels, -1)
    logits = ((1 + guidance) * network(z, labels) - guidance * network(z, null)) / 0.8
    u = torch.stack([uniform(5, f"sampling token {n}", index, 4) for n in range(6)], dim=1)
    assert float((z == (u < torch.sigmoid(logits)).float()).float().mean()) > 0.999


# --- Absorbing: an oracle ---------------------------------------------------------------------------------------------


class Oracle(AbsorbingPrior):
    """Knows a 3-bit toy as 3 tokens of one bit: P(token = 1 | the visible tokens), by counting."""

    def __init__(self, p: Tensor) -> None:
        super().__init__(PriorConfig(model="absorbing", layers=1, width=2, heads=1), 3, 1)
        self.p = p
        self.head.direct.weight.data[0, 0] = 1.0

    def token_features(self, z_BNC: Tensor, masked_BN: Tensor, labels: Tensor | None = None) -> Tensor:
        agrees = (z_BNC.view(-1, 1, 3) == STATES) | masked_BN[:, None]  # (B, state, token)
        p = self.p * agrees.all(-1)
        one = p @ STATES
        logits = (one / (p.sum(1, keepdim=True) - one)).log().float()
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


@torch.no_grad()
def exact_bound(p: Tensor, grid: Sequence[int]) -> float:
    """The mean over orders of sum_steps sum_tokens H(token | the visible), in bits a bit."""
    oracle, orders = Oracle(p), list(itertools.permutations(range(3)))
    codes, total = STATES.float()[..., None], 0.0
    for order in orders:
        for t, s in itertools.pairwise(grid):
            masked = torch.zeros(8, 3, dtype=torch.bool)
            masked[:, list(order[3 - t :])] = True
            nll = token_nll(oracle(codes, masked), codes)[:, list(order[3 - t : 3 - s])].double()
            total += float((p * nll.sum(1)).sum()) / math.log(2) / len(orders)
    return total / 3


def test_the_oracles_bound_is_the_entropy_token_by_token_and_more_in_larger_steps() -> None:
    for seed in range(2):
        p = toy_distribution(seed)
        z, entropy = toy_codes(p, 5000).transpose(1, 2), -float((p * p.log2()).sum()) / 3
        marginal = p @ STATES
        apart = -float((torch.xlogy(marginal, marginal) + torch.xlogy(1 - marginal, 1 - marginal)).sum()) / math.log(2)
        truths: list[float] = []
        for grid in ([3, 2, 1, 0], [3, 1, 0], [3, 2, 0], [3, 0]):
            bound = absorbing_bound(Oracle(p), CodeBatch.numbered(z), grid)
            truths.append(exact_bound(p, grid))
            assert abs(bound.bits_per_bit - truths[-1]) < 4 * bound.standard_error
            assert bound.standard_error < 0.02
            assert len(bound.profile) == len(grid) - 1
            assert sum(bound.profile) == pytest.approx(bound.bits_per_bit, rel=1e-9)
        assert truths[0] == pytest.approx(entropy, abs=1e-6)
        assert truths[0] < min(truths[1:3]) < max(truths[1:3]) < truths[3] == pytest.approx(apart / 3, abs=1e-6)


def test_the_oracles_samples_are_true_token_by_token_and_off_in_larger_steps() -> None:
    count, p = 40_000, toy_distribution(1)
    errors: list[float] = []
    for grid in ([3, 2, 1, 0], [3, 1, 0], [3, 0]):
        z = sample_unmasking(Oracle(p), (3, 1), SampleSpec(torch.arange(count)), grid, PLAIN)
        law = law_of(z)
        assert total_variation(law, absorbing_law(Oracle(p), 3, 1, grid)) < allowed(8, count)
        errors.append(total_variation(law, p))
    assert errors[0] < allowed(8, count) < errors[1] < errors[2]


# --- Absorbing: any network -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masked_tokens_are_never_looked_at_and_visible_ones_are() -> None:
    _, network = small("absorbing", 4, 3)
    z = (uniform(0, "toy", torch.arange(4), 12) < 0.5).float().view(4, 4, 3)
    masked = torch.tensor([True, False, True, False]).expand(4, -1)
    logits = network(z, masked)
    for token in range(4):
        other = z.clone()
        other[:, token] = 1 - other[:, token]
        changed = (network(other, masked) != logits).any(-1).all(0)
        if token in (0, 2):  # in its own chain alone
            assert changed.tolist() == [place == token for place in range(4)]
        else:
            assert changed[[0, 2]].all()
    assert not torch.allclose(network(z, torch.zeros_like(masked)), logits)


@torch.no_grad()
@pytest.mark.parametrize(("steps", "grid"), [(9, [3, 2, 1, 0]), (2, [3, 2, 0]), (1, [3, 0])])
def test_absorbing_samples_follow_the_law_of_their_grid(steps: int, grid: list[int]) -> None:
    model, network = small("absorbing", 3, 2)
    settings = replace(PLAIN, steps=steps)
    assert model.steps(settings) == len(grid) - 1
    count = 40_000
    z = model.sample(network, SampleSpec(torch.arange(count), seed=2), settings)
    truth = absorbing_law(network, 3, 2, grid)
    assert float(truth.sum()) == pytest.approx(1, abs=1e-5)
    assert total_variation(law_of(z), truth) < allowed(64, count)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_every_absorbing_bit_is_its_uniform_against_its_guided_tempered_probability(guidance: float) -> None:
    model, network = small("absorbing", 6, 4, classes=3, layers=2, class_tokens=2 * bool(guidance))
    index, labels = torch.arange(100, 150), torch.arange(50) % 3
    settings = SamplingConfig(grid=[6, 5, 2, 0], temperature=0.8, guidance=guidance)
    z = model.sample(network, SampleSpec(index, labels, 5), settings)
    order = random_order(5, "sampling order", index, 6)
    for t, s in itertools.pairwise(settings.grid):
        masked = order.argsort(1) >= 6 - t
        conditional, null = network(z, masked, labels), network(z, masked, torch.full_like(labels, -1))
        p = torch.sigmoid(((1 + guidance) * conditional - guidance * null) / 0.8)
        place = order[:, 6 - t : 6 - s, None].expand(-1, -1, 4)
        u = uniform(5, f"sampling step {t}", index, (t - s) * 4).view(50, t - s, 4)
        assert float((z.gather(1, place) == (u < p.gather(1, place)).float()).float().mean()) > 0.998


def test_orders_are_uniform_and_keyed_on_the_sample() -> None:
    order = random_order(0, "sampling order", torch.arange(24_000), 4)
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert float((counts - 1000).abs().max()) < 5 * math.sqrt(1000)
    assert torch.equal(random_order(0, "sampling order", torch.arange(100, 120), 4), order[100:120])


# --- Absorbing: a part is known ---------------------------------------------------------------------------------------


def test_completions_are_draws_from_the_conditional_distribution() -> None:
    count, p, index = 40_000, toy_distribution(2), torch.arange(40_000)
    for token, value in itertools.product(range(3), (0.0, 1.0)):
        mask = (torch.arange(3) == token).expand(count, -1)
        known = Known(torch.where(mask, value, 0.5)[..., None], mask)
        z = sample_unmasking(Oracle(p), (3, 1), SampleSpec(index, seed=3), [3, 2, 1, 0], PLAIN, known)
        truth = p * (STATES[:, token] == value)
        drawn = torch.bincount(state_number(z.squeeze(-1)), minlength=8).double() / count
        assert total_variation(drawn, truth / truth.sum()) < allowed(4, count)


def test_known_tokens_come_back_and_with_nothing_known_it_is_sampling_bitwise() -> None:
    model, network = small("absorbing", 6, 4, classes=3)
    index, labels = torch.arange(30), torch.arange(30) % 3
    settings = SamplingConfig(steps=4, guidance=1.0)
    mask = uniform(0, "toy mask", index, 6) < (index % 3)[:, None] / 2  # none, some, all
    z_0 = (uniform(0, "toy", index, 24) < 0.5).float().view(30, 6, 4)
    plain = model.sample(network, SampleSpec(index, labels, 1), settings)
    z = model.sample(network, SampleSpec(index, labels, 1), settings, Known(z_0, mask))
    assert torch.equal(z[mask], z_0[mask])
    assert torch.equal(z[::3], plain[::3])
    assert torch.equal(z[2::3], z_0[2::3])
    other = torch.where(mask[..., None], z_0, 1 - z_0)  # unknown bits are never looked at
    assert torch.equal(model.sample(network, SampleSpec(index, labels, 1), settings, Known(other, mask)), z)


def test_an_autoregressive_prior_refuses_to_complete() -> None:
    model, network = small("autoregressive", 4, 2)
    known = Known(torch.zeros(2, 4, 2), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"autoregressive.*cannot complete.*binary or absorbing"):
        model.sample(network, SampleSpec(torch.arange(2)), PLAIN, known)


# --- Both -------------------------------------------------------------------------------------------------------------


@each
def test_a_fresh_network_finds_every_code_as_likely(name: Comparator) -> None:
    model = make_model(PriorConfig(model=name, layers=1, width=16, heads=2, classes=3), DiffusionConfig(), 4, 8)
    z = (uniform(0, "toy", torch.arange(20), 32) < 0.1).float().view(20, 4, 8)
    assert model.bound(
        model.network(), CodeBatch.numbered(z, torch.arange(20) % 3), seed=0
    ).bits_per_bit == pytest.approx(1, abs=1e-6)


@each
def test_the_bounds_of_parts_merge_to_that_of_all_codes(name: Comparator) -> None:
    model, network = small(name, 4, 8)
    z = (uniform(0, "toy", torch.arange(20), 32) < 0.1).float().view(20, 4, 8)
    parts = [
        model.bound(network, CodeBatch.numbered(z[start:stop], first=start), 3) for start, stop in ((0, 13), (13, 20))
    ]
    whole, found = model.bound(network, CodeBatch.numbered(z), 3), merge_bounds(parts)
    assert found.bits_per_bit == pytest.approx(whole.bits_per_bit, rel=1e-6)
    assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-6)


@each
def test_every_parameter_gets_a_gradient(name: Comparator) -> None:
    model, network = small(name, 4, 8, classes=3)
    state = make_state(network, TrainingConfig())
    index = torch.arange(64)
    batch = Batch((uniform(0, "toy", index, 32) < 0.5).view(64, 4, 8).byte(), index % 4 - 1, index, [""] * 64)
    terms = model.objective(0)(state, batch)
    assert terms.keys() == {"loss"}
    terms["loss"].backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@each
def test_the_objective_is_the_bound_and_hides_labels(name: Comparator) -> None:
    model, network = small(name, 4, 8, classes=3, label_dropout=0.5)
    state, index = make_state(network, TrainingConfig()), torch.arange(5000)
    z, labels = (uniform(0, "toy", index, 32) < 0.4).byte().view(-1, 4, 8), index % 3
    with torch.no_grad():
        loss = float(model.objective(7)(state, Batch(z, labels, index, [""] * len(index)))["loss"]) / math.log(2)
        bound, whole = (
            model.bound(network, CodeBatch.numbered(z, given), seed=3)
            for given in (drop_labels(labels, index, 0.5, seed=7), labels)
        )
    assert abs(loss - bound.bits_per_bit) < 6 * bound.standard_error  # one noise level a sample, not eight
    assert abs(loss - whole.bits_per_bit) > 6 * bound.standard_error
    assert model.bound(network, CodeBatch.numbered(z, labels), seed=3) == whole


@each
def test_guidance_0_is_no_guidance_bitwise_and_without_labels_there_is_none(name: Comparator) -> None:
    model, network = small(name, 4, 8, classes=3)
    index, labels = torch.arange(64), torch.arange(64) % 3
    draws = {w: model.sample(network, SampleSpec(index, labels), SamplingConfig(guidance=w)) for w in (0.0, 1e-6, 4.0)}
    assert torch.equal(draws[0.0], model.sample(network, SampleSpec(index, labels), SamplingConfig()))
    assert float((draws[0.0] == draws[1e-6]).float().mean()) > 0.999
    assert not torch.equal(draws[0.0], draws[4.0])
    free = [model.sample(network, SampleSpec(index), SamplingConfig(guidance=w)) for w in (0.0, 4.0)]
    assert torch.equal(*free)
    assert not torch.equal(free[0], draws[0.0])


@each
def test_a_sample_does_not_depend_on_its_batch(name: Comparator) -> None:
    model, network = small(name, 8, 16, classes=3)
    index, labels = torch.arange(48), torch.arange(48) % 4 - 1
    settings = SamplingConfig(steps=4, guidance=1.5)

    def draw(size: int, seed: int = 9) -> Tensor:
        parts = [slice(start, start + size) for start in range(0, 48, size)]
        return torch.cat(
            [model.sample(network, SampleSpec(index[part], labels[part], seed), settings) for part in parts]
        )

    whole = draw(48)
    assert torch.equal(draw(48), whole)
    assert not torch.equal(draw(48, seed=8), whole)
    assert len({tuple(code.flatten().tolist()) for code in whole}) > 40
    for size in (1, 7):
        assert float((draw(size) == whole).float().mean()) >= 0.999


def trained(name: Comparator, tokens: int, bits: int, codes: Tensor, steps: int) -> tuple[PriorModel, nn.Module]:
    """A tiny prior, trained on rows of `codes` in turn."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"model": name, "layers": 1, "width": 32, "heads": 2, "label_dropout": 0.0}
    model = make_model(PriorConfig(**fields), DiffusionConfig(), tokens, bits)
    config = TrainingConfig(steps=steps, batch_size=128, warmup=10, learning_rate=1e-2, decay="cosine")
    state = make_state(model.network(), config)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            index = torch.arange(128) + 128 * step
            yield Batch(codes[index % len(codes)], torch.full((128,), -1), index, [""] * 128)

    for _ in train(state, batches(), model.objective(0), config):
        pass
    return model, state.module.eval()


@each
def test_on_an_iid_source_each_reaches_the_entropy(name: Comparator) -> None:
    p = 0.8
    z = (uniform(0, "source", torch.arange(12_000), 32) < p).float().view(-1, 4, 8)
    model, network = trained(name, 4, 8, z[:10_000], 80)
    held_out = z[10_000:]
    bound = model.bound(network, CodeBatch.numbered(held_out), seed=0)
    share = float(held_out.mean())  # the entropy of these very codes under the true p: no error of the choice of data
    truth = -share * math.log2(p) - (1 - share) * math.log2(1 - p)
    assert truth - 0.002 < bound.bits_per_bit < truth + 0.01


@each
def test_each_learns_what_bits_of_a_token_and_tokens_have_in_common(name: Comparator) -> None:
    # Of 3 tokens of 3 bits each, the third bit is the exclusive or of the other two, and the last token is the first:
    # 4 free bits of 9. Neither independent bits of a token nor a linear chain of them can say an exclusive or.
    free = (uniform(0, "toy xor", torch.arange(4000), 4) < 0.5).byte().view(-1, 2, 2)
    two = torch.cat([free, free[..., :1] ^ free[..., 1:]], dim=-1)
    codes = torch.cat([two, two[:, :1]], dim=1)
    model, network = trained(name, 3, 3, codes, 400)
    assert 4 / 9 - 1e-6 < model.bound(network, CodeBatch.numbered(codes[:500]), seed=0).bits_per_bit < 4 / 9 + 0.02
    z = model.sample(network, SampleSpec(torch.arange(500)), PLAIN).byte()
    assert float((z[..., 2] == z[..., 0] ^ z[..., 1]).float().mean()) > 0.99
    assert float((z[:, 2] == z[:, 0]).float().mean()) > 0.98
    assert len(z.flatten(1).unique(dim=0)) >= 16
    assert abs(float(z[:, :2, :2].float().mean()) - 0.5) < 0.1


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_each_model_says_how_many_steps_it_takes() -> None:
    steps = {
        name: [
            make_model(PriorConfig(model=name), DiffusionConfig(), 16, 8).steps(SamplingConfig(steps=count))
            for count in (4, 16, 64)
        ]
        for name in ("binary", *BOTH)
    }
    assert steps == {"binary": [4, 16, 64], "autoregressive": [16, 16, 16], "absorbing": [4, 16, 16]}


@pytest.mark.parametrize("name", ["binary", *BOTH])
def test_the_bound_is_that_of_the_steps_asked_for(name: ModelName) -> None:
    model = make_model(PriorConfig(model=name, layers=1, width=16, heads=2), DiffusionConfig(steps=16), 16, 8)
    network = model.network().eval()
    perturb(network)
    z = (uniform(0, "codes", torch.arange(64), 128) < 0.5).float().view(-1, 16, 8)
    every = model.bound(network, CodeBatch.numbered(z), 0)
    assert model.bound(network, CodeBatch.numbered(z), 0, SamplingConfig(steps=16)) == every
    few = model.bound(network, CodeBatch.numbered(z), 0, SamplingConfig(steps=4))
    if name == "autoregressive":  # always one step a token
        assert few == every
    else:
        assert (len(few.profile), len(every.profile)) == (4, 16)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("autoregressive", {"grid": [16, 0]}, r"`grid` is \[16, 0\].*autoregressive.*leave grid empty"),
        ("autoregressive", {"final": "mode"}, r"`final` mode with .*autoregressive.*final at sample"),
        ("absorbing", {"final": "mode"}, r"`final` is mode with .*absorbing.*set final to sample"),
        ("absorbing", {"grid": [64, 0]}, r"`grid` starts at 64.*T = 16"),
    ],
)
def test_settings_that_a_model_cannot_follow_are_refused(
    name: Comparator, settings: dict[str, Any], message: str
) -> None:
    model = make_model(PriorConfig(model=name, layers=1, width=8, heads=1), DiffusionConfig(), 16, 8)
    with pytest.raises(ValueError, match=message):
        model.steps(SamplingConfig(**settings))
    with pytest.raises(ValueError, match=message):
        model.sample(model.network(), SampleSpec(torch.arange(2)), SamplingConfig(**settings))


@each
def test_known_tokens_are_trained_for_binary_diffusion_alone(name: Comparator) -> None:
    with pytest.raises(ValueError, match=rf"`known_share` is 0.5 with `model` {name}.*set it to 0"):
        PriorConfig(model=name, known_share=0.5)
