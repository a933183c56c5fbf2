"""What the looks at held-out data in the middle of stage 1 cost, with one worker and with two.

    python benchmarks/evaluation_share.py [--evaluations 8]

The demo's stage 1 trains under Ray on two cores, each worker on one of them, and decodes its own images. It logs twice
as often as it evaluates: of two stretches of steps that follow one another, one holds an evaluation, its pictures and
the wait of all workers for it, and the other none, by the times of the MLflow figures. The first of each warm up.
Prints one JSON line: the share of the training's time that evaluations cost with two workers ("value") and with one
("peer") where they are as many as in the demo, and the seconds of an evaluation and of a step behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace

import ray
from train_overhead import demo_experiment  # pyright: ignore[reportImplicitRelativeImport]

from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.runtime import ClusterConfig
from cluster.tracking.runs import Run
from cluster.training.train import train_autoencoder

STRETCH = 20  # steps
EVERY = 200  # steps between two evaluations of the demo


def costs(experiment: Experiment) -> tuple[float, float]:
    """The seconds of an evaluation and of a step of a training."""
    final = train_autoencoder(experiment, fresh=True)
    run = Run(experiment.tracking.resolve(experiment.root), files.read_json(f"{final}/config.json")["run"])
    times = {metric.step: metric.timestamp / 1000 for metric in run.client.get_metric_history(run.run_id, "train_loss")}
    lasts = {step: times[step + STRETCH] - began for step, began in times.items() if step + STRETCH in times}
    every, warm = experiment.autoencoder_training.evaluate_every, 2 * STRETCH
    without = statistics.median(took for step, took in lasts.items() if step > warm and step % every)
    evaluated = statistics.median(took for step, took in lasts.items() if step > warm and step % every == 0)
    return evaluated - without, without / STRETCH


def main(evaluations: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        experiment = demo_experiment(root)
        every = 2 * STRETCH
        training = replace(
            experiment.autoencoder_training, steps=evaluations * every, log_every=STRETCH, evaluate_every=every
        )
        shares, seconds = list[float](), dict[str, dict[str, float]]()
        for workers in (1, 2):
            cluster = ClusterConfig(workers=workers, cpus_per_worker=1, decode_tasks=0)
            evaluation, step = costs(replace(experiment, autoencoder_training=training, cluster=cluster))
            shares.append(evaluation / (evaluation + EVERY * step))
            seconds[f"workers {workers}"] = {"evaluation": round(evaluation, 3), "step": round(step, 4)}
        ray.shutdown()
    one, two = shares
    line = {
        "name": f"evaluation_share, stage 1, every {EVERY} steps",
        "value": two,
        "unit": "of the training's time",
        "peer": one,
        "ratio": two / one,
        "seconds": seconds,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=8, help="of each training")
    main(parser.parse_args().evaluations)
