"""The transformer prior (Section 4.2): what the bits of z_t say of one another, at t, of class y.

Shapes: z_BNC bits; h_BND features of width D. A label of -1 means none, here as in the latent shards.
The trunk is also that of the priors it is compared with, in `baselines/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bld_core.diffusion.process import output_size
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.prior.blocks import Block, TrunkPart, make_norm
from bld_core.training.layers import Layers

ModelName = Literal["binary", "autoregressive", "absorbing"]


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The transformer prior (Section 4.2).

    Args:
        model: what the transformer models: "binary", the paper's Bernoulli diffusion; or, with the same trunk on the
            same codes, what Table 5 compares it with: "autoregressive", one token after the other, or "absorbing",
            masked tokens unmasked in random order.
        layers: transformer blocks.
        width: features a token.
        heads: attention heads; they divide the width.
        classes: number of classes; 0 makes an unconditional prior.
        label_dropout: probability, for each sample, that training hides its class behind the learned null class.
        known_share: share of the training samples in which a random set of tokens, of any size, is kept clean and
            marked as known. It teaches the prior to complete images exactly; 0 trains without it. For "binary" alone:
            "absorbing" completes images exactly without it, and "autoregressive" cannot.
        group: neighbouring bits of a token that "binary" draws jointly, 1 or 8; 1 is the paper. With 8 a token has 256
            more outputs for each 8 of its bits, and few steps cost less.
        trunk: parts of later transformers that learn faster than the paper's plain one, which is the empty list:
            "rms_norm" in place of LayerNorm, "qk_norm" (queries and keys of unit scale), "swiglu" (gated feed-forward
            layers), "adaln" (time and class scale, shift and gate each block), "rotary" (positions relative to each
            other in rows and columns).
        class_tokens: learned tokens in front of those of the code, told the time and the class as all are, to which
            the others attend (in-context conditioning; Peebles, Xie 2023, Section 3.2). None is the paper.
    """

    model: ModelName = "binary"
    layers: int = 24
    width: int = 768
    heads: int = 12
    classes: int = 0
    label_dropout: float = 0.1
    known_share: float = 0.0
    group: int = 1
    trunk: list[TrunkPart] = field(default_factory=lambda: ["rms_norm", "qk_norm", "swiglu", "adaln"])
    class_tokens: int = 0

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1:
            raise UserError(f"`layers` is {self.layers}, `heads` {self.heads}; both must be at least 1", self)
        if self.width < 2 or self.width % self.heads or self.width % 2:
            raise UserError(f"`width` is {self.width}; it must be even and a multiple of `heads` ({self.heads})", self)
        if self.classes < 0:
            raise UserError(f"`classes` is {self.classes}; it must be 0 (unconditional) or more", self)
        if self.class_tokens < 0:
            raise UserError(f"`class_tokens` is {self.class_tokens}; it must be 0 (none) or more", self)
        if self.class_tokens and not self.classes:
            raise UserError(
                f"`class_tokens` is {self.class_tokens} with `classes` 0: there is no class for them to tell; set it "
                "to 0, or `classes` to the number that the data has",
                self,
            )
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"`label_dropout` is {self.label_dropout}; it must lie in [0, 1)", self)
        if not 0 <= self.known_share <= 1:
            raise UserError(f"`known_share` is {self.known_share}; it must lie in [0, 1]", self)
        if self.known_share and self.model != "binary":
            raise UserError(
                f"`known_share` is {self.known_share} with `model` {self.model}, which is not trained with known "
                "tokens; set it to 0, or model to binary",
                self,
            )
        if len({*self.trunk}) < len(self.trunk):
            raise UserError(f"`trunk` is {self.trunk}, which names a part twice: name each once", self)
        if self.group not in (1, 8):
            raise UserError(f"`group` is {self.group}; it must be 1 (each bit by itself) or 8", self)
        if self.group > 1 and self.model != "binary":
            raise UserError(
                f"`group` is {self.group} with `model` {self.model}, which draws the bits of a token one after the "
                "other: set group to 1, or model to binary",
                self,
            )


