from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.prior.blocks import Attention, Block, Rotary, SwiGLU, TrunkPart
from bld_core.prior.transformer import Prior, PriorConfig
from tests.bld_core.toys import perturb

PARTS: list[TrunkPart] = ["rms_norm", "qk_norm", "swiglu", "adaln", "rotary"]
Z = torch.randint(0, 2, (3, 16, 8), generator=torch.Generator().manual_seed(0)).float()
TIME, LABELS = torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0, 1, -1])


def prior_of(*trunk: TrunkPart) -> Prior:
    torch.manual_seed(0)
    return Prior(PriorConfig(layers=2, width=16, heads=2, classes=2, trunk=[*trunk]), 16, 8)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_part_changes_the_answer_and_every_pair_of_parts_goes_together() -> None:
    answers: dict[tuple[TrunkPart, ...], Tensor] = {}
    some: list[tuple[TrunkPart, ...]] = [(), *((part,) for part in PARTS), *combinations(PARTS, 2), tuple(PARTS)]
    for parts in some:
        network = prior_of(*parts)
        perturb(network)
        answers[parts] = network(Z, TIME, LABELS)
        assert answers[parts].isfinite().all()
    for one, other in combinations(answers, 2):
        assert not torch.allclose(answers[one], answers[other]), (one, other)


def test_every_weight_of_every_part_gets_a_gradient() -> None:
    network = prior_of(*PARTS)
    perturb(network)
    network(Z, TIME, LABELS).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@torch.no_grad()
def test_gates_are_open_at_the_start() -> None:
    torch.manual_seed(0)
    gated = Block(8, 2, 4, ["adaln"])
    gated.initialise(1)
    assert gated.modulation is not None
    nn.init.zeros_(gated.modulation.bias)  # as `Trunk.initialise` does
    plain = Block(8, 2, 4)
    plain.load_state_dict({name: w for name, w in gated.state_dict().items() if not name.startswith("modulation")})
    h, condition = drawn(2, 4, 8), drawn(2, 8)
    assert torch.equal(gated(h, condition), plain(h, condition))
    nn.init.normal_(gated.modulation.weight)
    changed = gated(h, condition)
    assert not torch.allclose(changed, plain(h, condition))
    assert not torch.allclose(changed[:1], gated(h[:1], condition[1:]))  # each sample has its own condition


def test_rotary_positions_are_relative() -> None:
    rotary, q, k = Rotary(8, 16), drawn(1, 1, 1, 8), drawn(1, 1, 1, 8)
    scores = rotary(q.expand(1, 1, 16, 8)) @ rotary(k.expand(1, 1, 16, 8)).transpose(-1, -2)
    by_shift: dict[tuple[int, int], list[float]] = {}
    for i in range(16):
        for j in range(16):
            by_shift.setdefault((j // 4 - i // 4, j % 4 - i % 4), []).append(float(scores[0, 0, i, j]))
    for same in by_shift.values():
        assert max(same) - min(same) < 1e-5
    assert abs(by_shift[0, 1][0] - by_shift[1, 0][0]) > 1e-3  # rows are not columns
    torch.testing.assert_close(rotary(q.expand(1, 1, 16, 8)).norm(dim=-1), q.norm(dim=-1).expand(1, 1, 16))


def test_rotary_positions_of_a_token_that_comes_alone_are_its_own() -> None:
    rotary, x = Rotary(8, 16), drawn(1, 1, 16, 8)
    alone = torch.cat([rotary(x[:, :, n : n + 1], n) for n in range(16)], 2)
    assert torch.equal(alone, rotary(x))


@pytest.mark.parametrize(("width", "tokens"), [(6, 16), (8, 12)])
def test_rotary_positions_need_a_square_and_a_multiple_of_four(width: int, tokens: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{width} features and a code {tokens} tokens; .*leave rotary out of `trunk`"
    ):
        Rotary(width, tokens)


@torch.no_grad()
def test_queries_and_keys_of_unit_scale_bound_the_attention_whatever_the_input() -> None:
    attention = Attention(8, 2, 4, ["qk_norm"], causal=False)
    attention.qkv.bias.zero_()
    h = drawn(2, 4, 8)
    attention.qkv.weight[:16] *= 100  # logits would be 10,000 times as large
    large = attention(h)
    attention.qkv.weight[:16] /= 100
    torch.testing.assert_close(attention(h), large, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_gated_layer_is_its_formula_and_about_as_large_as_the_plain_one() -> None:
    layer, h = SwiGLU(96), drawn(2, 3, 96)
    gate, up = F.linear(h, layer.gate_and_up.weight, layer.gate_and_up.bias).split(256, -1)
    torch.testing.assert_close(layer(h), layer.down(gate * gate.sigmoid() * up), rtol=1e-4, atol=1e-5)
    for width in (128, 192, 768, 1536):
        plain, gated = 8 * width**2, sum(w.numel() for w in SwiGLU(width).parameters() if w.ndim == 2)
        assert 1 <= gated / plain < 1.04


def test_a_part_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`trunk` is \['adaln', 'adaln'\], which names a part twice"):
        PriorConfig(trunk=["adaln", "adaln"])
