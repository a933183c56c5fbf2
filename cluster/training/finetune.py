"""The decoder of a finished stage 1 learns on, while its codes stay as they are."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

from torch import nn

from bld_core.autoencoder.model import make_autoencoder
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, AutoencoderRecord, read_autoencoder
from bld_core.training.checkpoint import CONFIG, load_weights
from cluster.config.experiment import Experiment
from cluster.data.check import check_data
from cluster.data.ingest import check_feed
from cluster.lineage import lineage
from cluster.stages import open_stage
from cluster.training.checkpoints import FINAL, training_faults
from cluster.training.tasks import AutoencoderTask
from cluster.training.train import check_losses, fit


class DecoderTask(AutoencoderTask):
    """Stage 1 from its own end on, with a constant encoder; codes are taken as the encoded data set takes them."""

    def __init__(self, experiment: Experiment, trained: AutoencoderRecord) -> None:
        codes = "sample" if experiment.latents.draws else "mode"
        super().__init__(replace(experiment, autoencoder=replace(trained.autoencoder, codes=codes)))
        self.trained = trained

    def network(self) -> nn.Module:
        network = make_autoencoder(self.experiment.autoencoder, self.trained.channels)
        load_weights(files.join(self.experiment.folder, AUTOENCODER), network, self.trained.hash)
        network.encoder.requires_grad_(requires_grad=False)
        return network.train()


def finetune_decoder(experiment: Experiment, fresh: bool = False, mend: bool = False) -> str:
    """Finished stage 1, image shards -> <folder>/decoder/final: the same encoder, a decoder that has learned on.

    It decodes from then on. Stage 1 is left as it is, and so are the codes: latents and priors belong to both.

    Args:
        experiment: its configuration; `loss` and `autoencoder_training` are those of the fine-tuning.
        fresh: start over, deleting what the fine-tuning made before.
        mend: read all that it made before, and make again what is damaged.

    Returns:
        The folder of the finished model.

    Raises:
        MissingError: stage 1 is not finished.
        UserError: bad input, each with its remedy, before anything is started.
    """
    trained = read_autoencoder(experiment.folder, AUTOENCODER)
    experiment.check_autoencoder(trained)
    shards = check_data(experiment).train
    check_feed(shards, experiment.cluster.replicas)
    check_losses(experiment)
    fingerprint = {
        **experiment.fingerprint("data", "augmentation", "loss", "autoencoder_training"),
        "shards": files.fingerprint(shards),
        "autoencoder_hash": trained.hash,
        "drawn": experiment.latents.draws > 0,
    }
    faults = partial(training_faults, files.join(experiment.folder, "decoder"), mend)
    result, reads = f"{FINAL}/{CONFIG}", shards[:1]
    with open_stage(
        experiment, "decoder", fingerprint, result, fresh=fresh, faults=faults, reads=reads, decodes=True
    ) as stage:
        if not stage.done:
            config = {
                "autoencoder": asdict(trained.autoencoder),
                "code_shape": trained.code_shape,
                "image_size": trained.image_size,
                "channels": trained.channels,
                "data_hash": fingerprint["shards"],
                "codes_of": trained.codes_hash,
            }
            stage.run.tags(lineage(trained))
            fit(stage, DecoderTask(experiment, trained), config)
        return stage.url(FINAL)
