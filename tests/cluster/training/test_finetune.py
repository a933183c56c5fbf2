"""A decoder that learns on: the codes stay, byte for byte, and everything made from them is still good."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bld_core
from bld_core.autoencoder.losses import LossConfig
from bld_core.data.images import first_images
from bld_core.data.tensors import stack
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, DECODER, read_autoencoder
from bld_core.training.checkpoint import WEIGHTS, read_model_config
from cluster.config.artifacts import open_trained
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents
from cluster.training.checkpoints import verify_training
from cluster.training.finetune import finetune_decoder
from cluster.training.train import train_prior
from tests.conftest import copy_of, small_training

STAGES = ("autoencoder", "latents", "prior")
LOSS = LossConfig(adversarial=0.1, adversarial_start=2, critic_channels=4, critic_layers=2, entropy=0.1)


def test_a_decoder_learns_on_and_codes_latents_and_prior_stay(
    finished: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = replace(finished, root=str(copy_of(finished, tmp_path, *STAGES)), name=finished.name)
    folder = Path(experiment.folder)
    before = {path: path.read_bytes() for stage in STAGES for path in (folder / stage).rglob("*") if path.is_file()}
    stage_1 = bld_core.load(str(folder))
    images = stack(first_images(experiment.data.validation, experiment.data, 32))
    learning_on = replace(experiment, loss=LOSS, autoencoder_training=small_training(6, checkpoint_every=3))
    final = finetune_decoder(learning_on)
    assert {path: path.read_bytes() for path in before} == before

    record, first = (read_autoencoder(str(folder), place) for place in (DECODER, AUTOENCODER))
    assert read_autoencoder(str(folder)) == record == open_trained(experiment).autoencoder
    assert record.hash != first.hash
    assert record.codes_hash == first.codes_hash == first.hash
    assert record.metrics["val_psnr"] > first.metrics["val_psnr"]
    tuned = bld_core.load(str(folder))
    states = [pair.autoencoder.network.state_dict() for pair in (stage_1, tuned)]
    for name, tensor in states[0].items():
        if name.startswith("encoder"):
            assert torch.equal(tensor, states[1][name])
    assert not torch.equal(stage_1.autoencoder.network.last_layer, tuned.autoencoder.network.last_layer)
    bits = stage_1.encode(images)
    assert torch.equal(tuned.encode(images), bits)
    assert not torch.equal(tuned.decode(bits), stage_1.decode(bits))
    assert tuned.sample(3, seed=1).shape == (3, 32, 32, 1)

    capsys.readouterr()
    encode_latents(experiment)
    train_prior(experiment)
    finetune_decoder(learning_on)
    assert capsys.readouterr().out.count("already done") == 3
    assert "and 2 checkpoints" in verify_training(experiment, "decoder")
    with pytest.raises(ValueError, match=r"(?s)other settings.*loss\.l1: 1\.0 -> 2\.0.*--finetune decoder --fresh"):
        finetune_decoder(replace(learning_on, loss=replace(LOSS, l1=2.0)))

    weights = files.read_bytes(files.join(final, WEIGHTS))  # interrupted, with its first checkpoint
    shutil.rmtree(final)
    shutil.rmtree(folder / "decoder" / "checkpoint-0000006")
    assert read_autoencoder(str(folder)) == first
    finetune_decoder(learning_on)
    assert files.read_bytes(files.join(final, WEIGHTS)) == weights
    assert read_model_config(final)["codes_of"] == first.hash
