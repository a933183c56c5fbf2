"""Classification accuracy score (Ravuri, Vinyals 2019): what a classifier that saw samples alone knows of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.data.images import EXTENSIONS, first_images
from bld_core.data.skipped import Skipped
from bld_core.data.tensors import stack, to_float
from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.training.checkpoint import CONFIG, read_model_config
from bld_core.training.loop import Batch, Objective, TrainState
from cluster.config.experiment import Experiment
from cluster.data.decoding import ShardDecoder
from cluster.stages import open_stage
from cluster.training.checkpoints import FINAL, training_faults
from cluster.training.tasks import Evaluation, ImageTask, Worker
from cluster.training.train import fit

_FOLDER, _STAGE = "cas", "classifier"


def cas_experiment(experiment: Experiment) -> Experiment:
    """The experiment <folder>/evaluation/cas: its training images are samples, its stage a classifier.

    Raises:
        UserError: images without classes, fewer shards of samples than workers, or a batch that does not divide over
            them.
    """
    config, data = experiment.evaluation, experiment.data
    if not experiment.prior.classes or first_images(data.validation, data, 1)[0].label < 0:
        raise UserError(
            f"evaluation.cas_steps is {config.cas_steps}, but prior.classes is {experiment.prior.classes} or the "
            "validation shards hold no classes, which a classifier learns and is asked for: set it to 0"
        )
    shards, workers = -(-config.samples // config.batch_size), experiment.cluster.replicas
    if shards < workers:
        raise UserError(
            f"evaluation.samples is {config.samples}, evaluation.batch_size {config.batch_size}, which makes {shards} "
            f"shards of samples for {workers} workers that train a classifier on them; each needs one: lower "
            "evaluation.batch_size or cluster.workers, or draw more"
        )
    training = replace(
        experiment.autoencoder_training,
        steps=config.cas_steps,
        batch_size=config.cas_batch_size,
        accumulate=1,
        learning_rate=1e-3,
        warmup=config.cas_steps // 20,
        decay="cosine",
        betas=[0.9, 0.999],
        weight_decay=0.05,
        ema_decay=0.0,
        compile=False,
        checkpointing=False,
        evaluate_every=config.cas_steps,
    )
    samples = files.join(experiment.folder, "evaluation", _FOLDER, "samples/*.tar")
    return experiment.variant(
        "evaluation",
        _FOLDER,
        autoencoder_training=training,
        data=replace(data, train=samples, extensions=list(dict.fromkeys([*data.extensions, *EXTENSIONS]))),
    )


class CasTask(ImageTask):
    """ResNet-50 from scratch on images of the classes that they were asked for, augmented as in stage 1.

    Args:
        experiment: `cas_experiment`.
        held_out: shards of held-out images with classes.
    """

    def __init__(self, experiment: Experiment, held_out: Sequence[str]) -> None:
        super().__init__(experiment)
        self.held_out, self.decoder = held_out, ShardDecoder(experiment)

    def network(self) -> nn.Module:
        from torchvision.models import resnet50

        return resnet50(num_classes=self.experiment.prior.classes)

    def objective(self, worker: Worker) -> Objective:
        def cross_entropy(state: TrainState, batch: Batch) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(state(_planes(batch.data)).float(), batch.labels)}

        return cross_entropy

    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        """How often the true class of a held-out image is the likeliest, or among the five likeliest; in percent."""
        counts = worker.shared(lambda shard: self._counts(network, self.held_out[shard], worker), len(self.held_out))
        hits1, hits5, seen = (sum(each) for each in zip(*counts, strict=True))
        return Evaluation({"cas_top1": 100 * hits1 / seen, "cas_top5": 100 * hits5 / seen}, {})

    def _counts(self, network: nn.Module, url: str, worker: Worker) -> list[int]:
        """Of the images of a shard: those whose class is the likeliest, those where it is among five, and all."""
        hits, seen = torch.zeros(2, dtype=torch.int64), 0
        for some in self.decoder.batches(url, Skipped()):
            logits = network(_planes(stack(some).to(worker.device))).cpu()
            hits += hits_of(logits, [image.label for image in some])
            seen += len(some)
        return [*hits.tolist(), seen]


def _planes(images: Tensor) -> Tensor:
    return to_float(images).expand(-1, 3, -1, -1)


def hits_of(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """How many labels are the likeliest class, and among the five likeliest (or all, of fewer), int64 (2,)."""
    likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices == torch.tensor(labels)[:, None]
    return torch.stack([likeliest[:, 0].sum(), likeliest.any(1).sum()])


def measure_cas(experiment: Experiment, held_out: Sequence[str], identity: Mapping[str, object]) -> dict[str, float]:
    """Samples in evaluation/cas/samples -> the metrics cas_top1 and cas_top5, in percent, by a Ray Train job.

    Args:
        experiment: `cas_experiment`.
        held_out: shards of held-out images.
        identity: what the samples were made by.
    """
    fingerprint = {**identity} | experiment.fingerprint("data", "augmentation", "autoencoder_training")
    faults = partial(training_faults, files.join(experiment.folder, _STAGE), deep=False)
    result = f"{FINAL}/{CONFIG}"
    with open_stage(experiment, _STAGE, fingerprint, result, on_change="redo", faults=faults, decodes=True) as stage:
        if not stage.done:
            fit(stage, CasTask(experiment, held_out), {"classes": experiment.prior.classes})
        metrics = read_model_config(stage.url(FINAL))["metrics"]
        return {name: metrics[name] for name in ("cas_top1", "cas_top5")}
