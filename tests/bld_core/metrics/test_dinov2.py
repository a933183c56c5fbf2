from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.metrics.dinov2 import DINOv2

WIDTH, LAYERS, HEADS = 32, 2, 4


def network() -> DINOv2:
    made, generator = DINOv2(WIDTH, LAYERS, HEADS), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return made.requires_grad_(False)


def by_torch(made: DINOv2, x_BND: Tensor) -> Tensor:
    """The blocks as PyTorch's own pre-norm encoder layers; a layer's scale goes into its last matrix."""
    state = made.state_dict()
    for i in range(LAYERS):
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        ).requires_grad_(False)
        of = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        one, two = of["ls1.gamma"], of["ls2.gamma"]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": of["attn.qkv.weight"],
                "self_attn.in_proj_bias": of["attn.qkv.bias"],
                "self_attn.out_proj.weight": one[:, None] * of["attn.proj.weight"],
                "self_attn.out_proj.bias": one * of["attn.proj.bias"],
                "linear1.weight": of["mlp.fc1.weight"],
                "linear1.bias": of["mlp.fc1.bias"],
                "linear2.weight": two[:, None] * of["mlp.fc2.weight"],
                "linear2.bias": two * of["mlp.fc2.bias"],
                **{f"norm{n}.{part}": of[f"norm{n}.{part}"] for n in (1, 2) for part in ("weight", "bias")},
            }
        )
        x_BND = layer.train()(x_BND)
    return F.layer_norm(x_BND[:, 0], (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)


def test_it_is_a_pre_norm_transformer_over_patches_and_a_class_token() -> None:
    made, x = network(), torch.randn(2, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    patches = F.unfold(x, 14, stride=14).transpose(1, 2)  # (B, 37 x 37, 3 x 14 x 14), row by row
    embed = made.patch_embed["proj"]
    assert isinstance(embed, nn.Conv2d)
    assert embed.bias is not None
    tokens = patches @ embed.weight.flatten(1).T + embed.bias
    tokens = torch.cat([made.cls_token.expand(2, -1, -1), tokens], 1) + made.pos_embed
    torch.testing.assert_close(made(x), by_torch(made, tokens), rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resized_to_the_patches_that_there_are() -> None:
    made = network()
    ramp = torch.linspace(-1, 1, 37)
    made.pos_embed[0, 1:, 0] = ramp.repeat_interleave(37)  # from top to bottom
    made.pos_embed[0, 1:, 1] = 3.0
    positions = made._positions(16)  # pyright: ignore[reportPrivateUsage]
    assert positions.shape == (1, 257, WIDTH)
    assert torch.equal(positions[:, :1], made.pos_embed[:, :1])
    square = positions[0, 1:].view(16, 16, WIDTH)
    torch.testing.assert_close(square[..., 1], torch.full((16, 16), 3.0))
    centres = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5) / 18 - 1  # at 37 / 16, the last would be 0.01 off
    torch.testing.assert_close(
        square[2:-2, :, 0], centres[2:-2, None].expand(-1, 16), rtol=0, atol=4e-3
    )  # PyTorch's cubic bends lines a little
    assert made(torch.zeros(1, 3, 224, 224)).shape == (1, WIDTH)
