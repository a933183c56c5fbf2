"""Population based training (Jaderberg et al. 2017), in step: members that are trained side by side, in generations.

After each generation the worst quarter goes on from the weights of the best, with settings near theirs. Who from whom,
and with which, is a function of (seed, generation, member) and of what the generation before has reached; it is written
down when it is decided, so that a sweep that was interrupted goes on to the same. Every member of every generation is a
trial with a folder of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from bld_core.errors import UserError
from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.storage.records import read_record, write_record
from bld_core.training.loop import learning_rate
from cluster.config.experiment import Experiment
from cluster.sweep.space import GOALS, StageName, Values, draw, settings_of, space_of, span_of
from cluster.sweep.table import Row, ranked
from cluster.training.onward import training_of

_RECORD = "population.json"
_SHARE = 4  # the worst one in four goes on from the best one in four
_ANEW = 0.25  # of the settings of who goes on from another, drawn as at the beginning
_STEP = 1.2  # by which a number is multiplied or divided
_FREE = (
    *("prior_training.learning_rate", "prior_training.weight_decay", "prior_training.clip_norm"),
    *("autoencoder_training.learning_rate", "autoencoder_training.weight_decay", "autoencoder_training.clip_norm"),
    *("loss.l1", "loss.mse", "loss.entropy", "diffusion.vlb_weight"),
    *("augmentation.resize", "augmentation.flip"),
)
"""Fields that may change in the middle of a training: they shape no network, and no state of an optimizer."""


def check_population(experiment: Experiment, stage: StageName) -> None:
    """See that a training can go on with other settings, and that its parts are parts of a whole.

    Raises:
        UserError: a field that only a new training can change, or rates that go by the length of the training.
    """
    if not experiment.sweep.space:
        raise UserError("sweep.space is empty, but sweep.search is population: name the fields that members change")
    for name in space_of(experiment, stage):
        if name not in _FREE:
            free = ", ".join(each for each in _FREE if each.partition(".")[0] in GOALS[stage].sections)
            raise UserError(
                f"sweep.space has {name}, which only a new training can change, but sweep.search is population, whose "
                f"members change it in the middle: name some of {free}, or set another search"
            )
    training = training_of(experiment, stage)
    ends = (span_of(experiment, {"generation": number})[1] for number in (0, experiment.sweep.generations - 1))
    short, whole = (replace(training, steps=end) for end in ends)
    if any(learning_rate(short, step) != learning_rate(whole, step) for step in range(short.steps)):
        raise UserError(
            f"{GOALS[stage].training}.decay is {training.decay!r}: its rates go by the length of a training, and the "
            "generations of a population are trainings of their own: set it to constant"
        )
    if training.ema_lengths or (stage == "autoencoder" and experiment.autoencoder.codes == "fade"):
        raise UserError(
            f"{GOALS[stage].training}.ema_lengths, and codes that fade, go by the length of a training, and the "
            "generations of a population are trainings of their own: set ema_lengths to [], and autoencoder.codes to "
            "another value"
        )


def generation(experiment: Experiment, stage: StageName, number: int, before: Sequence[Row]) -> list[Values]:
    """The values of the members of a generation, in their order.

    Args:
        experiment: of the sweep.
        stage: of the sweep.
        number: of the generation, from 0.
        before: the rows of the generation before, in any order; those that failed are the worst of all.
    """
    space, members = space_of(experiment, stage), range(experiment.sweep.trials)

    def key(*purpose: str | int) -> int:
        return key_of(experiment.seed, "population", number, *purpose)

    def values(member: int, parent: int, settings: Values) -> Values:
        return {"generation": number, "member": member, "parent": parent, **settings}

    if not number:
        return [values(m, m, {name: draw(among, key(m, name)) for name, among in space.items()}) for m in members]
    order = [row for row in ranked(before, stage) if row.outcome == "finished"]
    count = max(1, len(members) // _SHARE)
    best, good = order[:count], {row.values["member"]: row for row in order[: len(members) - count]}
    found = list[Values]()
    for member in members:
        if member in good:
            found.append(values(member, member, settings_of(good[member].values)))
            continue
        parent = best[int(random.Random(key(member, "parent")).random() * len(best))]
        settings = settings_of(parent.values)
        near = {name: explored(space[name], value, key(member, name)) for name, value in settings.items()}
        found.append(values(member, parent.values["member"], near))
    return found


def explored(among: Any, value: Any, key: int) -> Any:
    """A value near another one, within the list or the distribution that both are from; now and then any of them."""
    dice = random.Random(key)
    anew, up = dice.random() < _ANEW, dice.random() < 1 / 2
    if anew:
        return draw(among, key_of(key, "anew"))
    [(kind, bounds)] = [("choice", among)] if isinstance(among, list) else among.items()
    if kind == "choice":
        there = [place for place in (bounds.index(value) - 1, bounds.index(value) + 1) if 0 <= place < len(bounds)]
        return bounds[there[-1 if up else 0]] if there else value
    low, high = bounds
    moved = value * _STEP if up else value / _STEP
    if kind == "randint":
        high, moved = high - 1, round(moved) if round(moved) != value else value + (1 if up else -1)
    near = min(max(moved, low), high)
    if near == value:  # at an end, or 0, which no factor moves
        return draw(among, key_of(key, "anew"))
    return near if kind == "randint" else float(f"{near:.4g}")


def decided(experiment: Experiment, stage: StageName) -> list[list[Values]]:
    """The generations that an earlier start has decided on, those of the same settings.

    Raises:
        UserError: its settings were others.
    """
    url = files.join(experiment.folder, GOALS[stage].folder, _RECORD)
    if not files.exists(url):
        return []
    found = read_record(url)
    if found["settings"] != _settings(experiment, stage):
        raise UserError(
            f"{url!r} is of a population with other settings, whose members would be taken for these: set them to what "
            "they were, choose another --name, or delete it with sweep.py --fresh"
        )
    return found["generations"]


def decide(experiment: Experiment, stage: StageName, generations: Sequence[Sequence[Values]]) -> None:
    """Write down all generations so far."""
    url = files.join(experiment.folder, GOALS[stage].folder, _RECORD)
    write_record(url, {"settings": _settings(experiment, stage), "generations": generations})


def _settings(experiment: Experiment, stage: StageName) -> dict[str, Any]:
    """What decides who the members are, as JSON has it."""
    sweep = {name: value for name, value in asdict(experiment.sweep).items() if name != "concurrent"}
    return json.loads(json.dumps({"sweep": sweep, **experiment.fingerprint(*GOALS[stage].sections)}))
