"""Compare priors, or ways to sample one, as in the paper's Tables 5 and 7 and Figs. 4 and 7; <root>/<name>/study.

The study "code" compares autoencoders: what they leave of images, and what their codes cost a prior.
"""

from argparse import Namespace
from typing import Literal

from cluster.config.experiment import Experiment
from cluster.study.code import code_table, run_code_study
from cluster.study.rows import StudyName
from cluster.study.study import BEST, run_study, study_table
from pipelines.command import Parser, command, fresh_flag


def extras(made: Parser) -> None:
    fresh_flag(made)
    made.add_argument("which", type=Literal[StudyName, "code"], help="what is compared")


def main(experiment: Experiment, flags: Namespace) -> None:
    folder = f"{experiment.folder}/study/{flags.which}"
    if flags.which == "code":
        print(code_table(run_code_study(experiment, flags.fresh)))
    else:
        print(study_table(run_study(experiment, flags.which, flags.fresh)))
    print(f"table and plot: {folder}/table.json, plot.png")
    if flags.which == "sampling":
        print(f"best: {folder}/{BEST}, which another --config after the experiment's takes")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
