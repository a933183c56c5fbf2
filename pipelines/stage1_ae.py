"""Stage 1: train the binary autoencoder on image shards; the result is <root>/<name>/autoencoder/final.

With --finetune decoder, train the decoder of a finished one on, its codes as they are; <root>/<name>/decoder/final.
"""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.checkpoints import verify_training
from cluster.training.finetune import finetune_decoder
from cluster.training.train import train_autoencoder
from pipelines.command import Parser, command, fresh_flag, mend_flags, next_command, start_flag


def extras(made: Parser) -> None:
    fresh_flag(made)
    mend_flags(made)
    start_flag(made)
    made.add_argument("--finetune", choices=["decoder"], help="what of a finished autoencoder is trained on")


def main(experiment: Experiment, flags: Namespace) -> None:
    if flags.verify:
        print(verify_training(experiment, flags.finetune or "autoencoder"))
        return
    if flags.finetune:
        print(f"autoencoder: {finetune_decoder(experiment, flags.fresh, mend=flags.mend)}")
        next_command("evaluate.py")
        return
    print(f"autoencoder: {train_autoencoder(experiment, flags.fresh, mend=flags.mend, start=flags.start_from)}")
    next_command("encode_latents.py")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
