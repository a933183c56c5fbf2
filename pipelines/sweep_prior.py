"""Sweep lambda and schedule of the prior over the cached latents; the best by the likelihood bound comes first."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.sweep import sweep_prior, sweep_table
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    print(sweep_table(sweep_prior(experiment, flags.fresh)))
    best = f"{experiment.folder}/sweep/best.yaml"
    print(f"best: {best}")
    next_command("stage2_prior.py", "--config", best)


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
