"""Tracking on a real MLflow server: each point once, whatever happens; lineage; nothing secret."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import cluster.lineage as lineage_module
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import ImageConfig
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.errors import UserError
from bld_core.prior.transformer import PriorConfig
from bld_core.trained import AutoencoderRecord, PriorRecord
from cluster.config.experiment import Experiment
from cluster.config.tracking import TrackingConfig
from cluster.data.shards import ShardConfig
from cluster.lineage import COMMIT, lineage
from cluster.secrets import without_secrets
from cluster.tracking.load import SystemLoad
from cluster.tracking.outbox import Note, Outbox
from cluster.tracking.runs import STARTS, Run, start_run
from cluster.tracking.store import open_client
from tests.conftest import small_experiment
from tests.servers import MlflowServer


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, name))


@pytest.fixture
def experiment(tmp_path: Path, mlflow_server: MlflowServer) -> Experiment:
    tracking = TrackingConfig(uri=mlflow_server.uri)
    return replace(small_experiment(tmp_path, {"train": "t", "validation": "v"}), tracking=tracking)


def training(run: Run, steps: range, picture: int = 0) -> None:
    for step in steps:
        run.metrics({"loss": 1 / step, "bound": 2 / step}, step)
        if step == picture:
            run.picture(Image.new("L", (4, 4), 7), f"samples/step-{step:07d}.png")


def check_whole(run: Run, steps: int, picture: int) -> None:
    for name, top in {"loss": 1, "bound": 2}.items():
        assert curve(run, name) == [(step, top / step) for step in range(1, steps + 1)]
    assert [file.path for file in run.client.list_artifacts(run.run_id, "samples")] == [
        f"samples/step-{picture:07d}.png"
    ]
    assert not list(Path(run.waiting).glob("*"))


@pytest.mark.long
def test_a_server_that_is_away_stops_no_training_and_misses_nothing(
    experiment: Experiment, mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(experiment, "prior", None)
    training(run, range(1, 11))
    mlflow_server.kill()
    try:
        training(run, range(11, 21), picture=12)
    finally:
        mlflow_server.start()
    assert caplog.text.count("is away since") == 1
    assert len(list(Path(run.waiting).iterdir())) == 11
    training(run, range(21, 31))
    run.end("FINISHED")
    check_whole(run, 30, 12)
    assert run.client.get_run(run.run_id).info.status == "FINISHED"


def test_a_database_that_is_gone_stops_no_training_and_the_next_start_tells_it(
    beside: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = replace(beside, tracking=TrackingConfig(patience=0.1))
    run = start_run(experiment, "prior", None)
    database, away = tmp_path / "mlflow.db", tmp_path / "away.db"
    training(run, range(1, 4))
    database.rename(away)
    training(run, range(4, 7), picture=5)
    run.end("FINISHED")
    assert f"waits in {run.waiting}; run the command again" in capsys.readouterr().out
    assert not database.exists()
    away.rename(database)
    assert run.client.get_run(run.run_id).info.status == "RUNNING"
    again = start_run(experiment, "prior", run.run_id)  # the steps behind the last checkpoint are taken once more
    training(again, range(5, 9))
    again.end("KILLED")
    check_whole(again, 8, 5)
    assert again.client.get_run(run.run_id).info.status == "KILLED"


@pytest.mark.long
def test_a_locked_database_stops_no_training(beside: Experiment, tmp_path: Path) -> None:
    run = start_run(beside, "prior", None)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        training(run, range(1, 31), picture=3)
        other.execute("ROLLBACK")
    run.end("FINISHED")
    check_whole(run, 30, 3)


def test_a_full_database_stops_no_training(beside: Experiment, tmp_path: Path) -> None:
    """By the limit on a file's size: SQLite says "database or disk is full", or that it cannot write."""
    run = start_run(beside, "prior", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "mlflow.db").stat().st_size, before[1]))
    try:
        training(run, range(1, 100), picture=3)  # more than the pages that it has hold
        assert list(Path(run.waiting).iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.end("FINISHED")
    check_whole(run, 99, 3)


def test_by_configuration_a_training_stops_with_one_message(beside: Experiment, tmp_path: Path) -> None:
    run = start_run(replace(beside, tracking=TrackingConfig(patience=0.1, when_away="stop")), "prior", None)
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    with pytest.raises(UserError, match=r"mlflow.db was there, and is gone: put it back"):
        run.metrics({"loss": 1.0}, 1)


def test_steps_that_are_taken_twice_are_logged_once(experiment: Experiment) -> None:
    first = start_run(experiment, "prior", None)
    for step in range(1, 9):
        first.metrics({"loss": 1.0 / step}, step)
    first.metrics({"val_bound": 0.5}, 4)
    second = start_run(experiment, "prior", first.run_id)  # from a checkpoint of step 4
    assert second == first
    for step in range(5, 13):
        second.metrics({"loss": 1.0 / step + (1e-7 if step <= 8 else 0)}, step)  # another machine rounds otherwise
    second.metrics({"val_bound": 0.4}, 8)
    assert curve(second, "loss") == [(step, 1.0 / step) for step in range(1, 13)]
    assert curve(second, "val_bound") == [(4, 0.5), (8, 0.4)]
    starts = second.client.get_run(second.run_id).data.tags[STARTS].splitlines()
    assert len(starts) == 2
    assert all("python" in start for start in starts)


def test_nothing_secret_reaches_mlflow(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = "https://shop.example/train-{0000..0001}.tar?X-Amz-Signature=hunter2&part=hunter2"
    monkeypatch.setattr("sys.argv", ["stage1_ae.py", "--data.train", signed.replace("shop", "me:hunter2@shop")])
    run = start_run(replace(experiment, data=ImageConfig(train=signed, image_size=32)), "autoencoder", None)
    known = run.client.get_run(run.run_id).data
    assert "hunter2" not in str(known.to_dictionary())
    assert known.params["data.train"] == "https://shop.example/train-{0000..0001}.tar?X-Amz-Signature=***&part=***"
    assert known.tags[STARTS].endswith("&part=***'")
    assert "stage1_ae.py --data.train 'https://***@shop.example" in known.tags[STARTS]
    assert known.tags[COMMIT] in known.tags[STARTS]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:hunter2@host/x", "https://***@host/x"),
        ("https://me:hun@ter2@host/x", "https://***@host/x"),
        ("https://me:hun/te@r2@host/x", "https://***@host/x"),
        ("https://me:12345@host/x", "https://***@host/x"),
        ("s3://AKIA:hun/ter2@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:123/hunter2@bucket/x", "s3://***@bucket/x"),
    ],
)
def test_a_password_in_an_address_of_data_is_refused_and_never_shown(tmp_path: Path, url: str, shown: str) -> None:
    assert without_secrets(f"see '{url}', and more") == f"see '{shown}', and more"
    for setting, settings in {
        "root": {"root": url},
        "data.train": {"data": ImageConfig(train=url)},
        "data.validation": {"data": ImageConfig(validation=f"{tmp_path}/{{{url}}}")},
    }.items():
        with pytest.raises(ValueError, match=f"^{setting} holds a user name and a password.* AWS_") as refused:
            Experiment(**settings)  # pyright: ignore[reportArgumentType]
        assert "hun" not in str(refused.value)
    with pytest.raises(ValueError, match=r"^output holds a user name and a password"):
        ShardConfig(output=url)


