"""What trials are to one another."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.sweep.table import Outcome, Row, ranked, sweep_table, table_json
from cluster.training.history import Evaluated


def prior_row(name: str, codes: list[float], outcome: Outcome = "finished", step: int = 10) -> Row:
    se = float(np.std(codes, ddof=1) / math.sqrt(len(codes)))
    metrics = {"val_bound": float(np.mean(codes)), "val_bound_se": se}
    return Row(trial=name, values={"x.y": name}, outcome=outcome, evaluations=[Evaluated(step, metrics, tuple(codes))])


def test_differences_to_the_best_are_paired_and_surer_than_the_bounds() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(0.4, 0.1, 512)
    worse = codes + rng.normal(0.01, 0.002, 512)
    best, second = ranked([prior_row("worse", worse.tolist()), prior_row("best", codes.tolist())], "prior")
    assert (best.trial, best.difference, best.difference_se) == ("best", 0, 0)
    assert second.difference == pytest.approx(second.metrics["val_bound"] - best.metrics["val_bound"])
    assert second.difference_se == pytest.approx(np.std(worse - codes, ddof=1) / math.sqrt(512))
    assert second.difference_se < second.metrics["val_bound_se"] / 20
    assert f"{second.difference:+.4f} +- {second.difference_se:.4f}" in sweep_table([best, second])


def test_finished_trials_come_before_stopped_ones_and_those_before_what_has_no_bound() -> None:
    rows = [
        Row(trial="refused", values={"x.y": "no"}, outcome="refused", why="x.y is no"),
        prior_row("stopped", [0.1, 0.2], "stopped", 3),
        prior_row("good", [0.2, 0.3]),
        Row(trial="failed", values={"x.y": "f"}, outcome="failed", why="it broke"),
        prior_row("bad", [0.8, 0.9]),
    ]
    found = ranked(rows, "prior")
    assert [row.trial for row in found] == ["good", "bad", "stopped", "failed", "refused"]
    made = table_json(found, "prior")
    assert [row["trial"] for row in made["rows"]] == ["good", "bad", "stopped"]
    assert made["rows"][0]["bound"] == pytest.approx(0.25)
    assert [(other["outcome"], other["why"]) for other in made["others"]] == [
        ("failed", "it broke"),
        ("refused", "x.y is no"),
    ]
    assert "stopped at step 3" in sweep_table(found)
    assert "refused: x.y is no" in sweep_table(found)


def test_the_front_is_what_no_other_trial_beats() -> None:
    rng = np.random.default_rng(1)
    points = np.stack([rng.integers(10, 14, 30), rng.integers(1, 4, 30) * 64, rng.integers(0, 4, 30)], 1)
    rows = [
        Row(
            trial=str(i),
            values={"x.y": i},
            outcome="finished",
            evaluations=[Evaluated(1, {"val_psnr": float(psnr), "code_bits": bits, "code_bits_entropy": float(noise)})],
        )
        for i, (psnr, bits, noise) in enumerate(points)
    ]
    costs = points * [-1, 1, 1]
    beaten = {i for i, a in enumerate(costs) for b in costs if (b <= a).all() and (b < a).any()}
    found = ranked(rows, "autoencoder")
    assert {int(row.trial) for row in found if not row.on_front} == beaten
    assert 0 < len(beaten) < 30
    assert found[0].metrics["val_psnr"] == points[:, 0].max()
