"""Training state and finished models on disk: safetensors and JSON, the JSON committed last."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bld_core.errors import MissingError, UserError
from bld_core.storage import files
from bld_core.training.loop import TrainState

FORMAT_VERSION = 2
META = "meta.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_CRITIC = "critic"


def save_state(folder: str, state: TrainState, extra: dict[str, Any]) -> None:
    """Write network, averages and optimizer, those of a critic, too; meta.json, with the step and `extra`, comes last.

    Args:
        folder: local path or URL.
        state: what is saved.
        extra: JSON values that the caller wants back, for example the position in the data.
    """
    if state.critic is not None:
        save_state(files.join(folder, _CRITIC), state.critic, {})
    names = _parameter_names(state)
    moments: dict[str, Tensor] = {}
    for optimizer in state.optimizers:
        for parameter, values in optimizer.state.items():
            for kind, value in values.items():
                moments[f"{names[parameter]}|{kind}"] = value
    parts = {"model": state.module.state_dict(), "optimizer": moments}
    parts |= {average_name(number): average.weights for number, average in enumerate(state.averages)}
    for part, tensors in parts.items():
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        files.write_bytes(files.join(folder, f"{part}.safetensors"), save_tensors(contiguous))
    progress = {"format": FORMAT_VERSION, "step": state.step, "skipped": state.skipped}
    files.write_json(files.join(folder, META), progress | extra)


def load_state(folder: str, state: TrainState) -> dict[str, Any]:
    """Restore what `save_state` wrote into a state of the same shape; returns its meta.json.

    Raises:
        UserError: another format version.
        RuntimeError: weights of another network.
    """
    meta = files.read_json(files.join(folder, META))
    if meta["format"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder!r} has format {meta['format']}; this version reads {FORMAT_VERSION}: train anew"
        )
    names = ["model", "optimizer", *(average_name(number) for number in range(len(state.averages)))]
    model, moments, *averages = (
        load_tensors(files.read_bytes(files.join(folder, f"{name}.safetensors"))) for name in names
    )
    state.module.load_state_dict(model)
    for average, saved in zip(state.averages, averages, strict=True):
        assert saved.keys() == average.weights.keys(), "averages and network come from the same checkpoint"
        for name, weight in average.weights.items():
            weight.copy_(saved[name])
    by_name = {name: parameter for parameter, name in _parameter_names(state).items()}
    owner = {p: each for each in state.optimizers for group in each.param_groups for p in group["params"]}
    for optimizer in state.optimizers:
        optimizer.state.clear()
    for name, value in moments.items():
        parameter_name, kind = name.split("|")
        parameter = by_name[parameter_name]
        # A moment must lie in memory as its parameter does: fused optimizers walk both at once.
        like = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
        owner[parameter].state[parameter][kind] = like.copy_(value)
    state.step, state.skipped = meta["step"], meta["skipped"]
    if state.critic is not None:
        load_state(files.join(folder, _CRITIC), state.critic)
    return meta


def average_name(number: int) -> str:
    """The part of a checkpoint that holds one of the averages."""
    return f"ema-{number}" if number else "ema"


def _parameter_names(state: TrainState) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in state.module.named_parameters()}


def save_model(folder: str, weights: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Write a finished model: model.safetensors, then config.json with `config` and the sha256 of the weights.

    Returns:
        That hash, which identifies the model.
    """
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    files.write_bytes(files.join(folder, WEIGHTS), data)
    digest = files.sha256(data)
    files.write_json(files.join(folder, CONFIG), {"format": FORMAT_VERSION, "hash": digest, **config})
    return digest


def read_model_config(folder: str) -> dict[str, Any]:
    """The config.json of a finished model.

    Raises:
        MissingError: nothing finished there.
        UserError: another format version.
    """
    url = files.join(folder, CONFIG)
    if not files.exists(url):
        raise MissingError(
            f"{folder!r} holds no finished model ({CONFIG} is missing): train it first", stages=_stage(folder)
        )
    config = json.loads(files.read_bytes(url))
    if config.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{url!r} has format {config.get('format')}; this version reads {FORMAT_VERSION}: train again",
            stages=_stage(folder),
        )
    return config


def _stage(folder: str) -> tuple[str, ...]:
    """The stage that makes <experiment>/<stage>/final."""
    return tuple(folder.rstrip("/").split("/")[-2:-1])


def load_weights(folder: str, module: nn.Module, expected_hash: str, device: str = "cpu") -> None:
    """Load the weights of a finished model into its network.

    Raises:
        UserError: the file is not the one that config.json names.
    """
    data = files.read_bytes(files.join(folder, WEIGHTS))
    found = files.sha256(data)
    if found != expected_hash:
        raise UserError(
            f"{folder!r}: {WEIGHTS} has sha256 {found[:12]}, config.json says {expected_hash[:12]}; "
            "the file is damaged or was replaced: restore it, or train again",
            stages=_stage(folder),
        )
    module.load_state_dict(load_tensors(data))
    module.to(torch.device(device)).eval()
