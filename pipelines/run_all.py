"""The whole order of work: autoencoder, latents, prior, samples, evaluation; what is done already is not done again."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents
from cluster.evaluation.evaluate import check_evaluation, evaluate
from cluster.report.page import write_report
from cluster.report.tables import report_table
from cluster.sampling.grids import GridConfig, draw_grid
from cluster.training.train import train_autoencoder, train_prior
from pipelines.command import command, next_command


def main(experiment: Experiment, _: Namespace) -> None:
    check_evaluation(experiment)  # the first stage checks the data for all of them
    print(f"autoencoder: {train_autoencoder(experiment)}")
    print(f"latents: {encode_latents(experiment)}")
    print(f"prior: {train_prior(experiment)}")
    samples = draw_grid(experiment, GridConfig())
    print(report_table(evaluate(experiment)))
    print(f"samples: {samples}\nreport: {write_report(experiment)}")
    next_command("register.py")


if __name__ == "__main__":
    command(__doc__, main)
