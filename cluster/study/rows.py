"""What each study compares: its rows, and what the paper says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from bld_core.diffusion.sampling import SamplingConfig
from bld_core.diffusion.schedule import ScheduleName
from bld_core.prior.blocks import TrunkPart
from cluster.config.experiment import Experiment
from cluster.sampling.sampler import MeasureBound

StudyName = Literal[
    "lambda", "targets", "groups", "schedule", "steps", "temperature", "sampling", "samplers", "trunk", "optimizer"
]
_STRIDES = (4, 8, 16, 32, 64)
_SCHEDULES: tuple[ScheduleName, ...] = ("linear", "cosine", "sigmoid")

# The paper's metrics, by study and row: 256 x 256, 50,000 samples.
PAPER: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "lambda": (
        "FID, recall; Table 7, LSUN Churches",
        {"0": (5.07, 0.42), "0.01": (4.68, 0.46), "0.1": (4.36, 0.50), "1": (5.12, 0.48)},
    ),
    "targets": (
        "FID, recall; Table 7, LSUN Churches",
        {
            f"{target}{reading}": metrics
            for reading in ("", ", uncalibrated")
            for target, metrics in {"flip": (4.36, 0.50), "z0": (4.72, 0.50), "z_prev": (5.09, 0.48)}.items()
        },
    ),
    "samplers": (
        "FID of LSUN Churches, of FFHQ; Table 5",
        {"binary": (4.36, 5.85), "autoregressive": (7.25, 8.23), "absorbing": (5.44, 7.64)},
    ),
    "steps": (
        "FID of LSUN Churches, tau 0.9, Table 1; seconds a sample at batch 1, Table 6",
        {"16": (4.96, 0.20), "64": (4.36, 0.82)},
    ),
}


@dataclass(frozen=True)
class StudyRow:
    """One row of a study: a prior, and how it is sampled.

    Attributes:
        label: names the row.
        experiment: the prior lies in its folder.
        sampling: how its samples are drawn.
        bounds: which likelihood bounds are measured, by the name of the metric.
        x: its position in the plot; None takes the label.
        line: names the line of the plot that it lies on; empty is the only one.
    """

    label: str
    experiment: Experiment
    sampling: SamplingConfig
    bounds: dict[str, MeasureBound] = field(default_factory=dict)
    x: float | None = None
    line: str = ""


def _variant(experiment: Experiment, name: str, **changes: Any) -> Experiment:
    """The experiment whose prior differs in some sections of the configuration.

    It lies in <folder>/study/variants/<name>, for all studies, or is "own" where nothing differs; trained for as many
    steps as the experiment, that one is the experiment itself.
    """
    steps = experiment.study.training_steps or experiment.prior_training.steps
    if all(getattr(experiment, section) == value for section, value in changes.items() if section != "sampling"):
        if steps == experiment.prior_training.steps:
            return experiment
        name = "own"
    changes["prior_training"] = replace(changes.get("prior_training", experiment.prior_training), steps=steps)
    return experiment.variant("study/variants", name, **changes)


def trainings(experiment: Experiment, row: StudyRow) -> list[StudyRow]:
    """A row with the experiment's seed, then with each of the `study.seeds` - 1 that follow it."""
    own = row.experiment.folder == experiment.folder
    first = experiment.variant("study/variants", "own") if own else row.experiment
    seeds = range(experiment.seed + 1, experiment.seed + experiment.study.seeds)
    again = [replace(first, name=f"{first.name}-seed{seed}", seed=seed) for seed in seeds]
    return [row, *(replace(row, experiment=variant) for variant in again)]


def _lambda(experiment: Experiment) -> list[StudyRow]:
    rows: list[StudyRow] = []
    for weight in experiment.study.vlb_weights:
        diffusion = replace(experiment.diffusion, vlb_weight=weight)
        variant = _variant(experiment, f"lambda{weight:g}", diffusion=diffusion)
        rows.append(StudyRow(f"{weight:g}", variant, experiment.sampling, _whole_bound(experiment)))
    return rows


def _targets(experiment: Experiment) -> list[StudyRow]:
    """With calibration, and in the paper's own reading; single bits, as in the paper."""
    prior = replace(experiment.prior, group=1)
    rows: list[StudyRow] = []
    for calibration, reading in (("bayes", ""), ("none", ", uncalibrated")):
        for target in ("flip", "z0", "z_prev"):
            diffusion = replace(experiment.diffusion, target=target, calibration=calibration, balance="none")
            label = f"{target}{reading}"
            variant = _variant(experiment, label.replace(", ", "-"), prior=prior, diffusion=diffusion)
            rows.append(StudyRow(label, variant, experiment.sampling, _whole_bound(experiment)))
    return rows


def _groups(experiment: Experiment) -> list[StudyRow]:
    """A row for each group and number of steps, few of them first, where groups matter most."""
    rows: list[StudyRow] = []
    for group in (1, 8):
        prior, diffusion = replace(experiment.prior, group=group), replace(experiment.diffusion, balance="none")
        variant = _variant(experiment, f"group{group}", prior=prior, diffusion=diffusion)
        for steps in experiment.study.steps:
            if steps <= diffusion.steps:
                sampling = replace(experiment.sampling, steps=steps, grid=[])
                bounds = {"bound": MeasureBound(sampling, 0, experiment.study.codes)}
                rows.append(StudyRow(f"{group}, {steps}", variant, sampling, bounds, steps, f"group of {group}"))
    return rows


