"""What comes after the prior: samples, evaluation, sweep, registry; each from the finished small experiment."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import vgg16

import bld_core
from bld_core.autoencoder.baselines.vector import VectorBottleneck
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.perceptual import load_perceptual
from bld_core.data.images import first_images
from bld_core.data.pictures import picture, png
from bld_core.data.shards import Sample, write_shard
from bld_core.data.tensors import stack, to_float
from bld_core.diffusion.bound import likelihood_bound
from bld_core.diffusion.process import CodeBatch
from bld_core.latents.reader import open_latents
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.mind import DIRECTIONS, directions
from bld_core.metrics.reconstruction import ReconstructionQuality
from bld_core.metrics.selection import Selection
from bld_core.prior.transformer import ModelName
from bld_core.storage import files
from bld_core.storage.records import read_record, write_record
from bld_core.trained import AUTOENCODER
from bld_core.training.checkpoint import average_name, load_weights, read_model_config, save_model
from cluster.config.artifacts import open_codes
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn, Evaluator, SampleFeatures
from cluster.evaluation.cas import CasTask, cas_experiment
from cluster.evaluation.config import NEIGHBOURHOOD, EvaluationConfig, StudyConfig
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.extractors import EfficientNetLite0Features
from cluster.evaluation.references import Space, load_extractor, make_references
from cluster.evaluation.sample_metrics import Samples, over_seeds, precision_recall
from cluster.report.tables import report_table
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.sampling.inpainting import InpaintConfig, inpaint, read_images, read_mask
from cluster.sampling.sampler import Draw, drawn_labels
from cluster.sweep.run import sweep
from cluster.training.tasks import PriorTask, Worker
from cluster.training.train import train_prior
from tests.bld_core.toys import toy_samples
from tests.cluster.evaluation.test_exactness import small_file
from tests.conftest import copy_of


def test_the_average_with_the_best_bound_is_the_one_that_is_kept(finished: Experiment) -> None:
    task, decays = PriorTask(finished, finished.folder, open_codes(finished.folder)), finished.prior_training.ema_decays
    networks = [task.network().eval() for _ in decays]
    checkpoint = max(Path(finished.folder, "prior").glob("checkpoint-*"))
    for number, network in enumerate(networks):
        network.load_state_dict(load_file(checkpoint / f"{average_name(number)}.safetensors"))
    best = task.choose(networks, Worker(0, 1, torch.device("cpu")))
    assert read_model_config(f"{finished.folder}/prior/final")["metrics"]["ema_decay"] == decays[best]
    kept = load_file(f"{finished.folder}/prior/final/model.safetensors")
    for number, network in enumerate(networks):
        same = [torch.equal(weight, kept[name]) for name, weight in network.state_dict().items()]
        assert all(same) if number == best else not any(same)


def test_a_grid_is_a_picture_and_an_npz_of_the_same_images(finished: Experiment) -> None:
    grid = Path(draw_grid(finished, GridConfig(classes=[3, 7, -1], rows=2, seed=5, process=4)))
    named = GridConfig(classes=["3", 7, -1], rows=2, seed=5, process=4)  # digits are classes that have names
    assert draw_grid(finished, named) == str(grid)
    with pytest.raises(ValueError, match=r"class 'three' asked for, .*: its classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"):
        draw_grid(finished, GridConfig(classes=["three"]))
    assert Image.open(grid).size == (3 * 66 + 2, 2 * 66 + 2)
    process = np.asarray(Image.open(grid.with_name("process.png")))
    assert process.shape == (3 * 66 + 2, 4 * 66 + 2)
    for row in range(3):  # a sample of the first row and its way there
        sample = np.asarray(Image.open(grid))[:66, 66 * row : 66 * row + 66]
        assert np.array_equal(process[66 * row : 66 * row + 66, 3 * 66 : 4 * 66], sample)
    with np.load(grid.with_name("samples.npz")) as arrays:
        assert arrays["arr_0"].shape == (6, 32, 32, 1)
        assert arrays["arr_1"].tolist() == [3, 7, -1, 3, 7, -1]
        again = bld_core.load(finished.folder).sample(labels=[3, 7, -1] * 2, seed=5, steps=4, guidance=1.0)
        assert np.array_equal(arrays["arr_0"], again.numpy())


def test_a_picture_of_completions_shows_image_hole_and_completions(
    finished: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = InpaintConfig(samples=[2, 0], box=[16, 0, 32, 32], completions=3, label=4, seed=5)
    picture = Path(inpaint(finished, settings))
    shown = np.asarray(Image.open(picture))
    assert shown.shape == (2 * 66 + 2, 5 * 66 + 2)
    cells = [
        [shown[2 + 66 * row : 66 + 66 * row : 2, 2 + 66 * column : 66 + 66 * column : 2] for column in range(5)]
        for row in range(2)
    ]
    held_out = read_images(settings, finished.data).squeeze(-1).numpy()
    for image, (original, masked, *completions) in zip(held_out, cells, strict=True):
        assert np.array_equal(original, image)
        for cell in (masked, *completions):
            assert np.array_equal(cell[:, :16], image[:, :16])
        assert (masked[:, 16:] == 128).all()
        assert len({cell.tobytes() for cell in completions}) > 1
    generator = bld_core.load(finished.folder)
    again = generator.inpaint(
        torch.from_numpy(held_out[1:, ..., None]), read_mask(settings, 32)[None], count=3, labels=[4], seed=5,
        first_index=1, steps=4, guidance=1.0,
    )  # fmt: skip
    assert np.array_equal(again[0, :, ..., 0].numpy(), np.stack(cells[1][2:]))
    inpaint(finished, settings)
    assert "already done" in capsys.readouterr().out

    Image.fromarray(held_out[0]).save(tmp_path / "image.png")  # the same from files
    Image.fromarray(read_mask(settings, 32).byte().numpy() * 255).save(tmp_path / "mask.png")
    from_files = replace(settings, image=str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"), box=[])
    assert np.array_equal(np.asarray(Image.open(inpaint(finished, from_files))), shown[: 66 + 2])


def test_a_picture_that_cannot_be_made_is_refused(finished: Experiment, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    wrong = {
        r"box is \[0, 0, 40, 4\]": {"box": [0, 0, 40, 4]},
        r"small.png' is 8 x 8 pixels; it must be 32 x 32": {"mask": str(tmp_path / "small.png")},
        r"mask .*cannot be read": {"mask": str(tmp_path / "text.png")},
        r"image .*cannot be read": {"image": str(tmp_path / "text.png")},
        r"positions are 0\.\.": {"samples": [10**6]},
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            inpaint(finished, InpaintConfig(**settings))  # pyright: ignore[reportArgumentType]
    for settings in ({"completions": 0}, {"samples": []}, {"mask": "m.png", "box": [0, 0, 1, 1]}, {"box": [1, 2]}):
        with pytest.raises(ValueError, match=r"inpaint\."):
            InpaintConfig(**settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"inpaint.mask '.*absent.png' cannot be read"):
        inpaint(finished, InpaintConfig(mask=str(tmp_path / "absent.png")))


@pytest.mark.long
def test_the_report_does_not_depend_on_the_number_of_workers(finished: Experiment) -> None:
    asked = replace(
        finished.evaluation,
        labels="drawn",
        classifier=True,
        precision_recall=True,
        bootstrap=3,
        neighbours=3,
        export="npz",
        seeds=2,
    )
    experiment = replace(finished, evaluation=asked, study=StudyConfig(classifier_steps=20))
    report = evaluate(experiment)
    figures = report["figures"]
    assert 0 < figures["bound"] < 1.5
    assert 0 <= figures["class_accuracy"] <= 1
    assert figures["class_accuracy_real"] > 0.95
    assert "classifier_accuracy" not in figures, "that of the classifier in whose features images are compared"
    prior, process = bld_core.load(finished.folder).prior, finished.diffusion.make_process()
    assert prior is not None
    held_out = open_latents(f"{finished.folder}/latents", "validation").read()
    codes = CodeBatch.numbered(*held_out.part(slice(None), torch.device("cpu")))
    grid = finished.sampling.make_grid(process.schedule)
    assert len(grid) == 5
    strided = likelihood_bound(prior.network, process, codes, grid)
    assert figures["bound_sampling"] == pytest.approx(strided.bits_per_bit, rel=1e-5)
    assert sum(report["bound_profile"]) == pytest.approx(figures["bound"], rel=1e-9)
    evaluation = Path(experiment.folder, "evaluation")
    assert Image.open(evaluation / "bound-profile.png").size == (480, 360)
    samples = (evaluation / "samples.png").read_bytes()
    _check_samples(experiment, figures)

    workers = replace(experiment.cluster, workers=2, decode_tasks=3)  # each works on three shards at a time
    files.remove(f"{experiment.folder}/reference")
    two = evaluate(replace(experiment, cluster=workers, evaluation=replace(asked, export="png")))["figures"]
    assert two == pytest.approx(figures, rel=1e-12)
    assert (evaluation / "samples.png").read_bytes() == samples, "equal batches, drawn by another number of workers"
    assert "dB" in report_table(report)
    assert "fd_classifier " in report_table(report)
    assert "Prior and samples (40 of 4 steps)" in report_table(report)
    assert "same classifier on held-out" in report_table(report)
    last = np.asarray(Image.open(evaluation / "samples/000039.png"))
    assert np.array_equal(last, bld_core.load(experiment.folder).sample(  # the same sample in a batch of its own
        labels=drawn_labels(_class_counts(experiment), 40, 0)[39:], first_index=39, steps=4, guidance=1.0
    )[0, ..., 0].numpy())  # fmt: skip


def _class_counts(experiment: Experiment) -> list[int]:
    labels = open_latents(f"{experiment.folder}/latents").read().labels
    return np.bincount(labels, minlength=10).tolist()


def _in_batches_of(size: int, experiment: Experiment, labels: list[int]) -> dict[str, float]:
    """The figures of the same samples, in other batches, in this process."""
    space, config = Space("classifier"), replace(experiment.evaluation, class_accuracy=False)
    [reference], evaluator = make_references(experiment, [space]), Evaluator(experiment, [space])
    sets = [Samples(config, experiment, [reference], labels) for _ in range(config.seeds)]
    for seed, samples in enumerate(sets):
        for start in range(0, len(labels), size):
            some = labels[start : start + size]
            drawn = evaluator.work(SampleFeatures(Draw(experiment.sampling, some, len(some), start, seed)))
            assert isinstance(drawn, Drawn)
            samples.add(drawn)
    return over_seeds([samples.metrics() for samples in sets])


def _check_samples(experiment: Experiment, figures: dict[str, float]) -> None:
    """The figures of samples are those of the samples that were exported, and of all training images."""
    with np.load(Path(experiment.folder, "evaluation/samples.npz")) as arrays:
        drawn, labels = torch.from_numpy(arrays["arr_0"]), arrays["arr_1"].tolist()
    assert drawn.shape == (40, 32, 32, 1)
    assert labels == drawn_labels(_class_counts(experiment), 40, 0)
    extractor = load_extractor(experiment, Space("classifier"))
    images = first_images(experiment.data.train, experiment.data, 10**6)
    real = extractor(stack(images))
    again = bld_core.load(experiment.folder).sample(labels=labels, seed=1, steps=4, guidance=1.0)
    a, chosen = FeatureMoments(), Selection(40)
    a.update(real)
    chosen.update([image.key for image in images], real)
    found = {name: list[float]() for name in ("fd_classifier", "precision_classifier", "recall_classifier")}
    for pixels in (drawn, again):
        b, features = FeatureMoments(), extractor(pixels)
        b.update(features)
        values = (frechet_distance(a, b), *precision_recall(features, chosen.features))
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    for name, values in found.items():
        near = 1e-4 * values[0] if name == "fd_classifier" else 0.03  # 40 samples: one more or less is 0.025
        assert figures[name] == pytest.approx(sum(values) / 2, abs=near)
        assert figures[f"{name}_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=0.03 * max(1, *values))
    assert 0 < figures["fd_classifier_se"] < figures["fd_classifier"]
    assert 0 < figures["fd_classifier_held_out"] < figures["fd_classifier"]
    assert figures["rfd_classifier"] > 0
    with np.load(Path(experiment.folder, "reference/classifier/statistics.npz")) as arrays:
        np.testing.assert_allclose(arrays["mu"], a.mean.numpy(), rtol=1e-4, atol=1e-6)
        assert arrays["sigma"].shape == (128, 128)

    other = _in_batches_of(7, experiment, labels)
    for name in ("fd_classifier", "fd_classifier_se"):
        assert other[name] == pytest.approx(figures[name], rel=1e-4), "another batch size"

    nearest = torch.cdist(extractor(drawn[:32]).double(), real.double()).min(1)
    held_out = extractor(stack(first_images(experiment.data.validation, experiment.data, 32))).double()
    ratio = nearest.values.mean() / torch.cdist(held_out, real.double()).min(1).values.mean()
    assert figures["neighbour_ratio_classifier"] == pytest.approx(float(ratio), rel=1e-3)
    picture = np.asarray(Image.open(Path(experiment.folder, "evaluation/neighbours.png")))
    assert picture.shape == (10 * 66 + 2, 4 * 66 + 2)
    cells = [picture[2:66:2, 2 + 66 * column : 66 + 66 * column : 2] for column in range(2)]
    assert np.array_equal(cells[0], drawn[0, ..., 0].numpy())
    assert np.array_equal(cells[1], images[int(nearest.indices[0])].pixels[..., 0])


def test_a_classifier_is_trained_on_samples_and_asked_about_held_out_images(finished: Experiment) -> None:
    asked = EvaluationConfig(samples=16, batch_size=8, cas_steps=2, cas_batch_size=8)
    experiment = replace(finished, evaluation=asked)
    report = evaluate(experiment)
    figures = report["figures"]
    assert 0 <= figures["cas_top1"] <= figures["cas_top5"] <= 100
    folder = Path(experiment.folder, "evaluation/cas")
    images = first_images(f"{folder}/samples/*.tar", experiment.data, 100)
    assert [image.label for image in images] == [i % 10 for i in range(16)]
    drawn = bld_core.load(experiment.folder).sample(labels=[i % 10 for i in range(16)], steps=4, guidance=1.0)
    assert torch.equal(stack(images[:8]), drawn[:8])
    network = CasTask(cas_experiment(experiment), []).network().eval()
    load_weights(f"{folder}/classifier/final", network, read_model_config(f"{folder}/classifier/final")["hash"])
    held_out = first_images(experiment.data.validation, experiment.data, 1000)
    with torch.no_grad():
        likeliest = network(to_float(stack(held_out)).expand(-1, 3, -1, -1)).argmax(1)
    right = (likeliest == torch.tensor([image.label for image in held_out])).double().mean()
    assert figures["cas_top1"] == pytest.approx(100 * float(right), abs=0.3)
    assert "cas_top5" in report_table(report)
    _check_interrupted(experiment, report)
    two = replace(finished.cluster, workers=2)
    with pytest.raises(ValueError, match=r"`batch_size` is 9, which does not divide over 2 workers"):
        evaluate(replace(finished, evaluation=replace(asked, cas_batch_size=9), cluster=two))
    with pytest.raises(ValueError, match=r"batch_size 16, which makes 1 shards of samples for 2 workers"):
        evaluate(replace(finished, evaluation=replace(asked, batch_size=16), cluster=two))
    with pytest.raises(ValueError, match=r"cas_steps is 2, but prior.classes is 0"):
        evaluate(replace(experiment, prior=replace(experiment.prior, classes=0)))


@pytest.mark.long
def test_a_published_extractor_looks_once_at_the_images_of_all_experiments(
    finished: Experiment, inception_weights: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 6), ("validation", 3)):
        write_shard(f"{tmp_path}/{name}.tar", toy_samples(count, 32))
    path, sha256 = inception_weights
    experiment = replace(
        finished,
        root=str(copy_of(finished, tmp_path, "autoencoder", "latents", "prior")),
        data=replace(finished.data, train=f"{tmp_path}/train.tar", validation=f"{tmp_path}/validation.tar"),
        evaluation=EvaluationConfig(
            samples=4, batch_size=2, frechet=True, inception_weights=path, inception_sha256=sha256
        ),
    )
    figures = evaluate(experiment)["figures"]
    fd, rfd = (f"{name}_inception_{sha256[:8]}" for name in ("fd", "rfd"))
    assert figures[f"{fd}_held_out"] > 0
    assert min(figures[fd], figures[rfd]) > 0
    assert "fid" not in figures
    capsys.readouterr()
    space = Space("inception", sha256)
    [again] = make_references(replace(experiment, name="another", seed=1), [space])
    assert "already done" in capsys.readouterr().out
    assert Path(again.folder).parent == tmp_path / "references"
    assert again.metrics == {f"{fd}_held_out": figures[f"{fd}_held_out"]}
    with np.load(f"{again.folder}/statistics.npz") as arrays:
        np.testing.assert_array_equal(arrays["mu"], again.moments.mean.numpy())
        assert arrays["sigma"].shape == (2048, 2048)


def frechet_in_numpy(u: Any, v: Any) -> float:
    """The Frechet distance of few feature vectors, (n, F): tr (A B)^(1/2) by the singular values of their products."""
    x, y = ((vectors - vectors.mean(0)) / (len(vectors) - 1) ** 0.5 for vectors in (u, v))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.square(u.mean(0) - v.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * overlap)


@pytest.mark.long
def test_bits_an_image_are_those_of_the_code_the_encoder_and_the_bound(finished: Experiment, tmp_path: Path) -> None:
    for name, count in (("train", 6), ("validation", 4)):
        write_shard(f"{tmp_path}/{name}.tar", toy_samples(count, 32))
    experiment = replace(
        finished,
        root=str(copy_of(finished, tmp_path, "autoencoder", "latents", "prior")),
        data=replace(finished.data, train=f"{tmp_path}/train.tar", validation=f"{tmp_path}/validation.tar"),
        evaluation=EvaluationConfig(samples=6, batch_size=4, efficientnet_lite0=True, mind=True, export="npz"),
    )
    report = evaluate(experiment)
    figures = report["figures"]
    held_out, real = (stack(first_images(f"{tmp_path}/{n}.tar", experiment.data, 9)) for n in ("validation", "train"))
    network = bld_core.load(experiment.folder).autoencoder.network.requires_grad_(False)
    y = network.encode(to_float(held_out)).double().sigmoid()
    entropy = -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).sum() / math.log(2) / len(held_out)
    assert figures["code_bits"] == 4 * 4 * 8
    assert figures["code_bits_entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert figures["code_bits_bound"] == 128 * figures["bound"]
    assert figures["code_bits_bound_se"] == 128 * figures["bound_se"]
    assert re.search(r"\n +code_bits +128 .*\n +code_bits_entropy .*\n +code_bits_bound ", report_table(report))

    extractor = EfficientNetLite0Features(torch.device("cpu"))
    with np.load(Path(experiment.folder, "evaluation/samples.npz")) as arrays:
        drawn = torch.from_numpy(arrays["arr_0"])
    u, v, w = (extractor(images).double().numpy() for images in (drawn, real, held_out))
    name = "efficientnet_lite0"
    assert figures[f"fd_{name}"] == pytest.approx(frechet_in_numpy(u, v), rel=1e-4)
    assert figures[f"fdr_{name}"] == pytest.approx(frechet_in_numpy(u[:4], v) / frechet_in_numpy(w, v), rel=1e-4)
    along_u, along_v = (np.sort(x @ directions(DIRECTIONS, 1280).numpy().T, axis=0) for x in (u, v))
    assert figures[f"mind_{name}"] == pytest.approx(3 * 1280 * np.square(along_u - along_v).mean(), rel=1e-4)
    assert figures[f"rfd_{name}"] > 0
    assert "fdr_mean" not in figures, "of one extractor"


def _check_interrupted(experiment: Experiment, report: dict[str, Any]) -> None:
    """An evaluation that was interrupted after all was measured goes on from there."""
    folder = Path(experiment.folder, "evaluation")
    (folder / "report.json").unlink()
    measured = read_record(f"{folder}/measured.json")
    measured["figures"]["psnr"] = 1234.0
    write_record(f"{folder}/measured.json", measured)
    assert evaluate(experiment)["figures"] == report["figures"] | {"psnr": 1234.0}
    assert files.read_json(f"{folder}/report.json")["figures"]["cas_top1"] == report["figures"]["cas_top1"]


def test_samples_are_judged_on_the_latents_that_their_prior_was_trained_on(
    finished: Experiment, tmp_path: Path
) -> None:
    experiment = replace(finished, root=str(copy_of(finished, tmp_path, "autoencoder", "latents", "prior")))
    manifest = Path(experiment.folder, "latents/manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    trained = read_model_config(f"{experiment.folder}/prior/final")["latents_hash"]
    with pytest.raises(
        ValueError, match=rf"trained on latents {trained[:12]}, but those there are \w+: .* on these again"
    ):
        evaluate(experiment)


def test_too_few_training_images_are_refused_before_a_sample_is_drawn(finished: Experiment, tmp_path: Path) -> None:
    images = first_images(finished.data.train, finished.data, NEIGHBOURHOOD)
    shard = str(tmp_path / "three.tar")
    pictures = [png(picture(pixels)) for pixels in stack(images)]
    write_shard(shard, [Sample(i.key, "png", data, i.label) for i, data in zip(images, pictures, strict=True)])
    experiment = replace(
        finished,
        root=str(copy_of(finished, tmp_path, "autoencoder", "latents", "prior")),
        data=replace(finished.data, train=shard, validation=shard),
        evaluation=EvaluationConfig(samples=4, classifier=True, precision_recall=True, export="png"),
        study=StudyConfig(classifier_steps=1),
    )
    with pytest.raises(ValueError, match=r"data.train holds 3 images; evaluation.precision_recall needs at least 4"):
        evaluate(experiment)
    assert not Path(experiment.folder, "evaluation/samples").exists()


def test_stage_1_is_evaluated_by_itself_whatever_its_latent(encoded: Experiment, tmp_path: Path) -> None:
    experiment = replace(encoded, root=str(tmp_path), autoencoder=replace(encoded.autoencoder, latent="vector"))
    torch.manual_seed(0)
    network = make_autoencoder(experiment.autoencoder, 1)
    assert isinstance(network.bottleneck, VectorBottleneck)
    torch.nn.init.normal_(network.bottleneck.codebook)
    config = {
        "autoencoder": asdict(experiment.autoencoder),
        "code_shape": experiment.code_shape,
        "image_size": 32,
        "channels": 1,
    }
    save_model(str(Path(experiment.folder, AUTOENCODER)), network.state_dict(), config)
    images = stack(first_images(experiment.data.validation, experiment.data, 24))
    shard = str(tmp_path / "held-out.tar")
    write_shard(shard, [Sample(str(i), "png", png(picture(pixels)), 0) for i, pixels in enumerate(images)])
    with torch.device("meta"):
        vgg = nn.Sequential(OrderedDict(features=vgg16().features))
    weights, sha256 = small_file(vgg, tmp_path / "vgg.pth")
    loss = LossConfig(vgg_weights=weights, vgg_sha256=sha256)
    data, asked = replace(experiment.data, validation=shard), replace(experiment.evaluation, lpips=True)
    experiment = replace(experiment, data=data, loss=loss, evaluation=asked)
    report = evaluate(experiment)
    generator = bld_core.load(experiment.folder)
    quality = ReconstructionQuality()
    reconstructions = generator.reconstruct(images)
    quality.update(images, reconstructions)
    distance = load_perceptual(loss, torch.device("cpu"))(to_float(images), to_float(reconstructions))
    assert (
        report["figures"]
        == pytest.approx(
            {
                "code_bits": 160,  # of 16 numbers below 1,024
                "psnr": quality.psnr.mean,
                "psnr_std": quality.psnr.deviation,
                "ssim": quality.ssim.mean,
                "ssim_std": quality.ssim.deviation,
                f"lpips_{sha256[:8]}": float(distance.mean()),
                f"lpips_{sha256[:8]}_std": float(distance.std()),
            },
            rel=1e-4,  # another batch size
        )
    )
    assert "dead_bits" not in report_table(report)
    with pytest.raises(ValueError, match=r"vector latent, which has no bits.*can only reconstruct"):
        generator.encode(images)


def test_a_new_prior_makes_samples_again(finished: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    draw_grid(finished, GridConfig(rows=1))
    draw_grid(finished, GridConfig(rows=1))
    assert "already done" in capsys.readouterr().out
    config = Path(finished.folder, "prior/final/config.json")
    original = config.read_text()
    write_record(str(config), json.loads(original) | {"run": "another"})
    try:
        draw_grid(finished, GridConfig(rows=1))
    finally:
        config.write_text(original)
    assert "already done" not in capsys.readouterr().out


@pytest.mark.parametrize("model", [pytest.param("autoregressive", marks=pytest.mark.long), "absorbing"])
def test_a_comparator_goes_the_same_way_by_one_field(encoded: Experiment, tmp_path: Path, model: ModelName) -> None:
    experiment = replace(
        encoded,
        root=str(copy_of(encoded, tmp_path, "autoencoder", "latents")),
        prior=replace(encoded.prior, model=model),
        evaluation=replace(encoded.evaluation, class_accuracy=False),
    )
    trained = read_model_config(train_prior(experiment))
    assert trained["prior"]["model"] == model
    assert 0.3 < trained["metrics"]["val_bound"] < 1.02
    draw_grid(experiment, GridConfig(classes=[3, -1], rows=2, seed=5))
    steps = 16 if model == "autoregressive" else 4
    [folder] = Path(experiment.folder, "samples").glob("seed5*/")
    assert folder.name.startswith(f"seed5-steps{steps}-")
    with np.load(folder / "samples.npz") as arrays:
        again = bld_core.load(experiment.folder).sample(labels=[3, -1] * 2, seed=5, guidance=1.0)
        assert np.array_equal(arrays["arr_0"], again.numpy())
    report = evaluate(experiment)
    assert report["sampling"]["steps"] == steps
    assert report["figures"]["bound"] == pytest.approx(trained["metrics"]["val_bound"], rel=1e-3)
    with pytest.raises(ValueError, match=rf"grid.process is 4, but prior.model is {model}"):
        draw_grid(experiment, GridConfig(process=4))
    with pytest.raises(ValueError, match=rf"prior.model is {model}.*sweep with prior.model binary"):
        sweep(experiment)
    if model == "autoregressive":
        with pytest.raises(ValueError, match=r"cannot complete an image"):
            inpaint(experiment, InpaintConfig(samples=[0]))
