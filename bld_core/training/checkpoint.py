"""Training state and finished models on disk: safetensors and JSON, the JSON committed last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, distributed, nn

from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.storage import files
from bld_core.storage.records import (
    Fault,
    Part,
    part_faults,
    part_of,
    read_file,
    read_part,
    read_record,
    sizes,
    write_record,
)
from bld_core.training.loop import TrainState
from bld_core.training.replicas import rank_and_world
from bld_core.training.sharding import is_sharded, shared_as, whole

FORMAT_VERSION = 2
META = "meta.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_CRITIC = "critic"
_TENSORS = ".safetensors"


def save_state(folder: str, state: TrainState, extra: dict[str, Any]) -> None:
    """Write network, averages and optimizer, those of a critic, too; meta.json comes last.

    It says the step, the size and sha256 of every other file, and `extra`.

    Args:
        folder: local path or URL.
        state: what is saved.
        extra: JSON values that the caller wants back, for example the position in the data.
    """
    snapshot(state, extra).write(folder)


def snapshot(state: TrainState, extra: dict[str, Any]) -> SavedState:
    """A copy of the state in host memory, which training does not change: what `save_state` writes.

    Where weights are shared out every replica must ask for it, and the first alone gets them.
    """
    names = _parameter_names(state)
    moments: dict[str, Tensor] = {}
    for optimizer in state.optimizers:
        for parameter, values in optimizer.state.items():
            for kind, value in values.items():
                moments[f"{names[parameter]}|{kind}"] = value
    tables = {"model": state.module.state_dict(), "optimizer": moments}
    tables |= {average_name(number): average.weights for number, average in enumerate(state.averages)}
    return SavedState(
        {"format": FORMAT_VERSION, "step": state.step, "skipped": state.skipped} | extra,
        {part: on_host(tensors) for part, tensors in tables.items()},
        None if state.critic is None else snapshot(state.critic, {}),
    )


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; of tensors that are shared out on the first replica alone, where all must ask."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = whole(tensor.detach())
        if rank_and_world()[0] == 0 or not is_sharded(tensor):
            copies[name] = here.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


@dataclass(frozen=True)
class SavedState:
    """A checkpoint in memory: read, every file of it as meta.json says, or about to be written.

    Attributes:
        meta: its meta.json.
        tensors: those of each part, by name.
        critic: that of the critic, where it has one.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    critic: SavedState | None

    def sizes(self, folder: str) -> dict[str, int]:
        """About the bytes of each file that `write` would write to a folder, by its path, in that order."""
        of_critic = {} if self.critic is None else self.critic.sizes(files.join(folder, _CRITIC))
        return of_critic | {
            files.join(folder, f"{part}{_TENSORS}"): sum(tensor.nbytes for tensor in tensors.values())
            for part, tensors in self.tensors.items()
        }

    def write(self, folder: str) -> None:
        """Write it, meta.json last: a folder without one was never finished.

        Raises:
            FullError: no space for it.
        """
        parts: dict[str, dict[str, int | str]] = {}
        if self.critic is not None:
            self.critic.write(files.join(folder, _CRITIC))
            parts[f"{_CRITIC}/{META}"] = part_of(files.read_bytes(files.join(folder, _CRITIC, META)))
        for part, tensors in self.tensors.items():
            file, data = f"{part}{_TENSORS}", save_tensors({**tensors})
            files.write_bytes(files.join(folder, file), data)
            parts[file] = part_of(data)
        write_record(files.join(folder, META), {**self.meta, "parts": parts})

    def restore(self, state: TrainState) -> None:
        """Put it into a state of the same shape.

        Raises:
            RuntimeError: weights of another network.
        """
        there, saved = state.module.state_dict(), self.tensors["model"]
        state.module.load_state_dict({name: shared_as(x, there.get(name, x)) for name, x in saved.items()})
        for number, average in enumerate(state.averages):
            saved = self.tensors[average_name(number)]
            assert saved.keys() == average.weights.keys(), "averages and network come from the same checkpoint"
            for name, weight in average.weights.items():
                weight.copy_(shared_as(saved[name], weight))
        by_name = {name: parameter for parameter, name in _parameter_names(state).items()}
        owner = {p: each for each in state.optimizers for group in each.param_groups for p in group["params"]}
        for optimizer in state.optimizers:
            optimizer.state.clear()
        for name, value in self.tensors["optimizer"].items():
            parameter_name, kind = name.split("|")
            parameter = by_name[parameter_name]
            # A moment must lie in memory as its parameter does: fused optimizers walk both at once.
            like = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
            owner[parameter].state[parameter][kind] = like.copy_(shared_as(value, like))
        state.step, state.skipped = self.meta["step"], self.meta["skipped"]
        if state.critic is not None:
            assert self.critic is not None, "`read_state` was asked for it"
            self.critic.restore(state.critic)


