from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bld_core.errors import DamagedError
from bld_core.storage.records import part_of
from bld_core.training.checkpoint import load_state, load_weights, read_model_config, save_model, save_state
from bld_core.training.loop import TrainingConfig, make_state
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
    meta = json.loads((tmp_path / "state/meta.json").read_text())
    parts = {name: part_of((tmp_path / "state" / name).read_bytes()) for name in meta["parts"]}
    assert parts.keys() == {"ema.safetensors", "model.safetensors", "optimizer.safetensors"}
    del meta["sha256"]  # its own
    assert meta == {"format": 2, "step": 0, "skipped": 0, "parts": parts, "metrics": {"x": 1.5}}


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    save_state(str(tmp_path), make_state(tiny_prior(classes=0), CONFIG), {})
    with pytest.raises(RuntimeError, match=r"label\.weight"):
        load_state(str(tmp_path), make_state(tiny_prior(classes=3), CONFIG))


def test_parts_of_another_step_and_a_wrong_step_are_found_and_the_state_stays_as_it_was(tmp_path: Path) -> None:
    for seed in (0, 1):
        state = make_state(tiny_prior(seed=seed), CONFIG)
        state.step = seed
        save_state(str(tmp_path / str(seed)), state, {})
    names = ("model.safetensors", "ema.safetensors", "meta.json")
    for name in names:
        mixed = tmp_path / f"with {name}"
        shutil.copytree(tmp_path / "1", mixed)
        shutil.copy(tmp_path / "0" / name, mixed / name)
        untouched = make_state(tiny_prior(seed=2), CONFIG)
        with pytest.raises(DamagedError, match=r"sha256 \w{12}, meta.json says \w{12}: it was damaged or replaced"):
            load_state(str(mixed), untouched)
        assert untouched.step == 0
        for key, tensor in tiny_prior(seed=2).state_dict().items():
            assert torch.equal(untouched.module.state_dict()[key], tensor), key
    meta = tmp_path / "1/meta.json"
    meta.write_text(meta.read_text().replace('"step": 1', '"step": 0'))
    with pytest.raises(DamagedError, match=r"meta.json' says of itself that it has sha256"):
        load_state(str(tmp_path / "1"), make_state(tiny_prior(), CONFIG))


def test_a_state_of_an_early_version_is_read_without_digests(tmp_path: Path) -> None:
    saved, read = make_state(tiny_prior(seed=1), CONFIG), make_state(tiny_prior(seed=2), CONFIG)
    saved.step = 3
    save_state(str(tmp_path), saved, {})
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({name: meta[name] for name in ("format", "step", "skipped")}))
    load_state(str(tmp_path), read)
    assert read.step == 3
    for key, tensor in saved.module.state_dict().items():
        assert torch.equal(read.module.state_dict()[key], tensor), key
