"""The model registry: autoencoder and prior as one version, with its evaluation, under aliases."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.trained import AUTOENCODER, PRIOR, autoencoder_place
from bld_core.training.checkpoint import CONFIG, WEIGHTS, check_model
from cluster.config.artifacts import open_pair
from cluster.config.experiment import Experiment
from cluster.config.tracking import CHAMPION, TrackingConfig
from cluster.evaluation.evaluate import read_report
from cluster.lineage import COMMIT, git_commit, lineage
from cluster.secrets import without_secrets
from cluster.tracking.runs import quoted, start_run
from cluster.tracking.store import open_client, plain_errors

_EVALUATION = ("evaluation/report.json", "evaluation/report.html")
_PROTOCOL, _FIGURE = "bld.protocol", "figure."
# Bits a bit of held-out codes: another autoencoder's bits are other bits, and other draws or views are other codes.
_OF_CODES = ("bound", "bound_sampling")
_LATENTS = ("bld.autoencoder_hash", "bld.latents_hash")


@dataclass(frozen=True)
class Registered:
    """A version of a model.

    Attributes:
        name: of the model.
        version: its number.
        rule: who is champion, by which rule, in words.
    """

    name: str
    version: str
    rule: str


def register(experiment: Experiment) -> Registered:
    """Register autoencoder and prior as one version of a model, under an alias; it may become the champion.

    The version's files are a folder that `bld_core.load` opens and `mlflow models serve` serves; its tags are hashes
    and the metrics of its evaluation. Running it again for the same pair adds nothing but newer metrics.

    Args:
        experiment: finished, evaluation included.

    Returns:
        The version, and what became of the champion.

    Raises:
        MissingError: a stage is not finished.
        UserError: prior, autoencoder and evaluation do not belong together, the champion's metric is not there, or
            MLflow refuses the name or is away.
    """
    pair = open_pair(experiment)
    made_from = lineage(pair.autoencoder, pair.prior)
    report = read_report(experiment.folder, pair)
    _check(report, experiment.tracking.champion_figure)
    with plain_errors(experiment.tracking.resolve(experiment.root)):
        return _register(experiment, report, made_from)


def _register(experiment: Experiment, report: dict[str, Any], made_from: Mapping[str, str]) -> Registered:
    tracking = experiment.tracking
    name, client = tracking.model or experiment.name, open_client(tracking.resolve(experiment.root))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {**made_from, COMMIT: git_commit(), _PROTOCOL: report["protocol"]}
    tags |= {f"{_FIGURE}{metric}": repr(value) for metric, value in report["figures"].items()}
    version = _version_of(client, name, made_from)
    if version is None:
        version = _make_version(client, name, experiment, report, tags)
    else:
        for tag, value in tags.items():
            client.set_model_version_tag(name, version.version, tag, value)
    client.set_registered_model_alias(name, tracking.alias, version.version)
    champion = _champion(client, name)
    moves, rule = compare_with_champion(tracking, str(version.version), tags, champion)
    if moves:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    return Registered(name, str(version.version), rule)


def _check(report: Mapping[str, Any], metric: str) -> None:
    """Whether a report says what the champion is chosen by."""
    if "protocol" not in report:
        raise UserError(
            "the evaluation does not say how it was measured, as early versions did: evaluate again",
            stages=("evaluation",),
        )
    if not math.isfinite(report["figures"].get(metric, math.nan)):
        raise UserError(
            f"tracking.champion_figure is {metric!r}, which the evaluation does not have as a finite number; it has "
            f"{', '.join(report['figures'])}: choose one of them, or evaluate with that figure"
        )


def _version_of(client: MlflowClient, name: str, made_from: Mapping[str, str]) -> ModelVersion | None:
    """The version that holds the same pair, if there is one."""
    for version in client.search_model_versions(f"name = {quoted(name)}"):
        if made_from.items() <= version.tags.items():
            return version
    return None


def _make_version(
    client: MlflowClient, name: str, experiment: Experiment, report: dict[str, Any], tags: dict[str, str]
) -> ModelVersion:
    """Log the pair and its evaluation to a run of their own, and make a version of it."""
    models = {autoencoder_place(experiment.folder): AUTOENCODER, PRIOR: PRIOR}
    for place in models:
        check_model(files.join(experiment.folder, place))
    run = replace(start_run(experiment, "registered", None), waiting="")  # nobody would come back to it
    with run.until_end():
        run.tags({tag: value for tag, value in tags.items() if tag.startswith("bld.")})
        run.metrics(report["figures"], 0)
        with tempfile.TemporaryDirectory() as folder:
            kept = {
                f"{place}/{file}": f"{there}/{file}" for place, there in models.items() for file in (WEIGHTS, CONFIG)
            }
            kept |= {file: file for file in _EVALUATION if files.exists(files.join(experiment.folder, file))}
            for file, there in kept.items():
                local = Path(folder, there)
                local.parent.mkdir(parents=True, exist_ok=True)
                local.write_bytes(files.read_bytes(files.join(experiment.folder, file)))
            model = Model(run_id=run.run_id)
            mlflow.pyfunc.add_to_model(model, "cluster.serving")  # a module that opens the folder: nothing is pickled
            model.save(str(Path(folder, "MLmodel")))
            run.artifacts(folder, "model")
        source = f"{client.get_run(run.run_id).info.artifact_uri}/model"
        return client.create_model_version(name, source, run.run_id, tags=tags)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if number is None else client.get_model_version(name, str(number))


def compare_with_champion(
    tracking: TrackingConfig, version: str, tags: Mapping[str, str], champion: ModelVersion | None
) -> tuple[bool, str]:
    """Whether a version follows the champion: its metric must be better by the margin, measured in the same way.

    Args:
        tracking: the metric, its direction and the margin.
        version: the number of the version.
        tags: of the version.
        champion: the current one.

    Returns:
        Whether the alias moves; and the rule and its outcome in words.
    """
    metric, margin = tracking.champion_figure, tracking.champion_margin
    of_codes = metric in _OF_CODES
    rule = (
        f"{CHAMPION} is who has the {'lower' if tracking.champion_lower else 'higher'} {metric}"
        f"{' on the same latents' if of_codes else ''}, by {margin:g} or more"
    )
    if champion is None:
        return True, f"{rule}: there was none, so version {version} is, with {float(tags[_FIGURE + metric]):.6g}"
    holder = f"version {champion.version}"
    if str(champion.version) == version:
        return False, f"{rule}: version {version} is already"
    alike = [_PROTOCOL, *(_LATENTS if of_codes else ())]
    differ = [tag.removeprefix("bld.") for tag in alike if champion.tags.get(tag) != tags[tag]]
    if differ or _FIGURE + metric not in champion.tags:
        return False, (
            f"{rule}: {holder} stays, for it has another {' and '.join(differ) or metric}, so the two cannot be "
            "compared; evaluate and register that pair in the same way, or move the alias yourself"
        )
    ours, theirs = float(tags[_FIGURE + metric]), float(champion.tags[_FIGURE + metric])
    better = theirs - ours if tracking.champion_lower else ours - theirs
    moves = better > 0 and better >= margin
    outcome = f"version {version} follows {holder}" if moves else f"{holder} stays"
    return moves, f"{rule}: {outcome}, {ours:.6g} against its {theirs:.6g}, better by {better:.6g}"


def newest_version(model: str, uri: str) -> tuple[str, str]:
    """Which version a model is now.

    Args:
        model: models:/<name>@<alias> or models:/<name>/<version>.
        uri: of the tracking server, as in `TrackingConfig.resolve`.

    Returns:
        The name and the number.

    Raises:
        UserError: another form; no such model, alias or version there; or MLflow is away.
    """
    found = _find(model, uri)
    return found.name, str(found.version)


def fetch_model(model: str, folder: str, uri: str) -> str:
    """Download a registered version.

    Args:
        model: models:/<name>@<alias> or models:/<name>/<version>.
        folder: where to; made if it is missing.
        uri: of the tracking server, as in `TrackingConfig.resolve`.

    Returns:
        A folder for `bld_core.load`.

    Raises:
        UserError: as `newest_version`.
    """
    found = _find(model, uri)
    assert found.source is not None, "every version was made with a source"
    with plain_errors(uri):
        return mlflow.artifacts.download_artifacts(artifact_uri=found.source, dst_path=folder, tracking_uri=uri)


def _find(model: str, uri: str) -> ModelVersion:
    form = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if form is None:
        raise UserError(f"model is {model!r}; it must be models:/<name>@<alias> or models:/<name>/<version>")
    client, (name, alias, number) = open_client(uri), form.groups()
    with plain_errors(uri):
        try:
            return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{without_secrets(uri)} has no {model}: {error.message}; register.py makes one") from error