def read_state(folder: str, averages: int, *, critic: bool = False) -> SavedState:
    """Read what `save_state` wrote, each file once.

    Args:
        folder: local path or URL.
        averages: how many averages of the weights it holds.
        critic: whether it holds one.

    Raises:
        DamagedError: a file is missing, unreadable, or not the one that meta.json names.
        UserError: another format version.
    """
    meta = read_meta(folder)
    names = ["model", "optimizer", *(average_name(number) for number in range(averages))]
    tensors = {name: read_tensors(folder, meta, name) for name in names}
    if not critic:
        return SavedState(meta, tensors, None)
    _read(folder, meta, f"{_CRITIC}/{META}")
    return SavedState(meta, tensors, read_state(files.join(folder, _CRITIC), averages))


def said_by_first(saved: SavedState | None, device: torch.device) -> SavedState | None:
    """What the first of all replicas has read, in the host memory of each: storage is asked once, by that one.

    Args:
        saved: the first replica's; what the others pass does not count.
        device: of this replica, through which the tensors come, one at a time.
    """
    rank, world = rank_and_world()
    if world == 1:
        return saved
    box: list[_Outline | None] = [None if saved is None else _outline(saved)]
    distributed.broadcast_object_list(box, device=device)
    if (outline := box[0]) is None:
        return None
    meta, shapes, critic = outline
    tensors: dict[str, dict[str, Tensor]] = {}
    for part, table in shapes.items():
        for name, (shape, dtype) in table.items():
            mine = torch.empty(shape, dtype=dtype) if rank or saved is None else saved.tensors[part][name]
            data = mine.flatten().view(torch.uint8).to(device)  # bytes: not every backend knows every type
            distributed.broadcast(data, 0)
            tensors.setdefault(part, {})[name] = data.cpu().view(dtype).view(shape)
    return SavedState(meta, tensors, said_by_first(saved.critic if saved else None, device) if critic else None)


_Outline = tuple[Mapping[str, Any], dict[str, dict[str, tuple[torch.Size, torch.dtype]]], bool]


def _outline(saved: SavedState) -> _Outline:
    """A checkpoint without its values: meta.json, shapes and types, and whether there is a critic."""
    shapes = {
        part: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for part, tensors in saved.tensors.items()
    }
    return saved.meta, shapes, saved.critic is not None


def read_meta(folder: str) -> dict[str, Any]:
    """The meta.json of a checkpoint; the errors are those of `read_state`."""
    meta = read_record(files.join(folder, META))
    if meta.get("format") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder!r} has format {meta.get('format')}; this version reads {FORMAT_VERSION}: train anew"
        )
    return meta


