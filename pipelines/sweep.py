"""Sweep settings of stage 1 (autoencoder) or 2 (prior): short trainings, compared on held-out data, the best first."""

from argparse import Namespace
from typing import Literal

from cluster.config.experiment import Experiment
from cluster.sweep.page import write_sweep_report
from cluster.sweep.run import start_of_full_length, sweep
from cluster.sweep.space import GOALS, StageName, flags
from cluster.sweep.table import sweep_table
from pipelines.command import Parser, command, following, fresh_flag


def sweep_and_say(experiment: Experiment, stage: StageName, fresh: bool) -> None:
    rows = sweep(experiment, stage, fresh)
    start = start_of_full_length(experiment, stage, rows[0].values)
    more = ["--start_from", start] if start else []
    # flags, which go above those that this command was given
    command = following("stage2_prior.py" if stage == "prior" else "stage1_ae.py", *flags(rows[0].values), *more)
    report = write_sweep_report(experiment, stage, rows, command)
    print(f"{sweep_table(rows, stage)}\nreport: {report}")
    print(f"best: {experiment.folder}/{GOALS[stage].folder}/best.yaml, which another --config takes")
    print(f"next: {command}")


def extras(made: Parser) -> None:
    fresh_flag(made)
    made.add_argument("stage", type=Literal[StageName], help="which stage the trials train")


def main(experiment: Experiment, flags: Namespace) -> None:
    sweep_and_say(experiment, flags.stage, flags.fresh)


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
