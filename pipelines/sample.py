"""Draw a grid of samples, by class, seed, temperature, steps and guidance, into <root>/<name>/samples."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.sampling.grids import GridConfig, draw_grid
from pipelines.command import Parser, command, fresh_flag, next_command


def extras(made: Parser) -> None:
    fresh_flag(made)
    made.add_class_arguments(GridConfig, "grid")


def main(experiment: Experiment, flags: Namespace) -> None:
    print(f"samples: {draw_grid(experiment, flags.grid, flags.fresh)}")
    next_command("evaluate.py")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