def read_tensors(folder: str, meta: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """One part of a checkpoint; the errors are those of `read_state`."""
    file = f"{name}{_TENSORS}"
    try:
        return load_tensors(_read(folder, meta, file))
    except SafetensorError as error:  # of an early version, without digests
        raise DamagedError(files.join(folder, file), f"is no safetensors file ({error}): it is damaged") from error


def _read(folder: str, meta: Mapping[str, Any], file: str) -> bytes:
    url, parts = files.join(folder, file), meta.get("parts")
    if parts is None:  # an early version
        return read_file(url)
    if file not in parts:
        raise DamagedError(url, f"is not named in {META}: it belongs to another checkpoint")
    return read_part(url, Part(**parts[file]), META)


def check_state(folder: str) -> None:
    """Read a checkpoint's files, whatever they are, and compare them with meta.json; the errors of `read_state`."""
    meta = read_meta(folder)
    for file in meta.get("parts", {}):
        _read(folder, meta, file)
        if file == f"{_CRITIC}/{META}":
            check_state(files.join(folder, _CRITIC))


def load_state(folder: str, state: TrainState) -> Mapping[str, Any]:
    """Read a checkpoint into a state of the same shape; returns its meta.json.

    Raises:
        DamagedError: as `read_state`; the state is then as it was.
        UserError: another format version.
        RuntimeError: weights of another network.
    """
    saved = read_state(folder, len(state.averages), critic=state.critic is not None)
    saved.restore(state)
    return saved.meta


def average_name(number: int) -> str:
    """The part of a checkpoint that holds one of the averages."""
    return f"ema-{number}" if number else "ema"


def _parameter_names(state: TrainState) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in state.module.named_parameters()}


def save_model(folder: str, weights: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Write a finished model: model.safetensors, then config.json with `config`, size and sha256 of the weights.

    Returns:
        That sha256, which identifies the model.
    """
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    files.write_bytes(files.join(folder, WEIGHTS), data)
    digest = files.sha256(data)
    progress = {"format": FORMAT_VERSION, "hash": digest, "bytes": len(data)}
    write_record(files.join(folder, CONFIG), progress | config)
    return digest


def read_model_config(folder: str) -> dict[str, Any]:
    """The config.json of a finished model.

    Raises:
        MissingError: nothing finished there.
        DamagedError: it is not what was written.
        UserError: another format version.
    """
    url = files.join(folder, CONFIG)
    if not files.exists(url):
        raise MissingError(
            f"{folder!r} holds no finished model ({CONFIG} is missing): train it first", stages=_stage(folder)
        )
    config = read_record(url, _stage(folder))
    if config.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{url!r} has format {config.get('format')}; this version reads {FORMAT_VERSION}: train again",
            stages=_stage(folder),
        )
    return config


def model_faults(folder: str, *, deep: bool) -> list[Fault]:
    """What is wrong with a finished model: by config.json and the size of its weights, or with `deep` by their bytes.

    Raises:
        MissingError: nothing finished there.
        UserError: another format version.
    """
    try:
        config = read_model_config(folder)
    except DamagedError as error:
        return [Fault(error.url, error.reason)]
    return part_faults(folder, sizes(folder), {WEIGHTS: Part(config["hash"], config.get("bytes"))}, CONFIG, deep=deep)


def check_model(folder: str) -> None:
    """Read a finished model and see that it is what was written.

    Raises:
        DamagedError: it is not; and the errors of `model_faults`.
    """
    for fault in model_faults(folder, deep=True):
        raise DamagedError(*fault, _stage(folder))


def _stage(folder: str) -> tuple[str, ...]:
    """The stage that makes <experiment>/<stage>/final."""
    return tuple(folder.rstrip("/").split("/")[-2:-1])


def read_weights(folder: str, expected_hash: str) -> dict[str, Tensor]:
    """The weights of a finished model.

    Raises:
        DamagedError: the file is not the one that config.json names.
    """
    return load_tensors(read_part(files.join(folder, WEIGHTS), Part(expected_hash), CONFIG, _stage(folder)))


def load_weights(folder: str, module: nn.Module, expected_hash: str, device: str = "cpu") -> None:
    """Load the weights of a finished model into its network; the errors are those of `read_weights`."""
    module.load_state_dict(read_weights(folder, expected_hash))
    module.to(torch.device(device)).eval()
