"""Autoregressive prior (Table 5): a causal transformer over the tokens of a code, the bits of each token chained.

    p(z) = prod_n prod_j p(z_nj | z_{n,<j}, z_{<n}, y)

Its likelihood is exact. Tokens go in row-major order. A sample takes as many passes as there are tokens, each of one
token, by a cache of keys and values. `chained.py` says why bits are chained, and what the shapes are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bld_core.diffusion.bound import Bound, estimate_bound
from bld_core.diffusion.process import CodeBatch
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.errors import UserError
from bld_core.prior.baselines.chained import TokenPrior, token_nll, token_objective, with_null_class
from bld_core.prior.blocks import Cache
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Objective


class AutoregressivePrior(TokenPrior):
    """Causal transformer: the features of token n are made from the tokens before it, its position and the class."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int) -> None:
        super().__init__(config, tokens, bits, causal=True)

    def forward(self, z_BNC: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, N, C) that each bit is 1, given all bits before it and the class.

        Args:
            z_BNC: codes, float 0/1.
            labels: int64 (B,), 0..classes - 1, or -1 for the learned null class; None means -1 for all.
        """
        start = self.blank.expand(len(z_BNC), 1, -1)
        h_BND = torch.cat([start, self.embed(2 * z_BNC[:, :-1] - 1)], dim=1)
        return self.head(self.features(h_BND + self.position, self.of_class(labels, len(z_BNC))), z_BNC)

    def next_features(self, previous_BC: Tensor, labels: Tensor | None, caches: list[Cache]) -> Tensor:
        """Features (B, D) of the next token, from the one before it and the caches, one a block, of those before.

        The first token has none before it: `previous_BC` is then not used, and class tokens go into the caches first,
        which need room for them.
        """
        condition = self.of_class(labels, len(previous_BC))

        def through(h_BD: Tensor) -> Tensor:
            h_BND = (h_BD + condition)[:, None]
            for block, cache in zip(self.blocks, caches, strict=True):
                h_BND = block(h_BND, condition, cache)
            return self.norm(h_BND)[:, 0]

        if self.class_tokens is not None and not caches[0].count:
            for token in self.class_tokens:
                through(token)
        n = caches[0].count - self.front
        h_BD = self.embed(2 * previous_BC - 1) if n else self.blank.expand(len(previous_BC), -1)
        return through(h_BD + self.position[n])


def autoregressive_loss(network: Callable[..., Tensor], codes: CodeBatch, seed: int) -> Tensor:
    """-log p(z), the mean over batch, tokens and bits: in nats a bit. Nothing is drawn: the seed is not read."""
    del seed
    return token_nll(network(codes.z_0, codes.labels), codes.z_0).mean()


@torch.no_grad()
def sample_in_order(
    network: AutoregressivePrior, shape: tuple[int, int], samples: SampleSpec, config: SamplingConfig
) -> Tensor:
    """Draw codes token after token, and each token bit after bit.

        for n = 0, ..., N - 1:
            h = guided features of token n, from the tokens before it
            draw the bits of token n, logits divided by tau

    Args:
        network: the prior.
        shape: (tokens, bits) of a code.
        samples: which to draw. Noise is keyed on (seed, index, n): a sample does not depend on its batch.
        config: temperature and guidance; nothing else of it is read.

    Returns:
        Codes, float 0/1, (B, tokens, bits), on the device of the samples' index.
    """
    tokens, bits = shape
    labels, copies = with_null_class(samples.labels, config.guidance)
    caches = [Cache(network.front + tokens) for _ in network.blocks]
    token, drawn = torch.zeros(len(samples.index), bits, device=samples.index.device), list[Tensor]()
    for n in range(tokens):
        h_MD = network.next_features(token.repeat(copies, 1), labels, caches)
        u = samples.uniforms(f"sampling token {n}", (bits,))
        token = network.head.draw(h_MD, u, config.temperature, config.guidance)
        drawn.append(token)
    return torch.stack(drawn, dim=1)


class AutoregressiveModel:
    """`PriorModel` of prior.model autoregressive."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int) -> None:
        self.config, self.shape = config, (tokens, bits)

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        return AutoregressivePrior(self.config, *self.shape)

    def objective(self, seed: int) -> Objective:
        """The exact negative log-likelihood."""
        return token_objective(autoregressive_loss, self.config.label_dropout, seed)

    def bound(self, network: nn.Module, codes: CodeBatch, seed: int, sampling: SamplingConfig | None = None) -> Bound:
        """The exact likelihood of held-out codes: one step, no noise; the error is that of the choice of codes."""
        del seed, sampling

        def cost(part: CodeBatch, n: Tensor, repeat: int) -> Tensor:
            return token_nll(network(part.z_0, part.labels), part.z_0).mean(1)

        return estimate_bound(cost, codes, steps=1, repeats=1)

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """As many as there are tokens, whatever `sampling.steps` is.

        Raises:
            UserError: it is to complete codes, or settings that only a diffusion has.
        """
        if completing:
            raise UserError(
                "an autoregressive prior knows a token only from those before it, and cannot complete an image from "
                "any part; train another one with `model` binary or absorbing",
                self.config,
            )
        if sampling.grid or sampling.final == "mode":
            raise UserError(
                f"`grid` is {sampling.grid} and `final` {sampling.final} with an autoregressive prior, which draws "
                "every token once, in order: leave grid empty and final at sample",
                sampling,
            )
        return self.shape[0]

    def sample(
        self, network: nn.Module, samples: SampleSpec, sampling: SamplingConfig, known: Known | None = None
    ) -> Tensor:
        """Draw codes in order; the errors are those of `steps`."""
        self.steps(sampling, completing=known is not None)
        assert isinstance(network, AutoregressivePrior), "made by `network`"
        return sample_in_order(network, self.shape, samples, sampling)
