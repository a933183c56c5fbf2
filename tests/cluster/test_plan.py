"""A plan says what the tables beside it say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.experiment import Experiment
from cluster.config.plan import PlanConfig, advice, encode_plan, make_plan

TABLE = (Path(__file__).parents[2] / "benchmarks/README.md").read_text().split("## At scale")[1]


def paper_s_encoder(blocks: int = 2) -> Experiment:
    """A small experiment with the paper's encoder, or one of fewer blocks, and images of its size."""
    experiment = Experiment()
    paper = {"channels": 128, "multipliers": [1, 1, 2, 2, 4], "blocks": blocks, "attention": [16], "bits": 32}
    autoencoder = replace(experiment.autoencoder, **paper)
    data = replace(experiment.data, image_size=256, channels=3)
    latents = replace(experiment.latents, draws=1, mirror=False)
    training = replace(experiment.autoencoder_training, batch_size=1)
    prior = replace(experiment.prior, layers=1, width=32, heads=2)
    return replace(
        experiment, prior=prior, data=data, autoencoder=autoencoder, latents=latents, autoencoder_training=training
    )


def number(text: str) -> float:
    value, unit = re.match(r"([\d,.]+) ?([MGT]?)", text.strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(value.replace(",", "")) * {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}[unit]


@pytest.mark.parametrize("name", ["ImageNet", "a web-scale set"])
def test_the_table_at_scale_is_the_plan_s(name: str) -> None:
    (row,) = re.findall(rf"^\| {name} \| (.*) \|$", TABLE, re.M)
    images, shards, requests, latents, core_hours, gpu_hours, _ = row.split(" | ")
    plan = PlanConfig(images=int(number(images)))
    encode = encode_plan(paper_s_encoder(), plan)
    assert number(shards.split(", ")[1].replace("TB", "T")) == pytest.approx(encode.read, rel=0.01)
    assert number(requests) == pytest.approx(encode.requests, rel=0.01)
    assert number(latents) == pytest.approx(encode.written, rel=0.05)
    assert number(core_hours) == pytest.approx(encode.cores * encode.hours, rel=0.02)
    assert number(gpu_hours) == pytest.approx(8 * encode.hours, rel=0.05)
    said = re.search(r"encodes ([\d,]+) images a second, and (\d+) cores", TABLE)
    assert said is not None
    assert number(said[1]) == pytest.approx(encode.rate / 8, rel=0.02)
    assert number(said[2]) == pytest.approx(encode.cores / 8, rel=0.05)


def test_the_bottleneck_is_named() -> None:
    experiment, plan = paper_s_encoder(blocks=1), PlanConfig(gpu="l4", gpus=1, fit=True)
    first, _, _ = make_plan(experiment, plan)
    assert "arithmetic" in advice(first, experiment, plan)
    assert first.largest is not None
    assert first.largest > 1
    assert first.memory is not None
    huge = first._replace(memory=first.memory._replace(activations=10**11))
    assert "accumulate" in advice(huge, experiment, plan)
    huge, eight = huge._replace(name="stage 2"), PlanConfig(gpu="l4", gpus=8)
    assert "fsdp" not in advice(huge, experiment, plan), "one GPU has nobody to share weights with"
    assert "prior_training.fsdp true" in advice(huge, experiment, eight)
    shares = replace(experiment, prior_training=replace(experiment.prior_training, fsdp=True))
    assert "fsdp" not in advice(huge, shares, eight)
    alone, shared = (make_plan(each, eight)[2] for each in (experiment, shares))
    assert alone.memory is not None
    assert shared.memory is not None
    assert sum(shared.memory[:4]) == pytest.approx(sum(alone.memory[:4]) / 8, rel=1e-3)
    assert shared.memory[4:] == alone.memory[4:]
    assert shared.written == alone.written, "a checkpoint is whole"
    assert "cluster.decode_tasks to 3" in advice(first._replace(cores=2.5), experiment, plan)
