"""A training that begins where a shorter one is, and does not take those steps again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from bld_core.errors import MissingError, UserError
from bld_core.storage import files
from bld_core.training.checkpoint import read_state
from bld_core.training.loop import TrainingConfig, learning_rate
from cluster.config.experiment import Experiment
from cluster.stages import changed_fields, read_stage
from cluster.training.checkpoints import checkpoint_step, checkpoints

TrainedStage = Literal["autoencoder", "prior"]


def training_of(experiment: Experiment, stage: TrainedStage) -> TrainingConfig:
    """The section of the settings that trains a stage."""
    return experiment.prior_training if stage == "prior" else experiment.autoencoder_training


def shared_checkpoint(experiment: Experiment, stage: TrainedStage, start: str, steps: int) -> str:
    """The newest checkpoint of a shorter training that a training of this experiment would come by, too.

    Args:
        experiment: that of the longer one.
        stage: that both train.
        start: experiment folder of the shorter one, whose settings are the same but for its length.
        steps: of the shorter one.

    Returns:
        Its folder; "" where there is none, as with rates that fall towards the last step.
    """
    training = training_of(experiment, stage)
    if training.ema_lengths or (stage == "autoencoder" and experiment.autoencoder.codes == "fade"):
        return ""  # snapshots, or how far codes have faded, are by the share of all steps
    short, fewest = replace(training, steps=steps), min(steps, training.steps)
    rates = (learning_rate(short, step) == learning_rate(training, step) for step in range(fewest))
    same = next((step for step, equal in enumerate(rates) if not equal), fewest)
    found = [url for url in checkpoints(files.join(start, stage)) if checkpoint_step(url) <= same]
    return found[-1] if found else ""


def first_checkpoint(
    experiment: Experiment,
    stage: TrainedStage,
    fingerprint: Mapping[str, object],
    start: str,
    *,
    fresh: bool,
    exploited: str = "",
) -> str:
    """The checkpoint of a shorter training that a stage begins with, checked.

    Args:
        experiment: of the stage.
        stage: its name.
        fingerprint: of the stage.
        start: experiment folder of the shorter training; "" begins with none.
        fresh: the stage's own checkpoints do not count.
        exploited: a checkpoint to begin with whatever its settings were, in place of one of `start`.

    Returns:
        Its folder; "" where the stage begins with none, or goes on from its own.

    Raises:
        MissingError: no such training.
        UserError: it has other settings, or no checkpoint that a longer one would come by.
    """
    if not (start or exploited) or (not fresh and checkpoints(files.join(experiment.folder, stage))):
        return ""
    if exploited:
        return exploited
    folder = files.join(start, stage)
    record = read_stage(folder, stage)
    if record is None:
        raise MissingError(f"{folder!r}, which --start_from names, holds no training: name the folder of an experiment")
    length = f"{stage}_training.steps"
    steps = record["fingerprint"][length]
    if changed := changed_fields(record["fingerprint"] | {length: fingerprint[length]}, fingerprint):
        raise UserError(
            "\n".join(
                [
                    f"{folder!r}, which --start_from names, has other settings or inputs (there -> here):",
                    *changed,
                    "set them to what they are there, or leave --start_from out",
                ]
            )
        )
    if not (found := shared_checkpoint(experiment, stage, start, steps)):
        raise UserError(
            f"{folder!r}, which --start_from names, has no checkpoint that a training of "
            f"{training_of(experiment, stage).steps} steps would come by: with {stage}_training.decay "
            f"{training_of(experiment, stage).decay!r} and {steps} steps its rates, averages or codes went by its "
            "length; leave --start_from out"
        )
    return found


def begin_with(experiment: Experiment, stage: TrainedStage, checkpoint: str) -> None:
    """Copy a checkpoint, every byte of it checked, into a stage's folder, from where the stage then goes on.

    Raises:
        DamagedError: it is not what was written.
    """
    averages = len(training_of(experiment, stage).ema_decays)
    critic = stage == "autoencoder" and bool(experiment.loss.adversarial)
    saved = read_state(checkpoint, averages, critic=critic)
    saved.write(files.join(experiment.folder, stage, files.name(checkpoint)))
