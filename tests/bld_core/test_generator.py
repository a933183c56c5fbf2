from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import bld_core
from bld_core.data.tensors import stack, to_float, to_uint8
from bld_core.diffusion.process import Calibration, CodeBatch, DiffusionConfig, Target
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.errors import UserError
from bld_core.generator import Generator, known_tokens
from bld_core.noise import uniform
from bld_core.prior.model import make_model
from bld_core.prior.transformer import ModelName, PriorConfig
from bld_core.storage.records import write_record
from bld_core.trained import AUTOENCODER, DECODER
from bld_core.training.checkpoint import save_model
from tests.bld_core.toys import TINY_AUTOENCODER, perturb, tiny_autoencoder, toy_images

CLASSES = 3


def save_autoencoder(folder: Path, seed: int = 0, place: str = AUTOENCODER, codes_of: str = "") -> str:
    """A tiny autoencoder of 8 x 8 grey images, as cluster/train.py saves it; its hash."""
    config = {
        "autoencoder": asdict(TINY_AUTOENCODER),
        "code_shape": TINY_AUTOENCODER.code_shape(8),
        "image_size": 8,
        "channels": 1,
        "run": "",
        "metrics": {},
        **({"codes_of": codes_of} if codes_of else {}),
    }
    autoencoder = tiny_autoencoder(seed)
    return save_model(str(folder / place), autoencoder.state_dict(), config)


def save_prior(
    folder: Path,
    autoencoder_hash: str,
    classes: int = CLASSES,
    target: Target = "flip",
    known_share: float = 0.0,
    model: ModelName = "binary",
    **fields: Any,
) -> None:
    """A tiny prior with random evidence."""
    settings = PriorConfig(model=model, layers=1, width=16, heads=2, classes=classes, known_share=known_share, **fields)
    config = {
        "prior": asdict(settings),
        "diffusion": asdict(DiffusionConfig(steps=16, target=target)),
        "sampling": asdict(SamplingConfig(steps=4)),
        "autoencoder_hash": autoencoder_hash,
        "latents_hash": "",
        "run": "",
        "metrics": {},
    }
    torch.manual_seed(0)
    prior = make_model(settings, DiffusionConfig(), 4, 8).network()
    perturb(prior)
    save_model(str(folder / "prior" / "final"), prior.state_dict(), config)


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    save_prior(tmp_path, save_autoencoder(tmp_path))
    return bld_core.load(str(tmp_path))


def test_a_fine_tuned_decoder_is_taken_and_one_for_other_codes_is_refused(tmp_path: Path) -> None:
    made_by = save_autoencoder(tmp_path)
    save_prior(tmp_path, made_by)
    bits = torch.zeros(1, 2, 2, 8)
    before = bld_core.load(str(tmp_path))
    save_autoencoder(tmp_path, seed=1, place=DECODER, codes_of=made_by)
    tuned = bld_core.load(str(tmp_path))
    assert (tuned.autoencoder.record.codes_hash, tuned.classes) == (made_by, CLASSES)
    assert not torch.equal(tuned.decode(bits), before.decode(bits))
    other = save_autoencoder(tmp_path, seed=2)
    save_prior(tmp_path, other)
    with pytest.raises(UserError, match=f"codes of autoencoder {made_by[:12]}, but the autoencoder there is") as error:
        bld_core.load(str(tmp_path))
    assert other[:12] in str(error.value)
    assert error.value.stages == ("decoder",)


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
    assert torch.equal(generator.reconstruct(images), decoded)


def test_classes_are_known_by_their_names_where_they_have_some(generator: Generator) -> None:
    assert generator.prior is not None
    record = generator.prior.record
    assert [record.label(2), replace(record, class_names=["cat", "dog", "owl"]).label("dog")] == [2, 1]
    with pytest.raises(UserError, match="class 'dog' asked for, of which the prior knows nothing: its classes are num"):
        record.label("dog")


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


def test_precision_rounds_and_compiling_is_no_other_sampler(generator: Generator) -> None:
    labels = [0, 1, 2] * 8
    plain = generator.sample(labels=labels, seed=7, guidance=1.0)
    rounded, again = (generator.sample(labels=labels, seed=7, guidance=1.0, precision="bfloat16") for _ in range(2))
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, plain)
    assert float((rounded.int() - plain.int()).abs().float().mean()) < 3  # grey levels: a few bits tip
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(generator.sample(labels=labels, seed=7, guidance=1.0, compile=True), plain)
    assert torch.equal(generator.sample(labels=labels, seed=7, guidance=1.0), plain)


