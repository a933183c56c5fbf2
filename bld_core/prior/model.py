"""The three priors behind one seam: what differs between binary diffusion and what Table 5 compares it with."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from bld_core.diffusion.bound import Bound
from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.prior.baselines.absorbing import AbsorbingModel
from bld_core.prior.baselines.autoregressive import AutoregressiveModel
from bld_core.prior.binary import BinaryModel
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Objective


class PriorModel(Protocol):
    """One way to model codes of N tokens of C bits; `prior.model` names it."""

    def network(self) -> nn.Module:
        """A freshly initialised network."""
        ...

    def objective(self, seed: int) -> Objective:
        """What stage 2 minimises, in nats a bit."""
        ...

    def bound(self, network: nn.Module, codes: CodeBatch, seed: int, sampling: SamplingConfig | None = None) -> Bound:
        """The likelihood bound of two or more held-out codes, comparable between the models.

        It is that of the chain that takes the steps of `sampling`; without, of all the steps that the model has. The
        codes of a part keep their numbers in the whole: `merge_bounds` makes the bound of the whole of those of parts.
        """
        ...

    def steps(self, sampling: SamplingConfig, completing: bool = False) -> int:
        """How many steps a sample takes; `completing` asks for codes of which a part is known.

        Raises:
            UserError: settings that this model cannot follow, or it cannot complete codes.
        """
        ...

    def sample(
        self, network: nn.Module, samples: SampleSpec, sampling: SamplingConfig, known: Known | None = None
    ) -> Tensor:
        """Draw codes, float 0/1 (B, N, C), on the device of the samples' index; the errors are those of `steps`."""
        ...


def make_model(prior: PriorConfig, diffusion: DiffusionConfig, tokens: int, bits: int) -> PriorModel:
    """The model that `prior.model` names, for codes of `tokens` tokens of `bits` bits."""
    match prior.model:
        case "binary":
            return BinaryModel(prior, diffusion, tokens, bits)
        case "autoregressive":
            return AutoregressiveModel(prior, tokens, bits)
        case "absorbing":
            return AbsorbingModel(prior, tokens, bits)
