"""Stage 2: train the transformer prior on the cached latents; the result is <root>/<name>/prior/final."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.train import train_prior
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    print(f"prior: {train_prior(experiment, flags.fresh)}")
    next_command("sample.py")


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
