"""The registry on a real MLflow server: versions, champion, download, and the pair behind HTTP."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from PIL import Image
from torch import Tensor

import bld_core
from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, DECODER
from bld_core.training.checkpoint import CONFIG, save_model
from cluster.config.experiment import Experiment
from cluster.config.tracking import CHAMPION, TrackingConfig
from cluster.evaluation.config import lower_is_better
from cluster.registry.registry import compare_with_champion, fetch_model, register
from cluster.report.tables import about
from cluster.tracking.store import open_client
from tests.conftest import random_pair, report_of
from tests.servers import HttpServer, MlflowServer, free_port

OPERATING = (Path(__file__).parents[3] / "docs/operating.md").read_text()


def evaluated(experiment: Experiment, protocol: str = "p", **figures: float) -> Experiment:
    """The experiment with a report of its pair."""
    return report_of(experiment, {"figures": figures, "protocol": protocol})


def champion(experiment: Experiment, name: str) -> str:
    return str(open_client(experiment.tracking.uri).get_model_version_by_alias(name, CHAMPION).version)


def test_the_champion_changes_only_for_a_figure_that_is_better_by_the_margin(
    tmp_path: Path, digits: dict[str, str], mlflow_server: MlflowServer
) -> None:
    def try_pair(
        prior: int, protocol: str = "p", autoencoder: int = 0, latents: str = "1", **figures: float
    ) -> tuple[str, str]:
        pair = random_pair(tmp_path, digits, mlflow_server.uri, autoencoder=autoencoder, prior=prior, latents=latents)
        settings = replace(pair.tracking, model="rivals", champion_margin=0.01)
        made = register(evaluated(replace(pair, tracking=settings), protocol, **figures))
        return made.rule, champion(pair, "rivals")

    rule, who = try_pair(0, bound=0.50, psnr=20.0)
    assert (who, "there was none" in rule) == ("1", True)
    rule, who = try_pair(1, bound=0.495, psnr=25.0)
    assert who == "1"
    assert rule.endswith("version 1 stays, 0.495 against its 0.5, better by 0.005")
    rule, who = try_pair(2, bound=0.48, psnr=19.0)
    assert who == "3"
    assert rule == (
        "champion is who has the lower bound on the same latents, by 0.01 or more: version 3 follows version 1, 0.48 "
        "against its 0.5, better by 0.02"
    )
    rule, who = try_pair(3, bound=0.49, psnr=30.0)
    assert (who, "better by -0.01" in rule) == ("3", True)
    rule, who = try_pair(2, bound=0.48, psnr=19.0)
    assert (who, "version 3 is already" in rule) == ("3", True)
    rule, who = try_pair(4, protocol="q", bound=0.1)
    assert (who, "another protocol" in rule) == ("3", True)
    rule, who = try_pair(5, autoencoder=1, bound=0.1)
    assert (who, "another autoencoder_hash" in rule) == ("3", True)
    rule, who = try_pair(6, latents="2", bound=0.1)
    assert (who, "another latents_hash, so" in rule) == ("3", True)


@pytest.mark.parametrize(("figure", "of_codes"), [("bound", True), ("bound_sampling", True), ("fid", False)])
def test_figures_of_codes_are_compared_on_the_same_latents_alone(figure: str, of_codes: bool) -> None:
    tracking = TrackingConfig(champion_figure=figure)
    theirs, ours = (
        {"bld.protocol": "p", "bld.autoencoder_hash": "a", "bld.latents_hash": latents, f"figure.{figure}": value}
        for latents, value in (("1", "0.5"), ("2", "0.4"))
    )
    holder = ModelVersion("rivals", "1", 0, tags=[ModelVersionTag(*tag) for tag in theirs.items()])
    moves, rule = compare_with_champion(tracking, "2", ours, holder)
    assert moves is not of_codes
    assert ("on the same latents" in rule, "another latents_hash, so" in rule) == (of_codes, of_codes)
    assert compare_with_champion(tracking, "2", ours | {"bld.latents_hash": "1"}, holder)[0]


@pytest.mark.parametrize(
    ("figure", "lower"),
    [("psnr", False), ("fid", True), ("fd_classifier", True), ("precision_vgg16", False), ("kd_0123", True)],
)
def test_the_worse_of_two_is_no_champion(figure: str, lower: bool) -> None:
    assert TrackingConfig(champion_figure=figure, champion_lower=lower)
    with pytest.raises(UserError, match=rf"champion_figure is {figure}, .* worst .* set it to {str(lower).lower()}"):
        TrackingConfig(champion_figure=figure, champion_lower=not lower)


def test_of_metrics_that_nobody_knows_either_value_may_be_the_better_one() -> None:
    for figure in ("bit_usage_mean", "class_accuracy_real", "fd_classifier_held_out", "own"):
        for lower in (True, False):
            TrackingConfig(champion_figure=figure, champion_lower=lower)


def test_what_a_metric_says_of_itself_is_the_direction_that_it_is_compared_in() -> None:
    known = ["psnr", "ssim", "lpips", "rfid", "fid", "kid", "inception_score", "precision", "fd_dinov2", "is_0123"]
    for name in known:
        says = re.findall("(lower|higher) is better", about(name).says)
        assert says in ([], ["lower" if lower_is_better(name) else "higher"])
        assert lower_is_better(name) is not None


def test_the_higher_figure_may_be_the_better_one(
    tmp_path: Path, digits: dict[str, str], mlflow_server: MlflowServer
) -> None:
    for prior, psnr, expected in ((0, 20.0, "1"), (1, 19.0, "1"), (2, 22.0, "3")):
        pair = random_pair(tmp_path, digits, mlflow_server.uri, prior=prior)
        settings = replace(pair.tracking, model="sharp", champion_figure="psnr", champion_lower=False)
        register(evaluated(replace(pair, tracking=settings), psnr=psnr))
        assert champion(pair, "sharp") == expected


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str], mlflow_server: MlflowServer
) -> Experiment:
    pair = random_pair(tmp_path_factory.mktemp("registered"), digits, mlflow_server.uri)
    pair = replace(pair, tracking=replace(pair.tracking, alias="tried"))
    made = register(evaluated(pair, bound=0.5, psnr=20.0))
    assert (made.name, made.version) == ("pair", "1")
    return pair


def test_a_version_is_its_pair_with_its_evaluation_and_without_pickle(registered: Experiment, tmp_path: Path) -> None:
    uri = registered.tracking.uri
    assert register(registered).version == "1", "the same pair was registered twice"
    folders = [
        fetch_model(f"models:/pair{which}", str(tmp_path / str(number)), uri)
        for number, which in enumerate(("@tried", f"@{CHAMPION}", "/1"))
    ]
    before, *after = (bld_core.load(folder).sample(labels=[1, 2], seed=3) for folder in (registered.folder, *folders))
    assert all(torch.equal(before, images) for images in after)
    names = sorted(str(path.relative_to(folders[0])) for path in Path(folders[0]).rglob("*") if path.is_file())
    assert names == [
        "MLmodel",
        *(f"autoencoder/final/{file}" for file in ("config.json", "model.safetensors")),
        "evaluation/report.json",
        *(f"prior/final/{file}" for file in ("config.json", "model.safetensors")),
    ]
    version = open_client(uri).get_model_version("pair", "1")
    assert version.tags["figure.bound"] == "0.5"
    pair = bld_core.load(registered.folder)
    assert pair.prior is not None
    assert version.tags["bld.autoencoder_hash"] == pair.autoencoder.record.hash
    assert version.tags["bld.prior_hash"] == pair.prior.record.hash
    assert version.run_id
    run = open_client(uri).get_run(version.run_id)
    assert run.data.metrics == {"bound": 0.5, "psnr": 20.0}
    assert run.data.tags["bld.prior_hash"] == pair.prior.record.hash
    assert run.info.status == "FINISHED"


def test_a_version_has_the_decoder_that_was_fine_tuned(
    tmp_path: Path, digits: dict[str, str], mlflow_server: MlflowServer
) -> None:
    pair = random_pair(tmp_path, digits, mlflow_server.uri)
    first = bld_core.load(pair.folder)
    weights = {name: weight * 1.1 for name, weight in first.autoencoder.network.state_dict().items()}
    config = files.read_json(files.join(pair.folder, AUTOENCODER, CONFIG))
    facts = {name: config[name] for name in ("autoencoder", "code_shape", "image_size", "channels", "data_hash")}
    digest = save_model(files.join(pair.folder, DECODER), weights, facts | {"codes_of": config["hash"]})
    named = replace(pair, tracking=replace(pair.tracking, model="tuned"))
    register(report_of(named, {"figures": {"bound": 0.5}, "protocol": "p", "autoencoder_hash": digest}))
    fetched = bld_core.load(fetch_model("models:/tuned/1", str(tmp_path / "fetched"), pair.tracking.uri))
    assert fetched.autoencoder.record.hash == digest
    tuned = bld_core.load(pair.folder)
    assert torch.equal(fetched.sample(labels=[1], seed=3), tuned.sample(labels=[1], seed=3))
    assert not torch.equal(fetched.sample(labels=[1], seed=3), first.sample(labels=[1], seed=3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pair@champion", "must be models:/<name>@<alias>"),
        ("models:/pair@nobody", "has no models:/pair@nobody"),
        ("models:/pair/77", "has no models:/pair/77"),
        ("models:/nothing@champion", "has no models:/nothing@champion"),
    ],
)
def test_a_model_that_is_not_there_is_refused(model: str, message: str, registered: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch_model(model, str(tmp_path), registered.tracking.uri)


def test_a_models_name_may_hold_a_quote_and_one_that_mlflow_refuses_is_refused(registered: Experiment) -> None:
    quote, dot = (replace(registered, tracking=replace(registered.tracking, model=name)) for name in ("it's", "."))
    assert [register(quote).version for _ in range(2)] == ["1", "1"]
    with pytest.raises(ValueError, match=rf"MLflow at {registered.tracking.uri} refused .*'\.'.*; check the settings"):
        register(dot)


def test_a_pair_without_its_own_evaluation_is_refused(
    tmp_path: Path, digits: dict[str, str], mlflow_server: MlflowServer
) -> None:
    pair = random_pair(tmp_path, digits, mlflow_server.uri)
    with pytest.raises(FileNotFoundError, match=r"report.json' is missing: evaluate first"):
        register(pair)
    evaluated(pair, psnr=20.0)
    with pytest.raises(ValueError, match=r"champion_figure is 'bound'.*it has psnr: choose one of them"):
        register(pair)
    evaluated(pair, bound=0.5)
    random_pair(tmp_path, digits, mlflow_server.uri, prior=1)
    with pytest.raises(ValueError, match=r"has prior_hash \w+, but the trained one is \w+: evaluate again"):
        register(pair)


@pytest.fixture(scope="module")
def served(registered: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The registered pair behind HTTP, by the command of docs/operating.md; yields its address."""
    (line,) = re.findall(r"^mlflow models serve .*$", OPERATING, re.M)
    port, words = str(free_port()), shlex.split(line.replace("models:/demo@", "models:/pair@"))
    words[words.index("--port") + 1] = port
    words[0] = str(Path(sys.executable).with_name("mlflow"))
    address = f"http://127.0.0.1:{port}"
    server = HttpServer(
        words,
        f"{address}/health",
        tmp_path_factory.mktemp("served") / "log",
        MLFLOW_TRACKING_URI=registered.tracking.uri,
        PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
        PYTHONPATH=str(Path(__file__).parents[3]),
    )
    yield address
    server.kill()


