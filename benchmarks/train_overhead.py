"""Stage overhead: steps a second of a training stage under Ray Train, against the same core loop called directly.

    python benchmarks/train_overhead.py prior
    python benchmarks/train_overhead.py autoencoder

Both take the same steps of the demo's networks on the demo digits, with one worker of one thread, in turns; the other
core is there for Ray Data and the rest of Ray, as in the demo. Ray's side pays for all that a stage pays for: the
worker process, progress, MLflow figures every 20 steps and, for the autoencoder, Ray Data. The direct loop has its data
in memory. Start-up, evaluation and checkpoints lie outside both clocks; start-up includes that of the processes which
read and decode images, each of which needs a core for some seconds while stage 1 already trains. Prints one JSON line:
the median of Ray's steps a second, and its ratio to the direct loop's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ray
import torch
import yaml

from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import ImageConfig, first_images
from bld_core.data.tensors import stack
from bld_core.latents.loader import latent_batches
from bld_core.noise import permutation
from bld_core.prior.transformer import PriorConfig
from bld_core.storage import files
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from cluster.config.artifacts import open_codes
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents
from cluster.data.shards import ShardConfig, make_shards
from cluster.runtime import ClusterConfig
from cluster.tracking.runs import Run
from cluster.training.tasks import AutoencoderTask, PriorTask, Worker
from cluster.training.train import train_autoencoder, train_prior

WARM_STEPS = {"prior": 40, "autoencoder": 160}
STEPS = {"prior": 300, "autoencoder": 400}
REPEATS = 3


def demo_experiment(root: str) -> Experiment:
    """The demo's networks and data, with one worker of one thread, reporting every 20 steps."""
    settings = yaml.safe_load(Path(__file__).parents[1].joinpath("configs/demo.yaml").read_text())
    patterns = make_shards(ShardConfig(output=f"{root}/digits", images_per_shard=405)).patterns
    never = {"log_every": 20, "evaluate_every": 10**6, "checkpoint_every": 10**6}
    return Experiment(
        root=root,
        data=ImageConfig(**settings["data"] | patterns),
        autoencoder=AutoencoderConfig(**settings["autoencoder"]),
        autoencoder_training=TrainingConfig(**settings["autoencoder_training"] | never | {"steps": 5}),
        prior=PriorConfig(**settings["prior"]),
        prior_training=TrainingConfig(**settings["prior_training"] | never),
        cluster=ClusterConfig(workers=1, cpus_per_worker=1, decode_tasks=1),
    )


def image_loop(experiment: Experiment) -> Iterator[Batch]:
    """Batches of decoded images in memory: the bare loop's data."""
    images = first_images(experiment.data.train, experiment.data, 10**6)
    pixels, labels = stack(images), torch.tensor([image.label for image in images])
    size = experiment.autoencoder_training.batch_size
    for step in itertools.count():
        index = step * size + torch.arange(size)
        rows = permutation(0, "bare loop", int(index[0]) // len(images), len(images))[index % len(images)]
        yield Batch(pixels[rows], labels[rows], index, [images[row].key for row in rows.tolist()])


def direct_rate(experiment: Experiment, stage: str) -> float:
    """Steps a second of the core loop in this process."""
    torch.set_num_threads(1)
    if stage == "prior":
        task, training = (
            PriorTask(experiment, experiment.folder, open_codes(experiment.folder)),
            experiment.prior_training,
        )
        batches = latent_batches(task.codes.train, training, experiment.seed, 0)
    else:
        task, training = AutoencoderTask(experiment), experiment.autoencoder_training
        batches = image_loop(experiment)
    objective = task.objective(Worker(0, 1, torch.device("cpu")))
    began, warm = 0.0, WARM_STEPS[stage]
    for report in train(make_state(task.network(), training), batches, objective, training):
        if report.step == warm:
            began = time.perf_counter()
    return (training.steps - warm) / (time.perf_counter() - began)


def ray_rate(experiment: Experiment, stage: str) -> float:
    """Steps a second of the stage under Ray Train, read off the times of its MLflow figures."""
    final = (train_prior if stage == "prior" else train_autoencoder)(experiment, fresh=True)
    run = Run(experiment.tracking.resolve(experiment.root), files.read_json(f"{final}/config.json")["run"])
    times = {metric.step: metric.timestamp / 1000 for metric in run.client.get_metric_history(run.run_id, "train_loss")}
    warm, last = WARM_STEPS[stage], max(times)
    return (last - warm) / (times[last] - times[warm])


def main(stage: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        experiment = demo_experiment(root)
        if stage == "prior":
            train_autoencoder(experiment)
            encode_latents(experiment)
        field = f"{stage}_training"
        experiment = replace(experiment, **{field: replace(getattr(experiment, field), steps=STEPS[stage])})
        direct: list[float] = []
        under_ray: list[float] = []
        for _ in range(REPEATS):
            direct.append(direct_rate(experiment, stage))
            under_ray.append(ray_rate(experiment, stage))
        ray.shutdown()
    value, peer = statistics.median(under_ray), statistics.median(direct)
    line = {"name": f"train_overhead {stage}", "value": value, "unit": "steps/s", "peer": peer, "ratio": value / peer}
    print(json.dumps(line))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STEPS))
    main(parser.parse_args().stage)
