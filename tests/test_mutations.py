"""Whatever is done to a stored file is found or harmless; what the command says mends it, to the same bytes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bld_core
from bld_core.errors import UserError
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.encode import encode_latents, verify_latents
from cluster.training.checkpoints import verify_training
from cluster.training.train import train_autoencoder, train_prior
from tests.conftest import copy_of, small_training
from tests.mutations import Damage, damages

STAGES = ("autoencoder", "latents", "prior")
SEED = 15
SHORT, ALL = 4, 90


@pytest.fixture(scope="module")
def stored(encoded: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A finished experiment with two checkpoints of its prior; its MLflow runs are those of `encoded`."""
    root = copy_of(encoded, tmp_path_factory.mktemp("stored"), "autoencoder", "latents")
    experiment = replace(
        encoded,
        root=str(root),
        prior_training=small_training(20, ema_decay=[0.9, 0.3], checkpoint_every=10),
        tracking=TrackingConfig(uri=encoded.tracking.resolve(encoded.root)),
    )
    train_prior(experiment)
    assert len([*Path(experiment.folder, "prior").glob("checkpoint-*")]) == 2
    return experiment


def results(experiment: Experiment) -> dict[str, bytes]:
    """What the stages have made, but for checkpoints and their own records."""
    folder = Path(experiment.folder)
    found = [*folder.glob("*/final/*"), *folder.glob("latents/manifest.json"), *folder.glob("latents/*/*.parquet")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found) if path.is_file()}


def said_by(work: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[str, bool]:
    """What a command says of damage, and whether it did its work; other errors than a user's are faults of ours."""
    capsys.readouterr()
    error = ""
    try:
        work()
    except UserError as problem:
        error = str(problem)
    out = capsys.readouterr()
    return f"{out.out}{out.err}{error}", not error


def is_found_or_harmless(stored: Experiment, damage: Damage, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Do a damage to a copy, run every command as a user would, and as it says; "found" or "harmless"."""
    experiment = replace(stored, root=str(copy_of(stored, root, *STAGES)))
    folder = Path(experiment.folder)
    stage = damage.file.split("/")[0]
    if "checkpoint-" in damage.file:  # which is read where a training goes on
        shutil.rmtree(folder / stage / "final")
    damage.do(folder)
    runs: list[Callable[[], object]] = [
        lambda: train_autoencoder(experiment),
        lambda: encode_latents(experiment),
        lambda: train_prior(experiment),
    ]
    checks: list[Callable[[], object]] = [
        lambda: verify_training(experiment, "autoencoder"),
        lambda: verify_latents(experiment),
        lambda: verify_training(experiment, "prior"),
    ]
    mends: list[Callable[[], object]] = [
        lambda: train_autoencoder(experiment, mend=True),
        lambda: encode_latents(experiment, mend=True),
        lambda: train_prior(experiment, mend=True),
    ]
    told = [said_by(work, capsys) for work in (*runs, *checks)]
    named = Path(damage.file).name in "".join(said for said, _ in told)
    if not named:
        assert results(experiment) == results(stored), f"{damage}: silent: {told}"
    if not all(good for _, good in told):
        assert named, f"{damage}: not named: {told}"
        for mend in mends:  # as the messages say
            said, good = said_by(mend, capsys)
            assert good, f"{damage}: not mended: {said}"
    for check in checks:
        said, good = said_by(check, capsys)
        assert good, f"{damage}: not verified: {said}"
    assert results(experiment) == results(stored), f"{damage}: other bytes"
    shutil.rmtree(root)
    return "found" if named else "harmless"


@pytest.mark.parametrize("damage", range(SHORT))
def test_damage_is_found_or_harmless_and_what_is_said_mends_it(
    stored: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: int
) -> None:
    chosen = next(itertools.islice(damages(Path(stored.folder), SEED), damage, None))
    is_found_or_harmless(stored, chosen, tmp_path / "damaged", capsys)


@pytest.mark.long
def test_ninety_damages_over_all_kinds_of_stored_files(
    stored: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults: list[str] = []
    verdicts: list[str] = []
    for number, damage in enumerate(itertools.islice(damages(Path(stored.folder), SEED), ALL)):
        try:
            verdicts.append(is_found_or_harmless(stored, damage, tmp_path / str(number), capsys))
        except Exception as error:
            faults.append(f"{damage}: {error!r}"[:3000])
    with capsys.disabled():
        print(f"{verdicts.count('found')} found, {verdicts.count('harmless')} harmless, {len(faults)} faults of {ALL}")
    assert not faults, "\n\n".join(faults)


def test_a_damaged_registered_model_is_refused_or_draws_the_same(stored: Experiment, tmp_path: Path) -> None:
    expected = bld_core.load(stored.folder).sample(labels=[3], seed=1, steps=2)
    finals = Path(stored.folder)
    for number, damage in enumerate(itertools.islice(damages(finals, SEED), 400)):
        if "/final/" not in damage.file:
            continue
        folder = tmp_path / str(number)
        for stage in ("autoencoder", "prior"):
            shutil.copytree(finals / stage / "final", folder / stage / "final")
        damage.do(folder)
        try:
            drawn = bld_core.load(str(folder)).sample(labels=[3], seed=1, steps=2)
        except UserError as error:
            assert "/final" in str(error) or "prior" in str(error), (damage, error)  # noqa: PT017
        else:
            assert torch.equal(drawn, expected), damage
