"""Binary diffusion, the paper's prior: Bernoulli diffusion over the bits (Section 4), network and objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from bld_core.diffusion.bound import Bound, likelihood_bound
from bld_core.diffusion.loss import diffusion_loss
from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig, reverse_process, sample_codes
from bld_core.errors import UserError
from bld_core.noise import uniform
from bld_core.prior.transformer import Prior, PriorConfig, drop_labels
from bld_core.training.loop import Batch, Objective, TrainState

_CODES_AT_ONCE = 64  # in a pass of the bound: on a CPU, more of them leave its cache, with groups most of all


def draw_known(index: Tensor, tokens: int, share: float, seed: int) -> Tensor:
    """The tokens that training keeps clean: a sample, keyed on its global index, gets some with probability `share`.

    The size of the set is uniform in 1..`tokens` - 1, and every set of that size is equally likely.

    Returns:
        bool (B, tokens), True for known.

    Raises:
        UserError: a single token, which leaves nothing to learn once it is known.
    """
    if tokens < 2:
        raise UserError("`known_share` is above 0, but a code has only 1 token: set it to 0, or use smaller patches")
    u = uniform(seed, "known tokens", index, 2 + tokens)
    size = 1 + (u[:, 1] * (tokens - 1)).long()
    rank = u[:, 2:].argsort(dim=1, stable=True).argsort(dim=1)
    return (u[:, 0] < share)[:, None] & (rank < size[:, None])


class PriorObjective:
    """Eq. 13 on cached codes, with label dropout and, in a share of the samples, with known tokens."""

    def __init__(self, diffusion: DiffusionConfig, prior: PriorConfig, seed: int) -> None:
        self.diffusion, self.prior, self.seed = diffusion, prior, seed
        self.process = diffusion.make_process(prior.group)

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """{"loss", "residual", "vlb"}, in nats a bit."""
        z_0, index = batch.data.float(), batch.sample_index
        labels = drop_labels(batch.labels, index, self.prior.label_dropout, self.seed) if self.prior.classes else None
        codes = CodeBatch(z_0, labels, index)
        share = self.prior.known_share
        known = draw_known(index, z_0.shape[1], share, self.seed) if share else None
        return diffusion_loss(state, self.process, codes, self.diffusion, self.seed, known)


class BinaryModel:
    """The paper's: Bernoulli diffusion over the bits (Section 4)."""

    def __init__(self, config: PriorConfig, diffusion: DiffusionConfig, tokens: int, bits: int) -> None:
        if bits % config.group:
            raise UserError(
                f"`group` is {config.group}; it must divide the {bits} bits of a token: set it to 1", config
            )
        if config.group > 1 and diffusion.balance != "none":
            raise UserError(
                f"`balance` is {diffusion.balance} with `group` {config.group}, whose values have no two classes to "
                "balance: set balance to none, or group to 1",
                config,
                diffusion,
            )
        self.config, self.diffusion, self.shape = config, diffusion, (tokens, bits)
        self.process = diffusion.make_process(config.group)

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        return Prior(self.config, *self.shape)

    def objective(self, seed: int) -> Objective:
        """Eq. 13."""
        return PriorObjective(self.diffusion, self.config, seed)

    def bound(self, network: nn.Module, codes: CodeBatch, seed: int, sampling: SamplingConfig | None = None) -> Bound:
        """The bound of all T steps, or of the grid of `sampling`."""
        grid = None if sampling is None else sampling.make_grid(self.process.schedule)
        return likelihood_bound(network, self.process, codes, grid, seed, _CODES_AT_ONCE)

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """Those of the grid; to complete codes may take some of them several times.

        Raises:
            UserError: a grid that is none.
        """
        del completing
        return len(sampling.make_grid(self.process.schedule)) - 1

    def sample(
        self, network: nn.Module, samples: SampleSpec, sampling: SamplingConfig, known: Known | None = None
    ) -> Tensor:
        """The last of `states`."""
        return sample_codes(network, self.process, self.shape, samples, _settled(network, sampling), known)

    def states(
        self, network: nn.Module, samples: SampleSpec, sampling: SamplingConfig, known: Known | None = None
    ) -> Iterator[Tensor]:
        """The states of the reverse process; see `bld_core.diffusion.sampling.reverse_process`, also for the errors."""
        return reverse_process(network, self.process, self.shape, samples, _settled(network, sampling), known)


def _settled(network: nn.Module, sampling: SamplingConfig) -> SamplingConfig:
    """The settings with the way of completing codes that suits the network, where they leave it open."""
    if sampling.inpainting != "auto":
        return sampling
    marked = isinstance(network, Prior) and network.known is not None  # conditioned is exact, for who is trained for it
    return replace(sampling, inpainting="conditioned" if marked else "replacement")
