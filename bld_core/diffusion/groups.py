"""Groups of bits, jointly (beyond the paper): g neighbouring bits of a token have one law, over their 2^g values.

Bits drawn independently cannot say how they depend on one another, and that is all that few steps cost; bits of a
group are drawn together. Words and letters are those of `process.py`, and

    v: a value of a group, 0 to 2^g - 1; its first bit counts most.
    x_BNGg: what each bit has, by groups; G = C / g of them a token.
    log_p: log P(z_0's group = v | z_t), (B, N, G, 2^g).

What goes over all values is made or changed one bit after the other: 2^g numbers, not 2^g times 2^g.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.process import Evidence, Scalar, calibrate, exact_coefficients


def in_groups(x_BNC: Tensor, group: int) -> Tensor:
    """(B, N, C, ...) -> (B, N, G, g, ...)."""
    return x_BNC.unflatten(2, (-1, group))


def _shifts(group: int, like: Tensor) -> Tensor:
    return torch.arange(group - 1, -1, -1, device=like.device)


def value_of(z_BNC: Tensor, group: int) -> Tensor:
    """The value v of each group of a code, int64 (B, N, G)."""
    return (in_groups(z_BNC, group).long() << _shifts(group, z_BNC)).sum(-1)


def bits_of(v_BNG: Tensor, group: int) -> Tensor:
    """The code whose groups have these values: 0/1, float, (B, N, C)."""
    return (v_BNG[..., None] >> _shifts(group, v_BNG) & 1).flatten(2).float()


def sums_of_bits(zero_BNGg: Tensor, one_BNGg: Tensor) -> Tensor:
    """sum_i (one_i if v_i else zero_i) of every value v, (B, N, G, 2^g): what bits that are independent say of it."""
    total = torch.zeros_like(zero_BNGg[..., :1])
    for pair in torch.stack([zero_BNGg, one_BNGg], -1).unbind(3):
        total = (total[..., :, None] + pair[..., None, :]).flatten(-2)
    return total


def joint_log_posterior(evidence: Evidence, z_t: Tensor, k_t: Scalar) -> Tensor:
    """Bayes' rule for groups: log_p = sum_i v_i logit P(z_0^i = 1 | z_t) + R_v - log Z, a bit's own evidence included.

    Where R = 0 its bits are independent, each flipped with the probability r of `calibrate`.
    """
    assert evidence.residual is not None, "a process of single bits has no groups"
    group = z_t.shape[-1] // evidence.residual.shape[-2]
    one = in_groups((1 - 2 * z_t) * calibrate(evidence.bits, k_t), group)
    return F.log_softmax(sums_of_bits(torch.zeros_like(one), one) + evidence.residual, dim=-1)


def draw_values(log_p: Tensor, u_BNG: Tensor | None) -> Tensor:
    """A value of each group, int64 (B, N, G): the first whose cumulative probability exceeds its uniform in [0, 1).

    Without uniforms, the likeliest.
    """
    if u_BNG is None:
        return log_p.argmax(-1)
    cumulative = log_p.exp().cumsum(-1)
    return torch.searchsorted(cumulative, u_BNG[..., None] * cumulative[..., -1:], right=True).squeeze(-1)


def step_law(z_t: Tensor, k_s: Scalar, k_t: Scalar) -> Tensor:
    """P(z_s = w | z_t, z_0 = v) of each bit, (B, N, C, 2, 2) by v and w: A and B of the exact reverse step as a table.

    It changes with A where v is not z_t, and with B where it is.
    """
    a, b = exact_coefficients(k_s, k_t, z_t)

    def table(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).unflatten(-1, (2, 2)).to(z_t.dtype)

    from_zero, from_one = table(1 - b, b, 1 - a, a), table(a, 1 - a, b, 1 - b)
    return torch.where(z_t[..., None, None] == 1, from_one, from_zero)


def image_of_step(p: Tensor, law_BNGg22: Tensor) -> Tensor:
    """The law of z_s's group, from that of z_0's: sum_v p(v) prod_i P(z_s^i = w_i | z_t, z_0^i = v_i), (B, N, G, 2^g).

    A butterfly for each bit: the values that differ in it alone are mixed by its 2 x 2 law.
    """
    for i, law in enumerate(law_BNGg22.unbind(3)):
        zero, one = p.unflatten(-1, (2**i, 2, -1)).unbind(-2)
        to_zero, to_one = (law[..., None, None, :, w].unbind(-1) for w in (0, 1))
        p = torch.stack([zero * to[0] + one * to[1] for to in (to_zero, to_one)], -2).flatten(-3)
    return p
