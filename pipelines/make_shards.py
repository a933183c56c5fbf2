"""Make WebDataset shards from a folder of images (sub-folders are classes), or from the built-in demo digits."""

import shlex
from argparse import Namespace

from cluster.shards import ShardConfig, make_shards
from pipelines.command import command


def main(config: ShardConfig, _: Namespace) -> None:
    flags = [f"--data.{split} {shlex.quote(pattern)}" for split, pattern in make_shards(config).items()]
    print(f"shards: {config.output}")
    print(f"next: python pipelines/run_all.py --config configs/demo.yaml {' '.join(sorted(flags))}")


if __name__ == "__main__":
    command(__doc__, main, ShardConfig)
