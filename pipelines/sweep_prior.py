"""Sweep lambda and schedule of the prior over the cached latents; the best by the likelihood bound comes first."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.training.sweep import sweep_prior, sweep_table
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    best, *others = sweep_prior(experiment, flags.fresh)
    print(sweep_table([best, *others]))
    print(f"best: {experiment.folder}/sweep/best.yaml")
    # flags, which go above those that this command was given
    next_command(
        "stage2_prior.py", f"--diffusion.vlb_weight={best.vlb_weight}", f"--diffusion.schedule={best.schedule}"
    )


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
