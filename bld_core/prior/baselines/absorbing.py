"""Absorbing diffusion (Table 5; Austin et al. 2021, Bond-Taylor et al. 2022): tokens are masked one after the other.

What is masked is a whole token, as with the codebook indices of those papers; time t is the number of masked tokens,
so T = N, and which of them are masked is uniform. The reverse step t -> s unmasks t - s of them, each drawn given the
visible ones, its bits chained (`chained.py` says why, and what the shapes are). Masking each token on its own with
probability t/N has the same bound in the limit of small steps; an exact number has no steps in which nothing happens.
The network is not told t: it sees how many tokens are masked.

    -log p(z) <= sum_t (t - s)/t E[ sum over masked n of -log p(z_n | the visible) ]

For steps of one token the weight is 1/t, and the bound is that of an autoregressive prior in random order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bld_core.diffusion.bound import Bound, estimate_bound
from bld_core.diffusion.process import CodeBatch
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.diffusion.schedule import make_schedule
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.prior.baselines.chained import TokenPrior, token_nll, token_objective, with_null_class
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Objective


class AbsorbingPrior(TokenPrior):
    """Bidirectional transformer: the features of every token are made from the visible tokens and the class."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int) -> None:
        super().__init__(config, tokens, bits, causal=False)

    def token_features(self, z_BNC: Tensor, masked_BN: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (B, N, D).

        Args:
            z_BNC: codes, float 0/1; the bits of masked tokens are not used.
            masked_BN: bool, True where a token is masked.
            labels: int64 (B,), 0..classes - 1, or -1 for the learned null class; None means -1 for all.
        """
        h_BND = torch.where(masked_BN[..., None], self.blank, self.embed(2 * z_BNC - 1))
        return self.features(h_BND + self.position, self.of_class(labels, len(z_BNC)))

    def forward(self, z_BNC: Tensor, masked_BN: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, N, C) that each bit is 1, given the visible tokens and the bits before it in its own token.

        They mean something for masked tokens alone.
        """
        return self.head(self.token_features(z_BNC, masked_BN, labels), z_BNC)


def random_order(seed: int | Sequence[int], purpose: str, index: Tensor, tokens: int) -> Tensor:
    """The tokens of each sample, in the order in which they are unmasked: int64 (B, tokens)."""
    return uniform(seed, purpose, index, tokens).argsort(dim=1, stable=True)


def masked_loss(network: Callable[..., Tensor], codes: CodeBatch, t: Tensor, order: Tensor) -> Tensor:
    """-log p of the last t tokens of an order, given the others: the mean over them and their bits, (B,), nats a bit.

    Args:
        network: (z_BNC, masked_BN, labels) -> logits.
        codes: clean, float.
        t: int64 (B,), 1..N.
        order: int64 (B, N), as `random_order` gives it.
    """
    masked = order.argsort(dim=1) >= order.shape[1] - t[:, None]
    return token_nll(network(codes.z_0, masked, codes.labels), codes.z_0).masked_fill(~masked, 0).sum(1) / t


def absorbing_loss(network: Callable[..., Tensor], codes: CodeBatch, seed: int) -> Tensor:
    """The bound itself, in nats a bit: the mean over the masked tokens, their number uniform in 1..N."""
    tokens = codes.z_0.shape[1]
    t = 1 + (uniform(seed, "absorbing time", codes.index, 1)[:, 0] * tokens).long()
    return masked_loss(network, codes, t, random_order(seed, "absorbing order", codes.index, tokens)).mean()


def absorbing_bound(network: Callable[..., Tensor], codes: CodeBatch, grid: Sequence[int], seed: int = 0) -> Bound:
    """The bound of a chain that takes the steps t -> s of a grid, as `likelihood_bound` takes it.

    Args:
        network: (z_BNC, masked_BN, labels) -> logits.
        codes: held-out, of any dtype.
        grid: the numbers of masked tokens that the chain visits, decreasing, from N to 0.
        seed: of what is masked.

    Raises:
        UserError: fewer than two codes.
    """
    tokens, levels = codes.z_0.shape[1], torch.tensor(list(reversed(grid)), device=codes.z_0.device)

    def cost(part: CodeBatch, n: Tensor, repeat: int) -> Tensor:
        order = random_order(seed, f"bound order {repeat}", part.index, tokens)
        share = (levels[n + 1] - levels[n]) / tokens
        return share * masked_loss(network, part, levels[n + 1], order)

    return estimate_bound(cost, codes, len(levels) - 1)


@torch.no_grad()
def sample_unmasking(
    network: AbsorbingPrior,
    shape: tuple[int, int],
    samples: SampleSpec,
    grid: Sequence[int],
    config: SamplingConfig,
    known: Known | None = None,
) -> Tensor:
    """Draw codes by unmasking tokens in random order.

        every token is masked
        for t > s along the grid N, ..., 0:
            h = guided features, from the visible tokens
            draw the next t - s tokens of the order, bit after bit, logits divided by tau

    Known tokens come first in the order and are never drawn: the rest is a draw from its conditional distribution.

    Args:
        network: the prior.
        shape: (tokens, bits) of a code.
        samples: which to draw. Noise is keyed on (seed, index, t): a sample does not depend on its batch.
        grid: the numbers of masked tokens to visit, decreasing, from N to 0.
        config: temperature and guidance; nothing else of it is read.
        known: what is given of each code; a sample of which nothing is known is drawn as without it.

    Returns:
        Codes, float 0/1, (B, tokens, bits), on the device of the samples' index.
    """
    tokens, bits = shape
    index = samples.index
    labels, copies = with_null_class(samples.labels, config.guidance)
    order = random_order(samples.seed, "sampling order", index, tokens)
    z, masked = torch.zeros(len(index), *shape, device=index.device), torch.ones_like(order, dtype=torch.bool)
    if known is not None:
        z, masked = torch.where(known.mask[..., None], known.z, z), ~known.mask
        order = order.gather(1, masked.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    for t, s in itertools.pairwise(grid):
        h_MND = network.token_features(z.repeat(copies, 1, 1), masked.repeat(copies, 1), labels)
        # The tokens that this step unmasks, (B, t - s), and their bits.
        chosen = order[:, tokens - t : tokens - s]
        of_chosen = chosen.repeat(copies, 1)[..., None].expand(-1, -1, h_MND.shape[-1])
        u = samples.uniforms(f"sampling step {t}", (t - s, bits))
        drawn = network.head.draw(h_MND.gather(1, of_chosen), u, config.temperature, config.guidance)
        # A chosen token that is already visible is a known one, and stays.
        chosen_bits = chosen[..., None].expand(-1, -1, bits)
        still_masked = masked.gather(1, chosen)[..., None]
        z = z.scatter(1, chosen_bits, torch.where(still_masked, drawn, z.gather(1, chosen_bits)))
        masked = masked.scatter(1, chosen, False)
    return z


class AbsorbingModel:
    """`PriorModel` of prior.model absorbing."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int) -> None:
        self.config, self.shape = config, (tokens, bits)

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        return AbsorbingPrior(self.config, *self.shape)

    def objective(self, seed: int) -> Objective:
        """The bound, one noise level a sample."""
        return token_objective(absorbing_loss, self.config.label_dropout, seed)

    def bound(self, network: nn.Module, codes: CodeBatch, seed: int, sampling: SamplingConfig | None = None) -> Bound:
        """The bound of the chain that unmasks one token a step, or takes the grid of `sampling`."""
        grid = range(self.shape[0], -1, -1) if sampling is None else self._grid(sampling)
        return absorbing_bound(network, codes, grid, seed)

    def _grid(self, sampling: SamplingConfig) -> list[int]:
        tokens = self.shape[0]
        if sampling.final == "mode":
            raise UserError(
                "`final` is mode with an absorbing prior, which draws every token once, not all in the last step: set "
                "final to sample, or lower `temperature`",
                sampling,
            )
        fewer = replace(sampling, steps=min(sampling.steps, tokens))
        return fewer.make_grid(make_schedule("linear", tokens))

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """Those of `sampling`, but at most one a token; to complete codes takes as many.

        Raises:
            UserError: a grid that is none, or settings that only binary diffusion has.
        """
        del completing
        return len(self._grid(sampling)) - 1

    def sample(
        self, network: nn.Module, samples: SampleSpec, sampling: SamplingConfig, known: Known | None = None
    ) -> Tensor:
        """Draw codes by unmasking; the errors are those of `steps`."""
        assert isinstance(network, AbsorbingPrior), "made by `network`"
        return sample_unmasking(network, self.shape, samples, self._grid(sampling), sampling, known)
