"""Sweep settings of stage 1 (autoencoder) or 2 (prior): short trainings, compared on held-out data, the best first."""

from argparse import Namespace
from typing import Literal

from cluster.config.experiment import Experiment
from cluster.sweep.run import sweep
from cluster.sweep.space import GOALS, StageName, flags
from cluster.sweep.table import sweep_table
from pipelines.command import Parser, command, fresh_flag, next_command


def sweep_and_say(experiment: Experiment, stage: StageName, fresh: bool) -> None:
    best, *others = sweep(experiment, stage, fresh)
    print(sweep_table([best, *others], stage))
    print(f"best: {experiment.folder}/{GOALS[stage].folder}/best.yaml")
    # flags, which go above those that this command was given
    next_command("stage2_prior.py" if stage == "prior" else "stage1_ae.py", *flags(best.values))


def extras(made: Parser) -> None:
    fresh_flag(made)
    made.add_argument("stage", type=Literal[StageName], help="which stage the trials train")


def main(experiment: Experiment, flags: Namespace) -> None:
    sweep_and_say(experiment, flags.stage, flags.fresh)


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
