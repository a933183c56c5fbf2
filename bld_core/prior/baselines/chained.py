"""What both comparators of Table 5 are made of: the trunk of the prior under a head that models whole tokens.

The bits of a token are *chained*: p(token) = prod_j p(bit j | features, bits before j). Independent bits would be a
simpler head, but an unfair comparison: binary diffusion learns over its many steps how the bits of a token depend on
one another, and a comparator that draws each token once, with independent bits, could not. The chain costs little: the
trunk runs once a token, however many bits it has.

Shapes: z_BNC bits; h_BND features of width D. A label of -1 means none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.diffusion.process import CodeBatch
from bld_core.prior.transformer import PriorConfig, Trunk, drop_labels
from bld_core.training.loop import Batch, Objective, TrainState


class ChainedHead(nn.Module):
    """Logits of a token's bits, each given the token's features and its earlier bits (MADE; Germain et al. 2015).

    One hidden layer of C groups of units: group j reads the features and the bits before j, and feeds the logits of the
    bits from j on. All bits are scored in one pass; to draw them takes C steps, which together cost one pass.

    Args:
        width: D, features in.
        bits: C, logits out.
    """

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.group = max(1, width // bits)
        hidden = self.group * bits
        self.direct = nn.Linear(width, bits)
        self.features = nn.Linear(width, hidden)
        self.earlier = nn.Parameter(torch.randn(hidden, bits) * 0.02)
        self.heard = nn.Parameter(torch.zeros(bits, hidden))

    def forward(self, h_BND: Tensor, z_BNC: Tensor) -> Tensor:
        """Features and all bits, float 0/1 -> logits (B, N, C) that each bit is 1, given the bits before it."""
        bit = torch.arange(z_BNC.shape[-1], device=h_BND.device)
        group = bit.repeat_interleave(self.group)
        seen, heard = bit < group[:, None], group <= bit[:, None]
        hidden = F.gelu(self.features(h_BND) + F.linear(2 * z_BNC - 1, self.earlier * seen))
        return self.direct(h_BND) + F.linear(hidden, self.heard * heard)

    def draw(self, h_MD: Tensor, u_BC: Tensor, temperature: float, guidance: float) -> Tensor:
        """Draw tokens bit after bit: bit = u < sigmoid(logit / tau).

        Args:
            h_MD: features, (M, ..., D); M = 2 B guides: the second half are those of the null class, and the logit of
                a bit is (1 + w) conditional - w unconditional.
            u_BC: uniforms in [0, 1), (B, ..., C).
            temperature: tau.
            guidance: w.

        Returns:
            Bits, float 0/1, shaped like u_BC.
        """
        copies = len(h_MD) // len(u_BC)
        z, logits, features = torch.zeros_like(u_BC), self.direct(h_MD), self.features(h_MD)
        for bit in range(u_BC.shape[-1]):
            group = slice(bit * self.group, (bit + 1) * self.group)
            earlier = F.linear(2 * z[..., :bit] - 1, self.earlier[group, :bit])
            hidden = F.gelu(features[..., group] + torch.cat([earlier] * copies))
            logits = logits + F.linear(hidden, self.heard[:, group])
            logit = logits[..., bit]
            if copies == 2:
                conditional, unconditional = logit.chunk(2)
                logit = (1 + guidance) * conditional - guidance * unconditional
            z[..., bit] = (u_BC[..., bit] < torch.sigmoid(logit.float() / temperature)).to(z.dtype)
        return z


class TokenPrior(Trunk):
    """The trunk under a chained head, and a learned vector in the place of a token that is not given."""

    def __init__(self, config: PriorConfig, tokens: int, bits: int, *, causal: bool) -> None:
        super().__init__(config, tokens, bits, causal=causal)
        self.head = ChainedHead(config.width, bits)
        self.blank = nn.Parameter(torch.randn(config.width) * 0.02)
        self.initialise()
        nn.init.zeros_(self.head.direct.weight)  # nothing learned yet: every code is as likely


def token_nll(logits_BNC: Tensor, z_BNC: Tensor) -> Tensor:
    """-log p of each token, the mean over its bits, (B, N): in nats a bit, float32."""
    return F.binary_cross_entropy_with_logits(logits_BNC.float(), z_BNC, reduction="none").mean(-1)


def with_null_class(labels: Tensor | None, guidance: float) -> tuple[Tensor | None, int]:
    """Labels of one batched call, and how many copies of the samples it takes: 2 where there is guidance, else 1.

    The second copy is then that of the null class, as `ChainedHead.draw` takes it.
    """
    if labels is None or guidance == 0:
        return labels, 1
    return torch.cat([labels, torch.full_like(labels, -1)]), 2


def token_objective(
    loss: Callable[[Callable[..., Tensor], CodeBatch, int], Tensor], label_dropout: float, seed: int
) -> Objective:
    """What stage 2 minimises: `loss` of (network, codes, seed), in nats a bit, with label dropout."""

    def objective(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        labels = drop_labels(batch.labels, batch.sample_index, label_dropout, seed)
        return {"loss": loss(state, CodeBatch(batch.data.float(), labels, batch.sample_index), seed)}

    return objective
