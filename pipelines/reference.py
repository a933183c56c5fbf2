"""Take the features of the images that samples are compared with, once; statistics.npz is for ADM's evaluator."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.evaluation.references import make_references, spaces_of
from pipelines.command import command, next_command


def main(experiment: Experiment, _: Namespace) -> None:
    for reference in make_references(experiment, spaces_of(experiment)):
        print(f"{reference.space.name}: {reference.folder}, {reference.hash[:12]}")
    next_command("evaluate.py")


if __name__ == "__main__":
    command(__doc__, main)
