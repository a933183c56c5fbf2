"""The encode job: every image shard, once, to a packed latent shard; the manifest last."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import ray
import torch

from bld_core.data.images import ImageConfig, LabelledImage, check_shards, read_batches
from bld_core.data.skipped import Skipped
from bld_core.errors import MissingError, UserError
from bld_core.latents.writer import (
    MANIFEST,
    LatentFile,
    Manifest,
    Split,
    describe_file,
    encode_images,
    latent_shard_bytes,
    shard_metadata,
)
from bld_core.storage import files
from bld_core.trained import load_autoencoder
from cluster.config.artifacts import open_autoencoder
from cluster.config.experiment import Experiment
from cluster.console import Progress
from cluster.data.check import check_data, shard_names, stem
from cluster.lineage import lineage
from cluster.ray_private import ahead
from cluster.runtime import DECODE_CPUS, connect_ray, fetch, finished_on_actors, map_on_actors
from cluster.stages import Stage, open_stage

_BATCHES_AHEAD = 2
_SECONDS_BETWEEN_METRICS = 10.0


class Job(NamedTuple):
    """One shard to encode: its source, split and name, and the file, in the latents folder, that it becomes."""

    source: str
    split: Split
    file: str
    name: str


class Encoded(NamedTuple):
    """A job done: what the manifest says of its file, the file's size, what it leaves out, and whether it is new."""

    file: LatentFile
    bytes: int
    skipped: Skipped
    anew: bool


def encode_latents(experiment: Experiment, fresh: bool = False) -> str:
    """Image shards -> <folder>/latents: a Parquet file for each shard, and manifest.json when all are there.

    A shard that an interrupted run has finished is not encoded again.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.

    Returns:
        The latents folder.

    Raises:
        MissingError: no autoencoder yet.
        UserError: bad input, each with its remedy, before anything is started.
    """
    autoencoder = open_autoencoder(experiment).autoencoder
    check_data(experiment)
    jobs = _jobs(experiment)
    fingerprint = {
        **experiment.fingerprint("data", "latents"),
        "shards": files.fingerprint([job.source for job in jobs]),
        "autoencoder_hash": autoencoder.hash,
    }
    if experiment.data.names:
        fingerprint["class_names"] = list(experiment.data.names)
    with open_stage(experiment, "latents", fingerprint, MANIFEST, fresh=fresh) as stage:
        if not stage.done:
            manifest = _empty_manifest(experiment, autoencoder.hash)
            manifest = replace(manifest, files=_encode(stage, jobs, manifest))
            manifest_url = files.join(stage.folder, MANIFEST)
            files.write_json(manifest_url, manifest.to_json())
            latents_hash = files.sha256(files.read_bytes(manifest_url))
            stage.run.tags(lineage(autoencoder) | {"bld.latents_hash": latents_hash})
        return stage.folder


def _encode(stage: Stage, jobs: list[Job], manifest: Manifest) -> list[LatentFile]:
    """What the manifest is to say of every job's file, in order; how far it is goes to the terminal and to MLflow."""
    experiment = stage.experiment
    views = max(1, experiment.latents.draws) * (1 + experiment.latents.mirror)
    encoded_files: dict[int, LatentFile] = {}
    totals: Counter[str] = Counter()
    images, left_out = 0, Skipped()
    began = spoke = time.monotonic()
    progress = Progress("encode", len(jobs))
    arguments, calls = (experiment, manifest), experiment.cluster.decode_tasks
    try:
        for position, encoded in finished_on_actors(Encoder, arguments, "encode", jobs, experiment.cluster, calls):
            encoded_files[position] = encoded.file
            totals["images"] += encoded.file.rows // views
            totals["rows"] += encoded.file.rows
            totals["bytes"] += encoded.bytes
            totals.update({f"skipped {reason}": count for reason, count in encoded.file.skipped.items()})
            left_out.merge(encoded.skipped)
            left_out.check(experiment.data.max_skipped, whole=len(encoded_files) == len(jobs))
            if encoded.anew:
                images += encoded.file.rows // views
            else:
                progress.start += 1
            now = time.monotonic()
            rate = images / (now - began)
            progress.update(len(encoded_files), {"images/s": rate})
            if now - spoke > _SECONDS_BETWEEN_METRICS or len(encoded_files) == len(jobs):
                spoke = now
                stage.run.metrics({**totals, "images_per_second": rate}, len(encoded_files))
    finally:
        progress.close()
    return [encoded_files[position] for position in range(len(jobs))]


def _jobs(experiment: Experiment) -> list[Job]:
    splits: tuple[Split, ...] = ("train", "validation")
    jobs: list[Job] = []
    for split in splits:
        urls = check_shards(experiment.data, split)
        named = zip(urls, shard_names(urls), strict=True)
        jobs += [Job(url, split, f"{split}/{stem(name)}.parquet", name) for url, name in named]
    return jobs


def _empty_manifest(experiment: Experiment, autoencoder_hash: str) -> Manifest:
    """How the data set is made, before any file is there."""
    data = experiment.data
    return Manifest(
        shape=experiment.code_shape,
        autoencoder_hash=autoencoder_hash,
        seed=experiment.seed,
        preprocessing={"image_size": data.image_size, "channels": data.channels, "fit": data.fit},
        latents=experiment.latents,
        classes=list(data.names),
    )


