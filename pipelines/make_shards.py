"""Make WebDataset shards from a folder of images (sub-folders are classes), or from the built-in demo digits."""

from argparse import Namespace

from cluster.shards import ShardConfig, make_shards
from pipelines.command import command


def main(config: ShardConfig, _: Namespace) -> None:
    patterns = make_shards(config)
    for split, pattern in patterns.items():
        print(f"data.{split}: {pattern}")
    print("next: python pipelines/run_all.py --config configs/demo.yaml")


if __name__ == "__main__":
    command(__doc__, main, ShardConfig)
