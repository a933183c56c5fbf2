"""A GPU rehearsed without one: nothing on the way of a step waits for the device, and no two devices are mixed.

Fake tensors have a shape and a device and no content. Those of a CPU raise wherever their content is asked for, as a
wait for a GPU begins; those of a GPU, without one, raise at every mixture of devices (and cannot go backwards).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.autoencoder.perceptual import Perceptual
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import Known, SampleSpec, SamplingConfig
from bld_core.latents.bits import pack_bits, unpack_bits
from bld_core.latents.writer import LatentConfig, encode_images
from bld_core.prior.baselines.absorbing import AbsorbingPrior, sample_unmasking
from bld_core.prior.model import make_model
from bld_core.prior.transformer import PriorConfig
from bld_core.training.gate import Later
from bld_core.training.loop import Batch, Objective, TrainingConfig, TrainState, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, toy_images

TOKENS, BITS, SIZE = 4, 8, 16
PRIOR = PriorConfig(layers=2, width=16, heads=2, classes=3)
DIFFUSION = DiffusionConfig(steps=16)
TRAINING = TrainingConfig(steps=3, batch_size=4)
LOSS = LossConfig(perceptual=1.0, adversarial=1.0, critic_layers=1, critic_channels=4, entropy=0.1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Later]:
    """What was read later, the one thing that may be: its content has left for the host long before."""
    found = list[Later]()
    monkeypatch.setattr(Later, "read", lambda self: (found.append(self), 0.0)[1])  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    return found


class RandomPerceptual(Perceptual):
    """LPIPS with random weights on the first two blocks of VGG16."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        from torchvision.models.vgg import cfgs, make_layers

        self.trunk = make_layers(cfgs["D"])[:9]
        self.heads = nn.ParameterList(torch.rand(1, width, 1, 1) for width in (64, 128))
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))


