"""The study of the code, end to end: rows from stage 1 on, and what they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bld_core.latents.reader import open_latents
from bld_core.trained import read_autoencoder, read_prior
from cluster.evaluation.config import StudyConfig
from cluster.study.code import CodeRow, code_rows, code_table, run_code_study
from tests.conftest import small_experiment, small_training


def test_every_row_differs_in_one_setting_and_all_have_codes_of_one_grid(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    experiment = small_experiment(tmp_path, digits)
    rows = code_rows(experiment)
    assert [row.label for row in rows] == [
        *("own", "entropy 0.01", "entropy 0.02", "entropy 0.05", "codes mode", "codes fade"),
        *("bits 4", "bits 16", "channels 2", "channels 8", "patch 2"),
    ]
    assert {row.experiment.code_shape[:2] for row in rows} == {experiment.code_shape[:2]}
    assert len({row.experiment.folder for row in rows}) == len(rows)
    patched = replace(experiment, autoencoder=rows[-1].experiment.autoencoder)
    back = code_rows(patched)[-1]
    assert (back.label, back.experiment.autoencoder.multipliers) == ("patch 1", [2, 2, 2, 2])
    joint = replace(experiment, prior=replace(experiment.prior, group=8))
    assert "bits 4" not in [row.label for row in code_rows(joint)]


@pytest.mark.long
def test_the_study_trains_every_row_from_stage_1_on_and_goes_on_after_an_interruption(
    tmp_path: Path, digits: dict[str, str], ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(
        small_experiment(tmp_path, digits),
        autoencoder_training=small_training(3),
        study=StudyConfig(training_steps=3, samples=20, codes=16, classifier_steps=5),
    )
    rows = [row for row in code_rows(experiment) if row.label in ("own", "bits 16")]

    def few_rows(_: object) -> list[CodeRow]:
        return rows

    monkeypatch.setattr("cluster.study.code.code_rows", few_rows)
    made = run_code_study(experiment)
    assert [row["code_bits"] for row in made["rows"]] == [128, 256]
    for row, found in zip(made["rows"], rows, strict=True):
        folder = found.experiment.folder
        prior, latents = read_prior(folder), open_latents(f"{folder}/latents", "train")
        assert prior.autoencoder_hash == read_autoencoder(folder).hash == latents.manifest.autoencoder_hash
        assert row["code_bits_entropy"] < row["code_bits_bound"] < 1.5 * row["code_bits"]
        assert row["fd_classifier"] > 0
    folder = Path(experiment.folder, "study/code")
    assert (folder / "table.txt").read_text() == f"{code_table(made)}\n"
    assert Image.open(folder / "plot.png").size == (2 * 480, 360)
    for gone in ("rows/1.json", "table.json"):
        (folder / gone).unlink()
    again = run_code_study(experiment)
    assert again == made
