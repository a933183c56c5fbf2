"""Groups of bits, jointly (beyond the paper): g neighbouring bits of a token have one law, over their 2^g values.

Bits drawn independently cannot say how they depend on one another, and that is all that few steps cost; bits of a
group are drawn together. Words and letters are those of `process.py`, and

    x_BNGg: what each bit has, by groups; G = C / g of them a token.
    value: of a group's bits as a number, 0 to 2^g - 1; the first bit counts most.
    log_p: log P(f = value | z_t) of the flips f of each group, (B, N, G, 2^g).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.diffusion.process import Evidence, Scalar, calibrate, exact_coefficients
from bld_core.precision import ieee_float32

_AT_ONCE = 4  # bits whose butterflies are one matrix, of 16 x 16


def in_groups(x_BNC: Tensor, group: int) -> Tensor:
    """(B, N, C) -> (B, N, G, g)."""
    return x_BNC.unflatten(2, (-1, group))


def _shifts(group: int, like: Tensor) -> Tensor:
    return torch.arange(group - 1, -1, -1, device=like.device)


def value_of(x_BNC: Tensor, group: int) -> Tensor:
    """The values of the groups of bits, or of flips, 0/1: int64 (B, N, G)."""
    return (in_groups(x_BNC, group).long() << _shifts(group, x_BNC)).sum(-1)


def bits_of(value_BNG: Tensor, group: int) -> Tensor:
    """The bits that have these values: 0/1, float, (B, N, C)."""
    return (value_BNG[..., None] >> _shifts(group, value_BNG) & 1).flatten(2).float()


def sums_of_bits(zero_BNGg: Tensor, one_BNGg: Tensor) -> Tensor:
    """sum_i (one_i if bit i of the value is 1 else zero_i), of every value: (B, N, G, 2^g)."""
    g = zero_BNGg.shape[-1]
    if g == 1:
        return torch.cat([zero_BNGg, one_BNGg], -1)
    first, second = (
        sums_of_bits(zero_BNGg[..., half], one_BNGg[..., half]) for half in (slice(g // 2), slice(g // 2, g))
    )
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


def joint_log_posterior(evidence: Evidence, z_t: Tensor, k_t: Scalar) -> Tensor:
    """Bayes' rule for groups: log_p = sum_i f_i logit r_i + R_v - log Z, where v = f XOR z_t is the clean value.

    logit r is the calibrated evidence, so a bit's own is in it; where R = 0 the flips are independent, each with its r.
    """
    assert evidence.residual is not None, "a process of single bits has no groups"
    group = z_t.shape[-1] // evidence.residual.shape[-2]
    logit_r = in_groups(calibrate(evidence.bits, k_t), group)
    clean = value_of(z_t, group)[..., None] ^ torch.arange(2**group, device=z_t.device)
    of_flips = sums_of_bits(torch.zeros_like(logit_r), logit_r)
    return F.log_softmax(of_flips + evidence.residual.gather(-1, clean), dim=-1)


def draw_flips(log_p: Tensor, u_BNG: Tensor | None) -> Tensor:
    """The flips of every bit, 0/1, (B, N, C), drawn by groups.

    Args:
        log_p: of every value of the flips.
        u_BNG: uniforms in [0, 1): a group's value is the first whose cumulative probability exceeds its own; None takes
            the likeliest.
    """
    group = log_p.shape[-1].bit_length() - 1
    if u_BNG is None:
        return bits_of(log_p.argmax(-1), group)
    cumulative = log_p.exp().cumsum(-1)
    value = torch.searchsorted(cumulative, u_BNG[..., None] * cumulative[..., -1:], right=True)
    return bits_of(value.squeeze(-1), group)


def step_law(k_s: Scalar, k_t: Scalar, like: Tensor) -> Tensor:
    """The exact reverse step of one bit as a table, P(z_s XOR z_t = d | f): (1 or B, 2, 2) by f and d; see A and B."""
    a, b = exact_coefficients(k_s, k_t, like)
    return torch.stack([1 - b, b, 1 - a, a], -1).view(-1, 2, 2).to(like.dtype)


def image_of_step(p: Tensor, law_B22: Tensor) -> Tensor:
    """The law of a group's changes d = z_s XOR z_t from that of its flips: sum_f p(f) prod_i law[f_i, d_i]; like p.

    By butterflies: the values that differ in one bit alone are mixed by its law, one bit after the other; that is
    g 2^g terms where the sum has 4^g. Here a few bits at a time, by the law of so many.
    """
    left, shape = p.shape[-1].bit_length() - 1, p.shape
    with ieee_float32(), torch.autocast(p.device.type, enabled=False):
        while left:
            count = min(_AT_ONCE, left)
            law = law_B22
            for _ in range(count - 1):
                law = torch.einsum("bij,bkl->bikjl", law, law_B22).flatten(3).flatten(1, 2)
            # The last bits of the value are mixed, and go to its front: once all have, they stand as before.
            mixed = p.reshape(len(law), -1, 2**count) @ law
            p = mixed.view(*shape[:-1], -1, 2**count).transpose(-1, -2).reshape(shape)
            left -= count
    return p
