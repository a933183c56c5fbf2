"""Both stages of training: what each needs, its folder, and its finished model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.perceptual import Perceptual, load_perceptual
from bld_core.storage import files
from bld_core.trained import AutoencoderRecord, read_autoencoder
from bld_core.training.checkpoint import CONFIG, save_model
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.console import on_terminal
from cluster.data.check import check_data
from cluster.data.ingest import check_feed
from cluster.lineage import lineage
from cluster.nodes.watch import nodes_watched
from cluster.stages import Stage, open_stage
from cluster.training.checkpoints import FINAL, chosen_weights, training_faults
from cluster.training.onward import TrainedStage, begin_with, first_checkpoint
from cluster.training.tasks import AutoencoderTask, ImageTask, PriorTask, Task
from cluster.training.work import Job, Told, work_alone

_RAYS_LIST = "checkpoint_manager_snapshot.json"
_SURE = 0.2  # bits of entropy a bit of a code, above which stage 1 ends with a warning
_ENTROPY_WEIGHT = 0.02  # of the entropy term, to begin with
_SMALL = 64  # pixels: enough to see whether a network takes an image


def train_autoencoder(
    experiment: Experiment,
    fresh: bool = False,
    mend: bool = False,
    told: Told | None = None,
    start: str = "",
    exploited: str = "",
) -> str:
    """Stage 1: image shards -> <folder>/autoencoder/final.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.
        mend: read all that it made before, and make again what is damaged.
        told: hears of each evaluation, which is then also kept in the stage's folder: see `read_history`.
        start: experiment folder of a shorter training of the same settings, from which this one goes on.
        exploited: checkpoint of a shorter training whose settings may have been others, from which this one goes on.

    Returns:
        The folder of the finished model.

    Raises:
        UserError: bad input, each with its remedy, before anything is started.
    """
    shards = check_data(experiment).train
    check_feed(shards, experiment.cluster.replicas)
    check_losses(experiment)
    fingerprint = {
        **experiment.fingerprint("data", "augmentation", "autoencoder", "loss", "autoencoder_training"),
        "shards": files.fingerprint(shards),
    }
    first = first_checkpoint(experiment, "autoencoder", fingerprint, start, fresh=fresh, exploited=exploited)
    faults = partial(training_faults, files.join(experiment.folder, "autoencoder"), mend)
    result, reads = f"{FINAL}/{CONFIG}", shards[:1]
    with open_stage(
        experiment, "autoencoder", fingerprint, result, fresh=fresh, faults=faults, reads=reads, decodes=True
    ) as stage:
        if not stage.done:
            config = {
                "autoencoder": asdict(experiment.autoencoder),
                "code_shape": experiment.code_shape,
                "image_size": experiment.data.image_size,
                "channels": experiment.data.channels,
                "data_hash": fingerprint["shards"],
            }
            stage.run.tags({"bld.data_hash": fingerprint["shards"]})
            _begin(stage, "autoencoder", first)
            fit(stage, AutoencoderTask(experiment), config, told)
            sys.stderr.write(unsure_bits(experiment, read_autoencoder(experiment.folder)))
        return stage.url(FINAL)


def unsure_bits(experiment: Experiment, trained: AutoencoderRecord) -> str:
    """What is to be said of bits of which the encoder is not sure; nothing where it is."""
    entropy = trained.metrics.get("val_bit_entropy", 0.0)
    if entropy <= _SURE:
        return ""
    bits = math.prod(trained.code_shape)
    return (
        f"autoencoder: its bits are unsure, with an entropy of {entropy:.3f} bits each: {entropy * bits:.0f} of the "
        f"{bits} bits of a drawn code are noise, which no prior can predict, and its bound cannot be below "
        f"{entropy:.3f}; train with a higher loss.entropy, which is {experiment.loss.entropy:g} (try "
        f"{max(_ENTROPY_WEIGHT, 2 * experiment.loss.entropy):g}), before the data set is encoded\n"
    )


def check_losses(experiment: Experiment) -> None:
    """Find what the losses need, and try the critic on one image without content, before anything is started."""
    loss, data = experiment.loss, experiment.data
    if loss.perceptual:
        perceptual = load_perceptual(loss, torch.device("cpu"))
        image = torch.zeros(1, data.channels, data.image_size, data.image_size)
        if isinstance(perceptual, Perceptual):
            perceptual(image[..., :_SMALL, :_SMALL], image[..., :_SMALL, :_SMALL])
    if loss.adversarial:
        with torch.device("meta"):
            PatchCritic(loss, data.channels)(torch.empty(1, data.channels, data.image_size, data.image_size))


def train_prior(
    experiment: Experiment,
    fresh: bool = False,
    source: str = "",
    mend: bool = False,
    told: Told | None = None,
    start: str = "",
    exploited: str = "",
) -> str:
    """Stage 2: cached latents -> <folder>/prior/final.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.
        source: experiment folder of the latents and their autoencoder; by default the experiment's own.
        mend: read all that it made before, and make again what is damaged.
        told: as in `train_autoencoder`.
        start: as in `train_autoencoder`.
        exploited: as in `train_autoencoder`.

    Returns:
        The folder of the finished model.

    Raises:
        MissingError: no autoencoder or no latents yet.
        UserError: latents of another autoencoder, or other bad input, before anything is started.
    """
    source = source or experiment.folder
    found = open_encoded(experiment, source)
    assert found.codes is not None, "`open_encoded` opens them"
    autoencoder, latents = found.autoencoder, found.codes.train
    fingerprint = experiment.fingerprint("prior", "diffusion", "prior_training") | {"latents_hash": latents.hash}
    window = latents.window(experiment.cluster.latents_gb)
    if window < len(latents.shards):  # it streams, in an order that depends on the window
        fingerprint["latents_window"] = window
    first = first_checkpoint(experiment, "prior", fingerprint, start, fresh=fresh, exploited=exploited)
    faults = partial(training_faults, files.join(experiment.folder, "prior"), mend)
    with open_stage(experiment, "prior", fingerprint, f"{FINAL}/{CONFIG}", fresh=fresh, faults=faults) as stage:
        if not stage.done:
            names = list(latents.manifest.classes)[: experiment.prior.classes]
            config = {
                "prior": asdict(experiment.prior),
                "diffusion": asdict(experiment.diffusion),
                "sampling": asdict(experiment.sampling),
                "autoencoder_hash": autoencoder.codes_hash,
                "latents_hash": latents.hash,
                **({"class_names": names} if names else {}),
            }
            stage.run.tags(lineage(autoencoder) | {"bld.latents_hash": latents.hash})
            _begin(stage, "prior", first)
            fit(stage, PriorTask(experiment, source, found.codes), config, told)
        return stage.url(FINAL)


def _begin(stage: Stage, name: TrainedStage, checkpoint: str) -> None:
    """Let a stage go on from the checkpoint of another training, where there is one."""
    if checkpoint:
        begin_with(stage.experiment, name, checkpoint)
        stage.run.tags({"bld.started_from": checkpoint})


def fit(stage: Stage, task: Task, facts: Mapping[str, object], told: Told | None = None) -> None:
    """Train, resuming where a checkpoint lies in the stage's folder, and write final/ from the averaged weights.

    Args:
        stage: open.
        task: what is trained.
        facts: what config.json is to say beside run and metrics; JSON values.
        told: hears of each evaluation, which is then also kept in the stage's folder.
    """
    cluster = stage.experiment.cluster
    # Early versions told Ray of their checkpoints. Ray stops where one of its list is gone; the folder is what counts.
    files.remove(stage.url(_RAYS_LIST))
    job = Job(task, stage.name, stage.folder, stage.run, on_terminal(), told is not None)
    need = cluster.training_need(decodes=isinstance(task, ImageTask))
    with nullcontext() if cluster.in_process else nodes_watched(need, cluster.patience):
        if cluster.workers:
            from cluster.training.replicas import train_replicas  # Ray Train takes 2 s of a core to import

            failure = train_replicas(job, told)
        else:
            failure = work_alone(job, told)
    if failure is not None:
        raise failure
    metrics, weights = chosen_weights(stage.folder, task.training)
    final = stage.url(FINAL)
    digest = save_model(final, weights, {**facts, "run": stage.run.run_id, "metrics": metrics})
    stage.run.tags({f"bld.{stage.name}_hash": digest})