def _trunk(experiment: Experiment) -> list[StudyRow]:
    """The paper's plain trunk, the experiment's own, and that without each of its parts."""
    own = experiment.prior.trunk
    trunks = {"plain": list[TrunkPart]()} | ({"own": own} if own else {})
    trunks |= {f"without {part}": [other for other in own if other != part] for part in own}
    rows: list[StudyRow] = []
    for label, trunk in trunks.items():
        name = f"trunk-{'-'.join(trunk) or 'plain'}"
        variant = _variant(experiment, name, prior=replace(experiment.prior, trunk=trunk))
        rows.append(StudyRow(label, variant, experiment.sampling, _whole_bound(experiment)))
    return rows


def _optimizer(experiment: Experiment) -> list[StudyRow]:
    """Each optimizer at several rates: only its best says what it can do."""
    rows: list[StudyRow] = []
    for optimizer in ("adamw", "muon"):
        for rate in experiment.study.learning_rates:
            training = replace(experiment.prior_training, optimizer=optimizer, learning_rate=rate)
            variant = _variant(experiment, f"{optimizer}-{rate:g}", prior_training=training)
            bounds = _whole_bound(experiment)
            rows.append(StudyRow(f"{optimizer}, {rate:g}", variant, experiment.sampling, bounds, rate, optimizer))
    return rows


def _samplers(experiment: Experiment) -> list[StudyRow]:
    rows: list[StudyRow] = []
    for model in ("binary", "autoregressive", "absorbing"):
        plain = {} if model == "binary" else {"known_share": 0.0, "group": 1}
        prior = replace(experiment.prior, model=model, **plain)
        variant = _variant(experiment, model, prior=prior)
        rows.append(StudyRow(model, variant, experiment.sampling, _whole_bound(experiment)))
    return rows


def _schedule(experiment: Experiment) -> list[StudyRow]:
    """A row for each schedule and spacing, with the bounds of grids of some steps."""
    rows: list[StudyRow] = []
    for schedule in _SCHEDULES:
        diffusion = replace(experiment.diffusion, schedule=schedule, betas=[])
        variant = _variant(experiment, schedule, diffusion=diffusion)
        for spacing in ("k", "t"):
            sampling = replace(experiment.sampling, spacing=spacing, grid=[])
            bounds = _whole_bound(experiment)
            for steps in _STRIDES:
                if steps <= diffusion.steps:
                    bounds[f"bound_{steps}"] = MeasureBound(replace(sampling, steps=steps), 0, experiment.study.codes)
            rows.append(StudyRow(f"{schedule}, equal {spacing}", variant, sampling, bounds))
    return rows


def _steps(experiment: Experiment) -> list[StudyRow]:
    """The experiment's own prior; at temperature 1, as in the paper."""
    rows: list[StudyRow] = []
    for steps in experiment.study.steps:
        if steps <= experiment.diffusion.steps:
            sampling = replace(experiment.sampling, steps=steps, grid=[], temperature=1.0)
            bounds = {"bound": MeasureBound(sampling, 0, experiment.study.codes)}
            rows.append(StudyRow(str(steps), experiment, sampling, bounds, steps))
    return rows


def _temperature(experiment: Experiment) -> list[StudyRow]:
    """The experiment's own prior; bounds do not depend on the temperature."""
    return [
        StudyRow(f"{tau:g}", experiment, replace(experiment.sampling, temperature=tau), x=tau)
        for tau in experiment.study.temperatures
    ]


def _sampling(experiment: Experiment) -> list[StudyRow]:
    """The experiment's own prior and number of steps: each temperature with each guidance, at all times or some."""
    study = experiment.study
    guidances = study.guidances if experiment.prior.classes else [0.0]
    rows: list[StudyRow] = []
    for w, tau in product(guidances, study.temperatures):
        for low, high in ([0.0, 1.0], study.guidance_interval) if w else ([0.0, 1.0],):
            sampling = replace(experiment.sampling, temperature=tau, guidance=w, guidance_interval=[low, high])
            line = f"w {w:g}" + (f" in {low:g}-{high:g}" if high - low < 1 else "")
            rows.append(StudyRow(f"{line}, tau {tau:g}", experiment, sampling, x=tau, line=line))
    return rows


def _whole_bound(experiment: Experiment) -> dict[str, MeasureBound]:
    return {"bound": MeasureBound(None, 0, experiment.study.codes)}


STUDIES: dict[StudyName, tuple[str, Callable[[Experiment], list[StudyRow]]]] = {
    "lambda": ("diffusion.vlb_weight", _lambda),
    "targets": ("diffusion.target", _targets),
    "groups": ("prior.group, sampling.steps", _groups),
    "schedule": ("diffusion.schedule, sampling.spacing", _schedule),
    "steps": ("sampling.steps", _steps),
    "temperature": ("sampling.temperature", _temperature),
    "sampling": ("sampling.guidance, sampling.guidance_interval, sampling.temperature", _sampling),
    "samplers": ("prior.model", _samplers),
    "trunk": ("prior.trunk", _trunk),
    "optimizer": ("prior_training.optimizer, learning_rate", _optimizer),
}
"""Of each study, by its name: the fields that differ, and its rows."""