def ask(address: str, body: Any) -> tuple[int, str]:
    """Status and text of the answer to a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def rows(*wanted: dict[str, Any]) -> dict[str, Any]:
    return {"dataframe_records": list(wanted)}


def pictures(text: str) -> list[list[Tensor]]:
    """The images of each row of an answer, each a PNG of the model's size."""
    found: list[list[Tensor]] = []
    for row in json.loads(text)["predictions"]:
        opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in row["images"]]
        assert {(image.format, image.size, image.mode) for image in opened} == {("PNG", (32, 32), "L")}
        found.append([torch.from_numpy(np.array(image))[..., None] for image in opened])
    return found


def encoded(image: Tensor) -> str:
    out = io.BytesIO()
    Image.fromarray(image.squeeze(-1).numpy()).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_the_served_pair_answers_with_the_class_asked_for(served: str, registered: Experiment) -> None:
    (body,) = re.findall(r"/invocations [^']*'[^']*' \\\n +--data '(.*?)'", OPERATING)
    status, text = ask(served, body.encode())
    assert status == 200, text
    generator = bld_core.load(registered.folder)
    ((first, second),) = pictures(text)
    wanted = generator.sample(labels=[3, 3], seed=7)
    assert torch.equal(torch.stack([first, second]), wanted)
    assert not torch.equal(wanted, generator.sample(labels=[4, 4], seed=7)), "the classes of this pair look the same"

    status, text = ask(served, rows({"label": 3, "seed": 7}, {"label": 4, "steps": 2, "guidance": 0.5}, {}))
    assert status == 200, text
    (same,), (other,), (none,) = pictures(text)
    assert torch.equal(same, first), "an image depends on its row alone"
    assert torch.equal(other, generator.sample(labels=[4], steps=2, guidance=0.5)[0])
    assert torch.equal(none, generator.sample(labels=[-1])[0])


