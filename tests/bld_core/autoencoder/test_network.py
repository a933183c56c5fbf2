from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bld_core.autoencoder.baselines.vector import VectorBottleneck
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.data.tensors import stack, to_float, to_uint8
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, perturb, tiny_autoencoder, toy_images


@pytest.mark.parametrize(
    ("size", "multipliers", "bits", "channels"),
    [(8, [1], 8, 1), (8, [1, 2], 3, 3), (16, [1, 1, 2], 16, 3), (16, [2, 1, 1, 1], 5, 1), (32, [1, 1, 1, 1, 2], 32, 3)],
)
def test_shapes(size: int, multipliers: list[int], bits: int, channels: int) -> None:
    config = AutoencoderConfig(bits=bits, channels=6, multipliers=multipliers, blocks=1, attention=[])
    h = size // config.downsampling
    with torch.device("meta"):
        autoencoder = make_autoencoder(config, channels)
        x = torch.zeros(2, channels, size, size)
        logits = autoencoder.encode(x)
        assert logits.shape == (2, bits, h, h)
        assert autoencoder.decode(logits).shape == x.shape
        assert autoencoder(x)[0].shape == x.shape
    if h * h * bits % 8 == 0:
        assert config.code_shape(size) == (h, h, bits)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_patch_of_pixels_is_a_position_of_the_first_level(patch: int) -> None:
    config = AutoencoderConfig(bits=8, channels=4, multipliers=[1, 2], blocks=1, attention=[2 * patch], patch=patch)
    assert config.code_shape(16) == (8 // patch, 8 // patch, 8)
    autoencoder = make_autoencoder(config, 3)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, last = autoencoder.encoder[: 1 + (patch > 1)], autoencoder.last_layer
    assert first(x).shape == (2, 4, 16 // patch, 16 // patch)
    moved = torch.roll(x, (patch, -patch), (2, 3))  # by whole patches: all positions move by one, but those at the edge
    there = torch.roll(first(x), (1, -1), (2, 3))
    torch.testing.assert_close(first(moved)[..., 2:-1, 1:-2], there[..., 2:-1, 1:-2])
    assert last.shape == (3 * patch**2, 4, 3, 3)
    x_hat = autoencoder(x)[0]
    assert x_hat.shape == x.shape
    (gradient,) = torch.autograd.grad(x_hat[:, :, 0, 0].sum(), last)  # one pixel: one of the patch's, of each colour
    assert gradient.flatten(1).abs().sum(1).gt(0).nonzero().flatten().tolist() == [n * patch**2 for n in range(3)]


def test_a_patch_or_attention_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"`patch` is 3; it must be 1 .*, 2 or 4"):
        AutoencoderConfig(patch=3)
    with pytest.raises(ValueError, match=r"`attention` is \[1\]; 2 levels have the down-samplings \[2, 4\]"):
        AutoencoderConfig(patch=2, multipliers=[1, 1], attention=[1])


def test_a_decoder_may_be_larger_and_the_encoder_stays_as_it_is() -> None:
    with torch.device("meta"):
        plain = make_autoencoder(TINY_AUTOENCODER, 1)
        larger = make_autoencoder(replace(TINY_AUTOENCODER, decoder_channels=16, decoder_blocks=3), 1)
        same = make_autoencoder(replace(TINY_AUTOENCODER, decoder_channels=8, decoder_blocks=1), 1)

    def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
        return {name: weights.shape for name, weights in network.named_parameters()}

    assert shapes(plain.encoder) == shapes(larger.encoder)
    assert shapes(plain) == shapes(same)
    assert larger.last_layer.shape == (1, 16, 3, 3)
    assert len(larger.decoder) == len(plain.decoder) + 3 * 2 + 2  # two blocks a level, and their attention at one
    with pytest.raises(ValueError, match=r"`decoder_blocks` is -1; it must be 0 \(as the encoder\) or more"):
        replace(TINY_AUTOENCODER, decoder_blocks=-1)


def test_images_that_are_not_square_pass_through() -> None:
    x = torch.zeros(1, 1, 8, 16)
    assert tiny_autoencoder().encode(x).shape == (1, 8, 2, 4)
    assert tiny_autoencoder()(x)[0].shape == x.shape


def test_an_image_that_does_not_divide_is_named_with_the_bound() -> None:
    for size in (30, 2, 0):
        with pytest.raises(ValueError, match=rf"`image_size` is {size}; the 3 levels .* multiple of 4"):
            TINY_AUTOENCODER.code_shape(size)


def test_a_code_that_is_not_whole_bytes_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 x 1 x 12 bits is not whole bytes.*multiple of 8"):
        AutoencoderConfig(bits=12, multipliers=[1, 1], attention=[]).code_shape(2)
    assert AutoencoderConfig(bits=2, multipliers=[1, 1], attention=[]).code_shape(4) == (2, 2, 2)


@pytest.mark.parametrize(("field", "value"), [("bits", 0), ("channels", 0), ("blocks", 0), ("multipliers", [])])
def test_a_bad_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` is ") as error:
        AutoencoderConfig(**{field: value})  # pyright: ignore[reportArgumentType]
    assert str(value) in str(error.value)


def test_to_uint8_inverts_to_float_for_every_grey_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    x = to_float(levels)
    assert x.shape == (2, 3, 16, 16)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), levels)
    assert to_uint8(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_the_decoder_reads_nothing_but_the_bits() -> None:
    autoencoder = tiny_autoencoder()
    x = to_float(stack(toy_images(4)))
    z = (autoencoder.encode(x) > 0).float()
    assert torch.equal(autoencoder(x)[0], autoencoder.decode(z))
    assert 0 < float(z.mean()) < 1


def test_every_parameter_gets_a_gradient_through_the_bits() -> None:
    autoencoder = tiny_autoencoder(channels=3)
    perturb(autoencoder)
    x = to_float(stack(toy_images(4, channels=3)))
    u = torch.rand(4, 2 * 2 * 8, generator=torch.Generator().manual_seed(0))
    (autoencoder(x, u)[0] - x).square().mean().backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_codes_are_drawn_in_training_or_taken_by_the_mode() -> None:
    x, generator = to_float(stack(toy_images(4))), torch.Generator().manual_seed(0)
    u, other = (torch.rand(4, 2 * 2 * 8, generator=generator) for _ in range(2))
    drawn, mode = tiny_autoencoder(), make_autoencoder(replace(TINY_AUTOENCODER, codes="mode"), 1)
    mode.load_state_dict(drawn.state_dict())
    assert not torch.equal(drawn(x, u)[0], drawn(x, other)[0])
    assert torch.equal(mode(x, u)[0], mode(x, other)[0])
    assert torch.equal(mode(x, u)[0], drawn(x)[0])


def test_a_codebook_has_the_entries_asked_for() -> None:
    bottleneck = make_autoencoder(replace(TINY_AUTOENCODER, latent="vector", entries=5), 1).bottleneck
    assert isinstance(bottleneck, VectorBottleneck)
    assert bottleneck.codebook.shape == (5, TINY_AUTOENCODER.bits)


def test_training_reduces_the_loss() -> None:
    images = toy_images(16)
    flat = torch.stack([torch.full((8, 8, 1), 40 * (i % 6)) for i in range(len(images))]).to(torch.uint8)
    config = TrainingConfig(steps=300, batch_size=16, learning_rate=3e-3, warmup=5)
    state = make_state(tiny_autoencoder().train(), config)
    objective = AutoencoderObjective(LossConfig(), TINY_AUTOENCODER.code_shape(8), seed=0)
    labels, keys = torch.full((16,), -1), [""] * 16
    batches = (Batch(flat, labels, torch.arange(16) + 16 * step, keys) for step in itertools.count())
    losses = [float(report.terms["loss"]) for report in train(state, batches, objective, config)]
    assert len(losses) == 300
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(("channels", "multipliers"), [(8, [1, 2, 4]), (32, [1, 1, 2, 2])])
def test_bits_start_half_sure(channels: int, multipliers: list[int]) -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=channels, multipliers=multipliers, attention=[])
    with torch.no_grad():
        logits = make_autoencoder(config, 3).encode(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert 0.5 < float(logits.std()) < 2  # a draw of logits near 0 would say nothing of the image
