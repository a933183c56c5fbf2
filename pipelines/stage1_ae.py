"""Stage 1: train the binary autoencoder on image shards; the result is <root>/<name>/autoencoder/final."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.checkpoints import verify_training
from cluster.training.train import train_autoencoder
from pipelines.command import Parser, command, fresh_flag, mend_flags, next_command


def extras(made: Parser) -> None:
    fresh_flag(made)
    mend_flags(made)


def main(experiment: Experiment, flags: Namespace) -> None:
    if flags.verify:
        print(verify_training(experiment, "autoencoder"))
        return
    print(f"autoencoder: {train_autoencoder(experiment, flags.fresh, mend=flags.mend)}")
    next_command("encode_latents.py")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
