"""Register autoencoder and prior as one version in the MLflow registry, under an alias."""

from argparse import Namespace

from cluster.experiment import Experiment
from cluster.tracking import register
from pipelines.command import command


def main(experiment: Experiment, _: Namespace) -> None:
    name, version = register(experiment)
    print(f"registered: models:/{name}@{experiment.tracking.alias} is version {version}")
    print("next: make ui")


if __name__ == "__main__":
    command(__doc__, main)
