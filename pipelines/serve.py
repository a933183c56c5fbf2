"""Serve the trained pair: a page to play with, and an HTTP API; by default the experiment's, or one of the registry."""

import signal
from argparse import Namespace

from cluster.config.artifacts import open_pair
from cluster.config.experiment import Experiment
from cluster.registry.registry import newest_version
from cluster.studio.pair import FolderSource, RegisteredSource
from cluster.studio.serve import studio
from pipelines.command import Parser, command


def extras(made: Parser) -> None:
    made.add_argument("--model", default="", help="models:/<name>@<alias>, whose changes are followed, or /<version>")


def main(experiment: Experiment, flags: Namespace) -> None:
    device = experiment.cluster.device
    if flags.model:
        source = RegisteredSource(flags.model, experiment.tracking.resolve(experiment.root), device)
        newest_version(source.model, source.uri)  # a mistake is told before anything starts
    else:
        open_pair(experiment)
        source = FolderSource(experiment.name, experiment.folder, device)
    with studio(source, experiment.serve, experiment.cluster) as address:
        print(f"studio: {address}", flush=True)
        signal.pause()


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
