"""Stage 1: train the binary autoencoder on image shards; the result is <root>/<name>/autoencoder/final."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.train import train_autoencoder
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    print(f"autoencoder: {train_autoencoder(experiment, flags.fresh)}")
    next_command("encode_latents.py")


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
