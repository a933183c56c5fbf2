"""Whatever is done to a stored file is found or harmless; what the command says mends it, to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bld_core
from bld_core.errors import UserError
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents, verify_latents
from cluster.training.checkpoints import verify_training
from cluster.training.train import train_autoencoder, train_prior
from tests.cluster.test_integrity import STAGES, STORED, made, whole
from tests.conftest import copy_of, random_pair
from tests.mutations import Mutation, mutations

__all__ = ["whole"]  # a fixture
DAMAGES = mutations(STORED, 16, seed=16)


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


def is_found_or_harmless(whole: Experiment, damage: Mutation, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Do a damage to a copy, run every command as a user would, and as it says; "found" or "harmless"."""
    experiment = replace(whole, root=str(copy_of(whole, root, *STAGES)))
    folder = Path(experiment.folder)
    stage = damage.file.split("/")[0]
    if "checkpoint-" in damage.file:  # which is read where a training goes on
        shutil.rmtree(folder / stage / "final")
    damage.apply(folder)
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
        assert made(experiment) == made(whole), f"{damage}: silent: {told}"
    if not all(good for _, good in told):
        assert named, f"{damage}: not named: {told}"
        for mend in mends:  # as the messages say
            said, good = said_by(mend, capsys)
            assert good, f"{damage}: not mended: {said}"
    for check in checks:
        said, good = said_by(check, capsys)
        assert good, f"{damage}: not verified: {said}"
    assert made(experiment) == made(whole), f"{damage}: other bytes"
    shutil.rmtree(root)
    return "found" if named else "harmless"


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: f"{each.file}, {each.damage}")
def test_what_the_commands_say_of_a_damage_mends_it(
    damage: Mutation, whole: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_found_or_harmless(whole, damage, tmp_path / "damaged", capsys) in ("found", "harmless")


def test_a_damaged_model_outside_its_experiment_is_refused(tmp_path: Path, digits: dict[str, str]) -> None:
    """As the registry hands it out: two models, without checkpoints; the other's record in its place, too."""
    whole = Path(random_pair(tmp_path, digits, "").folder)
    drawn = bld_core.load(str(whole)).sample(labels=[3], seed=1, steps=2)
    finals = [file for file in STORED if "/final/" in file]
    for number, damage in enumerate(mutations(finals, 40, seed=17)):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage.apply(folder)
        try:
            assert torch.equal(bld_core.load(str(folder)).sample(labels=[3], seed=1, steps=2), drawn), damage
        except UserError as error:
            assert str(folder) in str(error) or "prior" in str(error), damage  # noqa: PT017