def test_what_is_no_secret_is_shown_and_accepted() -> None:
    assert without_secrets("https://token@host/x;token=abc?a=1&b=2") == "https://***@host/x;token=***&b=***"
    for plain in (
        *("s3://bucket/train-????.tar", "s3://bucket/a@b.tar", "http://host:8080/a@b.tar", "file:///a:b@c"),
        *("runs/a=b", "me@example.org"),
    ):
        assert without_secrets(plain) == plain
        Experiment(data=ImageConfig(train=plain))


def test_a_password_in_the_address_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_PASSWORD") as refused:
        TrackingConfig(uri="http://me:hunter2@mlflow:5000")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match=r"champion_margin is -1"):
        TrackingConfig(champion_margin=-1)
    with pytest.raises(ValueError, match=r"tracking.patience is -1"):
        TrackingConfig(patience=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alias": "champion"}, "alias is 'champion', which moves only by the rule"),
        ({"alias": "Champion"}, "alias is 'Champion', which moves only by the rule"),
        ({"alias": "latest"}, "alias is 'latest'; MLflow wants .* and keeps latest"),
        ({"alias": "v12"}, "alias is 'v12'; MLflow wants .* and keeps latest"),
        ({"alias": "a/b"}, "alias is 'a/b'; MLflow wants letters"),
        ({"alias": ""}, "alias is ''; MLflow wants letters"),
        ({"model": "a/b"}, "model is 'a/b'; MLflow allows neither / nor :"),
        *(
            ({"uri": uri}, f"tracking.uri is {re.escape(repr(uri))}; it must be an MLflow server")
            for uri in ("mlflow:5000", "./mlruns", "file:///mlruns", "oracle://host/runs", "http://", "sqlite:///")
        ),
    ],
)
def test_what_mlflow_would_not_take_is_refused_before_anything_starts(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "https://host/mlflow?a=b:c", "http://[::1]:5000/", "sqlite:////it's a/run@2.db"]
)
def test_where_mlflow_can_keep_runs_is_accepted(uri: str) -> None:
    assert TrackingConfig(uri=uri).uri == uri


