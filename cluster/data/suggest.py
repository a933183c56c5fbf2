"""The flags by which a first experiment reads a set of shards, from what the images in it are like."""

from __future__ import annotations

import io
import statistics

from PIL import Image

from bld_core.data.images import EXTENSIONS
from bld_core.data.shards import Shard, read_shard
from bld_core.storage import files
from cluster.data.shards import ShardSet

DEMO = "configs/demo.yaml"
"""The experiment of the smallest networks: what a first one on small or grey images starts from."""

_PHOTOGRAPHS = "configs/photos64.yaml"  # colour at 64 x 64
_SIZES = (32, 64)  # pixels, that the networks of either take on two CPU cores
_PROBED_BYTES = 16 << 20
_PROBED = 64
_GUIDANCE = 1.0  # of a prior with classes, as the demo's
_MISSING = "NAME_YOUR_SHARDS"
_OF_CLASSES = ("classifier", "class_accuracy", "precision_recall")  # what the demo measures by a classifier's features


def first_flags(made: ShardSet, name: str) -> list[str]:
    """The flags of run_all.py on these shards: as photographs, or, of small or grey images, by the demo's networks.

    Args:
        made: the shards.
        name: of the experiment.
    """
    given = {split: made.patterns.get(split, _MISSING) for split in ("train", "validation")}
    shards = files.expand(next(iter(made.patterns.values())))
    size, channels = _form(read_shard(shards[0], EXTENSIONS, _PROBED_BYTES))
    classes = made.classes if made.classes > 1 else 0
    photographs = (size, channels) == (64, 3)
    config = _PHOTOGRAPHS if photographs else DEMO
    flags = ["--config", config, "--name", name, *(f"--data.{split}={pattern}" for split, pattern in given.items())]
    if not photographs:
        flags += [f"--data.image_size={size}", f"--data.channels={channels}"]
    flags += [f"--data.extensions=[{','.join(EXTENSIONS)}]", f"--prior.classes={classes}"]
    if photographs and classes:
        flags += [f"--sampling.guidance={_GUIDANCE}"]
    if not photographs and not classes:
        flags += [f"--evaluation.{metric}=false" for metric in _OF_CLASSES]
    if len(shards) < 2:
        flags += ["--cluster.workers=1"]  # each streams shards of its own
    return flags


def _form(shard: Shard) -> tuple[int, int]:
    """An image size and the channels for images such as the first of a shard; what is no image has no say."""
    sides: list[int] = []
    grey = True
    for sample in shard.samples[:_PROBED]:
        try:
            image = Image.open(io.BytesIO(sample.data))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        sides.append(min(image.size))
        grey = grey and image.mode.partition(";")[0] in ("1", "L", "LA", "I")
    side = statistics.median_low(sides) if sides else max(_SIZES)
    return max((size for size in _SIZES if size <= side), default=min(_SIZES)), 1 if grey and sides else 3
