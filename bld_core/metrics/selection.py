"""Feature vectors of some of many images, for metrics that sums cannot give: the same ones however work is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bld_core.splitmix import key_of


@dataclass
class Selection:
    """The feature vectors of at most `most` images, evenly among all that were shown: those of the smallest hashes.

    Attributes:
        most: images kept; memory is 4 F bytes for each.
        ranks: int64 (n,), ascending: a hash of each image's key.
        features: float32 (n, F), on the CPU; (0,) before the first.
    """

    most: int
    ranks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    features: Tensor = field(default_factory=lambda: torch.zeros(0))

    def update(self, keys: Sequence[str], features: Tensor) -> None:
        """Show the feature vectors, (B, F), of the images of these keys."""
        if self.most and len(keys):
            ranks = torch.tensor([key_of("selection", key) for key in keys])
            self.merge(Selection(self.most, ranks, features.detach().cpu().float()))

    def merge(self, other: Selection) -> None:
        """Add another worker's part."""
        if not len(other.ranks):
            return
        ranks = torch.cat([self.ranks, other.ranks])
        features = torch.cat([self.features, other.features]) if len(self.ranks) else other.features
        kept = ranks.argsort(stable=True)[: self.most]
        self.ranks, self.features = ranks[kept], features[kept]
