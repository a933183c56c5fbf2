"""Finished pieces of an evaluation, kept in files: one that was interrupted measures only the rest."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from bld_core.data.skipped import Skipped
from bld_core.diffusion.bound import Bound
from bld_core.metrics.code_health import CodeHealth
from bld_core.metrics.frechet import FeatureMoments
from bld_core.metrics.reconstruction import Moments, ReconstructionMetrics, ReconstructionQuality
from bld_core.storage import files
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn, Reconstruct, Reconstructions, SampleFeatures
from cluster.evaluation.references import Space
from cluster.sampling.sampler import MeasureBound
from cluster.secrets import without_secrets

Piece = SampleFeatures | MeasureBound | Reconstruct
Result = Drawn | Bound | Reconstructions
_FACTS = "facts"


class KeptPieces:
    """The results of pieces of work in a folder, a safetensors file each: sums and features, to the last bit.

    Images are kept where the piece was to hand them back: the first ones, or all for an export or for class_accuracy.
    A file is called by the piece and by the sha256 of what it holds: one that is damaged is not taken, and made again.

    Args:
        folder: of the files.
        experiment: whose evaluation it is; what else decides its results is the fingerprint of the stage.
    """

    def __init__(self, folder: str, experiment: Experiment) -> None:
        self._folder = folder
        self._how = {"batch_size": experiment.latents.batch_size, "device": experiment.cluster.device}
        self._files = {name.split("-")[0]: name for name in files.listing(folder)} if files.exists(folder) else {}
        self._sound = {key for key, name in self._files.items() if self._read(name) is not None}

    def __contains__(self, piece: Piece) -> bool:
        shard = piece.shard if isinstance(piece, SampleFeatures) else ""
        return self._key(piece) in self._sound and (not shard or files.exists(shard))

    def load(self, piece: Piece) -> Result:
        """The result of a piece that is there."""
        data = self._read(self._files[self._key(piece)])
        assert data is not None, "it was sound when the job began"
        return _result(piece, load_tensors(data), json.loads(_metadata(data)[_FACTS]))

    def keep(self, piece: Piece, result: Result) -> None:
        """Keep a result."""
        tensors, facts = _parts(result)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        data = save_tensors(tensors, {_FACTS: json.dumps(facts)})
        files.write_bytes(files.join(self._folder, f"{self._key(piece)}-{files.sha256(data)}.safetensors"), data)

    def _key(self, piece: Piece) -> str:
        said = json.dumps({"work": type(piece).__name__, **asdict(piece), **self._how}, sort_keys=True)
        return files.sha256(without_secrets(said).encode())[:32]

    def _read(self, name: str) -> bytes | None:
        """What a file holds; None where it is not what it was."""
        data = files.read_bytes(files.join(self._folder, name))
        return data if name.endswith(f"-{files.sha256(data)}.safetensors") else None


def _metadata(data: bytes) -> dict[str, str]:
    """The strings in the head of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]


def _parts(result: Result) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A result as tensors and JSON, which holds every float exactly."""
    match result:
        case Bound():
            return {}, asdict(replace(result, per_code=()))  # nobody asks for it
        case Drawn():
            tensors = {f"features {space}": features for space, features in result.features.items()}
            more = {"logits": result.logits, "images": result.images}
            facts = {"seed": result.seed, "first_index": result.first_index, "seconds": result.seconds}
            tensors |= {name: tensor for name, tensor in more.items() if tensor is not None}
            return tensors, facts | {"spaces": list(result.features)}
        case Reconstructions():
            return _parts_of_reconstructions(result)


def _parts_of_reconstructions(result: Reconstructions) -> tuple[dict[str, Tensor], dict[str, Any]]:
    sums, health, skipped = result.sums, result.sums.health, result.skipped
    tensors = {"ones": health.ones, "pairs": health.pairs, "entropy": health.entropy}
    for kind, by_space in (("real", result.real), ("reconstructed", result.reconstructed)):
        for number, moments in enumerate(by_space.values()):
            tensors |= {f"{kind} mean {number}": moments.mean, f"{kind} scatter {number}": moments.scatter}
    for number, (images, reconstructed) in enumerate(result.shown):
        tensors |= {f"shown {number}": images, f"shown reconstructed {number}": reconstructed}
    return tensors, {
        "figures": [asdict(moments) for moments in (sums.quality.psnr, sums.quality.ssim, sums.lpips)],
        "positions": health.count,
        "spaces": [asdict(space) for space in result.real],
        "counts": [[real.count, result.reconstructed[space].count] for space, real in result.real.items()],
        "shown": len(result.shown),
        "skipped": {
            "seen": skipped.seen,
            "counts": dict(skipped.counts),
            "names": json.loads(without_secrets(json.dumps(skipped.names))),
        },
    }


def _result(piece: Piece, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Result:
    """What `_parts` has taken apart."""
    match piece:
        case MeasureBound():
            codes, bound, error = (facts[name] for name in ("codes", "bits_per_bit", "standard_error"))
            return Bound(codes, bound, error, tuple(facts["profile"]))
        case SampleFeatures():
            features = {space: tensors[f"features {space}"] for space in facts["spaces"]}
            images, logits = tensors.get("images"), tensors.get("logits")
            return Drawn(facts["seed"], facts["first_index"], features, logits, images, facts["seconds"])
        case Reconstruct():
            return _reconstructions(tensors, facts)


def _reconstructions(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Reconstructions:
    psnr, ssim, lpips = (Moments(**moments) for moments in facts["figures"])
    health = CodeHealth(facts["positions"], tensors["ones"], tensors["pairs"], tensors["entropy"])
    found = Reconstructions(ReconstructionMetrics(ReconstructionQuality(psnr, ssim), lpips, health))
    for number, (space, counts) in enumerate(zip(facts["spaces"], facts["counts"], strict=True)):
        for kind, by_space, count in zip(
            ("real", "reconstructed"), (found.real, found.reconstructed), counts, strict=True
        ):
            mean, scatter = tensors[f"{kind} mean {number}"], tensors[f"{kind} scatter {number}"]
            by_space[Space(**space)] = FeatureMoments(count, mean, scatter)
    found.skipped = Skipped(**facts["skipped"] | {"counts": Counter(facts["skipped"]["counts"])})
    found.shown = [(tensors[f"shown {n}"], tensors[f"shown reconstructed {n}"]) for n in range(facts["shown"])]
    return found