def test_a_deleted_mlflow_experiment_is_named_with_its_cure(experiment: Experiment) -> None:
    tracking = replace(experiment.tracking, experiment="gone")
    client = open_client(tracking.uri)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    with pytest.raises(ValueError, match=f"'gone' was deleted: restore it by .* --experiment-id {number}`"):
        start_run(replace(experiment, tracking=tracking), "prior", None)
    client.restore_experiment(number)
    assert start_run(replace(experiment, tracking=tracking), "prior", None).run_id


def test_lineage_names_what_each_result_was_made_from() -> None:
    early = AutoencoderRecord(
        hash="a", autoencoder=AutoencoderConfig(), code_shape=(16, 16, 32), image_size=256, channels=3
    )
    autoencoder = replace(early, data_hash="d")
    prior = PriorRecord(
        hash="p", prior=PriorConfig(), diffusion=DiffusionConfig(), sampling=SamplingConfig(), latents_hash="l"
    )
    assert lineage(autoencoder) == {"bld.data_hash": "d", "bld.autoencoder_hash": "a"}
    assert list(lineage(autoencoder, prior).values()) == ["d", "a", "l", "p"]
    assert lineage(early)["bld.data_hash"] == "unknown"


def test_the_commit_is_of_the_repository_that_tracks_this_code(tmp_path: Path) -> None:
    """Their repository ignores the environment that our code is installed in."""
    installed = tmp_path / "venv/cluster"
    installed.mkdir(parents=True)
    shutil.copy(lineage_module.__file__, installed)
    (tmp_path / ".gitignore").write_text("venv\n__pycache__\n")
    environment = {name: value for name, value in os.environ.items() if name != "BLD_GIT_COMMIT"}

    def git(*words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, text=True, check=True, capture_output=True).stdout

    def commit(**more: str) -> str:
        code = "from cluster.lineage import git_commit; print(git_commit())"
        settings = environment | {"PYTHONPATH": str(installed.parent)} | more
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=settings, text=True, check=True, capture_output=True
        )
        return run.stdout.strip()

    git("init", "-q")
    git("add", ".gitignore")
    git("commit", "-qm", "theirs")
    assert commit() == "unknown"
    assert commit(BLD_GIT_COMMIT="0123") == "0123"
    git("add", "--force", "venv/cluster/lineage.py")
    git("commit", "-qm", "ours")
    assert commit() == git("rev-parse", "HEAD").strip()
    (installed / "lineage.py").write_text((installed / "lineage.py").read_text() + "\n")
    assert commit().endswith("-dirty")


def test_the_load_of_the_machine_has_mlflows_names_and_is_of_now() -> None:
    load = SystemLoad()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    figures = load.metrics()
    assert 0 < figures["system/cpu_utilization_percentage"] <= 100
    assert 0 < figures["system/system_memory_usage_percentage"] < 100
    assert figures["system/network_receive_megabytes"] >= 0


def test_two_processes_may_empty_one_outbox(tmp_path: Path) -> None:
    """As who ends a trial, and the trial itself, do: each note is told, by one of them or by both."""
    told: list[Note] = []

    def away(note: Note) -> None:
        raise ConnectionError("away")

    def tell(note: Note) -> None:
        told.append(note)
        if len(told) == 1:  # the other one comes in between
            assert Outbox(str(tmp_path), told.append, "x").send() is None

    writer = Outbox(str(tmp_path), away, "x")
    for number in range(3):
        writer.put({"number": number})
    assert len([*tmp_path.iterdir()]) == 3
    assert Outbox(str(tmp_path), tell, "x").send() is None
    assert {note["number"] for note in told} == {0, 1, 2}
    assert [*tmp_path.iterdir()] == []
