"""Studies, end to end on the small experiment: what is trained, what is kept, and what the figures are."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from PIL import Image

import bld_core
from bld_core.data.images import first_images
from bld_core.data.tensors import stack
from bld_core.diffusion.bound import likelihood_bound
from bld_core.diffusion.process import Calibration, CodeBatch, DiffusionConfig, Target
from bld_core.latents.reader import open_latents
from bld_core.metrics.classifier import Classifier
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.storage import files
from bld_core.training.checkpoint import load_weights, read_model_config
from cluster.config.experiment import Experiment
from cluster.evaluation.config import StudyConfig
from cluster.study import study
from cluster.study.rows import PAPER, STUDIES, StudyName
from cluster.study.study import run_study, study_table

SMALL = StudyConfig(
    samples=40,
    codes=32,
    classifier_steps=20,
    vlb_weights=[0.1, 1.0],
    steps=[4, 8, 1000],
    temperatures=[0.5, 1.0],
    guidances=[0.0, 2.0],
)


@pytest.fixture(scope="module")
def experiment(encoded: Experiment) -> Experiment:
    return replace(encoded, study=SMALL)


@pytest.mark.long
def test_a_study_trains_what_is_missing_and_measures_every_row(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_study(experiment, "lambda")
    folder = Path(experiment.folder, "study")
    assert [path.name for path in sorted((folder / "variants").iterdir()) if path.is_dir()] == ["lambda1"]
    assert [row["diffusion.vlb_weight"] for row in made["rows"]] == ["0.1", "1"]  # 0.1 is the experiment's own
    own, other = made["rows"]
    assert own["bound"] != other["bound"]
    assert own["paper"] == [4.36, 0.5]
    assert Image.open(folder / "lambda/plot.png").size == (3 * 480, 360)
    assert (folder / "lambda/table.txt").read_text() == f"{study_table(made)}\n"
    assert f"{own['bound']:.4f} +- {own['bound_se']:.4f}" in study_table(made)

    trained = f"{experiment.folder}/reference/classifier/classifier"
    data, config = experiment.data, read_model_config(trained)
    classifier = Classifier(32, 1, 10)
    load_weights(trained, classifier, config["hash"])

    @torch.no_grad()
    def moments(images: torch.Tensor) -> FeatureMoments:
        found = FeatureMoments()
        found.update(classifier.features(images))
        return found

    train = moments(stack(first_images(data.train, data, 10**6)))
    generator = bld_core.load(experiment.folder)
    drawn = generator.sample(labels=[i % 10 for i in range(40)], steps=4, guidance=1.0, batch_size=20)
    assert own["fd_classifier"] == pytest.approx(frechet_distance(train, moments(drawn)), rel=1e-4)
    held_out = stack(first_images(data.validation, data, 10**6))
    real = made["reference"]
    assert real["fd_classifier_held_out"] == pytest.approx(frechet_distance(train, moments(held_out)), rel=1e-3)
    reconstructed = generator.decode(generator.encode(held_out))
    assert real["fd_classifier_reconstructed"] == pytest.approx(
        frechet_distance(train, moments(reconstructed)), rel=1e-3
    )
    assert real["classifier_accuracy"] == config["accuracy"] > 0.2

    assert run_study(experiment, "lambda") == made
    assert "study/lambda: already done" in capsys.readouterr().out

    several = run_study(replace(experiment, study=replace(SMALL, seeds=2)), "lambda")
    variants = [path.name for path in sorted((folder / "variants").iterdir()) if path.is_dir()]
    assert variants == ["lambda1", "lambda1-seed1", "own-seed1"]
    rows = [json.loads((folder / f"lambda/rows/{number}.json").read_text()) for number in range(4)]
    for row, first, second in zip(several["rows"], rows[::2], rows[1::2], strict=True):
        assert row["bound"] == pytest.approx((first["bound"] + second["bound"]) / 2)
        assert row["bound_sd"] == pytest.approx(abs(first["bound"] - second["bound"]) / 2**0.5)
        assert f"{row['bound']:.4f} +- {row['bound_sd']:.4f}" in study_table(several)
    assert [row["bound"] for row in rows[::2]] == [own["bound"], other["bound"]]  # the same codes and noise
    assert "the mean of 2 trainings" in study_table(several)


@pytest.mark.long
def test_targets_and_groups_are_trained_and_measured(experiment: Experiment) -> None:
    targets = run_study(experiment, "targets")
    names = [row["diffusion.target"] for row in targets["rows"]]
    assert names == [f"{target}{reading}" for reading in ("", ", uncalibrated") for target in ("flip", "z0", "z_prev")]
    assert [row["paper"][0] for row in targets["rows"]] == [4.36, 4.72, 5.09] * 2
    groups = run_study(experiment, "groups")
    assert [row["prior.group, sampling.steps"] for row in groups["rows"]] == ["1, 4", "1, 8", "8, 4", "8, 8"]
    for made in (targets, groups):
        assert len({row["bound"] for row in made["rows"]}) == len(made["rows"])
        assert all(row["bound"] > 0 and row["fd_classifier"] > 0 for row in made["rows"])
    assert "group of 8" in {row["line"] for row in groups["rows"]}


@pytest.mark.long
def test_an_interrupted_study_measures_no_row_twice_and_workers_change_nothing(experiment: Experiment) -> None:
    made = run_study(experiment, "steps")
    assert [row["x"] for row in made["rows"]] == [4, 8]
    prior, process = bld_core.load(experiment.folder).prior, experiment.diffusion.make_process()
    assert prior is not None
    held_out = open_latents(f"{experiment.folder}/latents", "validation").read()
    codes = CodeBatch.numbered(*held_out.part(slice(32), torch.device("cpu")))
    for row in made["rows"]:
        strided = likelihood_bound(prior.network, process, codes, process.schedule.grid(int(row["x"])))
        assert row["bound"] == pytest.approx(strided.bits_per_bit, rel=1e-5)
    folder = Path(experiment.folder, "study/steps")
    first = folder / "rows/0.json"
    first.write_text(json.dumps(json.loads(first.read_text()) | {"seconds": 5.0}))
    for gone in ("rows/1.json", "table.json"):
        (folder / gone).unlink()
    again = run_study(replace(experiment, cluster=replace(experiment.cluster, workers=2)), "steps")
    assert again["rows"][0] == made["rows"][0] | {"seconds": 5.0}
    assert again["rows"][1] == made["rows"][1] | {"seconds": again["rows"][1]["seconds"]}


@pytest.mark.long
def test_the_study_of_sampling_finds_what_is_nearest_to_held_out_images(experiment: Experiment) -> None:
    config = replace(experiment.evaluation, classifier=True, precision_recall=True, bootstrap=20)
    experiment = replace(experiment, evaluation=config)
    made = run_study(experiment, "sampling")
    rows, folder = made["rows"], Path(experiment.folder, "study/sampling")
    assert [row["line"] for row in rows] == ["w 0", "w 0", *["w 2", "w 2 in 0.2-0.8"] * 2]
    assert {row["x"] for row in rows} == {0.5, 1.0}
    assert all({"fd_classifier_se", "precision_classifier", "recall_classifier"} <= set(row) for row in rows)
    best = min(rows, key=lambda row: row["fd_classifier_to_held_out"])
    assert rows[made["best"]["row"]] == best
    found = yaml.safe_load((folder / "best.yaml").read_text())["sampling"]
    assert found["temperature"] == best["x"]
    assert best["line"].startswith(f"w {found['guidance']:g}")

    # Its samples by hand, and what the table says of them.
    trained = f"{experiment.folder}/reference/classifier/classifier"
    classifier = Classifier(32, 1, 10)
    load_weights(trained, classifier, read_model_config(trained)["hash"])
    labels = [i % 10 for i in range(40)]
    drawn = bld_core.load(experiment.folder).sample(labels=labels, steps=4, batch_size=20, **found)
    held_out = stack(first_images(experiment.data.validation, experiment.data, 10**6))
    moments = [FeatureMoments(), FeatureMoments()]
    with torch.no_grad():
        for each, images in zip(moments, (held_out, drawn), strict=True):
            each.update(classifier.features(images))
    assert best["fd_classifier_to_held_out"] == pytest.approx(frechet_distance(*moments), rel=1e-3)


def test_what_each_study_compares() -> None:
    experiment = Experiment(
        diffusion=DiffusionConfig(steps=32),
        study=StudyConfig(training_steps=7, temperatures=[0.5, 1.2], learning_rates=[1e-3, 4e-3]),
    )
    rows = {name: make_rows(experiment) for name, (_, make_rows) in STUDIES.items()}
    names: dict[StudyName, list[str]] = {
        "lambda": ["lambda0", "lambda0.01", "own", "lambda1"],
        "targets": ["flip", "own", "z_prev", "flip-uncalibrated", "z0-uncalibrated", "z_prev-uncalibrated"],
        "groups": ["own"] * 4 + ["group8"] * 4,
        "schedule": ["own", "own", "cosine", "cosine", "sigmoid", "sigmoid"],
        "samplers": ["own", "autoregressive", "absorbing"],
        "trunk": [
            "trunk-plain",
            "own",
            "trunk-qk_norm-swiglu-adaln",
            "trunk-rms_norm-swiglu-adaln",
            "trunk-rms_norm-qk_norm-adaln",
            "trunk-rms_norm-qk_norm-swiglu",
        ],
        "optimizer": ["adamw-0.001", "adamw-0.004", "muon-0.001", "muon-0.004"],
    }
    for name, expected in names.items():
        assert [row.experiment.name for row in rows[name]] == expected
        assert {row.experiment.root for row in rows[name]} == {files.join(experiment.folder, "study/variants")}
        assert {row.experiment.prior_training.steps for row in rows[name]} == {7}
    asked = [(row.experiment.diffusion.calibration, row.experiment.diffusion.target) for row in rows["targets"]]
    assert asked == list(itertools.product(get_args(Calibration), get_args(Target)))
    assert set(PAPER["targets"][1]) == {row.label for row in rows["targets"]}
    assert [(row.experiment.prior.group, row.sampling.steps) for row in rows["groups"]] == [
        (group, steps) for group in (1, 8) for steps in (4, 8, 16, 32)
    ]
    assert all(row.bounds["bound"].sampling == row.sampling for row in rows["groups"])
    asked = [row.experiment.prior_training for row in rows["optimizer"]]
    assert [(each.optimizer, each.learning_rate) for each in asked] == [
        (name, rate) for name in ("adamw", "muon") for rate in (1e-3, 4e-3)
    ]
    assert [row.line for row in rows["optimizer"]] == ["adamw", "adamw", "muon", "muon"]
    assert list(rows["schedule"][3].bounds) == ["bound", "bound_4", "bound_8", "bound_16", "bound_32"]
    assert rows["schedule"][3].sampling.spacing == "t"
    assert [(row.sampling.steps, row.sampling.temperature) for row in rows["steps"]] == [
        (n, 1.0) for n in (4, 8, 16, 32)
    ]
    assert [row.sampling.temperature for row in rows["temperature"]] == [0.5, 1.2]
    assert {row.sampling.guidance for row in rows["sampling"]} == {0.0}  # no classes
    for name in ("steps", "temperature", "sampling"):
        assert all(row.experiment == experiment for row in rows[name])
    joint = replace(experiment, prior=replace(experiment.prior, group=8))  # of binary diffusion alone
    assert [row.experiment.prior.group for row in STUDIES["samplers"][1](joint)] == [8, 1, 1]
    assert {row.experiment.prior.group for row in STUDIES["targets"][1](joint)} == {1}


def test_a_study_of_groups_draws_a_line_for_each() -> None:
    rows = [
        {"line": f"group of {g}", "x": n, "bound": g / n, "bound_se": 0.1, "fd": n, "seconds": g, "paper": []}
        for g in (1, 8)
        for n in (4, 16)
    ]
    made = {"study": "groups", "column": "sampling.steps", "distance": "fd", "rows": rows}
    assert study._plot(made).size == (3 * 480, 360)
    row = {"line": "", "x": "flip", "bound": 0.5, "bound_se": 0.1, "fd": 1, "seconds": 1, "paper": []}
    one_line = study._plot(made | {"rows": [row | {"x": name} for name in ("flip", "z0")], "study": "targets"})
    assert one_line.size == (2 * 480, 360)


def test_a_study_that_cannot_be_made_is_refused(encoded: Experiment) -> None:
    with pytest.raises(ValueError, match=r"study.steps is \[128\]; at least one must be at most T = 64"):
        run_study(replace(encoded, study=StudyConfig(steps=[128])), "steps")
    with pytest.raises(ValueError, match=r"prior.model is absorbing; studies start from binary"):
        run_study(replace(encoded, prior=replace(encoded.prior, model="absorbing")), "lambda")
    for field, value in {"samples": 1, "steps": [], "vlb_weights": [0.1, 0.1], "training_steps": -1}.items():
        with pytest.raises(ValueError, match=rf"study\.{field} is"):
            StudyConfig(**{field: value})  # pyright: ignore[reportArgumentType]
