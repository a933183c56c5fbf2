"""Encode the whole data set into packed binary latent shards in <root>/<name>/latents."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents, verify_latents
from pipelines.command import Parser, command, fresh_flag, mend_flags, next_command


def extras(made: Parser) -> None:
    fresh_flag(made)
    mend_flags(made)


def main(experiment: Experiment, flags: Namespace) -> None:
    if flags.verify:
        print(verify_latents(experiment))
        return
    print(f"latents: {encode_latents(experiment, flags.fresh, flags.mend)}")
    next_command("stage2_prior.py")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
