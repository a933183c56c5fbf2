"""A small classifier of images, in whose features sets of images are compared where there is no Inception network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bld_core.data.tensors import to_float
from bld_core.noise import permutation
from bld_core.precision import ieee_float32
from bld_core.splitmix import key_of
from bld_core.training.loop import Batch, TrainingConfig, TrainState, make_state, train

_WIDTHS = (32, 64, 128)
_SIDE = 4  # pixels of the last feature map, over which features are averaged
_BATCH = 128


class Classifier(nn.Module):
    """Convolutions that each halve the image, down to 4 x 4; the mean over positions is the features, a map of them y.

    Args:
        image_size: pixels a side.
        channels: of the images.
        classes: how many.
    """

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for level in range(max(1, (image_size // _SIDE).bit_length() - 1)):
            wider = _WIDTHS[min(level, len(_WIDTHS) - 1)]
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, channels) -> float32 (B, F), F = 128 from 32 pixels on."""
        return self.layers(to_float(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, channels) -> logits of the classes, (B, classes)."""
        return self.head(self.features(images))


def train_classifier(images: Tensor, labels: Tensor, classes: int, steps: int, seed: int) -> Classifier:
    """Train a classifier on real images: a function of its arguments, on one machine with one number of threads.

    Args:
        images: uint8 (N, H, W, channels), on the device that trains.
        labels: int64 (N,), 0..classes - 1.
        classes: how many.
        steps: of training, 128 images each.
        seed: of the first weights and of the order of the images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "classifier weights"))
        network = Classifier(images.shape[1], images.shape[3], classes).to(images.device)

    def cross_entropy(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(state(batch.data), batch.labels)}

    config = TrainingConfig(
        steps=steps,
        batch_size=_BATCH,
        learning_rate=2e-3,
        warmup=50,
        decay="cosine",
        weight_decay=0.01,
        ema_decay=0.98,
    )
    state = make_state(network, config)
    for _ in train(state, _batches(images, labels, seed), cross_entropy, config):
        pass
    network.load_state_dict(state.averages[0].weights)
    return network.eval()


def _batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[Batch]:
    """Seeded permutations of the images, laid end to end."""
    orders = (permutation(seed, "classifier order", epoch, len(images)) for epoch in itertools.count())
    for order in orders:
        for rows in order.split(_BATCH):
            yield Batch(images[rows], labels[rows], rows, [""] * len(rows))


@ieee_float32()
@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images, uint8 (N, H, W, channels), whose likeliest class is their label, int64 (N,)."""
    right = [
        (classifier(some).argmax(1) == y).sum() for some, y in zip(images.split(256), labels.split(256), strict=True)
    ]
    return int(torch.stack(right).sum()) / len(images)
