"""Whose mistake it is: the user's is one message and exit code 2, ours keeps its traceback and exits 1."""

from __future__ import annotations

import _thread
import ast
import importlib.util
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from torch import Tensor

import cluster.sampling.inpainting
import cluster.sweep.run
import cluster.training.train
from bld_core.errors import UserError
from bld_core.training.loop import Batch
from cluster.config.experiment import Experiment
from cluster.sampling.inpainting import Inpainter, Piece
from cluster.training.tasks import PriorTask, Worker
from tests.conftest import copy_of
from tests.pipelines.test_commands import COMMANDS, run

ROOT = Path(__file__).parents[2]
DEMO = ("--config", str(ROOT / "configs/demo.yaml"))
SECTIONS = {name: type(part) for name, part in vars(Experiment()).items() if is_dataclass(part)}


def flags_of(experiment: Experiment, tmp_path: Path) -> list[str]:
    """The experiment as a settings file."""
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(asdict(experiment)))
    return ["--config", str(file)]


# --- What the core may say ------------------------------------------------------------------------------------------


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module that are not docstrings, with {} for what is filled in."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def beyond_the_core(text: str) -> list[str]:
    """Settings with their section, flags and commands in a text."""
    settings = [f"{section}.{field}" for section, kind in SECTIONS.items() for field in kind.__dataclass_fields__]
    found = re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})\.(?:\w+|{{}})", text)
    scripts = [name for name in COMMANDS if name in text]
    return [name for name in found if name in settings or name.endswith("{}")] + re.findall(r"--\w+", text) + scripts


def test_the_core_names_no_section_no_flag_and_no_command() -> None:
    stored = "image over data.max_pixels"  # a reason, as it stands in manifests
    found = {
        f"{path.name}: {text}": names
        for path in (ROOT / "bld_core").rglob("*.py")
        for text in texts(ast.parse(path.read_text()))
        if text != stored and (names := beyond_the_core(text))
    }
    assert found == {}


@pytest.mark.parametrize("wrong", ["diffusion.steps is {n}", "loss.{name} is 0", "use --fresh", "run sample.py first"])
def test_a_planted_name_is_found(wrong: str) -> None:
    assert beyond_the_core(next(texts(ast.parse(f"raise UserError(f{wrong!r})"))))


# --- Mistakes of the user -------------------------------------------------------------------------------------------


OUT_OF_BOUNDS = {
    "data": ("max_skipped", "2.0"),
    "augmentation": ("resize", "3.0"),
    "autoencoder": ("blocks", "0"),
    "loss": ("mse", "-1.0"),
    "autoencoder_training": ("steps", "0"),
    "latents": ("draws", "128"),
    "prior": ("width", "3"),
    "diffusion": ("steps", "2"),
    "prior_training": ("steps", "0"),
    "sampling": ("guidance", "-1.0"),
    "evaluation": ("samples", "0"),
    "sweep": ("steps", "0"),
    "study": ("classifier_steps", "0"),
    "serve": ("port", "0"),
    "cluster": ("decode_tasks", "-1"),
    "tracking": ("champion_margin", "-1.0"),
}


def test_every_section_has_a_setting_out_of_bounds() -> None:
    assert OUT_OF_BOUNDS.keys() == SECTIONS.keys()


