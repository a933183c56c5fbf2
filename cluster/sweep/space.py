"""The trials of a sweep: which values its fields take, and the experiment that each combination is."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bld_core.errors import UserError
from bld_core.splitmix import key_of
from bld_core.storage import files
from cluster.config.experiment import Experiment

StageName = Literal["prior", "autoencoder"]
Values = dict[str, Any]
"""The fields of a trial that differ, by dotted name; of a population, its LINEAGE before them."""

LINEAGE = ("generation", "member", "parent")
"""What a trial of a population is: the member's number, and that of whom it goes on from, a generation before."""

_LONGEST = 80  # characters of a trial's name
_CALLED = {"diffusion.vlb_weight": "lambda", "diffusion.schedule": ""}


class Goal(NamedTuple):
    """What a sweep of a stage looks for.

    Attributes:
        folder: of the sweep, within the experiment's.
        training: the section of the settings that trains the stage.
        sections: those that decide what the stage makes.
        metric: of an evaluation in training, by which trials are compared.
        mode: which of two values is the better one.
        unit: of the metric.
    """

    folder: str
    training: str
    sections: tuple[str, ...]
    metric: str
    mode: Literal["min", "max"]
    unit: str


GOALS: dict[StageName, Goal] = {
    "prior": Goal(
        "sweep", "prior_training", ("prior", "diffusion", "prior_training"), "val_bound", "min", "bits a bit"
    ),
    "autoencoder": Goal(
        "sweep-autoencoder",
        "autoencoder_training",
        ("autoencoder", "loss", "autoencoder_training", "augmentation"),
        "val_psnr",
        "max",
        "dB",
    ),
}


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        name: of the trial and of its folder, by its values.
        values: what differs.
        experiment: the trial as an experiment of its own; None where its settings are refused.
        why: why they are refused.
    """

    name: str
    values: Values
    experiment: Experiment | None
    why: str = ""

    @property
    def allowed(self) -> Experiment:
        """The experiment of a trial that is not refused.

        Raises:
            UserError: it is.
        """
        if self.experiment is None:
            raise UserError(self.why)
        return self.experiment


def space_of(experiment: Experiment, stage: StageName) -> Mapping[str, Any]:
    """The fields that a sweep varies, each with its values or its distribution.

    Raises:
        UserError: no such fields, fields of another stage, or none at all.
    """
    sweep, goal = experiment.sweep, GOALS[stage]
    space = sweep.space
    if not space and stage == "prior":
        space = {"diffusion.vlb_weight": sweep.vlb_weights, "diffusion.schedule": sweep.schedules}
    if not space:
        raise UserError(
            "sweep.space is empty: name the fields of stage 1 that are to differ, for example "
            "'{loss.entropy: [0.0, 0.02], autoencoder.bits: [16, 32]}'"
        )
    known = [f"{section}.{field.name}" for section in goal.sections for field in fields(getattr(experiment, section))]
    for name in space:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or [each for each in known if name in each][:1]
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(
                f"sweep.space has {name}, which is no field of {', '.join(goal.sections)}: these are what a sweep of "
                f"the {stage} can vary{hint}"
            )
    if experiment.prior.model != "binary" and any(name.startswith("diffusion.") for name in space):
        raise UserError(
            f"prior.model is {experiment.prior.model}, but lambda and the schedule are those of binary "
            "diffusion: sweep with prior.model binary, or leave diffusion out of sweep.space"
        )
    return space


def planned_values(experiment: Experiment, stage: StageName) -> list[Values]:
    """The values of every trial of a grid or of a random search, in order, none twice.

    Raises:
        UserError: as `space_of`.
    """
    space, sweep = space_of(experiment, stage), experiment.sweep
    if sweep.search == "grid":
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    drawn = [
        {name: draw(among, key_of(experiment.seed, "sweep", number, name)) for name, among in space.items()}
        for number in range(sweep.trials)
    ]
    return list({json.dumps(values): values for values in drawn}.values())


def draw(among: Any, key: int) -> Any:
    """A value from a list or a distribution, as a function of a key; numbers to four digits."""
    u = random.Random(key).random()
    if isinstance(among, list):
        return among[int(u * len(among))]
    [(kind, bounds)] = among.items()
    if kind == "choice":
        return bounds[int(u * len(bounds))]
    low, high = bounds
    if kind == "randint":
        return low + int(u * (high - low))
    if kind == "loguniform":
        return float(f"{math.exp(math.log(low) + u * math.log(high / low)):.4g}")
    return float(f"{low + u * (high - low):.4g}")


def settings_of(values: Values) -> Values:
    """The settings alone."""
    return {field: value for field, value in values.items() if field not in LINEAGE}


def parent_of(values: Values) -> str:
    """The trial whose weights one of a population goes on from; "" where it begins with none."""
    if not values.get("generation"):
        return ""
    return trial_name({"generation": values["generation"] - 1, "member": values["parent"]})


def span_of(experiment: Experiment, values: Values) -> tuple[int, int]:
    """The steps before the first that a trial takes, and behind the last."""
    sweep = experiment.sweep
    if "generation" not in values:
        return 0, sweep.steps
    number = values["generation"]
    return sweep.steps * number // sweep.generations, sweep.steps * (number + 1) // sweep.generations


def make_trial(experiment: Experiment, stage: StageName, values: Values) -> Trial:
    """The trial of some values; settings that the experiment refuses are a trial that says so."""
    goal, sweep = GOALS[stage], experiment.sweep
    name = trial_name(values)
    training = getattr(experiment, goal.training)
    every = sweep.first_rung if sweep.early_stopping == "asha" else training.evaluate_every
    trial_training = {
        "steps": span_of(experiment, values)[1],
        "evaluate_every": every,
        "checkpoint_every": min(training.checkpoint_every, every),
    }
    try:
        changes = {goal.training: replace(training, **trial_training)}
        for field, value in settings_of(values).items():
            section, _, leaf = field.partition(".")
            before = changes.get(section, getattr(experiment, section))
            changes[section] = replace(before, **{leaf: _checked(type(before), field, leaf, value)})
        return Trial(name, values, experiment.variant(goal.folder, name, **changes))
    except UserError as error:
        return Trial(name, values, None, _told(error, values))


def _told(error: UserError, values: Values) -> str:
    """What an error says, with the names of fields as the sweep has them."""
    said = str(error)
    for field in values:
        said = said.replace(f"`{field.rpartition('.')[2]}`", field)
    return said.replace("`", "")


@cache
def _adapter(kind: type, leaf: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind)[leaf])


def _checked(kind: type, field: str, leaf: str, value: Any) -> Any:
    """A value, if it has the type of its field.

    Raises:
        UserError: it has another.
    """
    try:
        return _adapter(kind, leaf).validate_python(value, strict=not isinstance(value, int))
    except ValidationError as error:
        raise UserError(f"{field} is {value!r}: {error.errors()[0]['msg']}") from error


def trial_name(values: Values) -> str:
    """A trial's name, in which its values can be read, as far as they fit; others are told apart by a hash."""
    if "generation" in values:  # of the same settings there may be several
        return f"generation{values['generation']}-member{values['member']}"
    parts = [f"{_CALLED.get(field, field.rpartition('.')[2])}{_short(value)}" for field, value in values.items()]
    name = "-".join(parts)
    readable = "".join(sign for sign in name if sign.isalnum() or sign in "-_.+")[:_LONGEST]
    if readable == name and all(map(_is_exact, values.values())):
        return name
    return f"{readable}-{files.sha256(json.dumps(values).encode())[:8]}"


def _is_exact(value: object) -> bool:
    """Whether a value can be read from its short form."""
    return float(_short(value)) == value if isinstance(value, float) else isinstance(value, str | int)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def nested(values: Values) -> dict[str, dict[str, Any]]:
    """Values by section, as a settings file has them."""
    found: dict[str, dict[str, Any]] = {}
    for field, value in settings_of(values).items():
        section, _, leaf = field.partition(".")
        found.setdefault(section, {})[leaf] = value
    return found


def flags(values: Values) -> Sequence[str]:
    """Values as flags of a command."""
    settings = settings_of(values)
    return [f"--{field}={value if isinstance(value, str) else json.dumps(value)}" for field, value in settings.items()]
