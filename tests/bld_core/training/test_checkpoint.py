from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bld_core.errors import DamagedError
from bld_core.storage.records import part_of, read_record, set_aside, write_record
from bld_core.training.checkpoint import load_state, load_weights, read_model_config, save_model, save_state
from bld_core.training.loop import TrainingConfig, TrainState, make_state
from tests.bld_core.toys import perturb, tiny_prior

CONFIG = TrainingConfig(steps=4, batch_size=4)


def test_a_model_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    folder = str(tmp_path / "final")
    prior, other = tiny_prior(seed=0), tiny_prior(seed=1)
    perturb(prior)
    digest = save_model(folder, prior.state_dict(), {"prior": {"layers": 1}})
    config = read_model_config(folder)
    size = (tmp_path / "final/model.safetensors").stat().st_size
    assert config == {"format": 2, "hash": digest, "bytes": size, "prior": {"layers": 1}}
    load_weights(folder, other, digest)
    assert not other.training
    for name, tensor in prior.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert save_model(str(tmp_path / "again"), prior.state_dict(), {}) == digest
    assert save_model(str(tmp_path / "else"), tiny_prior(seed=2).state_dict(), {}) != digest


def test_replaced_weights_are_refused_with_both_hashes(tmp_path: Path) -> None:
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    expected = save_model(mine, tiny_prior(seed=0).state_dict(), {})
    found = save_model(theirs, tiny_prior(seed=1).state_dict(), {})
    (tmp_path / "mine/model.safetensors").write_bytes((tmp_path / "theirs/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"{found[:12]}.*{expected[:12]}"):
        load_weights(mine, tiny_prior(), expected)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    digest = save_model(str(tmp_path), tiny_prior(classes=0).state_dict(), {})
    with pytest.raises(RuntimeError, match=r"label\.weight"):
        load_weights(str(tmp_path), tiny_prior(classes=3), digest)


def test_no_config_is_no_finished_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_model_config(str(tmp_path))
    save_model(str(tmp_path), tiny_prior().state_dict(), {})
    (tmp_path / "config.json").unlink()  # weights alone: the commit point was not reached
    with pytest.raises(FileNotFoundError, match="no finished model"):
        read_model_config(str(tmp_path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    state = make_state(tiny_prior(), CONFIG)
    save_state(str(tmp_path), state, {})
    save_model(str(tmp_path), tiny_prior().state_dict(), {})
    for name in ("meta.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"format": 1, "step": 0}))
    with pytest.raises(ValueError, match=r"format 1.*reads 2"):
        load_state(str(tmp_path), state)
    with pytest.raises(ValueError, match=r"format 1.*reads 2"):
        read_model_config(str(tmp_path))


def test_checkpoints_are_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    save_state(str(tmp_path / "state"), make_state(tiny_prior(), CONFIG), {"metrics": {"x": 1.5}})
    save_state(str(tmp_path / "several"), make_state(tiny_prior(), replace(CONFIG, ema_decay=[0.9, 0.99])), {})
    save_model(str(tmp_path / "model"), tiny_prior().state_dict(), {})
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "model/config.json",
        "model/model.safetensors",
        "several/ema-1.safetensors",
        *(f"several/{name}" for name in ("ema.safetensors", "meta.json", "model.safetensors", "optimizer.safetensors")),
        "state/ema.safetensors",
        "state/meta.json",
        "state/model.safetensors",
        "state/optimizer.safetensors",
    ]
    for path in tmp_path.rglob("*.safetensors"):  # 8 bytes of length, then a JSON header
        data = path.read_bytes()
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    meta = read_record(str(tmp_path / "state/meta.json"))
    assert meta.pop("parts") == {
        path.name: part_of(path.read_bytes()) for path in (tmp_path / "state").glob("*.safetensors")
    }
    assert meta == {"format": 2, "step": 0, "skipped": 0, "metrics": {"x": 1.5}}


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    save_state(str(tmp_path), make_state(tiny_prior(classes=0), CONFIG), {})
    with pytest.raises(RuntimeError, match=r"label\.weight"):
        load_state(str(tmp_path), make_state(tiny_prior(classes=3), CONFIG))


# --- Damage ---------------------------------------------------------------------------------------------------------


def with_critic() -> TrainState:
    state = make_state(tiny_prior(seed=0), CONFIG)
    state.critic = make_state(tiny_prior(seed=1), CONFIG)
    for each in state.states():
        torch.stack([parameter.sum() for parameter in each.module.parameters()]).sum().backward()
        each.optimizers[0].step()
    return state


FILES = [f"{part}{name}" for part in ("", "critic/") for name in ("model", "optimizer", "ema")]


@pytest.mark.parametrize("file", [*(f"{name}.safetensors" for name in FILES), "meta.json", "critic/meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "missing", "of another step", "a folder"])
def test_whatever_is_wrong_with_a_checkpoint_is_found_and_the_state_stays_as_it_was(
    file: str, damage: str, tmp_path: Path
) -> None:
    state = with_critic()
    save_state(str(tmp_path / "older"), state, {})
    for each in state.states():
        each.step = 7
        perturb(each.module)
        each.averages[0].update(each.module, each.step)
        for values in each.optimizers[0].state.values():
            values["exp_avg"].add_(1.0)
    save_state(str(tmp_path / "newer"), state, {})
    spoiled = tmp_path / "newer" / file
    data = spoiled.read_bytes()
    middle = len(data) // 2
    spoiled.unlink()
    if damage == "flipped":
        spoiled.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "cut off":
        spoiled.write_bytes(data[:middle])
    elif damage == "of another step":
        spoiled.write_bytes((tmp_path / "older" / file).read_bytes())
    elif damage == "a folder":
        spoiled.mkdir()
    fresh = with_critic()
    before = {name: weight.clone() for each in fresh.states() for name, weight in each.module.state_dict().items()}
    with pytest.raises(DamagedError) as found:
        load_state(str(tmp_path / "newer"), fresh)
    assert str(tmp_path / "newer") in str(found.value)
    after = {name: weight for each in fresh.states() for name, weight in each.module.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    load_state(str(tmp_path / "older"), fresh)


def test_a_checkpoint_of_an_early_version_is_read_without_digests(tmp_path: Path) -> None:
    save_state(str(tmp_path), with_critic(), {})
    for file in ("meta.json", "critic/meta.json"):
        meta = json.loads((tmp_path / file).read_text())
        del meta["parts"], meta["record_sha256"]
        (tmp_path / file).write_text(json.dumps(meta))
    load_state(str(tmp_path), with_critic())
    (tmp_path / "ema.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedError, match=r"ema.safetensors' is no safetensors file"):
        load_state(str(tmp_path), with_critic())


@pytest.mark.parametrize("text", ['{"a": 1', "", "[1]", '{"a": 2, "record_sha256": "%s"}', "\udcff"])
def test_a_record_that_is_not_what_was_written_is_named(text: str, tmp_path: Path) -> None:
    url = str(tmp_path / "a.json")
    write_record(url, {"a": 1, "b": (2.5, None)})
    assert read_record(url) == {"a": 1, "b": [2.5, None]}
    (tmp_path / "a.json").write_bytes((text.replace("%s", "0" * 64)).encode(errors="surrogateescape"))
    with pytest.raises(DamagedError, match=r"a\.json' .*; bring it back, or have it made again"):
        read_record(url)


def test_what_is_set_aside_is_renamed_and_never_replaced(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "part").write_text(content)
        set_aside(str(tmp_path / "part"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "part.damaged": "first",
        "part.damaged-2": "second",
    }
