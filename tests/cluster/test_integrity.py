"""Whatever happens to a stored file is found, or makes no difference; and what a message says to do helps."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bld_core.errors import DamagedError, UserError
from bld_core.storage import files
from bld_core.storage.records import part_of, read_record, write_record
from bld_core.trained import load_autoencoder
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents, verify_latents
from cluster.evaluation.config import EvaluationConfig, StudyConfig
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.references import Space, make_references
from cluster.report.page import write_report
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.training.checkpoints import verify_training
from cluster.training.train import train_prior
from tests.conftest import copy_of
from tests.mutations import Mutation
from tests.pipelines.test_commands import run
from tests.pipelines.test_errors import flags_of

STAGES = ("autoencoder", "latents", "prior")
STORED = [
    *(f"{stage}/{file}" for stage in STAGES for file in ("stage.json", "stage.copy.json")),
    *(f"{stage}/final/{file}" for stage in ("autoencoder", "prior") for file in ("config.json", "model.safetensors")),
    *(f"autoencoder/checkpoint-0000006/{file}" for file in ("meta.json", "model.safetensors")),
    *(
        f"prior/checkpoint-00000{step}/{file}"
        for step in (10, 20)
        for file in ("meta.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors", "ema-1.safetensors")
    ),
    *("latents/manifest.json", "latents/validation/validation-0000.parquet"),
    *(f"latents/train/train-000{shard}.parquet" for shard in range(4)),
]


@pytest.fixture(scope="module")
def whole(encoded: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment with all that stages keep: two checkpoints of the prior, too."""
    root = copy_of(encoded, tmp_path_factory.mktemp("whole"), "autoencoder", "latents")
    experiment = replace(
        encoded,
        root=str(root),
        tracking=TrackingConfig(uri=encoded.tracking.resolve(encoded.root)),
        prior_training=replace(encoded.prior_training, checkpoint_every=10),
    )
    train_prior(experiment)
    return experiment


@pytest.fixture
def spoiled(whole: Experiment, tmp_path: Path) -> Experiment:
    """A copy of it, to spoil."""
    return replace(whole, root=str(copy_of(whole, tmp_path, *STAGES)))


