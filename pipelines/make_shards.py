"""Make WebDataset shards from a folder of images (sub-folders are classes), or from the built-in demo digits."""

import shlex
from argparse import Namespace

from cluster.data.shards import ShardConfig, make_shards
from cluster.data.suggest import DEMO, first_flags
from pipelines.command import command


def main(config: ShardConfig, _: Namespace) -> None:
    made = make_shards(config)
    if config.source == "digits":
        flags = ["--config", DEMO, *(f"--data.{split}={pattern}" for split, pattern in sorted(made.patterns.items()))]
    else:
        flags = first_flags(made, config.output.rstrip("/").rsplit("/", 1)[-1])
    print(f"shards: {config.output}")
    print(f"next: {shlex.join(['python', 'pipelines/run_all.py', *flags])}")


if __name__ == "__main__":
    command(__doc__, main, ShardConfig)
