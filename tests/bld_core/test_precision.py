"""The policy of what networks compute in, seen at every product and convolution."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.diffusion.bound import likelihood_bound
from bld_core.diffusion.process import CodeBatch, DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.generator import Generator
from bld_core.latents.writer import LatentConfig, Manifest, encode_images
from bld_core.metrics.classifier import Classifier, accuracy
from bld_core.metrics.reconstruction import ReconstructionMetrics
from bld_core.precision import TrainingPrecision, ieee_float32, training_arithmetic
from bld_core.prior.transformer import PriorConfig
from bld_core.trained import AutoencoderRecord, PriorRecord, TrainedAutoencoder, TrainedPrior
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, Arithmetic, tf32, tiny_autoencoder, tiny_prior, toy_images


@pytest.fixture(autouse=True)
def as_torch_starts() -> Iterator[None]:
    """Convolutions take TF32, products do not: both must be seen to change."""
    assert tf32() == (False, True)
    yield
    assert tf32() == (False, True), "it is left as it was found"


def images(count: int) -> Tensor:
    return torch.stack([torch.from_numpy(image.pixels) for image in toy_images(count)])


def trained_pair() -> Generator:
    network, prior = tiny_autoencoder(), tiny_prior().eval()
    record = AutoencoderRecord(hash="", autoencoder=TINY_AUTOENCODER, code_shape=(2, 2, 8), image_size=8, channels=1)
    of_prior = PriorRecord(
        hash="", prior=PriorConfig(classes=3), diffusion=DiffusionConfig(), sampling=SamplingConfig(steps=2)
    )
    return Generator(
        TrainedAutoencoder(network, record), TrainedPrior(prior, of_prior, of_prior.model((2, 2, 8))), "cpu"
    )


def reconstruct() -> None:
    ReconstructionMetrics().update(tiny_autoencoder(), images(4))


def encode() -> None:
    encode_images(tiny_autoencoder(), toy_images(3), LatentConfig(batch_size=4), seed=0)


def bound() -> None:
    process = DiffusionConfig().make_process()
    likelihood_bound(tiny_prior(), process, CodeBatch.numbered(torch.zeros(2, 4, 8)))


def judge() -> None:
    accuracy(Classifier(8, 1, 2), images(2), torch.zeros(2, dtype=torch.int64))


MEASURED: dict[str, Callable[[], object]] = {
    "reconstruction": reconstruct,
    "codes": encode,
    "bound": bound,
    "classifier": judge,
    "samples": lambda: trained_pair().sample(2, labels=[0, 1]),
    "process": lambda: trained_pair().process([0, 1], 2),
    "bits": lambda: trained_pair().encode(images(2)),
    "images": lambda: trained_pair().reconstruct(images(2)),
}


@pytest.mark.parametrize("what", MEASURED)
def test_all_that_is_measured_encoded_or_drawn_is_in_ieee_float32(what: str) -> None:
    with Arithmetic() as seen:
        MEASURED[what]()
    assert seen.tf32 == {(False, False)}
    assert seen.dtypes <= {torch.float32, torch.float64}


@pytest.mark.parametrize(
    ("precision", "allowed", "dtype"),
    [("float32", False, torch.float32), ("tf32", True, torch.float32), ("bfloat16", True, torch.bfloat16)],
)
def test_training_takes_what_it_says_forward_and_backward(
    precision: TrainingPrecision, allowed: bool, dtype: torch.dtype
) -> None:
    config = TrainingConfig(steps=1, batch_size=2, precision=precision)
    state = make_state(tiny_autoencoder().train(), config)
    batch = Batch(images(2), torch.full((2,), -1), torch.arange(2), ["a", "b"])
    with Arithmetic() as seen:
        list(train(state, iter([batch]), AutoencoderObjective(LossConfig(), (2, 2, 8), seed=0), config))
    assert seen.tf32 == {(allowed, allowed)}
    assert dtype in seen.dtypes


def test_blocks_in_several_threads_and_in_one_another_hold_until_the_last_has_ended() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with ieee_float32():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with training_arithmetic("tf32"):
        with ieee_float32():
            thread.start()
            inside.wait()
        assert tf32() == (False, False), "the other thread measures still"
        leave.set()
        thread.join()
        assert tf32() == (True, True)


def test_codes_in_bfloat16_are_others_and_say_so() -> None:
    plain = LatentConfig(draws=64, batch_size=4)
    rows = [
        encode_images(tiny_autoencoder(), toy_images(8), replace(plain, precision=precision), seed=0)
        for precision in ("float32", "bfloat16")
    ]
    different = (rows[0].bits != rows[1].bits).float().mean()
    assert 0 < float(different) < 0.5
    told = [Manifest(shape=(2, 2, 8), latents=replace(plain, precision=p)) for p in ("float32", "bfloat16")]
    assert "precision" not in told[0].identity(), "as all that is there says it"
    assert told[1].identity() == told[0].identity() | {"precision": "bfloat16"}
    assert [Manifest.from_json(each.to_json()).latents for each in told] == [each.latents for each in told]
