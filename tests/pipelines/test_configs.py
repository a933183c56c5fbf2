"""The shipped configurations: each is read, its networks are built without memory, and its comments say what is so."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.model import make_autoencoder
from bld_core.prior.transformer import Prior
from cluster.config.experiment import Experiment
from pipelines.command import command

CONFIGS = {path.stem: path for path in sorted(Path(__file__).parents[2].glob("configs/*.yaml"))}
OF_THE_PAPER = sorted(CONFIGS.keys() - {"demo", "fashion_mnist"})

# Of the authors' release at 256 x 256: millions of parameters, billions of multiply-adds.
RELEASED = {"encoder": (30.4, 69.0), "decoder": (35.0, 95.0), "prior": (171.6, 46.0)}
# 1,000 classes and the null class, 768 numbers each.
CLASS_TABLE = 0.77


class Size(NamedTuple):
    """Millions of parameters, and billions of multiply-adds of one forward pass."""

    parameters: float
    work: float


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the configurations look for shards and runs."""
    monkeypatch.setenv("BLD_DATA", "/shards")
    monkeypatch.setenv("BLD_ROOT", "/runs")


def read(monkeypatch: pytest.MonkeyPatch, name: str, *flags: str) -> Experiment:
    """The experiment that any command makes of a configuration and of flags after it."""
    made: list[Experiment] = []

    def keep(experiment: Experiment, flags: object) -> None:
        made.append(experiment)

    monkeypatch.setattr(sys, "argv", ["any.py", "--config", str(CONFIGS[name]), *flags])
    command("", keep)
    return made[0]


def head(name: str) -> str:
    """The comment at the head of a configuration."""
    return re.split(r"^name:", CONFIGS[name].read_text(), maxsplit=1, flags=re.M)[0]


def pass_through(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Size, tuple[int, ...]]:
    """The size of a network, and the shape of what comes out of it. Two operations are one multiply-add."""
    with FlopCounterMode(display=False) as counter:
        shape = tuple(run().shape)
    parameters = sum(weights.numel() for weights in network.parameters())
    return Size(parameters / 1e6, counter.get_total_flops() / 2e9), shape


@torch.no_grad()
def networks(experiment: Experiment) -> dict[str, tuple[Size, tuple[int, ...]]]:
    """Every network on the meta device: its size, and the shape that one image or code leaves it in."""
    data, (h, w, c) = experiment.data, experiment.code_shape
    with torch.device("meta"):
        autoencoder = make_autoencoder(experiment.autoencoder, data.channels)
        critic = PatchCritic(experiment.loss, data.channels)
        prior = Prior(experiment.prior, h * w, c)
        x, z = torch.zeros(1, data.channels, data.image_size, data.image_size), torch.zeros(1, c, h, w)
        tokens, time = torch.zeros(1, h * w, c), torch.zeros(1)
    labels = torch.zeros(1, dtype=torch.int64, device="meta") if experiment.prior.classes else None
    return {
        "encoder": pass_through(autoencoder.encoder, lambda: autoencoder.encode(x)),
        "decoder": pass_through(autoencoder.decoder, lambda: autoencoder.decode(z)),
        "critic": pass_through(critic, lambda: critic(x)),
        "prior": pass_through(prior, lambda: prior(tokens, time, labels)),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_take_the_images_and_codes_of_their_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read(monkeypatch, name)
    assert experiment.name == name
    size, (h, w, c) = experiment.data.image_size, experiment.code_shape
    patches = size // 2**experiment.loss.critic_layers - 2
    assert {part: shape for part, (_, shape) in networks(experiment).items()} == {
        "encoder": (1, c, h, w),
        "decoder": (1, experiment.data.channels, size, size),
        "critic": (1, 1, patches, patches),
        "prior": (1, h * w, c),
    }


@pytest.mark.parametrize("name", [name for name in OF_THE_PAPER if name.endswith("256")])
def test_networks_at_256_are_as_large_as_those_released(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read(monkeypatch, name)
    found = networks(experiment)
    for part, (parameters, work) in RELEASED.items():
        expected = parameters + (CLASS_TABLE if part == "prior" and experiment.prior.classes else 0)
        assert found[part][0] == pytest.approx(Size(expected, work), rel=0.03)


def test_the_class_table_is_what_classes_add(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(monkeypatch, "imagenet256").prior
    with torch.device("meta"):
        label = Prior(config, 256, 64).label
    assert label is not None
    assert label.weight.numel() / 1e6 == pytest.approx(CLASS_TABLE, rel=0.01)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_a_prior_of_another_size_keeps_everything_else(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = CONFIGS["demo"].parent / "prior" / f"{size}.yaml"
    plain, sized = read(monkeypatch, "imagenet256"), read(monkeypatch, "imagenet256", "--prior", str(preset))
    shape = {"layers": sized.prior.layers, "width": sized.prior.width, "heads": sized.prior.heads}
    assert sized == replace(plain, prior=replace(plain.prior, **shape))
    with torch.device("meta"):
        prior = Prior(replace(sized.prior, classes=0), 256, 32)
    said = re.search(r": ([\d.]+)M parameters", preset.read_text())
    assert said is not None
    assert sum(weights.numel() for weights in prior.parameters()) / 1e6 == pytest.approx(float(said[1]), rel=0.01)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_comments_name_the_counted_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        part: Size(float(parameters), float(work.replace(",", "")))
        for part, parameters, work in re.findall(r"(\w+) ([\d.]+)M / ([\d.,]+) GMAC", head(name))
    }
    counted = {part: size for part, (size, _) in networks(read(monkeypatch, name)).items()}
    assert said.keys() == counted.keys()
    for part, size in counted.items():
        assert said[part] == pytest.approx(size, rel=0.01), part


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_comments_name_the_shards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(monkeypatch, name).data
    layout = re.findall(r"^#   (\S+\.tar) +([\d,]+) images, ([\d,]+) a shard$", head(name), re.M)
    assert [f"/shards/{name}/{pattern}" for pattern, _, _ in layout] == [data.train, data.validation]
    for pattern, images, a_shard in layout:
        count = math.ceil(int(images.replace(",", "")) / int(a_shard.replace(",", "")))
        assert len(list(braceexpand.braceexpand(pattern))) == count
        assert f"--images_per_shard {int(a_shard.replace(',', ''))} " in head(name)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_settings_are_the_paper_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read(monkeypatch, name)
    code, steps = ((32, 32, 64), 256) if name.endswith("1024") else ((16, 16, 32), 64)
    expected: dict[str, Any] = {"code": code, "steps": steps, "guidance": 0.0, "classes": 0}
    if name == "imagenet256":
        expected |= {"code": (16, 16, 64), "guidance": 2.0, "classes": 1000}
    assert expected == {
        "code": experiment.code_shape,
        "steps": experiment.sampling.steps,
        "guidance": experiment.sampling.guidance,
        "classes": experiment.prior.classes,
    }
    assert experiment.diffusion.steps == steps
    assert (experiment.sampling.temperature, experiment.diffusion.vlb_weight) == (0.9, 0.1)
    assert experiment.evaluation.samples == 50_000
