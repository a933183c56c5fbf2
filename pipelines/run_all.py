"""The whole order of work: autoencoder, latents, prior, samples, evaluation; what is done already is not done again."""

from argparse import Namespace

from cluster.encode import encode_latents
from cluster.evaluate import evaluate
from cluster.experiment import Experiment
from cluster.figures import table
from cluster.report import write_report
from cluster.sample import GridConfig, draw_grid
from cluster.train import train_autoencoder, train_prior
from pipelines.command import command, next_command


def main(experiment: Experiment, _: Namespace) -> None:
    print(f"autoencoder: {train_autoencoder(experiment)}")
    print(f"latents: {encode_latents(experiment)}")
    print(f"prior: {train_prior(experiment)}")
    samples = draw_grid(experiment, GridConfig())
    print(table(evaluate(experiment)))
    print(f"samples: {samples}\nreport: {write_report(experiment)}")
    next_command("register.py")


if __name__ == "__main__":
    command(__doc__, main)