def time_features(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of t/T in [0, 1] at `width`/2 geometric frequencies from 1 to 1000 radians; (B, width)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=time.device))
    angle = time.float()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Trunk(nn.Module):
    """What the networks of all priors share: bits in, a class, a position, transformer blocks, features out."""

    def __init__(
        self, config: PriorConfig, tokens: int, bits: int, *, timed: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        width = config.width
        self.classes = config.classes
        self.embed = nn.Linear(bits, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        if timed:
            self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.front = front = config.class_tokens  # tokens before those of the code
        self.class_tokens = nn.Parameter(torch.randn(front, width) * 0.02) if front else None
        self.blocks = Layers(
            *(Block(width, config.heads, tokens, config.trunk, causal, front) for _ in range(config.layers))
        )
        self.norm = make_norm(width, config.trunk)

    def initialise(self) -> None:
        """Draw the weights of all layers, those of a subclass, too: each calls it when it has made its own."""
        self.apply(_initialise)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.initialise(len(self.blocks))
        if self.label is not None:  # ten times the scale: a class matters beside the tokens from the first step on
            nn.init.normal_(self.label.weight, std=0.2)

    def of_class(self, labels: Tensor | None, count: int) -> Tensor:
        """Features (count, D) of int64 labels (count,), -1 or None for the null class; 0 where there are no classes."""
        if self.label is None:
            return self.position.new_zeros(count, self.position.shape[1])
        if labels is None:
            labels = torch.full((count,), -1, device=self.position.device)
        return self.label(torch.where(labels < 0, self.classes, labels))

    def features(self, h_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """Tokens, each with what it is told, and what all of them are told -> their features, (B, N, D)."""
        if self.class_tokens is not None:
            h_BND = torch.cat([self.class_tokens.expand(len(h_BND), -1, -1), h_BND], 1)
        h_BND = self.blocks(h_BND + condition_BD[:, None], condition_BD)
        return self.norm(h_BND[:, self.front :])


class Prior(Trunk):
    """Bidirectional transformer over the tokens of a code, conditioned on time and, optionally, on a class.

    Time enters as t/T, never as a count of sampling steps, so one model serves every grid.
    """

    def __init__(self, config: PriorConfig, tokens: int, bits: int) -> None:
        super().__init__(config, tokens, bits, timed=True)
        self.head = nn.Linear(config.width, output_size(bits, config.group))
        self.initialise()
        self.known = nn.Parameter(torch.randn(config.width) * 0.2) if config.known_share else None  # as a label's
        nn.init.zeros_(self.head.weight)  # no evidence yet: the calibrated answer is that of a uniform source

    def forward(self, z_BNC: Tensor, time: Tensor, labels: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """What `DiffusionProcess.evidence` reads: a logit a bit, (B, N, C); with groups R behind them.

        Args:
            z_BNC: z_t, float 0/1.
            time: t/T in [0, 1], (B,).
            labels: int64 (B,), 0..classes - 1, or -1 for the learned null class; None means -1 for all.
            known: bool (B, N), tokens that are clean in z_t, with the learned mark added; None means none.

        Raises:
            UserError: tokens are marked as known, but the prior was trained without such marks.
        """
        h_BND = self.embed(2 * z_BNC - 1) + self.position
        if known is not None:
            if self.known is None:
                raise UserError(
                    "this prior was trained with `known_share` 0 and cannot be told which tokens are known: set "
                    "`inpainting` to replacement, or train one with a share above 0"
                )
            h_BND = h_BND + known[..., None] * self.known
        condition = self.time(time_features(time, h_BND.shape[-1]).to(h_BND.dtype))
        condition = condition + self.of_class(labels, len(z_BNC))
        return self.head(self.features(h_BND, condition))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def drop_labels(labels: Tensor, index: Tensor, probability: float, seed: int) -> Tensor:
    """Label dropout for guidance: each sample, keyed on its global index, loses its class with `probability`."""
    dropped = uniform(seed, "label dropout", index, 1)[:, 0] < probability
    return labels.masked_fill(dropped, -1)
