"""Complete images of which a part is hidden, several times each, into <root>/<name>/samples."""

from argparse import Namespace

from cluster.config.experiment import Experiment
from cluster.sampling.inpainting import InpaintConfig, inpaint
from pipelines.command import Parser, command, fresh_flag


def extras(made: Parser) -> None:
    fresh_flag(made)
    made.add_class_arguments(InpaintConfig, "inpaint")


def main(experiment: Experiment, flags: Namespace) -> None:
    print(f"image, what is known of it, completions: {inpaint(experiment, flags.inpaint, flags.fresh)}")


if __name__ == "__main__":
    command(__doc__, main, extras=extras)
