"""Stages: done, refused, locked; and every kind of bad input before any work is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import AugmentationConfig, ImageConfig
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.prior.transformer import PriorConfig
from bld_core.storage import files
from bld_core.storage.records import write_record
from cluster.config.experiment import BEFORE, Experiment
from cluster.data.encode import encode_latents
from cluster.runtime import ClusterConfig, connect_ray
from cluster.stages import open_stage
from cluster.tracking.runs import Run, start_run
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import copy_of, small_experiment

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_finished_stage_says_so_and_does_nothing(encoded: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    final = Path(encoded.folder, "autoencoder/final/model.safetensors")
    written = final.stat().st_mtime_ns
    train_autoencoder(encoded)
    assert "already done" in capsys.readouterr().out
    assert final.stat().st_mtime_ns == written


def test_changed_settings_are_refused_with_the_fields_that_differ(encoded: Experiment) -> None:
    changed = replace(encoded, autoencoder=replace(encoded.autoencoder, channels=6))
    with pytest.raises(ValueError, match=r"autoencoder.channels: 4 -> 6[\s\S]*--fresh"):
        train_autoencoder(changed)


def test_augmentation_decides_what_stage_1_makes_and_nothing_that_is_encoded(
    encoded: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = replace(encoded, augmentation=AugmentationConfig(resize=1.05))
    with pytest.raises(ValueError, match=r"augmentation.resize: 1.0 -> 1.05[\s\S]*--fresh"):
        train_autoencoder(changed)
    encode_latents(changed)
    assert "already done" in capsys.readouterr().out


def test_reporting_more_often_is_no_change(encoded: Experiment) -> None:
    often = replace(encoded, autoencoder_training=replace(encoded.autoencoder_training, log_every=3))
    train_autoencoder(often)


def test_an_interrupted_stage_reopens_its_run_and_a_cheap_one_is_made_again(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    experiment = small_experiment(tmp_path, digits)
    runs: list[Run] = []

    def interrupted() -> None:
        with open_stage(experiment, "x", {"a": 1}, "result") as stage:
            runs.append(stage.run)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    [first] = runs
    assert first.client.get_run(first.run_id).info.status == "FAILED"
    with open_stage(experiment, "x", {"a": 1}, "result") as stage:
        assert stage.run == first
        assert not stage.done
        Path(stage.folder, "result").touch()
    assert first.client.get_run(first.run_id).info.status == "FINISHED"
    with open_stage(experiment, "x", {"a": 2}, "result", on_change="redo") as stage:
        assert stage.run != first
        assert not Path(stage.folder, "result").exists()


def test_a_link_that_is_signed_anew_is_no_change_and_no_signature_is_kept(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    experiment = small_experiment(tmp_path, digits)
    for signature in ("hunter1", "hunter2"):
        with open_stage(experiment, "x", {"data.train": f"https://x/0.tar?sig={signature}"}, "result") as stage:
            pass
    assert "hunter" not in Path(stage.folder, "stage.json").read_text()
    with (
        pytest.raises(ValueError, match=r"'https://x/0.tar' -> 'https://y/0.tar'"),
        open_stage(experiment, "x", {"data.train": "https://y/0.tar?sig=hunter3"}, "result"),
    ):
        pass


def test_parameters_and_the_tree_of_runs_are_in_mlflow(tmp_path: Path, digits: dict[str, str]) -> None:
    experiment = small_experiment(tmp_path, digits)
    one, two = (start_run(experiment, stage, None) for stage in ("autoencoder", "prior"))
    runs = [run.client.get_run(run.run_id) for run in (one, two)]
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    assert runs[0].data.params["autoencoder.bits"] == "8"
    assert runs[0].data.tags["mlflow.source.git.commit"]


def test_a_second_start_is_refused_while_one_is_running(tmp_path: Path, digits: dict[str, str]) -> None:
    experiment = small_experiment(tmp_path, digits)
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('4321', file=file, flush=True); print('locked', flush=True); time.sleep(60)"
    )
    lock = tmp_path / experiment.name / "autoencoder.lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="in use by process 4321"):
            train_autoencoder(experiment)
        holder.kill()
    with (
        open_stage(experiment, "autoencoder", {}, "result"),  # a dead holder holds nothing
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on {os.uname().nodename}: wait for it"),
        open_stage(experiment, "autoencoder", {}, "result"),
    ):
        pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "{root}/none-{{0000..0001}}.tar"}, "no file at .*none-0000.tar"),
        ({"train": ""}, "`train` is empty"),
        ({"extensions": ["jpg"]}, "looked for jpg, found cls, png; set `extensions`"),
        ({"validation": ""}, "`validation` is empty"),
    ],
)
def test_bad_shards_stop_before_ray_and_before_anything_is_written(
    tmp_path: Path, digits: dict[str, str], data: dict[str, object], message: str
) -> None:
    experiment = small_experiment(tmp_path, digits)
    data = {name: value.format(root=tmp_path) if isinstance(value, str) else value for name, value in data.items()}
    experiment = replace(experiment, data=replace(experiment.data, **data))  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_autoencoder(experiment)
    assert not Path(experiment.folder).exists()


def test_an_image_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`image_size` is 100; the 5 levels .* multiple of 16"):
        Experiment(root=str(tmp_path), data=ImageConfig(image_size=100), autoencoder=AutoencoderConfig())


def test_a_grid_and_groups_that_do_not_fit_are_refused_before_anything_is_trained() -> None:
    experiment = Experiment(sampling=SamplingConfig(steps=64), diffusion=DiffusionConfig(target="z_prev"))
    assert replace(experiment, sampling=SamplingConfig(steps=16)).sampling.steps == 16  # any grid serves any target
    with pytest.raises(ValueError, match=r"`grid` starts at 32.*T = 64"):
        replace(experiment, sampling=SamplingConfig(grid=[32, 0]))
    grouped = replace(experiment, prior=PriorConfig(group=8))
    with pytest.raises(ValueError, match=r"`group` is 8; it must divide the 20 bits of a token"):
        replace(grouped, autoencoder=AutoencoderConfig(bits=20))
    with pytest.raises(ValueError, match=r"`balance` is flip with `group` 8.*balance to none, or group to 1"):
        replace(grouped, diffusion=DiffusionConfig(balance="flip"))


def test_a_setting_that_came_later_is_what_it_was_before(tmp_path: Path, digits: dict[str, str]) -> None:
    experiment = small_experiment(tmp_path, digits)
    fingerprint: dict[str, object] = {"prior.group": 1, "prior.layers": 4}
    older = {name: value for name, value in fingerprint.items() if name not in BEFORE}
    with open_stage(experiment, "older", older, "result.json") as stage:
        files.write_json(files.join(stage.folder, "result.json"), {})
    with open_stage(experiment, "older", fingerprint, "result.json") as stage:
        assert stage.done
    with (
        pytest.raises(ValueError, match=r"prior\.group: 1 -> 8"),
        open_stage(experiment, "older", fingerprint | {"prior.group": 8}, "result.json"),
    ):
        pass


def test_padded_images_are_not_resized() -> None:
    flipped = Experiment(data=ImageConfig(fit="pad"), augmentation=AugmentationConfig(flip=True))
    with pytest.raises(ValueError, match=r"augmentation.resize is 1.05, but data.fit is pad.*set data.fit to crop"):
        replace(flipped, augmentation=AugmentationConfig(resize=1.05))


def test_a_run_folder_without_write_permission_is_refused(digits: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot write to '/proc/"):
        train_autoencoder(small_experiment(Path("/proc/nowhere"), digits))


def test_more_workers_than_the_cluster_holds_are_refused(ray_session: None) -> None:
    connect_ray(ClusterConfig(cpus_per_worker=0.25))
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(ValueError, match=f"the Ray cluster has {cpus:g}: lower cluster.workers"):
        connect_ray(ClusterConfig(workers=1000))


def test_files_that_no_stage_made_are_not_deleted(tmp_path: Path, digits: dict[str, str]) -> None:
    experiment = small_experiment(tmp_path, digits)
    precious = tmp_path / experiment.name / "autoencoder/final/model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(ValueError, match=r"holds files but no stage.json.*--fresh"):
        train_autoencoder(experiment)
    assert precious.exists()


def test_nothing_is_deleted_before_every_check_has_passed(encoded: Experiment, tmp_path: Path) -> None:
    root = copy_of(encoded, tmp_path, "autoencoder")
    experiment = replace(encoded, root=str(root), cluster=replace(encoded.cluster, workers=1, cpus_per_worker=1000))
    with pytest.raises(ValueError, match=r"lower cluster.workers or cluster.cpus_per_worker"):
        train_autoencoder(experiment, fresh=True)
    experiment = replace(experiment, cluster=replace(encoded.cluster, workers=8))
    with pytest.raises(ValueError, match="4 shards cannot feed 8 workers"):
        train_autoencoder(experiment, fresh=True)
    assert (root / experiment.name / "autoencoder/final/model.safetensors").is_file()


@pytest.mark.parametrize("stage", [encode_latents, train_prior])
def test_images_of_another_size_than_the_autoencoders_are_refused(
    encoded: Experiment, stage: Callable[[Experiment], str]
) -> None:
    larger = replace(encoded, data=replace(encoded.data, image_size=64))
    with pytest.raises(ValueError, match=r"code_shape \(4, 4, 8\) \(configured: \(8, 8, 8\)\), image_size 32"):
        stage(larger)


def test_an_added_shard_is_a_change(encoded: Experiment, digits: dict[str, str], tmp_path: Path) -> None:
    root = copy_of(encoded, tmp_path, "autoencoder", "latents")
    shards = tmp_path / "shards"
    shutil.copytree(Path(digits["train"]).parent, shards)
    data = replace(encoded.data, train=f"{shards}/train-*.tar")
    experiment = replace(encoded, root=str(root), data=data)
    record = root / experiment.name / "latents/stage.json"
    made = json.loads(record.read_text())
    write_record(str(record), made | {"fingerprint": made["fingerprint"] | {"data.train": data.train}})
    encode_latents(experiment)  # the same files under another name: done
    shutil.copy(shards / "train-0000.tar", shards / "train-0004.tar")
    with pytest.raises(ValueError, match=r"shards: '\w+' -> '\w+'[\s\S]*pipelines/encode_latents.py --fresh"):
        encode_latents(experiment)


def test_a_deleted_run_is_replaced_and_a_quote_in_the_folder_is_no_trouble(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    experiment = small_experiment(tmp_path / "it's here", digits)
    first = start_run(experiment, "prior", None)
    assert start_run(experiment, "prior", first.run_id) == first
    first.client.delete_run(first.run_id)
    second = start_run(experiment, "prior", first.run_id)
    assert second.run_id != first.run_id
    parents = [first.client.get_run(run.run_id).data.tags["mlflow.parentRunId"] for run in (first, second)]
    assert parents[0] == parents[1]
