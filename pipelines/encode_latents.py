"""Encode the whole data set into packed binary latent shards in <root>/<name>/latents."""

from argparse import Namespace

from cluster.encode import encode_latents
from cluster.experiment import Experiment
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    print(f"latents: {encode_latents(experiment, flags.fresh)}")
    next_command("stage2_prior.py")


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