def made(experiment: Experiment) -> dict[str, bytes]:
    """The results of the stages."""
    folder = Path(experiment.folder)
    results = [*folder.glob("*/final/*"), *folder.glob("latents/*/*.parquet"), folder / "latents/manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in results if ".damaged" not in path.name}


def unfinished(experiment: Experiment, stage: str) -> None:
    shutil.rmtree(Path(experiment.folder, stage, "final"))


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def test_a_bad_newest_checkpoint_is_set_aside_and_the_one_before_taken(
    whole: Experiment, spoiled: Experiment, capfd: pytest.CaptureFixture[str]
) -> None:
    unfinished(spoiled, "prior")
    folder = Path(spoiled.folder, "prior")
    (folder / "checkpoint-0000020/optimizer.safetensors").unlink()
    (folder / "checkpoint-notes.txt").write_text("the good one is 20")
    listed = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint-gone", "metrics": {}}]}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(listed))
    train_prior(spoiled)
    said = capfd.readouterr().err
    assert re.search(
        r"prior: '.*checkpoint-0000020/optimizer\.safetensors' is missing; set aside as '.*20\.damaged'", said
    )
    assert "prior: going on from step 10; the 10 steps up to 20 are lost and taken again" in said
    assert made(spoiled) == made(whole)
    assert (folder / "checkpoint-0000020.damaged/model.safetensors").exists()
    assert (folder / "checkpoint-notes.txt").exists()


def test_no_good_checkpoint_is_a_start_from_the_first_step(
    whole: Experiment, spoiled: Experiment, capfd: pytest.CaptureFixture[str]
) -> None:
    unfinished(spoiled, "prior")
    older, newer = sorted(Path(spoiled.folder, "prior").glob("checkpoint-*"))
    (newer / "meta.json").unlink()
    write_record(str(older / "meta.json"), files.read_json(str(older / "meta.json")) | {"step": 9})
    train_prior(spoiled)
    said = capfd.readouterr().err
    assert "checkpoint-0000020' was never finished: meta.json, which is written last, is missing\n" in said
    assert "going on from step 0; the 20 steps up to 20 are lost" in said
    assert made(spoiled) == made(whole)


# --- Done -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a bit flipped", "cut off", "deleted"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_the_remedy_for_a_damaged_model_helps(
    file: str,
    damage: str,
    whole: Experiment,
    spoiled: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Mutation(f"autoencoder/final/{file}", damage, 3).apply(Path(spoiled.folder))
    with pytest.raises(UserError, match=f"{file}"):
        load_autoencoder(spoiled.folder)
    flags = flags_of(spoiled, tmp_path)
    assert run(monkeypatch, "stage1_ae.py", *flags, "--verify") == 2
    remedy = "" if (file, damage) == ("config.json", "deleted") else " --mend"
    assert capsys.readouterr().err.endswith(f": pipelines/stage1_ae.py{remedy}\n")
    assert run(monkeypatch, "stage1_ae.py", *flags, *remedy.split()) == 0
    assert made(spoiled) == made(whole)
    assert run(monkeypatch, "stage1_ae.py", *flags, "--verify") == 0
    assert "and 1 checkpoints: all is as it was written" in capsys.readouterr().out


def test_a_missing_shard_alone_is_made_again(
    whole: Experiment, spoiled: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(spoiled.folder, "latents")
    (folder / "train/train-0002.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    with pytest.raises(DamagedError, match=r"train-0002\.parquet' is missing"):
        train_prior(spoiled)
    encode_latents(spoiled)
    assert "latents: '" in (said := capsys.readouterr().out)
    assert "train/train-0002.parquet' is missing; it is made again" in said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert made(spoiled) == made(whole)
    train_prior(spoiled)


def test_a_manifest_with_one_entry_removed_is_found(whole: Experiment, spoiled: Experiment) -> None:
    url = f"{spoiled.folder}/latents/manifest.json"
    manifest = files.read_json(url)
    manifest["files"].pop(1)
    files.write_json(url, manifest)
    with pytest.raises(DamagedError, match=r"manifest\.json' says of itself"):
        train_prior(spoiled)
    del manifest["record_sha256"]  # as an early version wrote it
    files.write_json(url, manifest)
    with pytest.raises(DamagedError, match=r"train-0001\.parquet' is not named in manifest\.json"):
        train_prior(spoiled)
    encode_latents(spoiled)
    assert made(spoiled) == made(whole)


def test_a_resumed_encode_makes_damaged_shards_again_and_names_them(
    whole: Experiment, spoiled: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(spoiled.folder, "latents")
    (folder / "manifest.json").unlink()
    for shard, damage in enumerate(("a bit flipped", "cut off", "emptied")):
        Mutation(f"latents/train/train-000{shard}.parquet", damage, shard).apply(Path(spoiled.folder))
    encode_latents(spoiled)
    said = capsys.readouterr().out
    for shard in range(3):
        assert re.search(rf"latents: '.*train-000{shard}\.parquet' is not what was written.*set aside as", said)
    assert "train-0003" not in said
    assert made(spoiled) == made(whole)
    assert verify_latents(spoiled).startswith("verified 5 files, 1797 rows, ")


def test_a_damaged_stage_record_is_written_again_from_its_copy(
    spoiled: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Path(spoiled.folder, "prior/stage.json")
    before = record.read_bytes()
    record.write_bytes(before[:40])
    shutil.copy(Path(spoiled.folder, "autoencoder/stage.json"), Path(spoiled.folder, "latents/stage.json"))
    encode_latents(spoiled)
    assert "stage.json' is the record of 'autoencoder': it was replaced; set aside as" in capsys.readouterr().out
    train_prior(spoiled)
    said = capsys.readouterr().out
    assert re.search(r"stage\.json' is not JSON .*; set aside as '.*stage\.json\.damaged', and written again", said)
    assert "prior: already done" in said
    assert record.read_bytes() == before
    record.write_bytes(before[:40])
    Path(spoiled.folder, "prior/stage.copy.json").unlink()
    with pytest.raises(UserError, match=r"stage\.json' is not JSON .*pipelines/stage2_prior.py --fresh"):
        train_prior(spoiled)


def test_a_damaged_file_of_samples_is_named_and_made_again(
    whole: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = replace(whole, root=str(copy_of(whole, tmp_path, *STAGES)))
    settings = GridConfig(rows=1)
    picture = Path(draw_grid(experiment, settings))
    before = picture.read_bytes()
    draw_grid(experiment, settings)
    assert "already done" in capsys.readouterr().out
    for name, damage in (("grid.png", "deleted"), ("samples.npz", "a bit flipped")):
        Mutation(name, damage, 3).apply(picture.parent)
        draw_grid(experiment, settings)
        said = capsys.readouterr().out
        assert re.search(rf"samples/.*/{name}' .*; it is made again", said), said
        assert picture.read_bytes() == before
    record = read_record(str(picture.with_name("stage.json")))
    del record["files"]  # as an early version wrote it
    for name in ("stage.json", "stage.copy.json"):
        write_record(str(picture.with_name(name)), record)
    draw_grid(experiment, settings)
    assert "already done" in capsys.readouterr().out


@pytest.mark.long
def test_damage_to_a_reference_is_found_where_it_is_read_and_to_an_evaluation_where_it_is_shown(
    whole: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = replace(
        whole,
        root=str(copy_of(whole, tmp_path, *STAGES)),
        evaluation=EvaluationConfig(samples=20, batch_size=20, classifier=True, export="npz"),
        study=StudyConfig(classifier_steps=2),
    )
    report = evaluate(experiment)
    folder = Path(experiment.folder, "evaluation")
    assert set(report["files"]) == {"samples.npz", *report_pictures(folder)}
    for name, part in report["files"].items():
        assert part == part_of((folder / name).read_bytes())
    [reference] = make_references(experiment, [Space("classifier")])
    for name in ("moments.safetensors", "statistics.npz", "reference.json"):
        Mutation(name, "a bit flipped", 40).apply(Path(reference.folder))
        capsys.readouterr()
        [again] = make_references(experiment, [Space("classifier")])
        assert f"{name}' has sha256" in capsys.readouterr().out
        assert (again.hash, again.metrics) == (reference.hash, reference.metrics)
    Mutation("samples.png", "a bit flipped", 3).apply(folder)
    with pytest.raises(DamagedError, match=r"samples\.png' has sha256 \w+, report\.json says") as raised:
        write_report(experiment)
    assert raised.value.stages == ("evaluation",)
    (folder / "report.json").unlink()  # an evaluation that was interrupted after all was measured
    again = evaluate(experiment)
    assert "samples.png' has sha256" in capsys.readouterr().out
    assert again == report
    write_report(experiment)


def report_pictures(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.png")]


def test_verify_of_every_stage_finds_nothing_wrong_with_what_was_just_made(whole: Experiment) -> None:
    assert "1 checkpoints" in verify_training(whole, "autoencoder")
    assert "2 checkpoints" in verify_training(whole, "prior")
    assert verify_latents(whole)
