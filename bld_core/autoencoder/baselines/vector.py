"""Vector quantizer (Table 4, first row): each position becomes the nearest of a few learned vectors.

Shapes: B images, an H x W grid, N = B H W positions of this replica, K entries of D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bld_core.autoencoder.quantizer import Bottleneck
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.training import replicas


class VectorBottleneck(Bottleneck):
    """The nearest entry of a codebook that follows the encoder (van den Oord et al. 2017, appendix A.1).

    A training step with gradients, in this order:
      1. an entry used too little is replaced by a vector of this batch; at the first step that is every entry;
      2. each position takes its nearest entry; the decoder's gradient passes straight through to the encoder;
      3. each entry moves to the moving average of the vectors that took it.
    The loss term "commitment" holds the encoder to the entries. Everything else leaves the codebook alone.

    Under torch.distributed every replica must take the step, with equal batches: usage and sums are over all replicas,
    the replacements are the same vectors of the global batch, so every replica has the same codebook, bit for bit.
    DistributedDataParallel needs no broadcast_buffers.

    Args:
        entries: K, the size of the codebook.
        width: D, channels in and out.
        decay: of the moving averages, a step.
        commitment: beta, the weight of the mean squared distance between features and entries.
        restart: an entry used less than this share of its fair part, 1/K of all positions, is replaced.
    """

    codebook: Tensor  # (K, D) float32; zeros before the first step
    usage: Tensor  # (K,) float32, moving average: 1 is the fair part
    updates: Tensor  # int64 scalar: training steps taken, on which the replacements are keyed

    def __init__(
        self, entries: int, width: int, decay: float = 0.99, commitment: float = 0.25, restart: float = 0.01
    ) -> None:
        super().__init__()
        for name, number in (("entries", entries), ("width", width)):
            if number < 1:
                raise UserError(f"{name} of a vector bottleneck is {number}; it must be at least 1")
        for name, value in (("decay", decay), ("restart", restart)):
            if not 0 < value < 1:
                raise UserError(
                    f"{name} of a vector bottleneck is {value}; it must lie in (0, 1), so that no usage reaches 0"
                )
        if commitment < 0:
            raise UserError(f"commitment of a vector bottleneck is {commitment}; a weight must be 0 or more")
        self.inputs = self.outputs = width
        self.decay, self.commitment, self.restart = decay, commitment, restart
        self.register_buffer("codebook", torch.zeros(entries, width))
        self.register_buffer("usage", torch.zeros(entries))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def perplexity(self) -> Tensor:
        """Scalar: the number of entries, all used alike, whose usage would have the same entropy."""
        return torch.special.entr(self.usage / self.usage.sum()).sum().exp()

    def nearest(self, x_ND: Tensor) -> Tensor:
        """Index of the nearest entry of each float32 vector, int64 (N,)."""
        return (self.codebook.square().sum(1) - 2 * x_ND @ self.codebook.T).argmin(1)

    def _replace(self, x_ND: Tensor, good: Tensor) -> None:
        """Step 1, of a good batch, with candidates from all over the global batch.

        Its positions rank N .. rank N + N-1 are here.
        """
        (rank, world), n, entries = replicas.rank_and_world(), len(x_ND), len(self.codebook)
        u = uniform(0, "codebook restart", self.updates.view(1), entries + 1)[0].double()
        strata = (torch.arange(entries, device=u.device) + u[1:]) / entries  # spread out: seldom the same place twice
        position = ((strata + u[0]) % 1 * (world * n)).long().clamp(max=world * n - 1) - rank * n
        mine = (position >= 0) & (position < n)
        candidates = replicas.sum_over_replicas(torch.where(mine[:, None], x_ND[position.clamp(0, n - 1)], 0.0))
        dead = (self.usage < self.restart) & good
        self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
        self.usage.masked_fill_(dead, 1.0)

    def _follow(self, x_ND: Tensor, nearest_N: Tensor, good: Tensor) -> None:
        """Step 3, of a good batch: usage <- average of usage; codebook <- (average of sums) / (average of usage)."""
        entries, width = self.codebook.shape
        ones = F.pad(x_ND, (0, 1), value=1.0)  # summed beside the vectors, they count
        sums = replicas.sum_over_replicas(x_ND.new_zeros(entries, width + 1).index_add_(0, nearest_N, ones))
        sums *= entries / (len(x_ND) * replicas.rank_and_world()[1])
        vectors, usage = sums[:, :-1], sums[:, -1]
        followed = self.usage.lerp(usage, 1 - self.decay)
        moved = self.codebook + (1 - self.decay) * (vectors - usage[:, None] * self.codebook) / followed[:, None]
        self.usage.copy_(torch.where(good, followed, self.usage))
        self.codebook.copy_(torch.where(good, moved, self.codebook))
        self.updates += good

    def forward(self, features_BCHW: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, D, H, W) -> their nearest entries, same shape and dtype, and {"commitment"}; u is not needed."""
        del u
        x_BHWD = features_BCHW.float().permute(0, 2, 3, 1)
        learning = self.training and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(features_BCHW.device.type, enabled=False):
            x_ND = x_BHWD.reshape(-1, self.inputs)
            # Not from a batch that is not finite on any replica: it would stay in the codebook for ever.
            good = replicas.sum_over_replicas((~x_ND.isfinite()).sum()) == 0 if learning else None
            if good is not None:
                self._replace(x_ND, good)
            nearest_N = self.nearest(x_ND)
            entry_BHWD = self.codebook[nearest_N].view(x_BHWD.shape)
            if good is not None:
                self._follow(x_ND, nearest_N, good)
        entry_BCHW = entry_BHWD.permute(0, 3, 1, 2).to(features_BCHW.dtype)
        latent = entry_BCHW + (features_BCHW - features_BCHW.detach())  # the bracket is exactly 0
        return latent, {"commitment": self.commitment * F.mse_loss(x_BHWD, entry_BHWD)}
