"""The shipped configurations: each is read, its networks are built without memory, and its comments say what is so."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import braceexpand
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.model import make_autoencoder
from bld_core.data.images import ImageConfig
from bld_core.diffusion.process import output_size
from bld_core.prior.transformer import Prior, PriorConfig
from cluster.config.experiment import Experiment
from cluster.config.plan import network_sizes
from pipelines.command import command

CONFIGS = {path.stem: path for path in sorted(Path(__file__).parents[2].glob("configs/*.yaml"))}
OF_THE_PAPER = sorted(CONFIGS.keys() - {"demo", "fashion_mnist", "photos64"})

# In what the paper's experiments of one size differ: everything else they share.
OWN = {
    *("name", "data.train", "data.validation", "loss.adversarial_start", "autoencoder_training.steps"),
    *("latents.mirror", "autoencoder.bits", "prior.classes", "prior_training.batch_size"),
    *("sampling.guidance", "evaluation.inception_score", "evaluation.cas_steps"),
}
# In what those at 1024 x 1024 differ from those at 256 x 256.
OF_THE_SIZE = {
    *("data.image_size", "autoencoder.bits", "autoencoder.multipliers", "autoencoder.attention"),
    *("autoencoder_training.checkpointing", "latents.batch_size", "diffusion.steps", "sampling.steps"),
    *("evaluation.batch_size", "evaluation.precision_recall"),
}

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
    """The experiment that any command makes of a configuration, by name or path, and of flags after it."""
    made: list[Experiment] = []

    def keep(experiment: Experiment, flags: object) -> None:
        made.append(experiment)

    monkeypatch.setattr(sys, "argv", ["any.py", "--config", str(CONFIGS.get(name, name)), *flags])
    command("", keep)
    return made[0]


def said_in(path: Path) -> dict[str, Any]:
    """The settings that one file says itself, by dotted name."""
    return dict(flat(yaml.safe_load(path.read_text())))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested settings with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            yield prefix + key, value


def files_of(path: Path) -> list[Path]:
    """A configuration and the files that it stands on, the lowest first."""
    base = said_in(path).get("config")
    return [*files_of(path.parent / base), path] if base else [path]


def head(path: Path) -> str:
    """The comment at the head of a configuration."""
    return re.split(r"^[a-z]", path.read_text(), maxsplit=1, flags=re.M)[0]


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
        "prior": (1, h * w, output_size(c, experiment.prior.group)),
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
        for path in files_of(CONFIGS[name])
        for part, parameters, work in re.findall(r"(\w+) ([\d.]+)M / ([\d.,]+) GMAC", head(path))
    }
    counted = {part: size for part, (size, _) in networks(read(monkeypatch, name)).items()}
    assert said.keys() == counted.keys()
    for part, size in counted.items():
        assert said[part] == pytest.approx(size, rel=0.01), part


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_plan_counts_the_same_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read(monkeypatch, name)
    found = {part: Size(p / 1e6, work / 2e9) for part, (p, work) in network_sizes(experiment).items()}
    assert found == {part: size for part, (size, _) in networks(experiment).items()}


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_comments_name_the_shards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(monkeypatch, name).data
    layout = re.findall(r"^#   (\S+\.tar) +([\d,]+) images, ([\d,]+) a shard$", head(CONFIGS[name]), re.M)
    assert [f"/shards/{name}/{pattern}" for pattern, _, _ in layout] == [data.train, data.validation]
    for pattern, images, a_shard in layout:
        count = math.ceil(int(images.replace(",", "")) / int(a_shard.replace(",", "")))
        assert len(list(braceexpand.braceexpand(pattern))) == count
        assert f"--images_per_shard {int(a_shard.replace(',', ''))} " in head(CONFIGS[name])


def test_the_paper_s_experiments_share_all_but_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: read(monkeypatch, name).parameters() for name in OF_THE_PAPER}

    def differ(*names: str) -> set[str]:
        return {key for key in settings[names[0]] if len({settings[name][key] for name in names}) > 1}

    assert differ(*(name for name in OF_THE_PAPER if name.endswith("256"))) == OWN
    assert differ("ffhq1024", "celebahq1024") == {"name", "data.train", "data.validation"}
    assert differ("ffhq256", "ffhq1024") == {"name", "data.train", "data.validation"} | OF_THE_SIZE


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_what_is_shared_stands_once(name: str) -> None:
    below: dict[str, Any] = {}
    for path in files_of(CONFIGS[name]):
        said = said_in(path)
        said.pop("config", None)
        assert not [key for key, value in said.items() if below.get(key) == value], path
        below |= said
    assert len(said_in(CONFIGS[name])) <= 13


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


def written(folder: Path, **files: str) -> str:
    """The path of the last of some settings files that are written into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{list(files)[-1]}.yaml")


def test_a_file_goes_over_its_base_field_by_field_and_flags_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = "prior: {layers: 3, width: 96, heads: 3}\nroot: /low\ndata: {train: '${root}/0.tar'}\nseed: 5\n"
    written(tmp_path, base=below, size="layers: 4\nheads: 6\n")
    above = written(
        tmp_path / "mine",
        middle="seed: 6\nconfig: ../base.yaml\nprior: ../size.yaml\n",
        top="root: /high\nprior: {heads: 2}\nconfig: middle.yaml\n",
    )
    monkeypatch.chdir("/")
    experiment = read(monkeypatch, above, "--prior.width", "48")
    assert experiment == replace(
        read(monkeypatch, written(tmp_path, alone="seed: 6\nroot: /high\n")),
        prior=PriorConfig(layers=4, width=48, heads=2),
        data=ImageConfig(train="/high/0.tar"),
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "config: nowhere.yaml\n"}, "config in top.yaml is 'nowhere.yaml': File does not exist"),
        ({"top": "config: [a.yaml, b.yaml]\n"}, "config in top.yaml is ['a.yaml', 'b.yaml']"),
        ({"low": "config: top.yaml\n", "top": "config: low.yaml\n"}, "Config file loop detected"),
        ({"low": "prior: {widht: 3}\n", "top": "config: low.yaml\n"}, "the nearest is 'prior.width'"),
        ({"low": "prior: {width: [\n", "top": "config: low.yaml\n"}, "low.yaml is not YAML"),
    ],
)
def test_a_base_that_cannot_be_taken_is_one_message(
    files: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        read(monkeypatch, written(tmp_path, **files))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
