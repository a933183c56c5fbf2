"""What is to be run on a GPU some day runs on a CPU today, all of it, and says what fails."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script; blocks are compiled without PyTorch's code generator, which takes minutes."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu"])
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    yield importlib.import_module("gpu")
    torch._dynamo.reset()


def lines(text: str) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in map(json.loads, text.splitlines())}


@pytest.mark.long
def test_every_check_and_measurement_has_its_line(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    said = lines(capsys.readouterr().out)
    assert {name: line["error"] for name, line in said.items() if "error" in line} == {}
    assert ended.value.code == 0
    due = {name for name, _ in [*gpu.checks("cpu"), *gpu.measurements(gpu.SMALL, "cpu")]}
    assert said.keys() == {"machine", *due}
    speeds = [line["value"] for line in said.values() if line.get("unit") in ("images/s", "s/sample", "TFLOP/s")]
    assert len(speeds) == len([*gpu.measurements(gpu.SMALL, "cpu")])
    assert min(speeds) > 0


def test_what_fails_says_so_in_its_place_and_all_else_goes_on(
    gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of a device that is off by one number, and a clock that runs out behind it."""
    uniform, now, places = gpu.uniform, iter([0.0, 0.0, 0.0]), itertools.count()

    def odd(*which: Any) -> torch.Tensor:
        return uniform(*which).index_fill_(1, torch.tensor([next(places)]), 2.0)

    monkeypatch.setattr(gpu, "uniform", odd)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now, 1e9))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    caught = capsys.readouterr()
    said = lines(caught.out)
    assert "numbers that differ, of which 0 are allowed" in said["noise and packed bits"]["error"]
    assert "AssertionError" in caught.err
    assert "time is over" in said["stage 2 bfloat16"]["error"]
    assert ended.value.code == 1


def test_launches_are_operations_without_views(gpu: Any) -> None:
    launches = importlib.import_module("launches")
    with launches.Launches() as counted:
        x = torch.ones(2, 3)
        _ = x.t().reshape(3, 2) + x[0, 0]
    assert counted.count == 2
