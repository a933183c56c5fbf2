"""Sweep lambda and schedule of the prior over the cached latents; the best by the likelihood bound comes first."""

from argparse import Namespace

from cluster.experiment import Experiment
from cluster.sweep import sweep_prior, table
from pipelines.command import command


def main(experiment: Experiment, _: Namespace) -> None:
    print(table(sweep_prior(experiment)))
    best = f"{experiment.folder}/sweep/best.yaml"
    print(f"best: {best}")
    print(f"next: python pipelines/stage2_prior.py with your flags and then --config {best} --name NEW_NAME")


if __name__ == "__main__":
    command(__doc__, main)