@pytest.mark.parametrize("section", OUT_OF_BOUNDS)
def test_a_setting_out_of_bounds_is_named_with_its_section(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    field, value = OUT_OF_BOUNDS[section]
    assert run(monkeypatch, "stage1_ae.py", *DEMO, f"--{section}.{field}={value}") == 2
    assert re.fullmatch(rf"error: {section}\.{field} is {value}[;,].*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("stage1_ae.py", ["--config", "missing.yaml"], r"File does not exist: .*missing\.yaml"),
        ("stage1_ae.py", ["--config", "{tmp}/no.yaml"], r"no.yaml is not YAML"),
        ("stage1_ae.py", ["--data.train", "${{oc.env:BLD_NO_SUCH_VARIABLE}}"], r"BLD_NO_SUCH_VARIABLE.*data\.train"),
        (
            "stage1_ae.py",
            ["--data.train", "{tmp}"],
            r"{tmp}' is a folder .*name the tar files in it, for example '{tmp}/\*\.tar'",
        ),
        ("stage1_ae.py", ["--root", "{tmp}/no.yaml"], r"root is '{tmp}/no\.yaml': cannot write to .*another folder"),
        (
            "stage1_ae.py",
            ["--loss.perceptual", "1", "--loss.vgg_weights", "{tmp}/no.yaml", "--loss.vgg_sha256", "00000000"],
            r"no\.yaml has sha256 \w+, expected 00000000.*set loss\.vgg_sha256 if",
        ),
        (
            "stage1_ae.py",
            ["--loss.perceptual", "1", "--loss.vgg_weights", "{tmp}/absent"],
            r"loss\.vgg_weights names {tmp}/absent, which is no file",
        ),
        (
            "stage1_ae.py",
            ["--prior_training.accumulate", "3"],
            r"prior_training\.batch_size is \d+, which does not divide .* prior_training\.accumulate 3",
        ),
        ("stage1_ae.py", ["--data.image_size", "36"], r"data\.image_size is 36; the \d levels of autoencoder\.multipl"),
        ("encode_latents.py", [], r"no finished model .*: train it first: pipelines/stage1_ae\.py\n"),
        ("inpaint.py", ["--inpaint.image", "missing.png"], r"inpaint\.image 'missing\.png' cannot be read"),
        ("inpaint.py", ["--inpaint.mask", "{tmp}"], r"inpaint\.mask '{tmp}' cannot be read .*Is a directory"),
        ("inpaint.py", ["--inpaint.image", "{tmp}/no.yaml"], r"inpaint\.image '{tmp}/no\.yaml' cannot be read as an"),
    ],
)
def test_a_mistake_is_one_message(
    script: str,
    flags: list[str],
    message: str,
    digits: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "no.yaml").write_text("a: [b")
    data = [f"--data.{split}={pattern}" for split, pattern in digits.items()]
    given = [flag.format(tmp=tmp_path) for flag in flags]
    assert run(monkeypatch, script, *DEMO, "--root", str(tmp_path / "runs"), *data, *given) == 2
    said = capsys.readouterr().err
    assert re.search(message.replace("{tmp}", str(tmp_path)), said)
    assert [line[:7] for line in said.splitlines()][:1] == ["error: "]
    assert "Traceback" not in said
    assert "`" not in said


# --- Faults of ours -------------------------------------------------------------------------------------------------


def number(*_: object) -> int:
    return int("x")


def pair(*_: object) -> object:
    first, second = (1,)  # pyright: ignore[reportAssignmentType]
    return first, second


def key(*_: object) -> object:
    return {}["x"]


@pytest.mark.parametrize("fault", [number, pair, key])
def test_a_fault_deep_in_our_code_keeps_its_traceback(
    fault: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.training.train, "check_data", fault)
    with pytest.raises((ValueError, KeyError)) as raised:
        run(monkeypatch, "stage1_ae.py", *DEMO, "--root", str(tmp_path))
    assert not isinstance(raised.value, UserError)
    assert raised.traceback[-1].name == fault.__name__


