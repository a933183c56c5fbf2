"""The study of the code: what the settings of stage 1 leave of images, and what they cost the prior in bits.

The other studies compare priors of one code; a row of this one is an experiment of its own, from stage 1 on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL.Image import Image

from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import check_shards
from bld_core.data.pictures import png
from bld_core.diffusion.bound import Bound
from bld_core.errors import UserError
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.storage import files
from cluster.config.artifacts import open_finished
from cluster.config.experiment import Experiment
from cluster.console import aligned
from cluster.data.encode import encode_latents
from cluster.evaluation.actors import Drawn, Evaluator, Reconstruct, Reconstructions, SampleFeatures
from cluster.evaluation.references import Reference, make_references
from cluster.plots import Line, Panel, panels_plot
from cluster.runtime import map_on_actors
from cluster.sampling.sampler import MeasureBound, balanced_labels, draw_pieces
from cluster.stages import open_stage
from cluster.study.study import study_space
from cluster.training.train import train_autoencoder, train_prior

_OWN = "own"


@dataclass(frozen=True)
class CodeRow:
    """One row: an experiment whose stage 1 differs from that of the studied one.

    Attributes:
        line: the setting that differs; empty for the studied experiment's own.
        value: of the setting.
        experiment: with the prior of all rows, in a folder of its own.
    """

    line: str
    value: str
    experiment: Experiment

    @property
    def label(self) -> str:
        """Names the row."""
        return f"{self.line} {self.value}" if self.line else _OWN


def code_rows(experiment: Experiment) -> list[CodeRow]:
    """The experiment's own stage 1, and those that differ from it in one setting."""
    own, study = experiment.autoencoder, experiment.study
    networks: list[tuple[str, AutoencoderConfig]] = [
        *(("codes", replace(own, codes=codes)) for codes in ("sample", "mode", "fade")),
        *(("bits", replace(own, bits=bits)) for bits in (max(1, own.bits // 2), 2 * own.bits)),
        *(("channels", replace(own, channels=channels)) for channels in (max(1, own.channels // 2), 2 * own.channels)),
        *(("patch", other) for other in _other_patches(own)),
    ]
    losses = [replace(experiment.loss, entropy=weight) for weight in study.entropies]
    changes: list[tuple[str, dict[str, Any]]] = [("", {})]
    changes += [("entropy", {"loss": loss}) for loss in losses if loss != experiment.loss]
    changes += [(line, {"autoencoder": network}) for line, network in networks if network != own]
    training = replace(experiment.prior_training, steps=study.training_steps or experiment.prior_training.steps)
    rows: list[CodeRow] = []
    for line, change in changes:
        value = str(next((getattr(changed, line) for changed in change.values()), ""))
        with contextlib.suppress(UserError):  # half of a small code may be no whole bytes, or not of the prior's groups
            name = f"{line}-{value}" if line else _OWN
            rows.append(
                CodeRow(line, value, experiment.variant("study/codes", name, prior_training=training, **change))
            )
    return rows


def _other_patches(own: AutoencoderConfig) -> list[AutoencoderConfig]:
    """Larger and smaller patches, of the same code: with a level less, or one of the same width more."""
    found: list[AutoencoderConfig] = []
    if own.patch < 4 and len(own.multipliers) > 1 and own.patch not in own.attention:
        found.append(replace(own, patch=2 * own.patch, multipliers=own.multipliers[1:]))
    if own.patch > 1:
        found.append(replace(own, patch=own.patch // 2, multipliers=[own.multipliers[0], *own.multipliers]))
    return found


def run_code_study(experiment: Experiment, fresh: bool = False) -> dict[str, Any]:
    """Image shards -> <folder>/study/code: table.json, table.txt, plot.png, and an experiment for each row.

    Every row has its own autoencoder and latents, and a prior of `study.training_steps`; what is there is used, and a
    study that was interrupted goes on.

    Args:
        experiment: its configuration; nothing of it needs to be trained.
        fresh: train everything again.

    Returns:
        The table: "rows", each with its metrics by name, and what they were measured with.

    Raises:
        UserError: bad input, before anything is trained.
    """
    if experiment.autoencoder.latent != "binary":
        raise UserError(
            f"autoencoder.latent is {experiment.autoencoder.latent}; the study of the code is of bits: set it to binary"
        )
    rows, study = code_rows(experiment), experiment.study
    [reference] = make_references(experiment, [study_space(experiment)])
    hashes: list[dict[str, str]] = []
    for row in rows:
        train_autoencoder(row.experiment, fresh)
        encode_latents(row.experiment, fresh)
        train_prior(row.experiment, fresh)
        hashes.append(open_finished(row.experiment).identity)
    fingerprint = {
        "reference": reference.hash,
        "rows": [[row.label, made_by] for row, made_by in zip(rows, hashes, strict=True)],
        "sampling": asdict(experiment.sampling),
        "samples": study.samples,
        "codes": study.codes,
        **experiment.fingerprint(),
    }
    with open_stage(
        experiment, "study/code", fingerprint, "table.json", fresh=fresh, on_change="redo", decodes=True
    ) as stage:
        table_url = stage.url("table.json")
        if not stage.done:
            found: list[dict[str, Any]] = []
            for row, metrics in zip(rows, _measured(experiment, rows, stage.folder, reference), strict=True):
                stage.run.metrics(metrics, len(found))
                found.append({"row": row.label, "line": row.line} | metrics)
            made = {
                "rows": found,
                "distance": reference.space.metric_name("fd"),
                "steps": [experiment.autoencoder_training.steps, rows[0].experiment.prior_training.steps],
                "samples": study.samples,
            }
            picture = _plot(made)
            stage.run.picture(picture, "plot.png")
            stage.run.text(code_table(made), "table.txt")
            files.write_bytes(stage.url("plot.png"), png(picture))
            files.write_bytes(stage.url("table.txt"), f"{code_table(made)}\n".encode())
            files.write_json(table_url, made)
        return files.read_json(table_url)


def _measured(
    experiment: Experiment, rows: list[CodeRow], folder: str, reference: Reference
) -> Iterator[dict[str, float]]:
    """The metrics of each row, kept in a file of its own, so that none is measured twice."""
    for number, row in enumerate(rows):
        url = files.join(folder, "rows", f"{number}.json")
        if not files.exists(url):
            files.write_json(url, _measure(experiment, row, reference))
        yield files.read_json(url)


def _measure(experiment: Experiment, row: CodeRow, reference: Reference) -> dict[str, float]:
    """Reconstructions, bits and samples of one row."""
    study, space, config = experiment.study, reference.space, experiment.evaluation
    plain = replace(config, inception_score=False, kid=False)  # what needs more than the sums here
    variant = replace(row.experiment, evaluation=plain)
    codes = open_finished(variant).codes
    assert codes is not None, "a finished prior has its latents"
    labels = balanced_labels(study.samples, experiment.prior.classes)
    draws = draw_pieces(experiment.sampling, labels, study.samples, config.batch_size, experiment.seed)
    pieces: list[Reconstruct | MeasureBound | SampleFeatures] = [
        *(Reconstruct(url) for url in check_shards(experiment.data, "validation")),
        MeasureBound(None, 0, study.codes),
        *(SampleFeatures(draw) for draw in draws),
    ]
    reconstructions, samples, metrics = Reconstructions(), FeatureMoments(), dict[str, float]()
    bits = math.prod(variant.code_shape)
    arguments = (variant, [space], codes.held_out, experiment)
    label = f"measure {row.label}"
    work = map_on_actors(Evaluator, arguments, "work", pieces, experiment.cluster, label, decodes=True)
    with contextlib.closing(work):
        for found in work:
            if isinstance(found, Reconstructions):
                reconstructions.merge(found)
            elif isinstance(found, Bound):
                metrics["code_bits_bound"] = bits * found.bits_per_bit
                metrics["code_bits_bound_se"] = bits * found.standard_error
            else:
                assert isinstance(found, Drawn), "there is no other work"
                samples.update(found.features[space.name])
    metrics |= reconstructions.metrics(experiment.loss.vgg_sha256)
    metrics |= {"code_bits": bits, "code_bits_entropy": bits * metrics["bit_entropy"]}
    return metrics | {space.metric_name("fd"): frechet_distance(reference.moments, samples)}


def code_table(made: dict[str, Any]) -> str:
    """The study as lines of text."""
    names = ["code_bits", "code_bits_entropy", "code_bits_bound", "psnr", "ssim"]
    names += [name for name in made["rows"][0] if name.startswith(("lpips", "rfd")) and not name.endswith("_std")]
    names += ["dead_bits", made["distance"]]
    cells = [["row", *names]]
    for row in made["rows"]:
        shown = [f"{row[name]:.1f}" if name.startswith("code_bits") else f"{row[name]:.4g}" for name in names]
        cells.append([row["row"], *shown])
    stage_1, prior = made["steps"]
    return "\n".join(
        [
            *aligned(cells),
            f"code_bits: of an image's code; _entropy: of them the encoder's own noise; _bound: what a prior of "
            f"{prior} steps needs for them",
            f"psnr, ssim, rfd: of held-out images and their reconstructions; stage 1 took {stage_1} steps",
            f"{made['distance']}: of {made['samples']} samples to the training images",
        ]
    )


def _plot(made: dict[str, Any]) -> Image:
    """Rate against distortion, and samples: a line for each setting, with the experiment's own on all of them."""
    rows, distance = made["rows"], made["distance"]

    def panel(title: str, name: str, label: str) -> Panel:
        lines: list[Line] = []
        for line in dict.fromkeys(row["line"] for row in rows if row["line"]):
            some = sorted((row["code_bits_bound"], row[name]) for row in rows if row["line"] in (line, ""))
            lines.append(Line([x for x, _ in some], [y for _, y in some], name=line))
        return Panel(title, "bits an image, by the bound", label, lines)

    return panels_plot(
        [panel("Rate and distortion", "psnr", "PSNR, dB"), panel("Rate and samples", distance, distance)]
    )