def decode_shard(source: str, data: ImageConfig, size: int) -> Iterator[list[LabelledImage] | Skipped]:
    """A shard's images, as they are, some at a time; and at the end what was left out."""
    skipped = Skipped()
    yield from read_batches(source, data, size, skipped)
    yield skipped


class Encoder:
    """An actor that holds the encoder and turns image shards into latent shards, several at a time.

    Images are decoded by Ray tasks, wherever there is a core, and arrive through Ray's object store: a few batches of
    each shard wait there, never a whole one. While one shard's batch is encoded, the others' are decoded.
    """

    def __init__(self, experiment: Experiment, manifest: Manifest) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.identity = manifest.identity()
        trained = load_autoencoder(experiment.folder, experiment.cluster.device)
        if trained.record.hash != manifest.autoencoder_hash:
            raise UserError(
                f"the autoencoder in {experiment.folder!r} is {trained.record.hash[:12]}, but this job began with "
                f"{manifest.autoencoder_hash[:12]}: it was trained again meanwhile; encode again",
                stages=("latents",),
            )
        self.autoencoder = trained.network
        self.turn = threading.Lock()
        self.decode = ray.remote(decode_shard).options(
            num_cpus=DECODE_CPUS,
            num_returns="streaming",
            max_retries=experiment.cluster.max_failures,
            **ahead(_BATCHES_AHEAD),
        )

    def encode(self, job: Job) -> Encoded:
        """Encode one shard, unless its file is there already."""
        url = files.join(self.experiment.folder, "latents", job.file)
        if files.exists(url):
            data = files.read_bytes(url)
            metadata = shard_metadata(data)
            if metadata.items() >= {**self.identity, "source": job.name}.items():
                skipped = Skipped(metadata["seen"], Counter(metadata["skipped"]), metadata["skipped_names"])
                file = describe_file(job.file, data, metadata["rows"], metadata["source"], job.split, skipped.counts)
                return Encoded(file, len(data), skipped, anew=False)
        skipped = Skipped()
        latents = self.experiment.latents
        images = self._decoded(job.source, skipped)
        rows = encode_images(self.autoencoder, images, latents, self.experiment.seed, self.turn)
        if not rows.key:
            rows.bits = torch.empty(0, math.prod(self.experiment.code_shape) // 8, dtype=torch.uint8)
        facts: dict[str, Any] = {
            "source": job.name,
            "rows": len(rows.key),
            "seen": skipped.seen,
            "skipped": dict(skipped.counts),
            "skipped_names": skipped.names,
        }
        data = latent_shard_bytes(rows, {**self.identity, **facts})
        files.write_bytes(url, data)
        file = describe_file(job.file, data, len(rows.key), facts["source"], job.split, skipped.counts)
        return Encoded(file, len(data), skipped, anew=True)

    def _decoded(self, source: str, skipped: Skipped) -> Iterator[LabelledImage]:
        """A shard's images as they arrive; `skipped` is complete when they end."""
        parts: Any = self.decode.remote(source, self.experiment.data, self.experiment.latents.batch_size)
        for reference in parts:
            part = fetch(reference)
            if isinstance(part, Skipped):
                skipped.merge(part)
            else:
                yield from part


def verify_latents(experiment: Experiment) -> str:
    """Read every latent file again and compare it with the manifest; returns what was found, as a line of text.

    Raises:
        MissingError: the data set is not (completely) encoded.
        UserError: files that differ, are missing or are too many, each named.
    """
    folder = files.join(experiment.folder, "latents")
    location = files.join(folder, MANIFEST)
    if not files.exists(location):
        raise MissingError(f"{location!r} is missing: encode the data set first", stages=("latents",))
    listed_files = Manifest.from_json(files.read_json(location)).files
    listed = {file.file for file in listed_files}
    due = {job.file for job in _jobs(experiment)}
    there = {
        f"{split}/{name}"
        for split in sorted({file.split for file in listed_files})
        if files.exists(files.join(folder, split))
        for name in files.listing(files.join(folder, split))
        if name.endswith(".parquet")
    }
    faults = [f"{file}: not in the manifest" for file in sorted((due | there) - listed)]
    connect_ray(experiment.cluster)
    checks = list(map_on_actors(Verifier, (folder,), "check", listed_files, experiment.cluster, "verify"))
    faults += [check.fault for check in checks if check.fault]
    if faults:
        remedy = f"delete these files and {MANIFEST}, and run encode_latents.py again, which makes what is missing"
        raise UserError("\n".join([f"{len(faults)} faults in {folder!r}:", *faults, remedy]))
    rows, size = sum(file.rows for file in listed_files), sum(check.bytes for check in checks)
    return f"verified {len(listed_files)} files, {rows} rows, {size} bytes: all are as the manifest says"


class Checked(NamedTuple):
    """A file read again: its size, and what is wrong with it, if anything."""

    bytes: int
    fault: str


class Verifier:
    """An actor that reads latent files again."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def check(self, listed: LatentFile) -> Checked:
        """Compare one file with what the manifest says of it."""
        try:
            data = files.read_bytes(files.join(self.folder, listed.file))
        except FileNotFoundError:
            return Checked(0, f"{listed.file}: missing")
        found, said = files.sha256(data), listed.sha256
        fault = "" if found == said else f"{listed.file}: sha256 {found[:12]}, the manifest says {said[:12]}"
        return Checked(len(data), fault)
