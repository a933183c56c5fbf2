"""Finished pieces of an evaluation outlast its interruption, to the last bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from bld_core.data.skipped import Skipped
from bld_core.diffusion.bound import Bound
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.metrics.code_health import CodeHealth
from bld_core.metrics.frechet import FeatureMoments
from bld_core.metrics.reconstruction import Moments, ReconstructionMetrics, ReconstructionQuality
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn, Reconstruct, Reconstructions, SampleFeatures
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.extractors import SpaceName
from cluster.evaluation.pieces import KeptPieces, Piece, Result
from cluster.evaluation.references import Space
from cluster.sampling.sampler import Draw, MeasureBound
from tests.conftest import copy_of

SHARD = "https://shop.example/0.tar?X-Amz-Signature=hunter2"
SPACES = [Space("inception", "0123"), Space("classifier")]
DRAW = Draw(SamplingConfig(steps=4), [1, 2], 2, 40, 7)


def moments() -> FeatureMoments:
    found = FeatureMoments()
    found.update(torch.rand(5, 3))
    return found


def reconstructions() -> Reconstructions:
    figures = [Moments(3, *torch.rand(2, dtype=torch.float64).tolist()) for _ in range(3)]
    health = CodeHealth(9, *(torch.rand(size, dtype=torch.float64) for size in (4, (4, 4), 4)))
    found = Reconstructions(ReconstructionMetrics(ReconstructionQuality(*figures[:2]), figures[2], health))
    found.real, found.reconstructed = ({space: moments() for space in SPACES} for _ in range(2))
    found.skipped = Skipped(9, Counter({"empty image": 2}), {"empty image": [f"{SHARD}/a"]})
    found.shown = [(torch.randint(256, (2, 4, 4, 1)).byte(), torch.randint(256, (2, 4, 4, 1)).byte())]
    return found


def pairs() -> list[tuple[Piece, Result]]:
    torch.manual_seed(0)
    features: dict[SpaceName, torch.Tensor] = {space.name: torch.rand(2, 5) for space in SPACES}
    return [
        (SampleFeatures(DRAW), Drawn(7, 40, features, None, None, 0.1 + 0.2)),
        (
            SampleFeatures(DRAW, pixels=True),
            Drawn(7, 40, features, torch.rand(2, 9), torch.zeros(2, 4, 4, 1).byte(), 0.3),
        ),
        (MeasureBound(None, 0, 9), Bound(9, 1 / 3, 1e-300, (0.1, 2 / 3))),
        (MeasureBound(SamplingConfig(), 0, 9), Bound(9, 1 / 7, 0.0, (0.1,))),
        (Reconstruct(SHARD, 2), reconstructions()),
        (Reconstruct("1.tar"), Reconstructions()),
    ]


def equal(one: object, other: object) -> bool:
    """Equal to the last bit, through whatever holds what."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return [*one] == [*other] and all(map(equal, one.values(), other.values()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, (Reconstructions, FeatureMoments)):
        return type(one) is type(other) and equal([*vars(one).values()], [*vars(other).values()])
    if isinstance(one, ReconstructionMetrics) and isinstance(other, ReconstructionMetrics):
        return equal(astuple(one), astuple(other))
    return one == other


def test_what_is_kept_comes_back_to_the_last_bit_and_damage_is_found(encoded_like: Experiment, tmp_path: Path) -> None:
    kept = KeptPieces(str(tmp_path), encoded_like)
    for piece, result in pairs():
        assert piece not in kept
        kept.keep(piece, result)
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"hunter2" not in everything
    again = KeptPieces(str(tmp_path), encoded_like)
    for piece, result in pairs():
        assert piece in again
        if isinstance(result, Reconstructions) and result.skipped.names:
            result.skipped.names = {"empty image": ["https://shop.example/0.tar?X-Amz-Signature=***"]}
        assert equal(again.load(piece), result)
    assert MeasureBound(None, 0, 8) not in again
    assert SampleFeatures(replace(DRAW, seed=8)) not in again
    assert SampleFeatures(DRAW, shard=str(tmp_path / "gone.tar")) not in again, "its shard is not there"
    other = replace(encoded_like, latents=replace(encoded_like.latents, batch_size=1))
    assert MeasureBound(None, 0, 9) not in KeptPieces(str(tmp_path), other)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    damaged = KeptPieces(str(tmp_path), encoded_like)
    assert not any(piece in damaged for piece, _ in pairs())


@pytest.fixture
def encoded_like() -> Experiment:
    return Experiment()


@pytest.mark.long
def test_an_evaluation_that_is_interrupted_goes_on_to_the_same_report(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 2 pieces of samples, 1 of reconstructions and 4 of bounds, 3 are kept, and one of these is damaged."""
    roots = [copy_of(finished, tmp_path / name, "autoencoder", "latents", "prior") for name in ("whole", "parts")]
    whole, parts = (replace(finished, root=str(root)) for root in roots)
    report = evaluate(whole)
    keep = KeptPieces.keep

    def interrupted(self: KeptPieces, piece: Piece, result: Result) -> None:
        if len(list(Path(parts.folder, "evaluation/pieces").glob("*"))) == 3:
            raise KeyboardInterrupt
        keep(self, piece, result)

    with monkeypatch.context() as patch:
        patch.setattr(KeptPieces, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(parts)
    first, *_ = Path(parts.folder, "evaluation/pieces").iterdir()
    first.write_bytes(first.read_bytes()[:-1])
    capsys.readouterr()
    again = evaluate(parts)
    assert "evaluation: 2 of " in capsys.readouterr().out
    assert {**again, "figures": None} == {**report, "figures": None}
    assert again["figures"] == report["figures"]
    assert not Path(parts.folder, "evaluation/pieces").exists()
    pictures = ["samples.png", "reconstructions.png"]
    one, other = ([Path(each.folder, "evaluation", name).read_bytes() for name in pictures] for each in (whole, parts))
    assert one == other
