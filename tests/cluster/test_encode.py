"""The encode job: the same bytes however the work is split or interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bld_core.codes import open_latents
from bld_core.files import read_json
from cluster.encode import encode_latents
from cluster.experiment import Experiment
from tests.conftest import copy_of


def latent_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix == ".parquet"
    }


def test_every_image_is_encoded_once_and_the_manifest_says_so(encoded: Experiment) -> None:
    folder = f"{encoded.folder}/latents"
    train, validation = open_latents(folder), open_latents(folder, "validation")
    assert len(train) == 1617
    assert len(validation) == 180
    assert train.shape == (4, 4, 8)
    assert train.classes == validation.classes == 10
    rows = train.read()
    assert len({*rows.keys.to_pylist(), *validation.read().keys.to_pylist()}) == 1797
    assert set(rows.labels.tolist()) == set(range(10))
    assert all(entry["skipped"] == {} for entry in train.manifest["files"])


def test_an_interrupted_job_resumes_and_ends_with_the_same_bytes(encoded: Experiment, tmp_path: Path) -> None:
    whole = Path(encoded.folder, "latents")
    experiment = replace(
        encoded,
        root=str(copy_of(encoded, tmp_path, "autoencoder", "latents")),
        cluster=replace(encoded.cluster, workers=1),
    )
    folder = Path(experiment.folder, "latents")
    (folder / "manifest.json").unlink()
    (folder / "train" / "train-0001.parquet").unlink()
    kept = folder / "train" / "train-0000.parquet"
    written = kept.stat().st_mtime_ns
    encode_latents(experiment)
    assert latent_files(folder) == latent_files(whole)
    assert read_json(f"{folder}/manifest.json") == read_json(f"{whole}/manifest.json")
    assert kept.stat().st_mtime_ns == written, "a finished shard was encoded again"
