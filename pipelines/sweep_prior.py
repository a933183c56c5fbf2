"""Sweep settings of the prior, lambda and schedule by default, over the cached latents: `sweep.py prior` for short."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from pipelines.command import command, fresh_flag
from pipelines.sweep import sweep_and_say


def main(experiment: Experiment, flags: Namespace) -> None:
    sweep_and_say(experiment, "prior", flags.fresh)


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
