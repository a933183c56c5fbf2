"""Stage 2: train the transformer prior on the cached latents; the result is <root>/<name>/prior/final."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.checkpoints import verify_training
from cluster.training.train import train_prior
from pipelines.command import Parser, command, fresh_flag, mend_flags, next_command, start_flag


def extras(made: Parser) -> None:
    fresh_flag(made)
    mend_flags(made)
    start_flag(made)


def main(experiment: Experiment, flags: Namespace) -> None:
    if flags.verify:
        print(verify_training(experiment, "prior"))
        return
    print(f"prior: {train_prior(experiment, flags.fresh, mend=flags.mend, start=flags.start_from)}")
    next_command("sample.py")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