def test_the_process_goes_from_noise_to_the_sample(generator: Generator) -> None:
    labels = [0, 2, -1]
    shown = generator.process(labels, 3, seed=7, first_index=4, steps=8, guidance=1.0)
    assert shown.shape == (3, 3, 8, 8, 1)
    assert torch.equal(shown[:, -1], generator.sample(labels=labels, seed=7, first_index=4, steps=8, guidance=1.0))
    noise = (uniform(7, "sampling start", torch.arange(4, 7), 32) < 0.5).float()
    assert torch.equal(shown[:, 0], generator.decode(noise.view(3, 2, 2, 8)))
    every = generator.process(labels, 100, seed=7, first_index=4, steps=8, guidance=1.0)
    assert every.shape[1] == 9
    assert torch.equal(every[:, ::4], shown)
    with pytest.raises(ValueError, match="1 states of the process"):
        generator.process(labels, 1)
    with pytest.raises(ValueError, match=r"class 7 asked for"):
        generator.process([7], 2)


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
    with pytest.raises(ValueError, match=r"`temperature` is 0"):
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
    with pytest.raises(ValueError, match="no finished prior: train one on its codes first"):
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


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what config.json says of a prior."""
    path = folder / "prior" / "final" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    write_record(str(path), config)


def test_the_stored_target_and_calibration_decide_what_the_network_means(tmp_path: Path) -> None:
    drawn: dict[str, torch.Tensor] = {}
    for target, calibration in itertools.product(get_args(Target), get_args(Calibration)):  # the same weights each time
        folder = tmp_path / f"{target} {calibration}"
        save_prior(folder, save_autoencoder(folder), target=target)
        rewrite(folder, lambda config, calibration=calibration: config["diffusion"].update(calibration=calibration))
        drawn[folder.name] = bld_core.load(str(folder)).sample(32, seed=3)
    for calibration in get_args(Calibration):
        assert torch.equal(drawn[f"z0 {calibration}"], drawn[f"z_prev {calibration}"])  # trained otherwise, said alike
    for first, second in itertools.combinations(["flip bayes", "flip none", "z0 bayes", "z0 none"], 2):
        assert not torch.equal(drawn[first], drawn[second])


def test_a_prior_of_single_steps_from_before_calibration_had_a_name_is_still_read_as_one(tmp_path: Path) -> None:
    save_prior(tmp_path, save_autoencoder(tmp_path), target="z_prev", known_share=0.5)
    new = bld_core.load(str(tmp_path))
    rewrite(tmp_path, lambda config: [config["diffusion"].pop("calibration"), config["prior"].pop("group")])
    old, images = bld_core.load(str(tmp_path)), stack(toy_images(4))
    assert new.prior is not None
    assert old.prior is not None
    assert (old.prior.record.single_step, new.prior.record.single_step) == (True, False)
    for steps in (16, 4):  # any grid, as others
        assert not torch.equal(old.sample(32, seed=3, steps=steps), new.sample(32, seed=3, steps=steps))
    codes = CodeBatch.numbered(old.encode(images).flatten(1, 2))
    assert old.prior.model.bound(old.prior.network, codes, 0).bits_per_bit > 0
    completed = old.inpaint(images, left_half(images), seed=3, inpainting="conditioned")
    assert torch.equal(completed[:, 0][left_half(images)], images[left_half(images)])
    assert old.sample(8, seed=3, precision="bfloat16").shape == (8, 8, 8, 1)


@pytest.mark.parametrize("known_share", [0.0, 0.5])
def test_a_prior_of_groups_draws_and_completes_like_any_other(tmp_path: Path, known_share: float) -> None:
    save_prior(tmp_path, save_autoencoder(tmp_path), known_share=known_share, group=8)
    pair, images, labels = bld_core.load(str(tmp_path)), stack(toy_images(8)), [i % CLASSES for i in range(24)]
    whole = pair.sample(labels=labels, seed=7, guidance=1.5, batch_size=8)
    assert len({tuple(image.flatten().tolist()) for image in whole}) > 10
    parts = [
        pair.sample(labels=labels[i : i + 8], seed=7, guidance=1.5, first_index=i, batch_size=8) for i in (0, 8, 16)
    ]
    assert torch.equal(torch.cat(parts), whole)
    changes: list[dict[str, Any]] = [{"guidance": 3.0}, {"steps": 16}, {"temperature": 0.1}, {"final": "mode"}]
    for settings in changes:
        assert not torch.equal(pair.sample(labels=labels, seed=7, batch_size=8, **settings), whole), settings
    mask = left_half(images)
    completed = pair.inpaint(images, mask, count=2, seed=3)
    for j in range(2):
        assert torch.equal(completed[:, j][mask], images[mask])
    assert not torch.equal(completed[:, 0], completed[:, 1])
    nothing = pair.inpaint(images, torch.zeros_like(mask), seed=3)
    assert torch.equal(nothing[:, 0], pair.sample(8, seed=3))
    assert pair.process([0, 1], 3, seed=7).shape == (2, 3, 8, 8, 1)
    fast = pair.sample(labels=labels, seed=7, guidance=1.5, batch_size=8, precision="bfloat16")
    assert fast.shape == whole.shape
    assert pair.prior is not None
    bound = pair.prior.model.bound(pair.prior.network, CodeBatch.numbered(pair.encode(images).flatten(1, 2)), 0)
    assert bound.bits_per_bit > 0


def test_a_prior_from_before_models_had_names_is_binary(generator: Generator, tmp_path: Path) -> None:
    expected = generator.sample(4, seed=2)
    config = tmp_path / "prior/final/config.json"
    made = json.loads(config.read_text())
    assert made["prior"].pop("model") == "binary"
    write_record(str(config), made)
    assert torch.equal(bld_core.load(str(tmp_path)).sample(4, seed=2), expected)


@pytest.mark.parametrize("model", ["autoregressive", "absorbing"])
def test_the_stored_model_decides_how_samples_are_drawn(tmp_path: Path, model: ModelName) -> None:
    save_prior(tmp_path, save_autoencoder(tmp_path), model=model)
    generator, images, labels = bld_core.load(str(tmp_path)), stack(toy_images(4)), [0, 1, 2, -1]
    whole = generator.sample(labels=labels * 4, seed=7, guidance=1.0)
    assert whole.shape == (16, 8, 8, 1)
    assert len({tuple(image.flatten().tolist()) for image in whole}) > 8
    assert torch.equal(generator.sample(labels=labels * 4, seed=7, guidance=1.0, steps=16), whole)  # 4 tokens, 4 steps
    with pytest.raises(ValueError, match=rf"mode with an {model} prior"):
        generator.sample(1, final="mode")
    if model == "autoregressive":
        with pytest.raises(ValueError, match=r"autoregressive.*cannot complete"):
            generator.inpaint(images, left_half(images))
    else:
        assert not torch.equal(generator.sample(labels=labels * 4, seed=7, guidance=1.0, steps=1), whole)
        completions = generator.inpaint(images, left_half(images), count=3, labels=labels)
        assert torch.equal(completions[:, 1, :, :4], images[:, :, :4])
        assert torch.equal(generator.outpaint(images, 14)[:, :, :8], images)


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


# --- Inpainting -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0.0, 0.5], ids=["replacement", "conditioned"])
def inpainter(tmp_path: Path, request: pytest.FixtureRequest) -> Generator:
    save_prior(tmp_path, save_autoencoder(tmp_path), known_share=request.param)
    return bld_core.load(str(tmp_path))


def left_half(images: torch.Tensor) -> torch.Tensor:
    return (torch.arange(8) < 4).expand(len(images), 8, 8)


def test_a_token_is_known_only_if_its_whole_patch_is() -> None:
    mask = torch.ones(3, 8, 12, dtype=torch.bool)
    mask[1, 3, 4] = False  # in the patch of row 0, column 1
    mask[2, :, 8:] = False
    assert known_tokens(mask, 2, 3).tolist() == [[True] * 6, [True, False, True] + [True] * 3, [True, True, False] * 2]


def test_known_pixels_come_back_untouched_and_the_others_are_completed(inpainter: Generator) -> None:
    images = stack(toy_images(5))
    mask = left_half(images).clone()
    mask[0] = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    completions = inpainter.inpaint(images, mask, count=6, seed=4)
    assert completions.shape == (5, 6, 8, 8, 1)
    assert completions.dtype == torch.uint8
    for j in range(6):
        assert torch.equal(completions[:, j][mask], images[mask])
    for of_one in completions:
        assert len({tuple(image.flatten().tolist()) for image in of_one}) > 1
    shared = inpainter.inpaint(images, left_half(images)[:1], seed=4)
    assert torch.equal(shared, inpainter.inpaint(images, left_half(images), seed=4))


def test_with_everything_known_the_images_come_back(inpainter: Generator) -> None:
    images = stack(toy_images(3))
    everything = torch.ones(1, 8, 8, dtype=torch.bool)
    assert torch.equal(inpainter.inpaint(images, everything, count=2), images[:, None].expand(-1, 2, -1, -1, -1))


def test_with_nothing_known_it_is_sampling(inpainter: Generator) -> None:
    images, nothing = stack(toy_images(6)), torch.zeros(1, 8, 8, dtype=torch.bool)
    labels = [0, 1, 2, -1, 0, 1]
    drawn = inpainter.inpaint(images, nothing, labels=labels, seed=3, guidance=1.0)
    assert torch.equal(drawn[:, 0], inpainter.sample(labels=labels, seed=3, guidance=1.0))


def test_hidden_pixels_never_show_through(inpainter: Generator) -> None:
    images = stack(toy_images(4))
    mask = left_half(images)
    other = torch.where(mask[..., None], images, 255 - images)
    here, there = (inpainter.inpaint(shown, mask, count=3, seed=2) for shown in (images, other))
    assert torch.equal(here, there)


def test_a_completion_is_a_function_of_seed_index_and_number(inpainter: Generator) -> None:
    images = stack(toy_images(4))
    mask = left_half(images)
    whole = inpainter.inpaint(images, mask, count=3, seed=2, batch_size=1)
    assert torch.equal(inpainter.inpaint(images, mask, count=2, seed=2, batch_size=1), whole[:, :2])
    part = inpainter.inpaint(images[2:], mask[2:], count=3, seed=2, first_index=2, batch_size=1)
    assert torch.equal(part, whole[2:])
    assert not torch.equal(inpainter.inpaint(images, mask, count=3, seed=3, batch_size=1), whole)
    twice = inpainter.inpaint(images[:1].expand(2, -1, -1, -1), mask[:1], seed=2)
    assert not torch.equal(twice[0], twice[1])


def test_a_bad_mask_or_count_is_refused(inpainter: Generator) -> None:
    images, mask = stack(toy_images(2)), torch.ones(1, 8, 8, dtype=torch.bool)
    for bad in (mask.byte(), torch.ones(1, 4, 8, dtype=torch.bool), mask.expand(3, -1, -1), mask[0]):
        with pytest.raises(ValueError, match=r"the mask is .*torch\.bool of shape \(B, H, W\)"):
            inpainter.inpaint(images, bad)
    with pytest.raises(ValueError, match="count is 0"):
        inpainter.inpaint(images, mask, count=0)
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        inpainter.inpaint(images, mask, labels=[0])
    with pytest.raises(ValueError, match="class 3 asked for"):
        inpainter.inpaint(images, mask, labels=[0, 3])


def test_a_prior_without_marks_refuses_to_be_conditioned(generator: Generator) -> None:
    images = stack(toy_images(2))
    with pytest.raises(ValueError, match="`known_share` 0"):
        generator.inpaint(images, left_half(images), inpainting="conditioned")


@pytest.mark.parametrize("known_share", [0.0, 0.5])
def test_the_stored_target_decides_completions_too(tmp_path: Path, known_share: float) -> None:
    images = stack(toy_images(8))
    drawn: list[torch.Tensor] = []
    for target in get_args(Target):  # the same weights each time
        folder = tmp_path / target
        save_prior(folder, save_autoencoder(folder), target=target, known_share=known_share)
        generator, mask = bld_core.load(str(folder)), left_half(images)
        drawn.append(generator.inpaint(images, mask, count=2, seed=3, steps=5))
        for j in range(2):
            assert torch.equal(drawn[-1][:, j][mask], images[mask])
        nothing = generator.inpaint(images, torch.zeros_like(mask), seed=3, steps=5)
        assert torch.equal(nothing[:, 0], generator.sample(8, seed=3, steps=5))
    flip, z0, z_prev = drawn
    assert not torch.equal(flip, z0)
    assert torch.equal(z0, z_prev)


def test_outpainting_continues_an_image(inpainter: Generator) -> None:
    images = stack(toy_images(3))
    wide = inpainter.outpaint(images, 22, labels=[0, 1, 2], seed=6)
    assert wide.shape == (3, 8, 22, 1)
    assert torch.equal(wide[:, :, :8], images)
    assert torch.equal(
        inpainter.outpaint(wide[:, :, :16], 22, labels=[0, 1, 2], seed=6), wide
    )  # and goes on from there
    assert not torch.equal(inpainter.outpaint(images, 22, labels=[0, 1, 2], seed=7), wide)
    for width in (8, 4):
        with pytest.raises(ValueError, match=rf"8 pixels wide and the result is to be {width}"):
            inpainter.outpaint(images, width)


def test_steps_that_are_asked_for_take_the_place_of_a_stored_grid(generator: Generator) -> None:
    assert generator.prior is not None
    expected = generator.sample(4, steps=8), generator.sample(4, steps=4)
    record = generator.prior.record
    stored = replace(record, sampling=replace(record.sampling, grid=[16, 12, 8, 4, 0]))
    generator.prior = replace(generator.prior, record=stored)
    assert torch.equal(generator.sample(4, steps=8), expected[0])
    assert torch.equal(generator.sample(4), expected[1])
