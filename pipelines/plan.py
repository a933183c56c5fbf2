"""Plan an experiment for GPUs that need not be there: work, memory, hours, cores, storage, what bounds each stage."""

from argparse import Namespace
from dataclasses import fields

from cluster.config.experiment import Experiment
from cluster.config.plan import PlanConfig, make_plan, plan_table
from pipelines.command import Parser, command


def extras(made: Parser) -> None:
    made.add_class_arguments(PlanConfig, skip={"fit"})
    made.add_argument("--fit", action="store_true", help="find the largest batch that a GPU holds")


def main(experiment: Experiment, flags: Namespace) -> None:
    plan = PlanConfig(**{field.name: getattr(flags, field.name) for field in fields(PlanConfig)})
    print(plan_table(make_plan(experiment, plan), experiment, plan))


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
