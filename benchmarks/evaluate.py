"""The samples of the evaluation job: their rate, where the time goes, what a second worker brings.

    python benchmarks/evaluate.py --config configs/fashion_mnist.yaml [--evaluation.samples 10000]

The experiment is finished: its pair is there, and `evaluation` says in whose features its samples are measured (the
classifier is trained, and the training images looked at, where that was not done yet). The parts, sampling, decoding
and features, are measured in this process, one after the other, in the threads of one worker; the job from its first
result on, without the start of processes, until its figures are there. Its whole time is compared with its slowest
part alone. Prints one JSON line for each figure.
"""

from __future__ import annotations

import contextlib
import json
import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

import ray
import torch
from timing import in_turns  # pyright: ignore[reportImplicitRelativeImport]  # a script imports what lies beside it

from bld_core.diffusion.sampling import SampleSpec
from bld_core.trained import read_prior
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import CALLS, Evaluator, SampleFeatures
from cluster.evaluation.references import make_references, spaces_of
from cluster.evaluation.sample_metrics import Samples
from cluster.runtime import connect_ray, map_on_actors
from cluster.sampling.sampler import balanced_labels, draw_pieces
from pipelines.command import command

REPEATS = 3


def classes_of(experiment: Experiment) -> int:
    """Of the trained prior."""
    return read_prior(experiment.folder).prior.classes


@torch.no_grad()
def parts(experiment: Experiment) -> dict[str, float]:
    """Seconds a sample of each part, in batches."""
    batch, device = experiment.evaluation.batch_size, experiment.cluster.device
    references = make_references(experiment, spaces_of(experiment))
    evaluator = Evaluator(experiment, [reference.space for reference in references])
    generator = evaluator.generator
    assert generator.prior is not None
    prior, autoencoder = generator._networks(  # pyright: ignore[reportPrivateUsage]  # the very networks that draw
        generator.prior, experiment.sampling
    )
    chosen = balanced_labels(batch, generator.classes)
    labels = None if chosen is None else torch.tensor(chosen, device=device)
    index = torch.arange(batch, device=device)

    def sample() -> torch.Tensor:
        return prior.model.sample(prior.network, SampleSpec(index, labels, experiment.seed), experiment.sampling)

    z = sample().view(-1, *autoencoder.code_shape)
    images = autoencoder.decode(z).cpu()

    def features() -> None:
        for extractor in evaluator.extractors.values():
            extractor(images).cpu()

    names = ("sampling", "decoding", "features")
    seconds = in_turns([sample, lambda: autoencoder.decode(z), features], REPEATS, device)
    return {name: value / batch for name, value in zip(names, seconds, strict=True)}


def job_rate(experiment: Experiment, workers: int) -> float:
    """Samples a second of the job, from its first result to its figures."""
    experiment = replace(experiment, cluster=replace(experiment.cluster, workers=workers))
    config, references = experiment.evaluation, make_references(experiment, spaces_of(experiment))
    connect_ray(experiment.cluster)
    labels = balanced_labels(config.samples, classes_of(experiment))
    pieces = draw_pieces(experiment.sampling, labels, config.samples, config.batch_size, experiment.seed)
    samples = Samples(replace(config, class_accuracy=False), experiment, references, labels)
    arguments = (experiment, [reference.space for reference in references])
    work = map_on_actors(
        Evaluator, arguments, "work", map(SampleFeatures, pieces), experiment.cluster, "evaluate", CALLS
    )
    with contextlib.closing(work):
        for _ in range(workers):  # the first of each
            samples.add(next(work))
        began = time.perf_counter()
        for drawn in work:
            samples.add(drawn)
        samples.metrics()
    return (config.samples - workers * config.batch_size) / (time.perf_counter() - began)


def main(experiment: Experiment, _: Namespace) -> None:
    seconds = parts(experiment)
    total, slowest = sum(seconds.values()), max(seconds.values())
    rates = {workers: job_rate(experiment, workers) for workers in (1, 2)}
    ray.shutdown()
    lines: list[dict[str, Any]] = [
        {"name": f"evaluate, share of {part}", "value": value / total, "unit": "of the parts", "peer": 1.0}
        for part, value in seconds.items()
    ]
    lines += [
        {"name": f"evaluate, {workers} workers", "value": rate, "unit": "samples/s", "peer": rates[1]}
        for workers, rate in rates.items()
    ]
    whole = {"name": "evaluate, whole by slowest part", "value": 1 / rates[1], "unit": "s/sample", "peer": slowest}
    lines.append(whole)
    for line in lines:
        print(json.dumps(line | {"ratio": line["value"] / line["peer"]}), flush=True)


if __name__ == "__main__":
    command(__doc__, main)
