"""An experiment and a registry that an earlier version made are opened, and give what they gave then.

golden/experiment-2026-11 was made by the commands of commit a072fd9 from 32 handwritten digits: every stage but the
samples, without checkpoints, and a registered version. Its root is written <root>, and MLflow's database is its SQL.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from base64 import b64decode
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import bld_core
from bld_core.data.images import ImageConfig, first_images
from bld_core.data.pictures import read_picture
from bld_core.data.tensors import stack
from bld_core.latents import open_latents
from bld_core.storage import files
from cluster.registry.registry import fetch_model
from cluster.tracking.store import open_client
from tests.pipelines.test_commands import run

GOLDEN = Path(__file__).parent / "golden" / "experiment-2026-11"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected" / "expected.json").read_text())
LABELS, SIZE = [0, 1, 2], 16
DEFAULTS_THEN = ("--diffusion.target", "flip", "--prior.trunk", "[]")  # experiment.yaml does not name them


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root with the experiment and its registry, as if it had been made there."""
    root = tmp_path / "root"
    shutil.copytree(GOLDEN, root)
    for record in (*root.rglob("stage.json"), root / "shards" / "shards.json"):
        record.write_text(record.read_text().replace("<root>", str(root)))
    sql = gzip.decompress((root / "mlflow.sql.gz").read_bytes()).decode()
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        database.executescript(sql.replace("<root>", str(root)))
    monkeypatch.setenv("BLD_ROOT", str(root))  # the root in experiment.yaml
    return root


def assert_as_then(images: Tensor, name: str) -> None:
    """Whether images are those of a picture, side by side, to one grey level.

    Float arithmetic differs in the last bits from one kind of processor to another, and rounding to a grey level may
    show that. Another bit of a code, or another weight, changes an image by far more.
    """
    picture = np.asarray(Image.open(GOLDEN / "expected" / f"{name}.png"))
    found = np.concatenate([*images[..., 0].numpy()], axis=1)
    assert found.shape == picture.shape
    assert np.abs(found.astype(int) - picture.astype(int)).max() <= 1


def test_an_older_experiment_is_loaded_and_draws_the_images_that_it_drew(older: Path) -> None:
    pair = bld_core.load(str(older / "older"))
    assert_as_then(pair.sample(labels=LABELS, seed=7, steps=4), "samples")
    data = ImageConfig(image_size=SIZE, channels=1, extensions=["png"])
    held_out = stack(first_images(str(older / "shards" / "validation-0000.tar"), data, 8))
    assert_as_then(pair.reconstruct(held_out), "reconstructions")


def test_older_latents_are_opened_and_are_the_same_bytes(older: Path) -> None:
    for split in ("train", "validation"):
        latents, expected = open_latents(str(older / "older" / "latents"), split), EXPECTED["latents"][split]
        rows = latents.read()
        assert latents.hash == EXPECTED["latents_hash"]
        assert (len(rows), latents.shape, latents.classes) == (expected["rows"], (4, 4, 8), 10)
        assert files.sha256(rows.packed.tobytes()) == expected["codes"]
        assert rows.labels.tolist() == expected["labels"]


def test_every_stage_of_an_older_experiment_is_done_and_its_report_can_be_written_again(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = older / "older"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stages = {
        "stage1_ae.py": "autoencoder",
        "encode_latents.py": "latents",
        "stage2_prior.py": "prior",
        "evaluate.py": "evaluation",
    }
    config = str(older / "experiment.yaml")
    assert run(monkeypatch, "stage2_prior.py", "--config", config) == 2
    assert "  diffusion.target: 'flip' -> 'z0'\n  prior.trunk: [] -> ['rms_norm'" in capsys.readouterr().err
    for script, stage in stages.items():
        assert run(monkeypatch, script, "--config", config, *DEFAULTS_THEN) == 0, capsys.readouterr().err
        assert f"{stage}: already done in {folder / stage}" in capsys.readouterr().out
    page = folder / "evaluation" / "report.html"
    assert f"{files.read_json(str(folder / 'evaluation' / 'report.json'))['figures']['bound']:.4f}" in page.read_text()
    locks = {folder / f"{stage}.lock" for stage in stages.values()}
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path not in locks | {page}} == before


def test_an_older_registry_hands_out_its_champion_and_knows_the_pair_again(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{older}/mlflow.db"
    folder = fetch_model("models:/older@champion", str(tmp_path / "fetched"), uri)
    assert_as_then(bld_core.load(folder).sample(labels=LABELS, seed=7, steps=4), "samples")
    served = mlflow.pyfunc.load_model(folder)
    answer = served.predict(pd.DataFrame([{"label": LABELS[0], "seed": 7, "steps": 4}]))
    image = read_picture(b64decode(answer[0]["images"][0]), SIZE, 1, "answer")
    again = bld_core.load(folder).sample(labels=LABELS[:1], seed=7, steps=4)
    assert torch.equal(image[None], again)
    assert run(monkeypatch, "register.py", "--config", str(older / "experiment.yaml")) == 0, capsys.readouterr().err
    assert "version 1 is already" in capsys.readouterr().out
    assert [found.version for found in open_client(uri).search_model_versions("name = 'older'")] == [1]