def rehearse(
    make: Callable[[], tuple[TrainState, Objective]], config: TrainingConfig, data: Callable[[], Tensor]
) -> None:
    """Take steps with fake tensors of a CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, objective = make()

        def batches() -> Iterator[Batch]:
            for step in itertools.count():
                yield Batch(data(), torch.randint(0, 3, (4,)), step * 4 + torch.arange(4), [""] * 4)

        assert sum(1 for _ in train(state, batches(), objective, config)) == config.steps


def rehearse_prior(prior: PriorConfig, diffusion: DiffusionConfig, training: TrainingConfig) -> None:
    model = make_model(prior, diffusion, TOKENS, BITS)
    objective = model.objective(0)  # checks its schedule on the host, once
    rehearse(
        lambda: (make_state(model.network(), training), objective),
        training,
        lambda: unpack_bits(torch.randint(0, 256, (4, TOKENS * BITS // 8)).byte(), (TOKENS, BITS)),
    )


def rehearse_autoencoder(config: AutoencoderConfig, loss: LossConfig, training: TrainingConfig) -> None:
    def make() -> tuple[TrainState, Objective]:
        state = make_state(make_autoencoder(config, 3, loss.entropy), training)
        if loss.adversarial:
            state.critic = make_state(PatchCritic(loss, 3), training)
        perceptual = RandomPerceptual() if loss.perceptual else None
        return state, AutoencoderObjective(loss, config.code_shape(SIZE), 0, perceptual)

    rehearse(make, training, lambda: torch.randint(0, 256, (4, SIZE, SIZE, 3)).byte())


STAGE_2: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "flip, balanced": ({}, {"target": "flip", "balance": "flip"}, {}),
    "z_prev": ({}, {"target": "z_prev"}, {}),
    "uncalibrated": ({}, {"calibration": "none"}, {}),
    "without classes": ({"classes": 0}, {}, {}),
    "paper's trunk": ({"trunk": []}, {}, {}),
    "groups, known tokens": ({"group": 8, "known_share": 0.5}, {}, {}),
    "class tokens, known tokens": ({"class_tokens": 2, "known_share": 0.5}, {}, {}),
    "autoregressive": ({"model": "autoregressive"}, {}, {}),
    "absorbing": ({"model": "absorbing"}, {}, {}),
    "muon": ({}, {}, {"optimizer": "muon"}),
    "accumulation, averages": ({}, {}, {"accumulate": 2, "ema_decay": [0.9, 0.5], "ema_lengths": [0.1]}),
    "bfloat16, checkpointing": ({}, {}, {"precision": "bfloat16", "checkpointing": True}),
}


@pytest.mark.parametrize("name", STAGE_2)
def test_no_step_of_stage_2_waits(name: str, read: list[Later]) -> None:
    prior, diffusion, training = STAGE_2[name]
    rehearse_prior(replace(PRIOR, **prior), replace(DIFFUSION, **diffusion), replace(TRAINING, **training))
    assert len(read) == 3, "one for each step"


STAGE_1: dict[str, tuple[dict[str, Any], LossConfig, dict[str, Any]]] = {
    "all terms": ({}, LOSS, {}),
    "all terms, accumulation": ({}, LOSS, {"accumulate": 2}),
    "bfloat16, channels last": ({}, LOSS, {"precision": "bfloat16"}),
    "vector": ({"latent": "vector"}, replace(LOSS, entropy=0.0), {}),
    "continuous": ({"latent": "continuous"}, replace(LOSS, entropy=0.0), {}),
}


@pytest.mark.parametrize("name", STAGE_1)
def test_no_step_of_stage_1_waits(name: str, read: list[Later]) -> None:
    config, loss, training = STAGE_1[name]
    rehearse_autoencoder(replace(TINY_AUTOENCODER, **config), loss, replace(TRAINING, **training))
    assert len(read) == 3


def test_what_is_to_be_looked_at_is_read_at_once_and_all_else_a_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of what the host does: to read what it has just asked for is to wait for it."""
    done = list[str]()
    made = Later.__init__

    def remember(self: Later, value: Tensor) -> None:
        done.append("asked")
        made(self, value)

    monkeypatch.setattr(Later, "__init__", remember)
    monkeypatch.setattr(Later, "read", lambda self: (done.append("read"), 0.0)[1])  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    rehearse_prior(PRIOR, DIFFUSION, replace(TRAINING, steps=5, log_every=4))
    assert done == ["asked", "read"] * 5
    backward = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (done.append("pass"), backward(*a, **k))[1])  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    done.clear()
    rehearse_prior(PRIOR, DIFFUSION, replace(TRAINING, steps=5, log_every=4))
    late, at_once = ["pass", "read", "asked"], ["pass", "asked"]
    assert done == [*at_once, *late, *late, *late, "read", *at_once, "read"]