def test_the_served_pair_completes_images(served: str, registered: Experiment) -> None:
    generator = bld_core.load(registered.folder)
    image = generator.sample(labels=[5], seed=1)[0]
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[:, 16:] = False
    by_box = {"image": encoded(image), "box": [16, 0, 32, 32], "label": 2, "count": 3, "seed": 4}
    by_mask = {
        "image": encoded(image),
        "mask": encoded(mask.byte()[..., None] * 255),
        "label": 2,
        "count": 3,
        "seed": 4,
    }
    answers: list[list[Tensor]] = []
    for wanted in (by_box, by_mask):
        status, text = ask(served, rows(wanted))
        assert status == 200, text
        answers += pictures(text)
    expected = generator.inpaint(image[None], mask[None], count=3, labels=[2], seed=4)[0]
    for answer in answers:
        assert torch.equal(torch.stack(answer), expected)
        assert all(torch.equal(made[:, :16], image[:, :16]) for made in answer)


def test_a_bad_request_is_the_senders_fault_and_says_why(served: str) -> None:
    image = encoded(torch.zeros(32, 32, 1, dtype=torch.uint8))
    small = encoded(torch.zeros(8, 8, 1, dtype=torch.uint8))
    bad: list[tuple[Any, str]] = [
        (rows({"label": 0}, {"label": 10}), "row 1: class 10 asked for; the classes of this prior: 0..9"),
        (rows({"lable": 3}), "row 0: unknown field lable; a row may have label, seed"),
        (rows({"label": "three"}), "row 0: class 'three' asked for, of which the prior knows nothing: its classes are"),
        (rows({"label": 1.5}), "label is 1.5; it must be a whole number or a name"),
        (rows({"count": 0}), "count is 0; it must be a whole number of at least 1"),
        (rows({"count": 200}, {"count": 200}), "row 1: 400 images asked for; one request gives at most 256"),
        (rows({"steps": 1000}), "steps"),
        (rows({"temperature": 0}), "`temperature` is 0.0; it must be above 0"),
        (rows({"temperature": math.inf}), "`temperature` is inf; it must be above 0 and finite"),
        (rows({"guidance": math.inf}), "`guidance` is inf; it must be 0 (none) or more, and finite"),
        (rows({"image": image}), "an image to complete comes with a mask or a box"),
        (rows({"box": [0, 0, 8, 8]}), "an image to complete comes with a mask or a box"),
        (rows({"image": image, "mask": image, "box": [0, 0, 8, 8]}), "leave one of them out"),
        (rows({"image": image, "box": [0, 0, 8]}), "it must be [left, top, right, bottom]"),
        (rows({"image": image, "box": [0, 0, 40, 8]}), "box is [0, 0, 40, 8]"),
        (rows({"image": image, "box": "0"}), "box is '0'; it must be a list of whole numbers"),
        (rows({"image": "///", "box": [0, 0, 8, 8]}), "image is '///'; it must be base64 text"),
        (rows({"image": "AAAA", "box": [0, 0, 8, 8]}), "image cannot be read as an image"),
        (rows({"image": small, "box": [0, 0, 8, 8]}), "image is 8 x 8 pixels; it must be 32 x 32"),
        (rows({"image": image, "mask": small}), "mask is 8 x 8 pixels; it must be 32 x 32"),
        (b"{", "valid JSON"),
        ({"rows": []}, "dataframe_records"),
        ({"instances": [{"label": 3}]}, "the request is not a table: send dataframe_records"),
        ({"inputs": [[3]]}, "the request is not a table: send dataframe_records"),
    ]
    for body, reason in bad:
        status, text = ask(served, body)
        assert 400 <= status < 500, (body, text)
        assert reason in json.loads(text)["message"], text
    assert ask(served, rows({"label": 0}))[0] == 200, "it goes on after bad requests"
