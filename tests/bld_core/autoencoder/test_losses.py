from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import (
    LossConfig,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
    lecam_term,
)
from bld_core.autoencoder.perceptual import Perceptual
from bld_core.storage.weights import VGG16


def random_images(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- Configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        *((name, value, "0 or more") for name in ("l1", "perceptual", "entropy") for value in (-1.0, float("nan"))),
        ("mse", float("inf"), "finite"),
        ("adversarial_start", -1, "0 or more"),
        ("adversarial_limit", 0.0, "above 0"),
        ("critic_learning_rate", 0.0, "above 0"),
        ("critic_channels", 0, "at least 1"),
        ("critic_layers", 0, "at least 1"),
        ("vgg_sha256", "397923a", "8 to 64 lower-case hex"),
        ("vgg_sha256", "397923AF", "8 to 64 lower-case hex"),
        ("vgg_sha256", "0123456789", "starts with 397923af"),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: float | str, bound: str) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` is .*{bound}") as error:
        LossConfig(**{field: value})  # pyright: ignore[reportArgumentType]
    assert str(value) in str(error.value)


def test_some_reconstruction_term_is_needed() -> None:
    with pytest.raises(ValueError, match=r"`l1` and `mse` are both 0"):
        LossConfig(l1=0.0, perceptual=1.0)
    assert LossConfig(l1=0.0, mse=0.5).mse == 0.5


def test_own_weights_may_have_any_hash() -> None:
    assert LossConfig(vgg_weights="mine.pth", vgg_sha256="01234567").vgg_sha256 == "01234567"


# --- The perceptual term --------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    path: Path
    sha256: str


def saved(path: Path, state: dict[str, Tensor]) -> Weights:
    torch.save(state, path)
    return Weights(path, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    """The part of a VGG16 that LPIPS uses, as torchvision names and initialises it."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    torch.manual_seed(0)
    vgg = VGG(make_layers(cfgs["D"]), num_classes=1, init_weights=False)  # the rest is 500 MB that nothing reads
    state = {name: value for name, value in vgg.state_dict().items() if name.startswith("features.")}
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        fan_in = value[0].numel() if value.ndim > 1 else 1e4
        value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return state


@pytest.fixture(scope="module")
def weights(features: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return saved(tmp_path_factory.mktemp("vgg") / "vgg16.pth", features)


@pytest.fixture(scope="module")
def perceptual(weights: Weights) -> Perceptual:
    return Perceptual(weights.path, weights.sha256[:8])


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_at_distance_0_from_itself_and_noise_moves_it_away(perceptual: Perceptual, channels: int) -> None:
    x = random_images(3, channels, 32)
    noise = random_images(3, channels, 32, seed=1)
    assert perceptual(x, x.clone().requires_grad_()).tolist() == [0, 0, 0]
    distances = torch.stack([perceptual(x, x + size * noise) for size in (0.01, 0.1, 0.5, 1.0)])
    assert distances.shape == (4, 3)
    assert distances.dtype == torch.float32
    assert (distances[0] > 0).all()
    assert (distances.diff(dim=0) > 0).all()


def test_it_is_the_distance_of_the_lpips_package(perceptual: Perceptual, features: dict[str, Tensor]) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about a keyword of lpips
        peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    peer.net.load_state_dict({k: features["features." + k.partition(".")[2]] for k in peer.net.state_dict()})
    x, y = random_images(2, 3, 48), random_images(2, 3, 48, seed=1).mul(0.3)
    y.requires_grad_()
    ours, theirs = perceptual(x, y), peer(x, y).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    (d_ours,), (d_theirs,) = (torch.autograd.grad(d.sum(), y) for d in (ours, theirs))
    torch.testing.assert_close(d_ours, d_theirs, rtol=1e-4, atol=1e-4 * float(d_theirs.abs().max()))


def test_one_channel_stands_for_three_equal_ones(perceptual: Perceptual) -> None:
    x, y = random_images(2, 1, 32), random_images(2, 1, 32, seed=1)
    torch.testing.assert_close(perceptual(x, y), perceptual(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_gradients_reach_the_reconstruction_alone(perceptual: Perceptual) -> None:
    x, y = random_images(2, 3, 32).requires_grad_(), random_images(2, 3, 32, seed=1).requires_grad_()
    perceptual(x, y).sum().backward()
    assert y.grad is not None
    assert (y.grad.flatten(1).norm(dim=1) > 0).all()
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_arises_where_all_features_are_0(features: dict[str, Tensor], tmp_path: Path) -> None:
    dead = {**features, "features.2.bias": features["features.2.bias"] - 1e4}  # the ReLU of the first tap lets none by
    perceptual = Perceptual(*saved(tmp_path / "vgg16.pth", dead))
    y = random_images(1, 3, 16, seed=1).requires_grad_()
    with torch.autograd.detect_anomaly():  # an error, if any node of the graph returns NaN
        perceptual(random_images(1, 3, 16), y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()


OUT_OF_RANGE = {
    "grey levels": torch.tensor([0.0, 255.0]),
    "grey levels in uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "dark grey levels in uint8": torch.tensor([0, 1], dtype=torch.uint8),
    "a little above": torch.tensor([0.0, 1.001]),
    "a little below": torch.tensor([0.0, -1.001]),
    "NaN": torch.tensor([0.0, float("nan")]),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_images_out_of_range_are_refused(perceptual: Perceptual, name: str) -> None:
    x = OUT_OF_RANGE[name].view(2, 1, 1, 1).repeat(1, 1, 16, 16)  # the first image is good
    with pytest.raises(ValueError, match=r"must be floats in \[-1, 1\]: convert uint8 .*to_float.*not to \[0, 1\]"):
        perceptual(x, torch.zeros(2, 1, 16, 16))


def test_reconstructions_may_overshoot(perceptual: Perceptual) -> None:
    x, y = random_images(1, 1, 16).clamp(-1, 1), torch.full((1, 1, 16, 16), 3.0, requires_grad=True)
    perceptual(x, y + random_images(1, 1, 16)).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_shapes_that_do_not_fit_are_named(perceptual: Perceptual) -> None:
    for x, y in (((2, 1, 16, 16), (2, 3, 16, 16)), ((2, 2, 16, 16),) * 2, ((3, 16, 16),) * 2):
        with pytest.raises(ValueError, match=r"both must be \(B, 1 or 3, H, W\)"):
            perceptual(torch.zeros(x), torch.zeros(y))
    with pytest.raises(ValueError, match="images of 15 x 16 pixels; VGG16 needs at least 16 x 16"):
        perceptual(torch.zeros(1, 1, 15, 16), torch.zeros(1, 1, 15, 16))


def test_it_stays_frozen_in_evaluation_mode_and_in_float32(perceptual: Perceptual) -> None:
    holder = nn.ModuleList([perceptual]).train()
    assert holder.training
    assert not any(m.training for m in perceptual.modules())
    x, y = random_images(2, 3, 32), random_images(2, 3, 32, seed=1)
    expected = perceptual(x, y)
    assert torch.equal(perceptual(x.double(), y.double()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perceptual(x, y), expected)


def test_the_trunk_is_that_of_the_file(perceptual: Perceptual, features: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = perceptual.trunk.state_dict()
    assert {f"features.{name}" for name in loaded} == set(features)
    assert all(torch.equal(value, features[f"features.{name}"]) for name, value in loaded.items())
    other = Perceptual(*saved(tmp_path / "other.pth", {k: v.flip(0) * 1.5 for k, v in features.items()}))
    x, y = random_images(2, 3, 32), random_images(2, 3, 32, seed=1)
    assert ((perceptual(x, y) - other(x, y)).abs() > 1e-3).all()


def test_building_it_draws_no_random_numbers(weights: Weights) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Perceptual(*weights)
    assert torch.equal(torch.rand(4), expected)


def test_a_file_that_lacks_a_layer_is_refused(features: dict[str, Tensor], tmp_path: Path) -> None:
    partial = {name: value for name, value in features.items() if name != "features.28.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*28\.bias"):
        Perceptual(*saved(tmp_path / "vgg16.pth", partial))


def test_a_wrong_hash_is_named_beside_the_right_one_and_nothing_is_loaded(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded before it was verified")

    monkeypatch.setattr(torch, "load", refuse)
    for attempt in (lambda: Perceptual(weights.path, "0" * 8), lambda: VGG16.find(str(weights.path), "0" * 8)):
        with pytest.raises(
            ValueError, match=rf"{weights.path} has sha256 {weights.sha256}, expected 00000000"
        ) as error:
            attempt()
        assert "fetch https://" in str(error.value)
    with pytest.raises(AssertionError, match="verified"):
        Perceptual(*weights)


def test_a_named_file_is_used_where_it_is(weights: Weights, tmp_path: Path) -> None:
    assert VGG16.find(str(weights.path), weights.sha256) == weights.path
    with pytest.raises(FileNotFoundError, match=r"`vgg_weights` names .*absent\.pth, which is no file"):
        VGG16.find(str(tmp_path / "absent.pth"), weights.sha256)


def test_a_download_appears_whole_and_verified_or_not_at_all(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = dataclasses.replace(VGG16, url=weights.path.as_uri())
    with pytest.raises(FileNotFoundError, match=rf"could not be downloaded.*00000000.*{weights.sha256}"):
        published.find("", "0" * 8)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    file = published.find("", weights.sha256[:8])
    assert file == tmp_path / "hub" / "checkpoints" / "vgg16.pth"
    assert file.read_bytes() == weights.path.read_bytes()
    gone = dataclasses.replace(VGG16, url="http://127.0.0.1:9/vgg16.pth")
    assert gone.find("", weights.sha256[:8]) == file  # found, not fetched again
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"has sha256 .*it was damaged"):
        published.find("", weights.sha256[:8])


def test_without_a_network_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    gone = dataclasses.replace(VGG16, url="http://127.0.0.1:9/vgg16-397923af.pth")  # nothing listens there
    with pytest.raises(FileNotFoundError, match=r"without a network, copy the file .* `vgg_weights`"):
        gone.find("", VGG16.sha256)


# --- The adversarial term -------------------------------------------------------------------------------------------


def critic_of(channels: int, **fields: int) -> PatchCritic:
    torch.manual_seed(0)
    return PatchCritic(dataclasses.replace(LossConfig(critic_channels=8), **fields), channels)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_score_of_an_image_does_not_depend_on_its_batch(channels: int) -> None:
    critic = critic_of(channels).train()
    x = random_images(5, channels, 64) * torch.tensor([1.0, 0.01, 5.0, 0.3, 1.0]).view(5, 1, 1, 1)
    together = critic(x)
    assert together.shape == (5, 1, 6, 6)
    alone = torch.cat([critic(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.flatten(1).std(dim=0).min() > 1e-3  # the scores do differ between the images


@pytest.mark.parametrize(
    ("layers", "height", "width"), [(1, 6, 9), (2, 12, 30), (3, 64, 64), (3, 256, 256), (4, 48, 50)]
)
def test_the_map_has_the_shape_that_is_promised(layers: int, height: int, width: int) -> None:
    with torch.device("meta"):
        logits = critic_of(3, critic_layers=layers)(torch.zeros(2, 3, height, width))
    assert logits.shape == (2, 1, height // 2**layers - 2, width // 2**layers - 2)


def test_too_small_an_image_is_named_with_the_bound() -> None:
    with pytest.raises(ValueError, match=r"images of 64 x 23 pixels; its 3 layers need at least 24 x 24: lower"):
        critic_of(1)(torch.zeros(1, 1, 64, 23))


def test_the_critic_is_the_patchgan_of_70_pixels() -> None:
    critic = PatchCritic(LossConfig(), 3)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    field = 1
    for convolution in reversed(convolutions):
        field = (field - 1) * convolution.stride[0] + convolution.kernel_size[0]
    assert field == 70
    for convolution in convolutions[1:4]:
        assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        assert convolution.bias is not None
        assert not convolution.bias.any()


def test_hinge_losses_by_hand() -> None:
    real = torch.tensor([2.0, 1.0, 0.5, -1.0], dtype=torch.float64)  # 0, 0, .5, 2
    fake = torch.tensor([-3.0, -1.0, 0.0, 1.0], dtype=torch.float64)  # 0, 0, 1, 2
    assert float(hinge_critic_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 4 + 3 / 4), rel=1e-15)
    assert float(hinge_critic_loss(torch.zeros(3), torch.zeros(2, 1, 6, 6))) == 1  # what an untrained critic pays
    assert float(hinge_generator_loss(fake)) == 0.75


def test_the_critic_learns_only_from_logits_within_the_margin() -> None:
    real = torch.tensor([2.0, 1.1, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-3.0, -1.1, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    hinge_critic_loss(real, fake).backward()
    assert real.grad is not None
    assert real.grad.tolist() == [0, 0, -0.125, -0.125]
    assert fake.grad is not None
    assert fake.grad.tolist() == [0, 0, 0.125, 0.125]
    (towards_real,) = torch.autograd.grad(hinge_generator_loss(fake), fake)
    assert towards_real.tolist() == [-0.25] * 4  # the generator never stops learning
    assert torch.autograd.gradcheck(hinge_critic_loss, (real, fake))
    assert torch.autograd.gradcheck(hinge_generator_loss, (fake,))


def test_the_lecam_term_by_hand() -> None:
    real = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)  # 2.5, and below the other average
    fake = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)  # 3.5, 0.5, above it
    averages = torch.tensor([0.5, -0.5], dtype=torch.float64)
    term = lecam_term(real, fake, *averages)
    assert float(term.detach()) == pytest.approx(2.5**2 / 2 + (3.5**2 + 0.5**2) / 3, rel=1e-15)
    assert torch.autograd.gradcheck(lecam_term, (real, fake, *averages))


def test_the_critics_averages_are_moving_means_of_what_it_has_said() -> None:
    critic = PatchCritic(LossConfig(lecam=0.001, critic_channels=4, critic_layers=1), 1)
    expected = torch.zeros(2)
    for step in range(5):
        real, fake = torch.full((2, 1, 3, 3), 1.0 + step), torch.full((2, 1, 3, 3), -2.0)
        critic.follow(real, fake)
        expected = 0.99 * expected + 0.01 * torch.tensor([1.0 + step, -2.0])
        critic.follow(torch.full((2,), torch.nan), fake[:0].sum() + torch.full((2,), torch.inf))
    torch.testing.assert_close(critic.averages, expected)
    assert "averages" not in PatchCritic(LossConfig(), 1).state_dict()  # checkpoints of before are opened


# --- The adaptive weight --------------------------------------------------------------------------------------------


class Game(NamedTuple):
    """A small decoder against a small critic, in float64."""

    decoder: nn.Sequential
    critic: PatchCritic
    x: Tensor

    def losses(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        y = network(self.x)
        return F.mse_loss(y, self.x), hinge_generator_loss(self.critic(y))

    @property
    def last(self) -> nn.Parameter:
        return self.decoder.get_parameter("2.weight")


def game() -> Game:
    critic = critic_of(2, critic_layers=1).double().requires_grad_(False)
    for parameter in critic.parameters():
        parameter.mul_(5)
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)).double()
    return Game(decoder, critic, random_images(6, 2, 8).double())


def test_the_adaptive_weight_is_the_ratio_of_two_gradients_by_finite_differences() -> None:
    decoder, _, _ = this = game()
    weight = adaptive_weight(*this.losses(decoder), this.last, 1e4)
    step = 1e-5
    slopes = torch.zeros(2, this.last.numel(), dtype=torch.float64)
    with torch.no_grad():
        flat = this.last.view(-1)
        for i, value in enumerate(flat.tolist()):
            ends: list[Tensor] = []
            for moved in (value + step, value - step):
                flat[i] = moved
                ends.append(torch.stack(this.losses(decoder)))
            flat[i] = value
            slopes[:, i] = (ends[0] - ends[1]) / (2 * step)
    reconstruction, adversarial = slopes.norm(dim=1).tolist()
    assert adversarial > 1e-2
    assert float(weight) == pytest.approx(reconstruction / (adversarial + 1e-4), rel=1e-6)


def test_the_adaptive_weight_of_a_linear_layer_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    h, x, w, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 3), (7, 2), (2, 3), (2,)))
    w.requires_grad_()
    y = h @ w.T
    weight = adaptive_weight((y - x).square().mean(), -(y @ c).mean(), w, 1e4)
    d_reconstruction = 2 / 14 * (y - x).detach().T @ h
    d_adversarial = -torch.outer(c, h.mean(0))
    expected = d_reconstruction.norm() / (d_adversarial.norm() + 1e-4)
    assert float(weight) == pytest.approx(float(expected), rel=1e-12)


def test_the_adaptive_weight_is_clamped_detached_and_leaves_both_graphs() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    reconstruction, adversarial = (3 * w).sum(), (w * 2).square().sum() / 2
    weight = adaptive_weight(reconstruction, adversarial, w, 1e4)  # ||3|| / ||4||
    assert float(weight) == pytest.approx(6 / (8 + 1e-4), rel=1e-12)
    assert float(adaptive_weight(reconstruction, adversarial, w, 0.5)) == 0.5
    assert float(adaptive_weight(reconstruction, 0 * adversarial, w, 1e6)) == pytest.approx(6e4, rel=1e-12)
    assert float(adaptive_weight(reconstruction, 0 * adversarial, w, 1e4)) == 1e4
    assert float(adaptive_weight(0 * reconstruction, adversarial, w, 1e4)) == 0
    assert not weight.requires_grad
    assert w.grad is None
    (reconstruction + weight * adversarial).backward()
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([3 + 4 * float(weight)] * 4)


def step_of_one_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2)
    whole = game()
    half = whole._replace(x=whole.x[3 * rank : 3 * rank + 3])
    replica = DistributedDataParallel(half.decoder)
    reconstruction, adversarial = half.losses(replica)
    weight = adaptive_weight(reconstruction, adversarial, half.last, 1e4)
    (reconstruction + weight * adversarial).backward()
    torch.save((weight, half.last.grad), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # on few cores gloo's threads may outlive their group, and abort a process that ends in order


def test_two_workers_use_the_weight_and_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    decoder, _, _ = whole = game()
    reconstruction, adversarial = whole.losses(decoder)
    expected = adaptive_weight(reconstruction, adversarial, whole.last, 1e4)
    (reconstruction + expected * adversarial).backward()
    spawn(step_of_one_worker, (tmp_path,), nprocs=2)
    for rank in range(2):
        weight, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, whole.last.grad, rtol=1e-10, atol=1e-14)
