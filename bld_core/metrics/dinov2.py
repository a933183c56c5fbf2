"""The network of DINOv2 (Oquab et al. 2023), in whose features sets of images may be compared: ViT-L/14, class token.

Not timm's: with the same random weights its ViT-L/14 agrees bit for bit at 518 pixels, but at 224, where it resizes
position embeddings in another way than the authors, its features are 6 % off.

Legend: B images, N tokens (the class token and a square of patches), D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14
_TRAINED_SIDE = 37  # patches a side at 518 pixels, the size that the weights were trained for
_NUDGE = 0.1  # what the authors add to the new side where position embeddings are resized


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3, B, H, N, D / H
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)
        self.ls2 = _Scale(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.ls1.gamma * self.attn(self.norm1(x_BND))
        return x_BND + self.ls2.gamma * self.mlp(self.norm2(x_BND))


class DINOv2(nn.Module):
    """Parameters are named as in the published files, which it loads as they are.

    Args:
        width: D.
        layers: blocks.
        heads: H.
    """

    def __init__(self, width: int = 1024, layers: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _TRAINED_SIDE**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the training; it is in the file
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Square images, float32 (B, 3, s, s) with the mean and deviation of ImageNet, s a multiple of 14 -> (B, D)."""
        patches = self.patch_embed["proj"](x_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        x_BND = x_BND + self._positions(x_BCHW.shape[-1] // PATCH)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND[:, 0])

    def _positions(self, side: int) -> Tensor:
        """Position embeddings of side x side patches, (1, 1 + side^2, D)."""
        if side == _TRAINED_SIDE:
            return self.pos_embed
        square = self.pos_embed[:, 1:].transpose(1, 2).unflatten(-1, (_TRAINED_SIDE, _TRAINED_SIDE))
        scale = (side + _NUDGE) / _TRAINED_SIDE
        resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1)
