from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import bld_core
from bld_core.autoencoder import to_float, to_uint8
from bld_core.checkpoint import save_model
from bld_core.diffusion import DiffusionConfig, Target
from bld_core.generator import Generator
from bld_core.images import stack
from bld_core.prior import PriorConfig
from bld_core.sampling import SamplingConfig
from tests.bld_core.toys import TINY_AUTOENCODER, perturb, tiny_autoencoder, tiny_prior, toy_images

CLASSES = 3


def save_autoencoder(folder: Path, seed: int = 0) -> str:
    """A tiny autoencoder of 8 x 8 grey images, as cluster/train.py saves it; its hash."""
    config = {
        "autoencoder": asdict(TINY_AUTOENCODER),
        "code_shape": TINY_AUTOENCODER.code_shape(8),
        "image_size": 8,
        "channels": 1,
        "run": "",
        "metrics": {},
    }
    autoencoder = tiny_autoencoder(seed)
    return save_model(str(folder / "autoencoder" / "final"), autoencoder.state_dict(), config)


def save_prior(folder: Path, autoencoder_hash: str, classes: int = CLASSES, target: Target = "flip") -> None:
    """A tiny prior with random evidence."""
    config = {
        "prior": asdict(PriorConfig(layers=1, width=16, heads=2, classes=classes)),
        "diffusion": asdict(DiffusionConfig(steps=16, target=target)),
        "sampling": asdict(SamplingConfig(steps=4)),
        "autoencoder_hash": autoencoder_hash,
        "latents_hash": "",
        "run": "",
        "metrics": {},
    }
    prior = tiny_prior(classes=classes)
    perturb(prior)
    save_model(str(folder / "prior" / "final"), prior.state_dict(), config)


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    save_prior(tmp_path, save_autoencoder(tmp_path))
    return bld_core.load(str(tmp_path))


def test_images_become_bits_and_bits_images(generator: Generator) -> None:
    images = stack(toy_images(5))
    bits = generator.encode(images)
    assert bits.shape == (5, 2, 2, 8)
    assert bits.dtype == torch.uint8
    assert set(bits.unique().tolist()) == {0, 1}
    decoded = generator.decode(bits)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.uint8
    with torch.no_grad():  # the same as the network's own way through the mode
        assert torch.equal(decoded, to_uint8(tiny_autoencoder()(to_float(images))[0]))


def test_samples_are_a_function_of_seed_and_index(generator: Generator) -> None:
    labels = [0, 1, 2, -1] * 5
    whole = generator.sample(labels=labels, seed=7)
    assert whole.shape == (20, 8, 8, 1)
    assert whole.dtype == torch.uint8
    assert torch.equal(generator.sample(20, labels=labels, seed=7), whole)
    assert not torch.equal(generator.sample(labels=labels, seed=8), whole)
    assert len({tuple(image.flatten().tolist()) for image in generator.sample(20, seed=7)}) > 10


def test_a_set_drawn_in_parts_is_the_set(generator: Generator) -> None:
    labels = [i % CLASSES for i in range(24)]
    whole = generator.sample(labels=labels, seed=7, batch_size=8)
    parts = [generator.sample(labels=labels[i : i + 8], seed=7, first_index=i, batch_size=8) for i in (0, 8, 16)]
    assert torch.equal(torch.cat(parts), whole)  # equal batches: equal arithmetic
    for size in (1, 5, 24):  # other batches round otherwise, which may tip a bit now and then
        other = generator.sample(labels=labels, seed=7, batch_size=size)
        assert float(((other.int() - whole.int()).abs() <= 1).float().mean()) >= 0.99


def test_labels_guidance_and_settings_matter(generator: Generator) -> None:
    plain = generator.sample(labels=[0] * 16, seed=7)
    assert not torch.equal(generator.sample(labels=[1] * 16, seed=7), plain)
    changes: list[dict[str, Any]] = [{"guidance": 3.0}, {"steps": 16}, {"temperature": 0.1}, {"final": "mode"}]
    for settings in changes:
        assert not torch.equal(generator.sample(labels=[0] * 16, seed=7, **settings), plain), settings
    stored: dict[str, Any] = asdict(SamplingConfig(steps=4))
    assert torch.equal(generator.sample(labels=[0] * 16, seed=7, **stored), plain)


