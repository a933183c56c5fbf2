"""Transformer blocks of the priors: the paper's, and the parts of later transformers that learn faster.

Shapes: h_BND features of width D; heads of width d = D / heads; condition_BD what all tokens of a sample are told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.errors import UserError

TrunkPart = Literal["rms_norm", "qk_norm", "swiglu", "adaln", "rotary"]

_ROTARY_BASE = 100.0  # the slowest pair of features turns by about a radian over 100 rows or columns


class Cache:
    """Keys and values of the tokens that a causal block has seen, so that each is computed once."""

    def __init__(self, tokens: int) -> None:
        """Room for `tokens` of them."""
        self.tokens = tokens
        self.count = 0
        self.kept: list[Tensor] = []

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Keys and values of the next token, each (B, heads, 1, D / heads) -> those of all so far."""
        if not self.kept:
            self.kept = [x.new_empty(*x.shape[:2], self.tokens, x.shape[3]) for x in new]
        for kept, x in zip(self.kept, new, strict=True):
            assert x.shape[2] == 1, "tokens come one by one"
            kept[:, :, self.count] = x[:, :, 0]
        self.count += 1
        return [kept[:, :, : self.count] for kept in self.kept]


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang, Sennrich 2019), in float32 under autocast, too, as LayerNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def make_norm(width: int, parts: Sequence[TrunkPart]) -> nn.Module:
    """LayerNorm, or RMSNorm where it is among the parts."""
    return RMSNorm(width, eps=1e-6) if "rms_norm" in parts else nn.LayerNorm(width)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) on a square grid: half of a head's features turn with the row, half with the
    column, so that attention knows where two tokens stand to each other.

    Args:
        width: d, of a head; a multiple of 4.
        tokens: N, a square number, in row-major order.
        front: tokens before those, which stand nowhere on the grid and turn by nothing.

    Raises:
        UserError: another width, or no square.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, tokens: int, front: int = 0) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        if width % 4 or side * side != tokens:
            raise UserError(
                f"a head has {width} features and a code {tokens} tokens; rotary positions take a multiple of 4 and a "
                "square: change `width` or `heads`, or leave rotary out of `trunk`"
            )
        frequency = _ROTARY_BASE ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        row, column = torch.arange(tokens) // side, torch.arange(tokens) % side
        angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], 1).float()  # (N, d / 2)
        angle = torch.cat([angle.new_zeros(front, width // 2), angle])
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Queries or keys (B, heads, n, d) of the tokens `first`, `first` + 1, ... -> the same, turned."""
        some = slice(first, first + x.shape[2])
        cosine, sine = self.cosine[some].to(x.dtype), self.sine[some].to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class Attention(nn.Module):
    """Multi-head self-attention by PyTorch's fused kernel, over all tokens, or (causal) over those up to each.

    With "qk_norm" queries and keys have unit scale (Dehghani et al. 2023), with "rotary" they know their positions.
    """

    def __init__(
        self, width: int, heads: int, tokens: int, parts: Sequence[TrunkPart], causal: bool, front: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        each = width // heads
        self.norm_q, self.norm_k = (RMSNorm(each, eps=1e-6) if "qk_norm" in parts else nn.Identity() for _ in range(2))
        self.rotary = Rotary(each, tokens, front) if "rotary" in parts else None

    def forward(self, h_BND: Tensor, cache: Cache | None = None) -> Tensor:
        """With a cache, h_BND is the one token that follows those in it."""
        B, N, D = h_BND.shape
        q, k, v = self.qkv(h_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rotary is not None:
            first = 0 if cache is None else cache.count
            q, k = self.rotary(q, first), self.rotary(k, first)
        if cache is not None:
            k, v = cache.extend(k, v)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and cache is None)
        return self.out(seen.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020), of about as many weights as the plain one of 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 32 * -(-8 * width // (3 * 32))
        self.gate_and_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, h_BND: Tensor) -> Tensor:
        gate, up = self.gate_and_up(h_BND).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block.

    With "adaln" the condition scales and shifts what each of its halves reads, and scales what that adds (Peebles, Xie
    2023); at the start it does neither: the gates are open, and the block is one without.

    Args:
        width: D.
        heads: they divide it.
        tokens: N.
        parts: of later transformers; none is the paper's block.
        causal: whether a token sees only those up to it.
        front: tokens before the N of the code.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        parts: Sequence[TrunkPart] = (),
        causal: bool = False,
        front: int = 0,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(width, parts), make_norm(width, parts)
        self.attention = Attention(width, heads, tokens, parts, causal, front)
        plain = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = SwiGLU(width) if "swiglu" in parts else plain
        self.modulation = nn.Linear(width, 6 * width) if "adaln" in parts else None

    def forward(self, h_BND: Tensor, condition_BD: Tensor, cache: Cache | None = None) -> Tensor:
        if self.modulation is None:
            h_BND = h_BND + self.attention(self.norm_1(h_BND), cache)
            return h_BND + self.mlp(self.norm_2(h_BND))
        modulation = self.modulation(F.silu(condition_BD))[:, None].chunk(6, -1)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation
        h_BND = h_BND + (1 + gate_1) * self.attention(self.norm_1(h_BND) * (1 + scale_1) + shift_1, cache)
        return h_BND + (1 + gate_2) * self.mlp(self.norm_2(h_BND) * (1 + scale_2) + shift_2)

    def initialise(self, blocks: int) -> None:
        """Weights of a block among so many: each adds to the stream, and together they keep its scale."""
        down = self.mlp.down if isinstance(self.mlp, SwiGLU) else self.mlp[2]
        for linear in (self.attention.out, down):
            assert isinstance(linear, nn.Linear), "what a block adds comes out of its last linear maps"
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * blocks))
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
