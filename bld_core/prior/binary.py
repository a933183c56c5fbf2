"""Binary diffusion, the paper's prior: Bernoulli diffusion over the bits (Section 4), network and objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from bld_core.diffusion.bound import Bound, likelihood_bound
from bld_core.diffusion.process import DiffusionConfig, check_grid, diffusion_loss
from bld_core.diffusion.sampling import Known, SamplingConfig, reverse_process, sample_codes
from bld_core.prior.transformer import Prior, PriorConfig, draw_known, drop_labels
from bld_core.training.loop import Batch, Objective, TrainState


class PriorObjective:
    """Eq. 13 on cached codes, with label dropout and, in a share of the samples, with known tokens."""

    def __init__(self, diffusion: DiffusionConfig, label_dropout: float, seed: int, known_share: float = 0.0) -> None:
        self.diffusion = diffusion
        self.schedule = diffusion.make_schedule()
        self.label_dropout = label_dropout
        self.known_share = known_share
        self.seed = seed

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """{"loss", "residual", "vlb"}, in nats a bit."""
        labels = drop_labels(batch.labels, batch.sample_index, self.label_dropout, self.seed)
        z_0, index = batch.data.float(), batch.sample_index
        known = draw_known(index, z_0.shape[1], self.known_share, self.seed) if self.known_share else None
        return diffusion_loss(state, z_0, labels, index, self.schedule, self.diffusion, self.seed, known)


class BinaryModel:
    """The paper's: Bernoulli diffusion over the bits (Section 4)."""

    def __init__(self, config: PriorConfig, diffusion: DiffusionConfig, tokens: int, bits: int) -> None:
        self.config, self.diffusion, self.shape = config, diffusion, (tokens, bits)
        self.schedule = diffusion.make_schedule()

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        return Prior(self.config, *self.shape)

    def objective(self, seed: int) -> Objective:
        """Eq. 13."""
        return PriorObjective(self.diffusion, self.config.label_dropout, seed, self.config.known_share)

    def bound(
        self,
        network: nn.Module,
        z_0: Tensor,
        labels: Tensor | None,
        seed: int,
        sampling: SamplingConfig | None = None,
        first: int = 0,
    ) -> Bound:
        """The bound of all T steps, or of the grid of `sampling`."""
        schedule, target = self.schedule, self.diffusion.target
        grid = None if sampling is None else sampling.times(schedule)
        return likelihood_bound(network, z_0, labels, schedule, grid, target=target, seed=seed, first=first)

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """Those of the grid; to complete codes may take some of them several times.

        Raises:
            UserError: a grid that is none, or one that skips steps for target z_prev.
        """
        del completing
        grid = sampling.times(self.schedule)
        check_grid(grid, self.schedule, self.diffusion.target)
        return len(grid) - 1

    def sample(
        self,
        network: nn.Module,
        labels: Tensor | None,
        index: Tensor,
        sampling: SamplingConfig,
        seed: int,
        known: Known | None = None,
    ) -> Tensor:
        """The reverse process; the errors are those of `bld_core.diffusion.sampling.reverse_process`."""
        target = self.diffusion.target
        if sampling.inpainting == "auto":  # conditioned is exact, and for priors that were trained for it
            marked = isinstance(network, Prior) and network.known is not None
            sampling = replace(sampling, inpainting="conditioned" if marked else "replacement")
        return sample_codes(network, self.shape, labels, index, self.schedule, sampling, seed, target, known)

    def states(
        self, network: nn.Module, labels: Tensor | None, index: Tensor, sampling: SamplingConfig, seed: int
    ) -> Iterator[Tensor]:
        """The states z_T, ..., z_0 of the reverse process that `sample` takes the last of."""
        target = self.diffusion.target
        return reverse_process(network, self.shape, labels, index, self.schedule, sampling, seed, target)
