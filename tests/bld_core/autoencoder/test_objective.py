"""Training stage 1: whatever saves time or memory changes nothing else; the critic; losses that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.losses import LossConfig, hinge_critic_loss
from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.data.tensors import stack, to_float
from bld_core.noise import uniform
from bld_core.training.checkpoint import load_state, save_state
from bld_core.training.loop import Batch, TrainingConfig, TrainState, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, toy_images

SIDE = 16
CONFIG = TrainingConfig(steps=3, batch_size=8, learning_rate=1e-3, warmup=0)
PLAIN = LossConfig()
ADVERSARIAL = LossConfig(adversarial=0.5, adversarial_start=2, critic_channels=4, critic_layers=1)


def new_state(
    config: TrainingConfig, loss: LossConfig = PLAIN, *, latent: str = "binary", replicas: bool = False
) -> TrainState:
    def wrap(module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module) if replicas else module

    torch.manual_seed(0)
    network = make_autoencoder(replace(TINY_AUTOENCODER, latent=latent), 1)  # pyright: ignore[reportArgumentType]
    critic = PatchCritic(loss, 1)
    state = make_state(network, config, wrap)
    if loss.adversarial:
        state.critic = make_state(critic, replace(config, learning_rate=2e-3), wrap)
    return state


def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    images = stack(toy_images(40, SIDE))
    size = CONFIG.batch_size // world
    for step in itertools.count(start):
        index = step * CONFIG.batch_size + rank * size + torch.arange(size)
        rows = index % len(images)
        yield Batch(images[rows], torch.full((size,), -1), index, [f"key{row}" for row in rows.tolist()])


def objective(loss: LossConfig = PLAIN) -> AutoencoderObjective:
    return AutoencoderObjective(loss, TINY_AUTOENCODER.code_shape(SIDE), seed=0)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor.clone()
        for number, player in enumerate(state.states())
        for name, tensor in player.module.state_dict().items()
    }


def first_gradient(config: TrainingConfig) -> dict[str, Tensor]:
    state = new_state(config)
    next(train(state, batches(), objective(), config))
    return {name: parameter.grad for name, parameter in state.module.named_parameters() if parameter.grad is not None}


def test_the_loss_is_the_weighted_sum_of_the_terms_that_have_a_weight() -> None:
    config, loss = replace(CONFIG, steps=1), LossConfig(l1=0.5, mse=2.0)
    batch = next(batches())
    x, u = to_float(batch.data), uniform(0, "autoencoder draw", batch.sample_index, 8 * 4 * 4)
    with torch.no_grad():
        error = new_state(config).module(x, u)[0] - x
    terms = next(train(new_state(config), batches(), objective(loss), config)).terms
    assert {name: float(terms[name]) for name in ("l1", "mse", "loss")} == pytest.approx(
        {
            "l1": float(error.abs().mean()),
            "mse": float(error.square().mean()),
            "loss": float(0.5 * error.abs().mean() + 2 * error.square().mean()),
        },
        rel=1e-5,
    )
    only = next(train(new_state(config), batches(), objective(LossConfig(l1=0.0, mse=1.0)), config)).terms
    assert "l1" not in only
    assert float(only["loss"]) == float(only["mse"])


# --- What saves time or memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"accumulate": 4}, {"checkpointing": True}, {"channels_last": True}], ids=str)
def test_it_changes_nothing_but_rounding(change: dict[str, int]) -> None:
    other = first_gradient(replace(CONFIG, **change))  # pyright: ignore[reportArgumentType]
    for name, gradient in first_gradient(CONFIG).items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_have_the_strides_of_their_weights_and_the_same_bits(channels: int, channels_last: bool) -> None:
    images = to_float(stack(toy_images(8, SIDE, channels)))

    def gradients(config: TrainingConfig | None) -> list[tuple[nn.Parameter, Tensor]]:
        torch.manual_seed(0)
        network = make_autoencoder(TINY_AUTOENCODER, channels)
        if config is None:
            network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        else:
            make_state(network, config)
        (network(images)[0] - images).square().mean().backward()
        return [(weights, weights.grad) for weights in network.parameters() if weights.grad is not None]

    plain, ours = gradients(None), gradients(replace(CONFIG, channels_last=channels_last))
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(ours, plain, strict=True))
    assert all(gradient.stride() == weights.stride() for weights, gradient in ours)
    if channels == 1 and not channels_last:  # else they have them already
        assert not all(gradient.stride() == weights.stride() for weights, gradient in plain)


def test_checkpointing_keeps_fewer_activations() -> None:
    kept: list[int] = []
    for checkpointing in (False, True):
        state = new_state(replace(CONFIG, checkpointing=checkpointing))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            objective()(state, next(batches()))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_bfloat16_is_the_precision_of_the_forward_pass_alone() -> None:
    config = replace(CONFIG, precision="bfloat16")
    state, usual = new_state(config), new_state(CONFIG)
    terms, expected = (objective()(s, next(batches()))["loss"] for s in (state, usual))
    assert terms.dtype == torch.float32
    assert terms != expected
    assert float(terms.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    assert {gradient.dtype for gradient in first_gradient(config).values()} == {torch.float32}


@pytest.mark.long
def test_a_compiled_step_and_a_plain_one_load_each_others_checkpoints(tmp_path: Path) -> None:
    states: dict[bool, TrainState] = {}
    gradients: list[Tensor] = []
    for compiled in (False, True):
        config = replace(CONFIG, steps=1, compile=compiled)
        states[compiled] = new_state(config)
        list(train(states[compiled], batches(), objective(), config))
        gradients.append(
            torch.cat([p.grad.flatten() for p in states[compiled].module.parameters() if p.grad is not None])
        )
        save_state(str(tmp_path / str(compiled)), states[compiled], {})
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
    saved = {compiled: weights(state) for compiled, state in states.items()}
    assert saved[False].keys() == saved[True].keys()
    for compiled, state in states.items():
        load_state(str(tmp_path / str(not compiled)), state)
        assert all(torch.equal(tensor, saved[not compiled][name]) for name, tensor in weights(state).items())
        config = replace(CONFIG, steps=2, compile=compiled)
        assert len(list(train(state, batches(1), objective(), config))) == 1


@pytest.mark.parametrize("latent", ["vector", "continuous"])
def test_the_comparators_train_by_the_same_stage(latent: str) -> None:
    config = replace(CONFIG, steps=60, learning_rate=3e-3)
    state = new_state(config, latent=latent)
    grey = (batch._replace(data=(batch.data[:, :1, :1] // 2).expand(batch.data.shape)) for batch in batches())
    losses = [float(report.terms["l1"]) for report in train(state, grey, objective(), config)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_noise_of_a_draw_fades_from_that_of_the_bernoulli_to_none() -> None:
    fading = AutoencoderObjective(PLAIN, TINY_AUTOENCODER.code_shape(SIDE), seed=0, fade=8)
    batch, state = next(batches()), new_state(CONFIG)
    found: list[float] = []
    for state.step in (0, 4, 8, 9):
        found.append(float(fading(state, batch)["loss"].detach()))
    drawn = float(objective()(state, batch)["loss"].detach())
    mode = float((state.module(to_float(batch.data))[0] - to_float(batch.data)).abs().mean().detach())
    assert found[0] == drawn
    assert len({*found[:3]}) == 3
    assert found[2:] == pytest.approx([mode, mode], rel=1e-6)


def test_the_weight_of_the_entropy_term_rises_over_its_ramp() -> None:
    torch.manual_seed(0)
    state = make_state(make_autoencoder(TINY_AUTOENCODER, 1, entropy=3.0), CONFIG)
    ramped = objective(LossConfig(entropy=3.0, entropy_ramp=3))
    found: list[float] = []
    for state.step in (0, 1, 3, 7):
        terms = {name: float(term.detach()) for name, term in ramped(state, next(batches())).items()}
        assert terms["loss"] == pytest.approx(terms["l1"] + terms["entropy"])
        found.append(terms["entropy"])
    assert found == pytest.approx([found[3] * share for share in (0.25, 0.5, 1, 1)])


# --- The critic ------------------------------------------------------------------------------------------------------


def test_before_its_start_the_critic_does_nothing_and_after_it_both_learn() -> None:
    config = replace(CONFIG, steps=4)
    state = new_state(config, ADVERSARIAL)
    assert state.critic is not None
    before = {name: tensor.clone() for name, tensor in state.critic.module.state_dict().items()}
    for report in train(state, batches(), objective(ADVERSARIAL), config):
        waiting = report.step <= ADVERSARIAL.adversarial_start
        assert ("critic" in report.terms) == ("adversarial" in report.terms) == (not waiting)
        assert state.critic.step == max(0, report.step - ADVERSARIAL.adversarial_start)
        same = all(torch.equal(tensor, before[name]) for name, tensor in state.critic.module.state_dict().items())
        assert same == waiting
    usual = new_state(config)
    list(train(usual, batches(), objective(), config))
    assert any(not torch.equal(tensor, weights(state)[name]) for name, tensor in weights(usual).items())


def test_each_player_is_moved_by_its_own_loss_alone() -> None:
    loss = replace(ADVERSARIAL, adversarial_start=0)
    state = new_state(CONFIG, loss)
    assert state.critic is not None
    batch = next(batches())
    terms = objective(loss)(state, batch)
    (terms["loss"] + terms["critic"]).backward()
    critic, autoencoder = state.critic.module, state.module
    found = [parameter.grad for parameter in critic.parameters()]
    x = batch.data.permute(0, 3, 1, 2).float() / 127.5 - 1
    u = uniform(0, "autoencoder draw", batch.sample_index, 4 * 4 * 8)
    with torch.no_grad():
        x_hat = autoencoder(x, u)[0]
    own = torch.autograd.grad(hinge_critic_loss(critic(x), critic(x_hat)), list(critic.parameters()))
    for gradient, expected in zip(found, own, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    l1, fooled = (autoencoder(x, u)[0] - x).abs().mean(), -critic(autoencoder(x, u)[0]).mean()
    parameters = list(autoencoder.parameters())
    parts = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (l1, fooled)]
    for parameter, of_l1, of_critic in zip(parameters, *parts, strict=True):
        expected = of_l1 + loss.adversarial * terms["adaptive"] * of_critic
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restart_goes_on_with_the_same_critic(channels_last: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=7, channels_last=channels_last)
    whole = new_state(config, ADVERSARIAL)
    for report in train(whole, batches(), objective(ADVERSARIAL), config):
        if report.step == 4:
            save_state(str(tmp_path), whole, {})
    resumed = new_state(config, ADVERSARIAL)
    load_state(str(tmp_path), resumed)
    assert resumed.critic is not None
    assert resumed.critic.step == 2
    list(train(resumed, batches(4), objective(ADVERSARIAL), config))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_the_adversarial_weight_rises_over_its_ramp_and_the_critics_averages_are_in_its_checkpoint(
    tmp_path: Path,
) -> None:
    config, loss = replace(CONFIG, steps=5), replace(ADVERSARIAL, adversarial_start=1, adversarial_ramp=2, lecam=0.1)
    whole = new_state(config, loss)
    shares: list[float] = []
    for report in train(whole, batches(), objective(loss), config):
        terms = {name: float(term) for name, term in report.terms.items()}
        if report.step > loss.adversarial_start:
            pull = loss.adversarial * terms["adaptive"] * terms["adversarial"]
            shares.append((terms["loss"] - terms["l1"]) / pull)
            assert terms["critic"] > loss.lecam * terms["lecam"] > 0
        if report.step == 3:
            save_state(str(tmp_path), whole, {})
    assert shares == pytest.approx([1 / 3, 2 / 3, 1, 1], rel=1e-3)
    resumed = new_state(config, loss)
    load_state(str(tmp_path), resumed)
    list(train(resumed, batches(3), objective(loss), config))
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert weights(whole)["1.averages"].abs().min() > 0


def work(rank: int, folder: str) -> None:
    """One of two replicas: 20 steps on its half of the batches, in two parts each."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = replace(CONFIG, steps=20, accumulate=2)
    loss = replace(ADVERSARIAL, lecam=0.1)
    state = new_state(config, loss, replicas=True)
    curve = [report.terms["l1"] for report in train(state, batches(0, rank, 2), objective(loss), config)]
    torch.save((weights(state), torch.stack(curve)), Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.mark.long
def test_two_replicas_of_both_players_stay_the_same_and_follow_one(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
    (first, curve_1), (second, curve_2) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = replace(CONFIG, steps=20, accumulate=2)
    loss = replace(ADVERSARIAL, lecam=0.1)
    state = new_state(config, loss)
    assert first.keys() == weights(state).keys()
    curve = torch.stack([report.terms["l1"] for report in train(state, batches(), objective(loss), config)])
    torch.testing.assert_close((curve_1 + curve_2) / 2, curve, rtol=0.02, atol=0)


# --- Losses that are not finite ---------------------------------------------------------------------------------------


def spoiled() -> Iterator[Batch]:
    """The third batch has a NaN in its sixth image."""
    for step, batch in enumerate(batches()):
        data = batch.data.float()
        if step == 2:
            data[5, 3, 3] = torch.nan
        yield batch._replace(data=data)


@pytest.mark.parametrize("loss", [PLAIN, replace(ADVERSARIAL, adversarial_start=0)], ids=["plain", "adversarial"])
@pytest.mark.parametrize(("accumulate", "late"), [(1, True), (2, False)])
def test_one_bad_sample_is_named_with_its_step_and_term_and_no_weight_is_touched(
    loss: LossConfig, accumulate: int, late: bool
) -> None:
    """It is heard of a step late, unless somebody is to look at the step."""
    config = replace(CONFIG, steps=5, accumulate=accumulate, log_every=50 if late else 3)
    state = new_state(config, loss)
    steps = train(state, spoiled(), objective(loss), config)
    next(steps)
    next(steps)
    before = weights(state)
    if late:
        assert next(steps).terms["loss"].isnan()
    with pytest.raises(
        FloatingPointError, match=r"step 3: .*\(batch: loss = nan, .*; sample 'key21': loss = nan, l1 = nan\)"
    ) as stopped:
        next(steps)
    assert "key20" not in str(stopped.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(state).items())


def test_a_bad_step_can_be_skipped_and_is_counted(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=5, non_finite="skip")
    state = new_state(config)
    history = [weights(state)]
    for _ in train(state, spoiled(), objective(), config):
        history.append(weights(state))  # noqa: PERF401  # the state changes from step to step
    assert state.step == 5
    assert state.skipped == 1
    moved = [any(not torch.equal(b[name], a[name]) for name in a) for a, b in itertools.pairwise(history)]
    assert moved == [True, True, False, True, True]
    save_state(str(tmp_path), state, {})
    again = new_state(config)
    load_state(str(tmp_path), again)
    assert (again.step, again.skipped) == (5, 1)


def test_a_codebook_never_learns_from_a_bad_batch() -> None:
    config = replace(CONFIG, steps=5, non_finite="skip")
    state = new_state(config, latent="vector")
    list(train(state, spoiled(), objective(), config))
    assert state.skipped == 1
    assert all(tensor.isfinite().all() for tensor in weights(state).values())