def test_no_labels_are_the_null_class(generator: Generator) -> None:
    assert torch.equal(generator.sample(6, seed=1), generator.sample(labels=[-1] * 6, seed=1))


def test_an_unknown_class_is_named_with_what_is_known(generator: Generator) -> None:
    assert generator.classes == CLASSES
    for bad in (3, -2):
        with pytest.raises(ValueError, match=rf"class {bad} asked for; the classes of this prior: 0\.\.2"):
            generator.sample(labels=[0, bad])


@pytest.mark.parametrize(("count", "labels"), [(None, None), (0, None), (2, [0]), (None, [])])
def test_a_bad_count_is_refused(generator: Generator, count: int | None, labels: list[int] | None) -> None:
    with pytest.raises(ValueError, match=rf"count is {0 if labels == [] else count}"):
        generator.sample(count, labels=labels)


def test_bad_settings_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"temperature is 0"):
        generator.sample(1, temperature=0)
    with pytest.raises(ValueError, match=r"17 sampling steps.*T = 16"):
        generator.sample(1, steps=17)


def test_images_and_bits_of_another_shape_are_named_with_the_right_one(generator: Generator) -> None:
    for images in (torch.zeros(1, 8, 8, 3).byte(), torch.zeros(1, 16, 16, 1).byte(), torch.zeros(1, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"takes uint8 \(B, 8, 8, 1\)"):
            generator.encode(images)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 4\).*\(2, 2, 8\)"):
        generator.decode(torch.zeros(1, 2, 2, 4).byte())


def test_without_a_prior_there_is_an_autoencoder_but_no_samples(tmp_path: Path) -> None:
    save_autoencoder(tmp_path)
    generator = bld_core.load(str(tmp_path))
    assert generator.classes == 0
    assert generator.encode(stack(toy_images(1))).shape == (1, 2, 2, 8)
    with pytest.raises(ValueError, match="no finished prior; train stage 2"):
        generator.sample(1)


def test_an_unconditional_prior_knows_no_class(tmp_path: Path) -> None:
    save_prior(tmp_path, save_autoencoder(tmp_path), classes=0)
    generator = bld_core.load(str(tmp_path))
    assert torch.equal(generator.sample(labels=[-1, -1]), generator.sample(2))
    with pytest.raises(ValueError, match=r"class 0 asked for; the classes of this prior: none, it is unconditional"):
        generator.sample(labels=[0])


def test_a_prior_of_another_autoencoder_is_refused_with_both_hashes(tmp_path: Path) -> None:
    other = save_autoencoder(tmp_path / "other", seed=1)
    mine = save_autoencoder(tmp_path / "mine")
    save_prior(tmp_path / "mine", other)
    with pytest.raises(ValueError, match=rf"{other[:12]}.*{mine[:12]}"):
        bld_core.load(str(tmp_path / "mine"))


def test_the_stored_target_decides_what_the_network_means(tmp_path: Path) -> None:
    targets: tuple[Target, ...] = ("flip", "z0", "z_prev")
    drawn: list[torch.Tensor] = []
    for target in targets:  # the same weights each time
        save_prior(tmp_path / target, save_autoencoder(tmp_path / target), target=target)
        drawn.append(bld_core.load(str(tmp_path / target)).sample(32, seed=3, steps=16))
    flip, z0, z_prev = drawn
    assert not torch.equal(flip, z0)
    assert not torch.equal(flip, z_prev)
    assert not torch.equal(z0, z_prev)
    with pytest.raises(ValueError, match=r"4 sampling steps.*z_prev.*take all T = 16"):
        bld_core.load(str(tmp_path / "z_prev")).sample(1)


def test_an_empty_folder_is_not_an_experiment(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished model"):
        bld_core.load(str(tmp_path))


def test_a_generator_opens_from_any_file_system(tmp_path: Path) -> None:
    import fsspec

    save_prior(tmp_path, save_autoencoder(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    there, here = bld_core.load(f"memory://{tmp_path.name}"), bld_core.load(str(tmp_path))
    assert torch.equal(there.sample(3, seed=2), here.sample(3, seed=2))
