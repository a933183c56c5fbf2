"""The commands as a user meets them: help, mistakes, and a whole run on other images."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from s3fs import S3FileSystem

from bld_core.data.shards import read_shard, write_shard
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from pipelines.command import command, next_command
from tests.conftest import copy_of, small_experiment
from tests.console import unknown

PIPELINES = Path(__file__).parents[2] / "pipelines"
CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
COMMANDS = [path.name for path in sorted(PIPELINES.glob("*.py")) if path.stem not in ("__init__", "command")]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *flags: str) -> int:
    """Run a command as `python pipelines/<script> <flags>` would; its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        runpy.run_path(str(PIPELINES / script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("script", COMMANDS)
def test_help_explains_every_field(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(monkeypatch, script, "--help") == 0
    text = capsys.readouterr().out
    fields = re.findall(r"^ +--([\w.]+) \S.*?\n?(.*\(type: .*)$", text, re.M)
    assert len(fields) >= 5
    for name, explanation in fields:
        words = explanation.split("(type:")[0].split()
        assert len(words) >= 2, f"--{name} of {script} is not explained"


@pytest.mark.parametrize("script", COMMANDS)
def test_commands_are_short(script: str) -> None:
    assert len((PIPELINES / script).read_text().splitlines()) <= 40


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_without_a_mistake(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLD_DATA", "/shards")
    assert run(monkeypatch, "stage1_ae.py", "--config", str(config), "--print_config") == 0
    assert "${" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior.layer", "3"], "the nearest is 'prior.layers'"),
        (["--prior.layers", "0"], "prior.layers is 0"),
        (["--prior.layers", "many"], "prior.layers"),
        (["--data.image_size", "36"], "multiple of 8"),
        (["--data.train", "nowhere-{0000..0001}.tar"], "nowhere-0000.tar"),
        (["--data.train", "s3://me:hunter/2@bucket/0.tar"], "data.train holds a user name and a password"),
        (["--data.train", "nowhere-{0000..0001}.tar?sig=hunter2"], "nowhere-0000.tar?sig=***"),
        (["--tracking.uri", "http://me:hunter2@mlflow:5000"], "tracking.uri holds a user name or a password"),
        (["--tracking.uri", "mlflow:5000"], "tracking.uri is 'mlflow:5000'; it must be an MLflow server"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    assert run(monkeypatch, "stage1_ae.py", "--config", str(CONFIGS[0].with_name("demo.yaml")), *root, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "hunter" not in error
    assert not list(tmp_path.iterdir())


def test_the_next_command_has_the_flags_of_this_one_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["any.py", "--name", "it's", "--fresh", "--data.train", "https://x/0.tar?sig=hunter2"]
    )
    next_command("sample.py", "--more")
    said = capsys.readouterr().out
    assert (
        said == "next: python pipelines/sample.py --name 'it'\"'\"'s' --data.train 'https://x/0.tar?sig=***' --more\n"
    )


def test_a_flag_goes_above_a_settings_file_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, layers in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"prior: {{layers: {layers}, width: 64}}\n")
    a, b = ("--config", str(tmp_path / "a.yaml")), f"--config={tmp_path}/b.yaml"
    for flags, layers in (
        (["--prior.layers", "7", *a], 7),
        ([*a, "--prior.layers=7", b], 7),
        ([*a, b], 5),
        ([b, *a], 3),
    ):
        assert run(monkeypatch, "stage1_ae.py", *flags, "--print_config") == 0
        said = yaml.safe_load(capsys.readouterr().out)["prior"]
        assert (said["layers"], said["width"]) == (layers, 64)


def test_storage_that_cannot_be_reached_is_one_message(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "0.5")
    S3FileSystem.clear_instance_cache()
    demo = str(CONFIGS[0].with_name("demo.yaml"))
    assert run(monkeypatch, "encode_latents.py", "--config", demo, "--root", s3) == 2
    S3FileSystem.clear_instance_cache()
    error = capsys.readouterr().err
    assert "error: cannot look for 's3://bucket/demo/decoder/final/config.json': tried" in error
    assert "Traceback" not in error


def test_a_fault_of_a_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(settings: object, flags: object) -> None:
        json.loads("")

    monkeypatch.setattr(sys, "argv", ["any.py"])
    with pytest.raises(ValueError, match="Expecting value"):
        command("", work)


def test_an_unknown_key_in_a_file_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("prior: {layer: 4}\n")
    assert run(monkeypatch, "stage1_ae.py", "--config", str(config)) == 2
    assert "'layer'; the nearest is 'prior.layers'" in capsys.readouterr().err


# --- Real runs ------------------------------------------------------------------------------------------------------


class Real(NamedTuple):
    """A run of a command that does its work: the stages before it, its flags, what it says, the files it makes."""

    before: list[str]
    flags: list[str]
    said: str
    made: list[str]


TRAINED = ["autoencoder", "latents", "prior"]
SPACE = ["--sweep.space", "{prior.width: [32, 33]}"]
REAL = {
    "make_shards.py": Real(
        [], ["--images_per_shard", "900"], r"^shards: .*/small$", ["train-0000.tar", "shards.json", "classes.json"]
    ),
    "stage1_ae.py": Real([], [], r"^autoencoder: .*/small/autoencoder/final$", ["autoencoder/final/model.safetensors"]),
    "encode_latents.py": Real(
        ["autoencoder"],
        [],
        r"^latents: .*/small/latents$",
        ["latents/train/train-0003.parquet", "latents/manifest.json"],
    ),
    "stage2_prior.py": Real(
        ["autoencoder", "latents"], [], r"^prior: .*/small/prior/final$", ["prior/final/model.safetensors"]
    ),
    "sample.py": Real(
        TRAINED,
        ["--grid.rows", "1", "--grid.classes", "[3]"],
        r"^samples: .*/grid.png\nnext: .*pipelines/evaluate.py --config \S+$",
        ["samples/*/grid.png", "samples/*/samples.npz"],
    ),
    "inpaint.py": Real(
        TRAINED, ["--inpaint.samples", "[0]"], r"^image, what is known of it, completions: .*png$", ["samples/*/*.png"]
    ),
    "sweep.py": Real(
        ["autoencoder", "latents"],
        ["prior", *SPACE, "--sweep.early_stopping", "asha"],
        r"^best: .*/small/sweep/best.yaml, which another --config takes$",
        ["sweep/best.yaml", "sweep/report.html", "sweep/width32/prior/final/model.safetensors"],
    ),
    "reference.py": Real(
        [],
        ["--evaluation.classifier", "true", "--study.classifier_steps", "2"],
        r"^classifier: .*/small/reference/classifier, \w{12}$",
        ["reference/classifier/statistics.npz"],
    ),
    "study.py": Real(
        TRAINED,
        [
            "steps",
            "--study.steps",
            "[4]",
            "--study.samples",
            "16",
            "--study.codes",
            "8",
            "--study.classifier_steps",
            "2",
        ],
        r"^table and plot: .*/small/study/steps/table.json, plot.png$",
        ["study/steps/table.json", "study/steps/plot.png"],
    ),
    "plan.py": Real([], ["--gpu", "l4", "--fit"], r"^stage 1 is bounded by: ", []),
    "evaluate.py": Real(
        TRAINED,
        ["--evaluation.class_accuracy", "false"],
        r"^report: .*/small/evaluation/report.html, its metrics",
        ["evaluation/report.json", "evaluation/report.html"],
    ),
}
"""Every command but those of WHOLE, which `test_the_whole_order_of_work` runs, and sweep_prior.py, after sweep.py."""
WHOLE = {"run_all.py", "register.py"}
SERVED = {"serve.py"}  # which tests/cluster/studio/test_serve.py runs


@pytest.mark.parametrize("script", sorted({*COMMANDS} - WHOLE - SERVED - {"sweep_prior.py"}))
def test_every_command_does_its_work(
    script: str,
    finished: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, folder = REAL[script], tmp_path / "small"
    tracking = TrackingConfig(uri=finished.tracking.resolve(finished.root))  # a new database takes MLflow a second
    experiment = replace(finished, root=str(copy_of(finished, tmp_path, *real.before)), tracking=tracking)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(asdict(experiment)))
    place = ["--output", str(folder)] if script == "make_shards.py" else ["--config", str(tmp_path / "small.yaml")]
    assert not [pattern for pattern in real.made if list(folder.glob(pattern))]
    capsys.readouterr()
    assert run(monkeypatch, script, *place, *real.flags) == 0
    said = capsys.readouterr().out
    assert re.search(real.said, said, re.M), said
    assert [pattern for pattern in real.made if list(folder.glob(pattern))] == real.made
    if script == "encode_latents.py":
        assert run(monkeypatch, script, *place, "--verify") == 0
        assert capsys.readouterr().out.startswith("verified 5 files, 1797 rows, ")
    if script == "sweep.py":  # the short name, and trials that are there already
        assert re.search(r"^33 .* refused: prior.width is 33", said, re.M), said
        assert run(monkeypatch, "sweep_prior.py", *place, *SPACE) == 0
        assert capsys.readouterr().out == said
        (best,) = re.findall(r"^next: python pipelines/stage2_prior.py (.*--start_from \S+/sweep/width32)$", said, re.M)
        assert run(monkeypatch, "stage2_prior.py", *shlex.split(best)) == 0
        assert "prior  20/20" in (told := capsys.readouterr()).out + told.err
        assert "next: python pipelines/sample.py --config" in told.out
        assert "--start_from" not in told.out


def check_the_whole_order(
    said: str, flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one command from shards to the report has said; the same again, and the registry."""
    assert unknown(said) == []
    assert re.search(r"^  psnr +\d+\.\d\d dB ", said, re.M)
    assert "Prior and samples (40 of" in said
    assert "next: python pipelines/register.py --config" in said
    (report,) = re.findall(r"^report: (.*)$", said, re.M)
    assert Path(report).is_relative_to(folder / "evaluation")
    page = Path(report).read_text()
    assert page.count("<img") == 3  # samples, reconstructions, the profile of the bound
    assert page.count("<svg") > 5  # bits, curves
    assert run(monkeypatch, "run_all.py", *flags) == 0
    assert capsys.readouterr().out.count("already done") == 5
    assert run(monkeypatch, "register.py", *flags) == 0
    said = capsys.readouterr().out
    assert f"models:/{folder.name}@latest-trained is version 1" in said
    assert (
        "champion is who has the lower bound on the same latents, by 0.001 or more: there was none, so version 1 is"
        in said
    )


SHORT = [
    *("--autoencoder_training.steps", "4", "--prior_training.steps", "4", "--evaluation.samples", "40"),
    *("--evaluation.class_accuracy", "false", "--evaluation.classifier", "false"),
    *("--evaluation.precision_recall", "false", "--evaluation.neighbours", "0"),
    *("--cluster.workers", "0", "--cluster.cpus_per_worker", "0.25"),
]


def test_the_whole_order_of_work(
    ray_session: None,
    digits: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(asdict(small_experiment(tmp_path, digits))))
    capsys.readouterr()
    flags = ["--config", str(tmp_path / "small.yaml"), *SHORT]
    assert run(monkeypatch, "run_all.py", *flags) == 0
    check_the_whole_order(capsys.readouterr().out, flags, tmp_path / "small", monkeypatch, capsys)


@pytest.mark.long
def test_the_whole_order_of_work_on_fashion_images(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = os.environ.get("BLD_REAL_DATA")
    if not data:
        pytest.skip("BLD_REAL_DATA does not name a folder of real image shards")
    for name in ("train-0000", "train-0001", "test-0000"):
        write_shard(f"{tmp_path}/{name}.tar", read_shard(f"{data}/fashion-mnist/{name}.tar", ["png"]).samples[:500])
    flags = [
        *("--config", str(CONFIGS[0].with_name("demo.yaml"))),
        *("--name", "fashion", "--root", str(tmp_path)),
        *("--data.train", f"{tmp_path}/train-{{0000..0001}}.tar"),
        *("--data.validation", f"{tmp_path}/test-0000.tar", "--data.fit", "pad"),
        *SHORT,
    ]
    command = [sys.executable, "pipelines/run_all.py", *flags]  # with a console of its own
    done = subprocess.run(command, cwd=PIPELINES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert unknown(done.stderr) == []
    assert re.search(r"^autoencoder  4/4  .* loss ", done.stderr, re.M)
    check_the_whole_order(done.stdout, flags, tmp_path / "fashion", monkeypatch, capsys)


def test_run_all_refuses_first_what_its_evaluation_would_refuse_last(
    digits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["--config", str(PIPELINES.parent / "configs/demo.yaml"), "--root", str(tmp_path)]
    data = [f"--data.{split}={pattern}" for split, pattern in digits.items()]
    asked = ["--evaluation.lpips=true", f"--loss.vgg_weights={tmp_path}/vgg.pth"]
    assert run(monkeypatch, "run_all.py", *demo, *data, *asked) == 2
    assert re.search(r"error: .*vgg\.pth", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [], "something was begun"
