"""Make WebDataset shards from a folder of images (sub-folders are classes), or from the built-in demo digits."""

import shlex
from argparse import Namespace

from cluster.data.shards import ShardConfig, make_shards
from pipelines.command import command


def main(config: ShardConfig, _: Namespace) -> None:
    made = make_shards(config)
    if config.source == "digits":
        flags = ["--config", "configs/demo.yaml"]
    else:
        flags = ["--name", config.output.rstrip("/").rsplit("/", 1)[-1], f"--prior.classes={made.classes}"]
    flags += [f"--data.{split}={pattern}" for split, pattern in sorted(made.patterns.items())]
    print(f"shards: {config.output}")
    print(f"next: {shlex.join(['python', 'pipelines/run_all.py', *flags])}")


if __name__ == "__main__":
    command(__doc__, main, ShardConfig)
