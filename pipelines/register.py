"""Register autoencoder and prior as one version in the MLflow registry, under an alias; the better one is champion."""

import shlex
from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.registry.registry import register
from pipelines.command import command


def main(experiment: Experiment, _: Namespace) -> None:
    made, tracking = register(experiment), experiment.tracking
    print(f"registered: models:/{made.name}@{tracking.alias} is version {made.version}")
    print(made.rule)
    serve = ["mlflow", "models", "serve", "--model-uri", f"models:/{made.name}@champion", "--env-manager", "local"]
    print(f"next: MLFLOW_TRACKING_URI={shlex.quote(tracking.resolve(experiment.root))} {shlex.join(serve)}")


if __name__ == "__main__":
    command(__doc__, main)