# --- Planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [float, bool, Tensor.tolist, Tensor.item])
def test_a_wait_that_is_planted_in_a_step_is_found(wait: Callable[[Tensor], object], read: list[Later]) -> None:
    model = make_model(PRIOR, DIFFUSION, TOKENS, BITS)
    objective = model.objective(0)

    def waiting(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        terms = objective(state, batch)
        wait(terms["loss"].detach())
        return terms

    with pytest.raises((DataDependentOutputException, RuntimeError), match=r"_local_scalar_dense|tolist\(\) is not"):
        rehearse(
            lambda: (make_state(model.network(), TRAINING), waiting),
            TRAINING,
            lambda: torch.randint(0, 2, (4, TOKENS, BITS)).byte(),
        )


def test_the_verdict_on_a_step_is_a_wait_where_it_is_read_from_the_device() -> None:
    with pytest.raises(DataDependentOutputException):
        rehearse_prior(PRIOR, DIFFUSION, TRAINING)


# --- Samples, codes, losses, on both devices --------------------------------------------------------------------------

SAMPLING = SamplingConfig(grid=[16, 9, 3, 0], guidance=1.5, temperature=0.9)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("inpainting", ["", "replacement", "conditioned"])
@pytest.mark.parametrize("group", [1, 8])
def test_sampling_neither_waits_nor_mixes_devices(device: str, inpainting: Any, group: int) -> None:
    model = make_model(replace(PRIOR, group=group, known_share=0.5), DIFFUSION, TOKENS, BITS)
    assert model.steps(SAMPLING) == 3  # the schedule is read on the host, once
    model.process.schedule.levels  # pyright: ignore  # noqa: B018
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        network, known = model.network().eval(), None
        if inpainting:
            known = Known(
                torch.rand(5, TOKENS, BITS, device=device).round(), torch.rand(5, TOKENS, device=device) < 0.5
            )
        samples = SampleSpec(torch.arange(5, device=device), torch.randint(0, 3, (5,), device=device))
        config = replace(SAMPLING, inpainting=inpainting or "auto")
        assert model.sample(network, samples, config, known).device.type == device


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["autoregressive", "absorbing"])
def test_sampling_of_the_other_priors_does_not_either(device: str, name: Any) -> None:
    model = make_model(replace(PRIOR, model=name), DIFFUSION, TOKENS, BITS)
    config = replace(SAMPLING, grid=[])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        network, samples = model.network().eval(), SampleSpec(torch.arange(5), torch.randint(0, 3, (5,)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        if isinstance(network, AbsorbingPrior):  # its model makes a schedule, on the host, for each call
            z = sample_unmasking(network, (TOKENS, BITS), samples, [4, 2, 0], config)
        else:
            z = model.sample(network, samples, config)
        assert z.device.type == device


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoding_waits_for_nothing_but_its_bits(mirror: bool, precision: Any) -> None:
    config = LatentConfig(draws=2, mirror=mirror, batch_size=4, precision=precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = make_autoencoder(TINY_AUTOENCODER, 1).eval()
        assert len(encode_images(network, toy_images(6), config, 0).bits) == 6 * 2 * (1 + mirror)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_losses_are_computed_on_the_gpu_alone(stage: str) -> None:
    """All of it but the backward pass, which fake tensors of a GPU do not have."""
    model = make_model(replace(PRIOR, group=8, known_share=0.5), DIFFUSION, TOKENS, BITS)
    objective = model.objective(0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        if stage == "1":
            with torch.device("cuda"):
                network: nn.Module = make_autoencoder(TINY_AUTOENCODER, 3, 0.1)
                plain = replace(LOSS, adversarial=0.0)
                objective = AutoencoderObjective(plain, (4, 4, 8), 0, RandomPerceptual())
            data = torch.randint(0, 256, (4, SIZE, SIZE, 3), device="cuda").byte()
        else:
            with torch.device("cuda"):
                network = model.network()
            data = torch.randint(0, 2, (4, TOKENS, BITS), device="cuda").byte()
        state = TrainState(network, network, [], [])
        batch = Batch(data, torch.randint(0, 3, (4,), device="cuda"), torch.arange(4, device="cuda"), [""] * 4)
        assert all(term.device.type == "cuda" for term in objective(state, batch).values())
        packed = pack_bits(torch.randint(0, 2, (4, 16), device="cuda"))
        assert unpack_bits(packed, (2, 8)).device.type == "cuda"


def test_a_mixture_of_devices_that_is_planted_is_found() -> None:
    model = make_model(PRIOR, DIFFUSION, TOKENS, BITS)
    model.process.schedule.levels  # pyright: ignore  # noqa: B018
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            network = model.network().eval()
        network.position = nn.Parameter(torch.randn(TOKENS, 16))  # as if it had been left behind
        samples = SampleSpec(torch.arange(5, device="cuda"), torch.randint(0, 3, (5,), device="cuda"))
        with pytest.raises(RuntimeError, match="device"):
            model.sample(network, samples, SAMPLING)
