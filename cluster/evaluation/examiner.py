"""The actor of the studies: the evaluation job's, over many priors on the codes of one autoencoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bld_core.diffusion.bound import Bound
from bld_core.generator import Generator, load_prior
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn, Evaluator, Look, Reconstruct, Reconstructions
from cluster.evaluation.references import Space
from cluster.sampling.sampler import Judge


@dataclass(frozen=True)
class Examine:
    """Piece of work: with the prior of an experiment's folder."""

    folder: str
    work: Look | Judge | Reconstruct


class Examiner(Evaluator):
    """An actor that holds one prior at a time, and looks at its images in one space."""

    def __init__(self, experiment: Experiment, space: Space) -> None:
        plain = replace(experiment.evaluation, lpips=False, inception_score=False)  # no study shows them
        super().__init__(replace(experiment, evaluation=plain), [space])
        self.folder = experiment.folder

    def examine(self, piece: Examine) -> Reconstructions | Drawn | Bound:
        """Do one piece."""
        if piece.folder != self.folder:
            autoencoder, device = self.generator.autoencoder, str(self.generator.device)
            self.generator = Generator(autoencoder, load_prior(piece.folder, autoencoder, device), device)
            self.folder = piece.folder
        return self.work(piece.work)
