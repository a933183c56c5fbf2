"""The three priors behind one seam: what differs between binary diffusion and what Table 5 compares it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from bld_core.baselines.absorbing import AbsorbingModel
from bld_core.baselines.autoregressive import AutoregressiveModel
from bld_core.bound import Bound, likelihood_bound
from bld_core.diffusion import DiffusionConfig, check_grid
from bld_core.objectives import PriorObjective
from bld_core.prior import Prior, PriorConfig
from bld_core.sampling import Known, SamplingConfig, reverse_process, sample_codes
from bld_core.training import Objective


class PriorModel(Protocol):
    """One way to model codes of N tokens of C bits; `prior.model` names it."""

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        ...

    def objective(self, seed: int) -> Objective:
        """What stage 2 minimises, in nats a bit."""
        ...

    def bound(
        self,
        network: nn.Module,
        z_0: Tensor,
        labels: Tensor | None,
        seed: int,
        sampling: SamplingConfig | None = None,
        first: int = 0,
    ) -> Bound:
        """The likelihood bound of held-out codes 0/1 (M, N, C), M >= 2, comparable between the models.

        It is that of the chain that takes the steps of `sampling`; without, of all the steps that the model has.
        `first` is the number of the first code, where they are a part of those that the bound is of.
        """
        ...

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """How many steps a sample takes; `completing` asks for codes of which a part is known.

        Raises:
            ValueError: settings that this model cannot follow, or it cannot complete codes.
        """
        ...

    def sample(
        self,
        network: nn.Module,
        labels: Tensor | None,
        index: Tensor,
        sampling: SamplingConfig,
        seed: int,
        known: Known | None = None,
    ) -> Tensor:
        """Draw codes, float 0/1 (B, N, C), on the device of `index`; sample i is keyed on (seed, index[i]).

        The errors are those of `steps`.
        """
        ...


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
            ValueError: a grid that is none, or one that skips steps for target z_prev.
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
        """The reverse process; the errors are those of `bld_core.sampling.reverse_process`."""
        target = self.diffusion.target
        return sample_codes(network, self.shape, labels, index, self.schedule, sampling, seed, target, known)

    def states(
        self, network: nn.Module, labels: Tensor | None, index: Tensor, sampling: SamplingConfig, seed: int
    ) -> Iterator[Tensor]:
        """The states z_T, ..., z_0 of the reverse process that `sample` takes the last of."""
        target = self.diffusion.target
        return reverse_process(network, self.shape, labels, index, self.schedule, sampling, seed, target)


def make_model(prior: PriorConfig, diffusion: DiffusionConfig, tokens: int, bits: int) -> PriorModel:
    """The model that `prior.model` names, for codes of `tokens` tokens of `bits` bits."""
    match prior.model:
        case "binary":
            return BinaryModel(prior, diffusion, tokens, bits)
        case "autoregressive":
            return AutoregressiveModel(prior, tokens, bits)
        case "absorbing":
            return AbsorbingModel(prior, tokens, bits)


def trained_model(config: Mapping[str, Any], code_shape: tuple[int, int, int]) -> PriorModel:
    """The model of a trained prior, from its config.json and the (h, w, c) of its codes."""
    h, w, c = code_shape
    return make_model(PriorConfig(**config["prior"]), DiffusionConfig(**config["diffusion"]), h * w, c)
