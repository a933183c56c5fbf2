"""The Inception score of Salimans et al. (2016), from sums."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bld_core.errors import UserError

_SHUFFLE = 2020


def split_of_samples(count: int, splits: int = 10) -> Tensor:
    """Which split each of `count` samples falls into, int64 (count,): torch-fidelity's shuffle and cuts.

    Raises:
        UserError: fewer samples than splits, one of which would be empty.
    """
    if count < splits:
        raise UserError(f"{count} samples for an Inception score of {splits} splits; it needs one for each: draw more")
    order = torch.from_numpy(np.random.RandomState(_SHUFFLE).permutation(count))
    ends = torch.tensor([(split + 1) * count // splits for split in range(splits)])
    found = torch.empty(count, dtype=torch.int64)
    found[order] = torch.searchsorted(ends, torch.arange(count), right=True)
    return found


class InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)) in each split of the samples; sums of p and of p log p in float64.

    Args:
        count: samples that there will be; each belongs to the split that its index says.
        splits: parts that are scored by themselves.

    Raises:
        UserError: fewer samples than splits.
    """

    def __init__(self, count: int, splits: int = 10) -> None:
        self._split, self._splits = split_of_samples(count, splits), splits
        self._probabilities = torch.zeros(splits, 0, dtype=torch.float64)
        self._negative_entropy = torch.zeros(splits, dtype=torch.float64)
        self._seen = torch.zeros(splits, dtype=torch.int64)

    def update(self, logits: Tensor, first_index: int) -> None:
        """Add the logits of samples `first_index`, `first_index` + 1, ..., (B, classes), any device and real type."""
        log_p = logits.detach().cpu().double().log_softmax(1)
        p, split = log_p.exp(), self._split[first_index : first_index + len(log_p)]
        if not self._probabilities.shape[1]:
            self._probabilities = torch.zeros(self._splits, p.shape[1], dtype=torch.float64)
        self._probabilities.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, (p * log_p).sum(1))
        self._seen += torch.bincount(split, minlength=self._splits)

    def scores(self) -> Tensor:
        """The score of each split, float64 (splits,), from 1 to the number of classes; report their mean.

        Raises:
            UserError: not every sample was seen, once.
        """
        if not torch.equal(self._seen, torch.bincount(self._split, minlength=self._splits)):
            raise UserError(
                f"{int(self._seen.sum())} of {len(self._split)} samples were seen; the score is one of all, each once"
            )
        p_y = self._probabilities / self._seen[:, None]
        return (self._negative_entropy / self._seen - torch.xlogy(p_y, p_y).sum(1)).exp()