def test_a_fault_ends_the_command_with_its_traceback_and_exit_code_1(tmp_path: Path) -> None:
    command = f"""
import runpy, sys
import cluster.training.train
from tests.pipelines.test_errors import pair
cluster.training.train.check_data = pair
sys.argv = ["stage1_ae.py", *{[*DEMO, "--root", str(tmp_path)]}]
runpy.run_path("pipelines/stage1_ae.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "in pair\n" in done.stderr
    assert done.stderr.endswith("ValueError: not enough values to unpack (expected 2, got 1)\n")


@pytest.mark.parametrize("inside", [True, False])
def test_it_does_not_matter_where_a_library_lies(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix=".venv-", dir=ROOT if inside else None) as folder:
        file = Path(folder, "library.py")
        file.write_text("def fault(*_): return int('x')\n\ndef refuse(mistake): raise mistake\n")
        spec = importlib.util.spec_from_file_location("library", file)
        assert spec is not None
        assert spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
        monkeypatch.setattr(cluster.training.train, "check_data", library.fault)
        with pytest.raises(ValueError, match="invalid literal"):
            run(monkeypatch, "stage1_ae.py", *DEMO)
        monkeypatch.setattr(cluster.training.train, "check_data", lambda *_: library.refuse(UserError("no")))  # pyright: ignore[reportUnknownLambdaType]
        assert run(monkeypatch, "stage1_ae.py", *DEMO) == 2


# --- The same from far away -----------------------------------------------------------------------------------------


class FaultyInpainter(Inpainter):
    def complete(self, piece: Piece) -> Tensor:
        raise AssertionError(number())


class RefusingInpainter(Inpainter):
    def complete(self, piece: Piece) -> Tensor:
        sampling = self.experiment.sampling
        raise UserError(f"`steps` is {sampling.steps}; it must not be", sampling)


def test_an_actor_tells_whose_mistake_it_is(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(replace(finished, cluster=replace(finished.cluster, workers=1)), tmp_path)
    monkeypatch.setattr(cluster.sampling.inpainting, "Inpainter", RefusingInpainter)
    assert run(monkeypatch, "inpaint.py", *flags) == 2
    assert capsys.readouterr().err.endswith("error: sampling.steps is 4; it must not be\n")
    monkeypatch.setattr(cluster.sampling.inpainting, "Inpainter", FaultyInpainter)
    with pytest.raises(ValueError, match="invalid literal") as raised:
        run(monkeypatch, "inpaint.py", *flags)
    assert not isinstance(raised.value, UserError)
    assert ", in number\n" in "".join(traceback.format_exception(raised.value))


class FaultyTask(PriorTask):
    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        raise AssertionError(number())


class RefusingTask(PriorTask):
    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        raise UserError(f"`batch_size` is {self.training.batch_size}; it must not be", self.training)


class DyingTask(PriorTask):
    def batches(self, step: int, positions: list[list[int]], worker: Worker) -> Generator[Batch]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.long
def test_a_training_worker_that_dies_too_often_is_one_message(
    encoded: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = replace(encoded.cluster, workers=1, max_failures=1)
    root = copy_of(encoded, tmp_path, "autoencoder", "latents")
    flags = flags_of(replace(encoded, root=str(root), cluster=machines), tmp_path)
    monkeypatch.setattr(cluster.training.train, "PriorTask", DyingTask)
    assert run(monkeypatch, "stage2_prior.py", *flags) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        r"error: a training worker died 2 times, at last on node \S+, as its worker process has died; "
        r"cluster\.max_failures is 1: see whether .* memory enough, or raise it, then run the same command again, .*",
        said,
    )


def refuse(trial: Experiment, source: str = "", told: object = None, exploited: str = "") -> str:
    del source, told, exploited
    raise UserError(f"`steps` is {trial.sampling.steps}; it must not be", trial.sampling)


@pytest.mark.long
def test_a_trial_of_a_sweep_tells_whose_mistake_it_is_and_one_that_is_stopped_leaves_no_open_run(
    encoded: Experiment,
    tmp_path: Path,
    ctrl_c: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = copy_of(encoded, tmp_path, "autoencoder", "latents")
    sweep = replace(encoded.sweep, vlb_weights=[0.0], schedules=["cosine"], steps=100_000)
    experiment = replace(encoded, root=str(root), sweep=sweep)
    flags = flags_of(experiment, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.sweep.run, "train_prior", refuse)
        assert run(monkeypatch, "sweep_prior.py", *flags) == 2
    assert capsys.readouterr().err.endswith("error: sampling.steps is 4; it must not be\n")

    def stop() -> None:
        while not list(root.glob("small/sweep/lambda0-cosine/prior/checkpoint-*/meta.json")):
            time.sleep(0.1)
        _thread.interrupt_main()

    threading.Thread(target=stop, daemon=True).start()
    assert run(monkeypatch, "sweep_prior.py", *flags) == 130
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs WHERE name = 'prior'").fetchall() == [("KILLED",)]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_training_worker_tells_whose_mistake_it_is(
    workers: int,
    encoded: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machines = replace(encoded.cluster, workers=workers, max_failures=0)
    root = copy_of(encoded, tmp_path, "autoencoder", "latents")
    flags = flags_of(replace(encoded, root=str(root), cluster=machines), tmp_path)
    monkeypatch.setattr(cluster.training.train, "PriorTask", RefusingTask)
    assert run(monkeypatch, "stage2_prior.py", *flags) == 2
    assert capsys.readouterr().err.endswith("error: prior_training.batch_size is 16; it must not be\n")
    monkeypatch.setattr(cluster.training.train, "PriorTask", FaultyTask)
    with pytest.raises(Exception, match="invalid literal") as raised:  # Ray Train's own, which names ours
        run(monkeypatch, "stage2_prior.py", *flags)
    assert not isinstance(raised.value, UserError)
    assert ", in number\n" in "".join(traceback.format_exception(raised.value))
