"""Evaluate a finished experiment: reconstruction, likelihood bound, samples; <root>/<name>/evaluation/report.html."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.evaluation.evaluate import evaluate
from cluster.report.page import write_report
from cluster.report.tables import report_table
from pipelines.command import command, fresh_flag, next_command


def main(experiment: Experiment, flags: Namespace) -> None:
    print(report_table(evaluate(experiment, flags.fresh)))
    print(f"report: {write_report(experiment)}, its metrics beside it in report.json")
    next_command("register.py")


if __name__ == "__main__":
    command(__doc__, main, extras=fresh_flag)
