"""Our figures of samples beside torch-fidelity's own, from the images on: the same files, weights and batches.

    BLD_REAL_DATA=path/to/real/shards python benchmarks/exactness.py [--images 2000] [--weights file.pth]
        [--samples 'fashion-mnist/test-*.tar'] [--image-size 32]

2,000 images, Fashion-MNIST's test images or others, stand for the samples, 2,000 of its training images for the
reference. Ours go through the extractor of the evaluation job and its sums, in parts that merge; the peer is
`torch_fidelity.calculate_metrics`.
Without --weights Inception has random ones of the usual scale (He et al. 2015), which changes the figures and not the
arithmetic. Takes 4 passes of Inception an image, and prints one JSON line for each figure; "ratio" is the relative
difference, which is to be below 1e-6. torch-fidelity takes the mean of features in float32, which shows where the two
sets are so much alike that their distance is a small difference of large numbers; "fd, float64" is its own function on
the same features as float64.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from bld_core.data.images import EXTENSIONS, ImageConfig, first_images
from bld_core.data.tensors import stack
from bld_core.metrics.frechet import FeatureMoments
from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.extractors import Inception
from cluster.evaluation.references import Reference, Space
from cluster.evaluation.sample_metrics import SampleMetrics

NAMES = {
    "fd": "frechet_inception_distance",
    "is": "inception_score_mean",
    "kd": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


class Images(Dataset[Tensor]):
    """Images as torch-fidelity reads them, uint8 (3, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def random_weights(folder: str) -> str:
    """A file of random Inception weights."""
    torch.manual_seed(0)
    with (  # its constructor wants the file that is yet to be made
        mock.patch.object(torch, "load", return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = FeatureExtractorInceptionV3("made", ["2048"], feature_extractor_weights_path="none")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = f"{folder}/inception.pth"
    torch.save(network.state_dict(), path)
    return path


def ours(weights: str, samples: Tensor, real: Tensor, batch: int) -> tuple[dict[str, float], list[Tensor]]:
    """The figures by the parts of the evaluation job; features of the samples and of the real images."""
    sha256 = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    inception = Inception(weights, sha256, torch.device("cpu"))
    moments, kept = FeatureMoments(), list[Tensor]()
    for some in real.split(batch):
        kept.append(inception(some))
        part = FeatureMoments()
        part.update(kept[-1])
        moments.merge(part)
    config = EvaluationConfig(
        samples=len(samples),
        frechet=True,
        inception_weights=weights,
        inception_sha256=sha256,
        inception_score=True,
        kid=len(samples) >= 1000,
        precision_recall=True,
    )
    space = Space("inception", sha256)
    figures = SampleMetrics(config, Reference(space, "", "", moments, torch.cat(kept), {}), 0)
    seen = list[Tensor]()
    for number, some in enumerate(samples.split(batch)):
        seen.append(inception(some))
        figures.update(seen[-1], inception.logits(seen[-1]), number * batch)
    found = figures.metrics()
    named = {name: found[space.metric_name(name)] for name in NAMES if space.metric_name(name) in found}
    return named, [torch.cat(seen), torch.cat(kept)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--weights", default="")
    parser.add_argument("--image-size", type=int, default=32, help="pixels that smaller images are padded to")
    parser.add_argument("--samples", default="fashion-mnist/test-*.tar")
    flags = parser.parse_args()
    data = os.environ.get("BLD_REAL_DATA")
    if not data:
        raise SystemExit("BLD_REAL_DATA does not name a folder of real image shards")
    config = ImageConfig(image_size=flags.image_size, channels=1, fit="pad", extensions=[*EXTENSIONS])
    samples, real = (
        stack(first_images(f"{data}/{shards}", config, flags.images))
        for shards in (flags.samples, "fashion-mnist/train-*.tar")
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = flags.weights or random_weights(folder)
        found, features = ours(weights, samples, real, flags.batch_size)
        theirs = calculate_metrics(
            input1=Images(samples),
            input2=Images(real),
            feature_extractor="inception-v3-compat",  # also for precision and recall, which it takes in VGG16 otherwise
            feature_extractor_weights_path=weights,
            batch_size=flags.batch_size,
            fid=True,
            isc=True,
            kid="kd" in found,
            prc=True,
            cuda=False,
            save_cpu_ram=True,
            verbose=False,
        )
    statistics = [fid_features_to_statistics(part.double()) for part in features]
    exact = fid_statistics_to_metric(*statistics, verbose=False)[NAMES["fd"]]
    pairs = {name: (value, theirs[NAMES[name]]) for name, value in found.items()} | {
        "fd, float64": (found["fd"], exact)
    }
    for name, (value, peer) in pairs.items():
        line = {"name": f"exactness {name}, {flags.images} images", "value": value, "unit": "", "peer": peer}
        print(json.dumps(line | {"ratio": abs(value - peer) / abs(peer) if peer else abs(value)}), flush=True)


if __name__ == "__main__":
    main()
