"""Bad data in the stages: left out and counted; too much of it stops the stage with a report that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bld_core.data.images import ImageConfig
from bld_core.data.shards import read_shard, write_shard
from bld_core.data.skipped import Reason
from bld_core.latents.reader import open_latents
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents
from cluster.evaluation.actors import Evaluator, Reconstruct
from cluster.training.train import train_autoencoder
from tests.conftest import copy_of, small_training

REPORT = (
    r"[2-4] of \d+ samples left out: .*1 damaged tar \('bad.tar/byte \d+'\).*; "
    r"`max_skipped` allows a share of 0: mend or leave out those shards, or allow more"
)


def spoiled(data: ImageConfig, folder: Path) -> ImageConfig:
    """60 digits in each split, of which three are of no use: one by its tar header, two by themselves."""
    samples = read_shard(data.train.replace("{0000..0003}", "0000"), data.extensions).samples[:60]
    samples[7] = samples[7]._replace(data=samples[7].data[:90])
    samples[8] = samples[8]._replace(data=b"")
    url = f"{folder}/bad.tar"
    write_shard(url, samples)
    tar = bytearray(Path(url).read_bytes())
    tar[tar.index(f"{samples[20].key}.png".encode()) + 50] ^= 1
    Path(url).write_bytes(tar)
    return replace(data, train=url, validation=url, max_skipped=0.0)


def test_training_stops_with_the_report_and_counts_as_it_goes(encoded: Experiment, tmp_path: Path) -> None:
    experiment = replace(
        encoded,
        root=str(tmp_path),
        data=spoiled(encoded.data, tmp_path),
        autoencoder_training=small_training(3),
    )
    with pytest.raises(ValueError, match=REPORT):
        train_autoencoder(experiment)


def test_encoding_stops_with_the_report_and_goes_on_when_it_may(encoded: Experiment, tmp_path: Path) -> None:
    data = spoiled(encoded.data, tmp_path)
    experiment = replace(encoded, root=str(copy_of(encoded, tmp_path, "autoencoder")), data=data)
    with pytest.raises(ValueError, match=REPORT):
        encode_latents(experiment)
    encode_latents(replace(experiment, data=replace(data, max_skipped=0.1)))  # changes nothing of what is made
    latents = open_latents(f"{experiment.folder}/latents")
    assert len(latents) == 57
    expected = {Reason.DAMAGED: 1, Reason.NO_IMAGE: 1, Reason.UNREADABLE: 1, Reason.EMPTY: 1}
    assert [file.skipped for file in latents.manifest.files] == [dict(sorted(expected.items()))] * 2


def test_evaluation_counts_what_it_leaves_out(encoded: Experiment, tmp_path: Path) -> None:
    evaluator = Evaluator(replace(encoded, data=spoiled(encoded.data, tmp_path)), [])
    found = evaluator.work(Reconstruct(f"{tmp_path}/bad.tar"))
    with pytest.raises(ValueError, match=REPORT):
        found.skipped.check(0)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    assert found.sums.quality.psnr.count == 57  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
