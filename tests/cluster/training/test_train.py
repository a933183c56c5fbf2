"""Training under Ray Train: replicas agree, worker counts agree, interruptions leave no trace."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Generator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.distributed import set_timeout

from bld_core.autoencoder.losses import LossConfig
from bld_core.errors import UserError
from bld_core.latents.reader import open_latents
from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.storage.records import write_record
from bld_core.trained import load_autoencoder, load_prior, read_autoencoder
from bld_core.training.checkpoint import read_model_config, read_weights
from bld_core.training.loop import Batch, Objective
from bld_core.training.sharding import is_sharded
from cluster.config.artifacts import open_codes
from cluster.config.experiment import Experiment
from cluster.stages import open_stage
from cluster.tracking.address import RunAddress
from cluster.tracking.runs import Run
from cluster.training import replicas
from cluster.training import train as cluster_train
from cluster.training import work as cluster_work
from cluster.training.tasks import AutoencoderTask, Evaluation, PriorTask, Worker
from cluster.training.train import train_autoencoder, train_prior, unsure_bits
from cluster.training.work import Job, work_alone
from tests.conftest import small_training


class FingerprintTask(PriorTask):
    """Stage 2, each worker adding a fingerprint of its own weights to the checkpoint."""

    def network(self) -> nn.Module:
        self.built = super().network()
        return self.built

    def position(self) -> list[int]:
        return [key_of(*(tensor.double().sum().item() for tensor in self.built.state_dict().values()))]


A_SHARD_AT_A_TIME = 70e-6  # latents_gb: two shards of 405 codes, of 80 bytes each


def curve_of(experiment: Experiment, stage: str) -> list[tuple[int, float]]:
    """Steps and losses of a finished stage, as MLflow has them."""
    run_id = read_model_config(f"{experiment.folder}/{stage}/final")["run"]
    run = Run(experiment.tracking.resolve(experiment.root), run_id)
    history = run.client.get_metric_history(run.run_id, "train_loss")
    return sorted((metric.step, metric.value) for metric in history)


def test_two_workers_hold_the_same_weights_and_follow_the_curve_of_one(finished: Experiment, tmp_path: Path) -> None:
    two = replace(finished, root=str(tmp_path), cluster=replace(finished.cluster, workers=2))
    with open_stage(two, "prior", {}, "never") as stage:
        cluster_train.fit(stage, FingerprintTask(two, finished.folder, open_codes(finished.folder)), {})
    meta = files.read_json(str(max(Path(two.folder, "prior").glob("checkpoint-*")) / "meta.json"))
    assert len(meta["positions"]) == 2
    assert meta["positions"][0] == meta["positions"][1], "replicas differ"
    run: Run = stage.run
    history = run.client.get_metric_history(run.run_id, "train_loss")
    curves = curve_of(finished, "prior"), [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    one, other = torch.tensor([loss for _, loss in curves[0]]), torch.tensor(curves[1])
    assert len(one) == len(other) == 20
    assert one[-1] < one[0]
    assert (one - other).abs().max() <= 1e-4


class SharesTask(PriorTask):
    """Stage 2, each worker of which sees that it has a part of the weights alone."""

    def network(self) -> nn.Module:
        self.built = super().network()
        return self.built

    def position(self) -> list[int]:
        assert self.training.fsdp == all(is_sharded(weight) for weight in self.built.parameters())
        return super().position()


@pytest.mark.long
def test_weights_that_two_workers_share_out_follow_the_curve_of_one_that_may_go_on_from_them(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_train, "PriorTask", SharesTask)
    training = replace(finished.prior_training, ema_decay=[0.9, 0.5], checkpoint_every=10)
    alone = replace(finished, root=str(tmp_path / "alone"), prior_training=training)
    shared = replace(
        alone,
        root=str(tmp_path / "shared"),
        cluster=replace(finished.cluster, workers=2),
        prior_training=replace(training, fsdp=True),
    )
    for each in (alone, shared):
        train_prior(each, source=finished.folder)
    (steps, losses), (also, others) = (zip(*curve_of(each, "prior"), strict=True) for each in (alone, shared))
    assert steps == also == (*range(1, 21),)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(losses), rtol=0, atol=1e-4)
    ends = check_weights_are_close(alone, shared)

    folder = Path(shared.folder, "prior")
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-0000020")
    train_prior(replace(alone, root=shared.root), source=finished.folder)
    assert check_weights_are_close(alone, shared) != ends, (
        "the other half was taken by one worker, which rounds otherwise"
    )


def check_weights_are_close(one: Experiment, other: Experiment) -> str:
    """Two finished priors of one training; the hash of the other."""
    configs = [read_model_config(f"{each.folder}/prior/final") for each in (one, other)]
    assert configs[0]["metrics"] == pytest.approx(configs[1]["metrics"], abs=1e-3)
    pairs = [
        read_weights(f"{each.folder}/prior/final", config["hash"])
        for each, config in zip((one, other), configs, strict=True)
    ]
    assert pairs[0].keys() == pairs[1].keys()
    for name, weight in pairs[0].items():
        torch.testing.assert_close(pairs[1][name], weight, rtol=0, atol=1e-3, msg=name)
    return configs[1]["hash"]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_replica_takes_a_gpu_only_where_one_is_asked_for(
    gpu: bool, encoded: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray finds a GPU, it names it, asked for or not."""

    class Context:
        """Ray Train's, in a worker."""

        def get_world_rank(self) -> int:
            return 0

        def get_world_size(self) -> int:
            return 1

    found: list[Worker] = []

    def work(job: Job, worker: Worker, *rest: object) -> None:
        found.append(worker)

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(replicas, "work", work)
    task = PriorTask(replace(encoded, cluster=replace(encoded.cluster, gpu=gpu)), "", open_codes(encoded.folder))
    replicas._work({"job": Job(task, "prior", "", RunAddress("", ""), bar=False)})
    assert [str(worker.device) for worker in found] == ["cuda:0" if gpu else "cpu"]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_training_in_its_commands_process_takes_a_gpu_only_where_one_is_asked_for(
    gpu: bool, encoded: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = replace(encoded, prior_training=small_training(1), cluster=replace(encoded.cluster, decode_tasks=1, gpu=gpu))
    job = Job(PriorTask(here, "", open_codes(encoded.folder)), "prior", str(tmp_path), RunAddress("", ""), bar=False)
    if gpu:
        with pytest.raises(UserError, match=r"cluster.gpu is true, but this process, .* sees no GPU: set it to false"):
            work_alone(job, None)
        return
    devices: list[torch.device] = []

    def work(job: Job, worker: Worker, *rest: object) -> None:
        devices.append(worker.device)

    monkeypatch.setattr(cluster_work, "work", work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    work_alone(job, None)
    assert [device.type for device in devices] == ["cpu"]


class SlowTask(PriorTask):
    """Stage 2, the evaluation of all workers, and then what rank 0 alone does, longer than a collective may take."""

    def objective(self, worker: Worker) -> Objective:
        set_timeout(timedelta(seconds=4))
        return super().objective(worker)

    def position(self) -> list[int]:
        return [1]

    def evaluate(self, network: nn.Module, worker: Worker) -> Evaluation:
        time.sleep(6)
        found = super().evaluate(network, worker)
        time.sleep(0 if worker.rank else 6)
        return found


@pytest.mark.long
def test_an_evaluation_may_take_longer_than_a_collective(encoded: Experiment, tmp_path: Path) -> None:
    training, two = small_training(1), replace(encoded.cluster, workers=2, max_failures=0)
    experiment = replace(encoded, root=str(tmp_path), prior_training=training, cluster=two)
    with open_stage(experiment, "prior", {}, "never") as stage:
        cluster_train.fit(stage, SlowTask(experiment, encoded.folder, open_codes(encoded.folder)), {})
    assert files.exists(f"{experiment.folder}/prior/final/config.json")


def test_a_prior_of_groups_is_trained_like_any_other(encoded: Experiment) -> None:
    groups = encoded.variant("variants", "groups", prior=replace(encoded.prior, group=8, known_share=0.5))
    train_prior(groups, source=encoded.folder)
    losses = [loss for _, loss in curve_of(groups, "prior")]
    assert losses[-1] < losses[0]
    prior = load_prior(groups.folder, load_autoencoder(encoded.folder))
    assert prior.record.prior.group == 8
    assert prior.record.metrics["val_bound"] < 1


def test_averages_of_any_length_are_made_of_snapshots_interrupted_or_not(
    encoded: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    training = replace(encoded.prior_training, ema_decay=0.9, ema_lengths=[0.03], checkpoint_every=10)
    experiment = encoded.variant("variants", "lengths", prior_training=training)
    train_prior(experiment, source=encoded.folder)
    folder = Path(experiment.folder, "prior")
    whole, snapshots = read_model_config(str(folder / "final")), sorted((folder / "snapshots").iterdir())
    assert [path.name for path in snapshots] == [
        f"{step:07d}-{length}" for step in range(2, 21, 2) for length in (0.05, 0.1)
    ]
    assert whole["metrics"]["ema_length"] == 0.03  # after so few steps the shortest is the best

    for path in (folder / "final", folder / "checkpoint-0000020", *snapshots[10:]):
        shutil.rmtree(path)
    train_prior(experiment, source=encoded.folder)
    assert read_model_config(str(folder / "final")) == whole

    damaged = snapshots[-3] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(folder / "final")
    train_prior(experiment, source=encoded.folder)
    assert f"{str(damaged)!r} has " in capsys.readouterr().err
    assert read_model_config(str(folder / "final"))["hash"] != whole["hash"]
    assert load_prior(experiment.folder, load_autoencoder(encoded.folder)).record.metrics == whole["metrics"]

    with pytest.raises(ValueError, match=r"autoencoder_training.ema_lengths is \[0.2\], but averages are chosen by"):
        replace(encoded, autoencoder_training=replace(encoded.autoencoder_training, ema_lengths=[0.2]))


def test_memory_that_would_change_the_order_of_an_unfinished_run_is_refused(
    encoded: Experiment, tmp_path: Path
) -> None:
    latents = open_latents(f"{encoded.folder}/latents")
    assert latents.window(A_SHARD_AT_A_TIME) == 1
    before = encoded.fingerprint("prior", "diffusion", "prior_training")
    with open_stage(
        replace(encoded, root=str(tmp_path)),
        "prior",
        before | {"latents_hash": latents.hash, "latents_window": 1},
        "no",
    ):
        pass
    with pytest.raises(ValueError, match="latents_window: 1 -> None"):
        train_prior(replace(encoded, root=str(tmp_path)), source=encoded.folder)


def test_classes_that_the_prior_does_not_know_are_refused(encoded: Experiment) -> None:
    with pytest.raises(ValueError, match=r"hold class 9; prior\.classes is 5: raise it"):
        train_prior(replace(encoded, prior=replace(encoded.prior, classes=5)))


class DyingTask(AutoencoderTask):
    """Stage 1, its worker killed once, in the middle of an epoch, some steps after a checkpoint."""

    def __init__(self, experiment: Experiment, flag: Path) -> None:
        super().__init__(experiment)
        self.flag = flag

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        for batch in super().batches(step, positions, worker):
            if int(batch.sample_index[0]) // self.training.batch_size == 4 and not self.flag.exists():
                self.flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.long
def test_a_killed_worker_leaves_no_trace_in_the_weights(
    encoded: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the session's experiment, which was trained undisturbed, in its own process."""
    training = replace(encoded.autoencoder_training, checkpoint_every=3)
    one = replace(encoded.cluster, workers=1)
    killed = replace(encoded, root=str(tmp_path), autoencoder_training=training, cluster=one)
    flag = tmp_path / "died"
    monkeypatch.setattr(cluster_train, "AutoencoderTask", partial(DyingTask, flag=flag))
    config = read_model_config(train_autoencoder(killed))
    assert flag.exists(), "the worker was never killed"
    assert config["hash"] == read_model_config(f"{encoded.folder}/autoencoder/final")["hash"]
    curve = curve_of(killed, "autoencoder")
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6], "step 4 was taken twice, and logged once"
    assert curve == curve_of(encoded, "autoencoder")
    run = Run(killed.tracking.resolve(killed.root), config["run"])
    recorded = run.client.get_run(run.run_id)
    everyone = run.client.search_runs([recorded.info.experiment_id], "tags.mlflow.runName = 'autoencoder'")
    assert [each.info.run_id for each in everyone] == [run.run_id]
    assert recorded.data.tags["bld.autoencoder_hash"] == config["hash"]
    assert recorded.data.tags["bld.data_hash"] == config["data_hash"]
    assert "system/cpu_utilization_percentage" in recorded.data.metrics


class SpoiledTask(AutoencoderTask):
    """Stage 1, one image of step 4 with a NaN in it."""

    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        for batch in super().batches(step, positions, worker):
            data = batch.data.float()
            if worker.rank == 1 and int(batch.sample_index[0]) // self.training.batch_size == 3:
                data[2, 5, 5] = torch.nan
                Path(self.experiment.folder, "spoiled").write_text(batch.keys[2])
            yield batch._replace(data=data)


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_with_the_sample_to_blame(
    encoded: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(
        encoded,
        root=str(tmp_path),
        loss=LossConfig(adversarial=0.5, adversarial_start=1, critic_channels=4, critic_layers=2, entropy=0.1),
        autoencoder_training=small_training(6, checkpoint_every=2),
        cluster=replace(encoded.cluster, workers=2),
    )
    monkeypatch.setattr(cluster_train, "AutoencoderTask", SpoiledTask)
    with pytest.raises(FloatingPointError, match=r"step 4: the loss or its gradient is not finite") as stopped:
        train_autoencoder(experiment)
    spoiled = Path(experiment.folder, "spoiled").read_text()
    assert f"sample '{spoiled}': loss = nan, l1 = nan" in str(stopped.value)
    monkeypatch.undo()
    one = replace(experiment, cluster=encoded.cluster)
    final = train_autoencoder(one)  # goes on from the last good checkpoint, with both players, in this process
    assert read_model_config(final)["metrics"]["val_psnr"] > 0
    run = Run(experiment.tracking.resolve(experiment.root), read_model_config(final)["run"])
    critic = run.client.get_metric_history(run.run_id, "train_critic")
    assert sorted({metric.step for metric in critic}) == [2, 3, 4, 5, 6]
    entropy = run.client.get_metric_history(run.run_id, "train_entropy")
    assert all(-0.1 * math.log(2) <= metric.value < 0 for metric in entropy)
    assert len(entropy) >= 6


def test_what_the_losses_need_is_checked_first(encoded: Experiment, tmp_path: Path) -> None:
    absent = replace(encoded, root=str(tmp_path), loss=LossConfig(perceptual=1.0, vgg_weights=f"{tmp_path}/none.pth"))
    with pytest.raises(FileNotFoundError, match=r"none.pth, which is no file"):
        train_autoencoder(absent)
    large = replace(encoded, root=str(tmp_path), loss=LossConfig(adversarial=1.0, critic_layers=4))
    with pytest.raises(ValueError, match=r"the critic got images of 32 x 32 pixels.*at least 48"):
        train_autoencoder(large)
    assert not list(tmp_path.iterdir())


def test_latents_of_another_autoencoder_are_refused_with_both_hashes(encoded: Experiment, tmp_path: Path) -> None:
    from tests.conftest import copy_of

    experiment = replace(encoded, root=str(copy_of(encoded, tmp_path, "autoencoder", "latents")))
    config_url = files.join(experiment.folder, "autoencoder/final/config.json")
    config = files.read_json(config_url)
    write_record(config_url, config | {"hash": "f" * 64})
    with pytest.raises(ValueError, match=f"{config['hash'][:12]}.*ffffffffffff: encode the data set again"):
        train_prior(experiment)


def test_unsure_bits_are_named_with_what_they_cost_and_a_remedy(encoded: Experiment) -> None:
    trained = read_autoencoder(encoded.folder)
    h, w, c = trained.code_shape
    said = unsure_bits(encoded, replace(trained, metrics={"val_bit_entropy": 0.25}))
    assert f"{h * w * c // 4} of the {h * w * c} bits of a drawn code are noise" in said
    assert "loss.entropy, which is 0 (try 0.02)" in said
    assert unsure_bits(encoded, replace(trained, metrics={"val_bit_entropy": 0.12})) == ""
    assert unsure_bits(encoded, replace(trained, metrics={})) == ""
