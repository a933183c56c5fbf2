"""What the paper compares with, and how every bottleneck behaves on two replicas."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.autoencoder.baselines.continuous import GaussianBottleneck, gaussian_kl, normal_from_uniform
from bld_core.autoencoder.baselines.vector import VectorBottleneck
from bld_core.autoencoder.quantizer import BernoulliBottleneck
from bld_core.noise import uniform
from bld_core.training.averages import Ema


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(entries: int, width: int, **settings: float) -> VectorBottleneck:
    """A vector bottleneck after its first step, on normal features."""
    bottleneck = VectorBottleneck(entries, width, **settings)
    bottleneck(normal(8, width, 4, 4))
    return bottleneck


# ---- vector quantizer


def test_each_position_takes_its_nearest_entry() -> None:
    bottleneck = trained(16, 3).eval()
    features = normal(2, 3, 5, 4, seed=1)
    latent, _ = bottleneck(features)
    for b in range(2):
        for h in range(5):
            for w in range(4):
                distances = [float((features[b, :, h, w] - entry).norm()) for entry in bottleneck.codebook]
                entry = bottleneck.codebook[distances.index(min(distances))]
                assert torch.equal(latent[b, :, h, w], entry)


def test_the_gradient_is_the_decoders_and_the_commitments() -> None:
    bottleneck = trained(16, 3, commitment=0.3).eval()
    features, weight = normal(2, 3, 4, 4, seed=1).requires_grad_(), normal(2, 3, 4, 4, seed=2)
    latent, terms = bottleneck(features)
    assert list(terms) == ["commitment"]
    through = torch.autograd.grad((latent * weight).sum(), features, retain_graph=True)[0]
    assert torch.equal(through, weight)
    commitment = torch.autograd.grad(terms["commitment"], features)[0]
    torch.testing.assert_close(commitment, 0.3 * 2 * (features - latent).detach() / features.numel())
    torch.testing.assert_close(terms["commitment"], 0.3 * (features - latent).square().mean())


def test_the_codebook_starts_as_vectors_of_the_first_batch() -> None:
    bottleneck, features = VectorBottleneck(32, 3), normal(8, 3, 4, 4)
    latent, _ = bottleneck(features)
    vectors = {tuple(v) for v in features.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    used = {tuple(v) for v in latent.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert used <= vectors
    assert len(used) >= 30


def test_new_entries_come_from_all_over_the_batch() -> None:
    features = torch.arange(64.0).view(1, 1, 8, 8)  # each vector is its place
    first: set[int] = set()
    for step in range(40):
        bottleneck = VectorBottleneck(4, 1, decay=1 - 1e-6)
        bottleneck.updates.fill_(step)
        bottleneck(features)
        places = bottleneck.codebook.flatten().round().long()
        assert len(places.unique()) == 4
        first.add(int(places[0]) // 16)
    assert first == {0, 1, 2, 3}


def test_the_nearest_entry_is_found_in_float32_under_autocast() -> None:
    bottleneck = trained(128, 3).eval()
    features = normal(8, 3, 8, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        latent, _ = bottleneck(features)
    assert torch.equal(latent, bottleneck(features)[0])


def test_the_codebook_moves_to_the_means_of_clusters() -> None:
    centres = 10 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [2, 2]])
    bottleneck = VectorBottleneck(5, 2, decay=0.8)
    bottleneck.codebook.copy_(centres + 3 * normal(5, 2, seed=1000).clamp(-1, 1))
    bottleneck.usage.fill_(1)
    every: list[Tensor] = []
    for step in range(150):
        features = (centres.repeat(40, 1) + normal(200, 2, seed=step)).view(2, 10, 10, 2).permute(0, 3, 1, 2)
        every.append(features)
        bottleneck(features)
    weights = 0.8 ** torch.arange(149, -1, -1.0)
    means = torch.stack([f.permute(0, 2, 3, 1).reshape(40, 5, 2).mean(0) for f in every])
    average = torch.einsum("s,skd->kd", weights / weights.sum(), means)
    torch.testing.assert_close(bottleneck.codebook, average, rtol=0, atol=1e-3)
    assert float(bottleneck.perplexity) == pytest.approx(5, abs=0.01)


def test_dead_entries_are_replaced_and_then_used() -> None:
    bottleneck = trained(8, 2, decay=0.5, restart=0.2)
    far = normal(4, 2, 4, 4, seed=3) + 100
    used = [len(bottleneck(far)[0].permute(0, 2, 3, 1).reshape(-1, 2).unique(dim=0)) for _ in range(6)]
    assert used[:2] == [1, 1]  # at first all positions take the one entry that is nearest to the new place
    assert used[-1] > 5
    assert float(bottleneck.codebook.min()) > 90
    assert float(bottleneck.perplexity) > 4


def test_only_a_training_step_with_gradients_changes_the_codebook() -> None:
    bottleneck = trained(8, 3)
    before = copy.deepcopy(bottleneck.state_dict())
    features = normal(2, 3, 4, 4, seed=1)
    with torch.no_grad():
        bottleneck(features)
    bottleneck.eval()(features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bottleneck.state_dict().items())
    bottleneck.train()(features)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in bottleneck.state_dict().items())


def test_a_resumed_codebook_goes_on_as_the_uninterrupted_one_whatever_torchs_own_generator_says() -> None:
    batches = [normal(2, 3, 4, 4, seed=step) for step in range(6)]
    whole, first, second = (VectorBottleneck(8, 3, decay=0.5, restart=0.5) for _ in range(3))
    for features in batches:
        whole(features)
    for features in batches[:3]:
        first(features)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(7)
    for features in batches[3:]:
        second(features)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_the_averaged_network_has_the_codebook_itself() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), VectorBottleneck(8, 3))
    ema = Ema(network, 0.9)
    network(normal(2, 1, 4, 4))
    ema.update(network, 1)
    current = network.state_dict()
    for name in ("codebook", "usage", "updates"):
        assert torch.equal(ema.weights[f"1.{name}"], current[f"1.{name}"])


def test_settings_out_of_bounds_say_so() -> None:
    with pytest.raises(ValueError, match=r"entries .* is 0; it must be at least 1"):
        VectorBottleneck(0, 3)
    with pytest.raises(ValueError, match=r"decay .* is 1.0; it must lie in \(0, 1\)"):
        VectorBottleneck(8, 3, decay=1.0)
    with pytest.raises(ValueError, match=r"commitment .* is -1; a weight must be 0 or more"):
        VectorBottleneck(8, 3, commitment=-1)
    with pytest.raises(ValueError, match=r"weight .* is -1; it must be 0 or more"):
        GaussianBottleneck(8, weight=-1)


# ---- continuous latent


def test_noise_from_uniforms_is_standard_normal() -> None:
    n = 400_000
    noise = normal_from_uniform(uniform(0, "normal", torch.arange(n), 1)[:, 0]).double()
    for power, truth, deviation in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((noise**power).mean()) - truth) < 4 * math.sqrt(deviation / n), power
    ends = normal_from_uniform(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert ends.isfinite().all()
    assert float(ends[0]) == -float(ends[2])
    assert abs(float(ends[1])) < 1e-6


def test_kl_is_that_of_torch_distributions() -> None:
    mean, log_variance = normal(1000).double(), 3 * normal(1000, seed=1).double()
    unit = torch.distributions.Normal(torch.zeros(1000).double(), 1)
    truth = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * log_variance).exp()), unit)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), truth)
    features = torch.stack([mean, log_variance]).view(1, 2, 10, 100)
    _, terms = GaussianBottleneck(1, weight=0.5)(features)
    assert list(terms) == ["kl"]
    assert float(terms["kl"]) == pytest.approx(0.5 * float(truth.mean()), rel=1e-5)


def test_a_gaussian_draw_and_its_gradient() -> None:
    bottleneck = GaussianBottleneck(3, weight=1.0)
    features = normal(2, 6, 4, 4).requires_grad_()
    mean, log_variance = features.split(3, 1)
    assert torch.equal(bottleneck(features)[0], mean)
    u = uniform(0, "latent", torch.arange(2), 6 * 16).view(2, 6, 4, 4)
    latent, terms = bottleneck(features, u)
    noise = torch.distributions.Normal(0.0, 1.0).icdf(u[:, :3].double() + 2.0**-25).float()
    torch.testing.assert_close(latent, mean + (log_variance / 2).exp() * noise)
    weight = normal(2, 3, 4, 4, seed=1)
    gradient = torch.autograd.grad((latent * weight).sum(), features, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.cat([weight, weight * (latent - mean) / 2], 1))
    of_kl = torch.autograd.grad(terms["kl"], features)[0]
    torch.testing.assert_close(of_kl, torch.cat([mean, (log_variance.exp() - 1) / 2], 1) / mean.numel())


def test_extreme_log_variances_are_clamped() -> None:
    features = torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1)
    latent, terms = GaussianBottleneck(1)(features, torch.full((1, 2, 1, 1), 0.9))
    assert latent.isfinite().all()
    assert terms["kl"].isfinite()


# ---- every bottleneck


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "bottleneck", [BernoulliBottleneck(4, entropy=0.1), VectorBottleneck(8, 4), GaussianBottleneck(4)], ids=type
)
def test_a_bottleneck_keeps_the_dtype_and_computes_in_float32(
    bottleneck: BernoulliBottleneck | VectorBottleneck | GaussianBottleneck, dtype: torch.dtype
) -> None:
    assert bottleneck.outputs == 4
    features = normal(2, bottleneck.inputs, 4, 4).to(dtype).requires_grad_()
    u = uniform(0, "u", torch.arange(2), bottleneck.inputs * 16).view(features.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        latent, terms = bottleneck(features, u)
    assert latent.dtype == dtype
    assert latent.shape == (2, 4, 4, 4)
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
    (latent.float().sum() + sum(terms.values())).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


# ---- two replicas


def networks() -> list[nn.Sequential]:
    """Each with a bottleneck that learns from the whole batch."""
    torch.manual_seed(0)
    bottlenecks = [VectorBottleneck(16, 4, decay=0.7, restart=0.3), BernoulliBottleneck(4, entropy=1.0)]
    return [nn.Sequential(nn.Conv2d(3, 4, 1), bottleneck) for bottleneck in bottlenecks]


def learn(network: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    """Five steps of gradient descent on this replica's part of each batch; the state and the last gradient."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(5):
        latent, terms = network(normal(8, 3, 4, 4, seed=step).chunk(world)[rank])
        optimizer.zero_grad()
        (latent.square().mean() + sum(terms.values())).backward()
        optimizer.step()
    gradients = {f"gradient {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name.replace("module.", ""): t.clone() for name, t in (network.state_dict() | gradients).items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    replicas = [DistributedDataParallel(network, broadcast_buffers=False) for network in networks()]
    torch.save([learn(network, rank, 2) for network in replicas], Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.mark.long
def test_two_replicas_learn_what_one_learns(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for network, a, b in zip(networks(), first, second, strict=True):
        whole = learn(network, 0, 1)
        assert whole.keys() == a.keys() == b.keys()
        for name, tensor in whole.items():
            assert torch.equal(a[name], b[name]), name
            torch.testing.assert_close(a[name], tensor, rtol=1e-5, atol=1e-5)
