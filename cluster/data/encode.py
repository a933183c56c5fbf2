"""The encode job: every image shard, once, to a packed latent shard; the manifest last."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bld_core.data.images import check_shards
from bld_core.data.skipped import Skipped
from bld_core.errors import DamagedError, MissingError, UserError
from bld_core.latents.reader import latent_faults
from bld_core.latents.writer import (
    MANIFEST,
    LatentFile,
    Manifest,
    Split,
    describe_file,
    encode_images,
    latent_shard_bytes,
    shard_metadata,
    whole_shard_metadata,
)
from bld_core.storage import files
from bld_core.storage.records import Fault, part_faults, read_file, read_record, set_aside, write_record
from bld_core.trained import load_autoencoder
from bld_core.training.inference import for_inference
from cluster.config.artifacts import LATENTS, open_autoencoder
from cluster.config.experiment import Experiment
from cluster.console import Progress
from cluster.data.check import check_data, shard_names, stem
from cluster.data.decoding import ShardDecoder
from cluster.lineage import lineage
from cluster.runtime import connect_ray, finished_on_actors, map_on_actors
from cluster.stages import Stage, faulty, open_stage

_SECONDS_BETWEEN_METRICS = 10.0


class Job(NamedTuple):
    """One shard to encode.

    Attributes:
        source: the image shard.
        split: which part of the data set.
        file: what it becomes, relative to the latents folder.
        name: of the source, as the file and the manifest say it.
        listed: what an earlier manifest says of it.
    """

    source: str
    split: Split
    file: str
    name: str
    listed: LatentFile | None = None


class Encoded(NamedTuple):
    """A job done.

    Attributes:
        file: what the manifest says of it.
        bytes: its size.
        skipped: what it leaves out.
        anew: whether it was made now.
        fault: what was wrong with the file that was there; where that is now.
    """

    file: LatentFile
    bytes: int
    skipped: Skipped
    anew: bool
    fault: str = ""


def encode_latents(experiment: Experiment, fresh: bool = False, mend: bool = False) -> str:
    """Image shards -> <folder>/latents: a Parquet file for each shard, and manifest.json when all are there.

    A shard that an interrupted run has finished is not encoded again, unless its file is not what was written.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.
        mend: read all that it made before, and make again what is damaged.

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
        "autoencoder_hash": autoencoder.codes_hash,
    }
    if experiment.data.names:
        fingerprint["class_names"] = list(experiment.data.names)
    folder = files.join(experiment.folder, LATENTS)
    faults, reads = lambda: _faults(experiment, jobs, deep=mend), [jobs[0].source]
    with open_stage(
        experiment, LATENTS, fingerprint, MANIFEST, fresh=fresh, faults=faults, reads=reads, decodes=True
    ) as stage:
        if not stage.done:
            listed = {file.file: file for file in _listed(folder)}
            jobs = [job._replace(listed=listed.get(job.file)) for job in jobs]
            manifest = _empty_manifest(experiment, autoencoder.codes_hash)
            manifest = replace(manifest, files=_encode(stage, jobs, manifest))
            manifest_url = stage.url(MANIFEST)
            write_record(manifest_url, manifest.to_json())
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
    arguments, calls = (experiment, manifest), experiment.cluster.shards_at_once
    try:
        for position, encoded in finished_on_actors(
            Encoder, arguments, "encode", jobs, experiment.cluster, calls, decodes=True
        ):
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
            if encoded.fault:
                print(f"{stage.name}: {encoded.fault}; made again", flush=True)
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


class Encoder:
    """An actor that holds the encoder and turns image shards into latent shards, several at a time.

    While one shard's batch is encoded, the others' are decoded.
    """

    def __init__(self, experiment: Experiment, manifest: Manifest) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.manifest = manifest
        trained = load_autoencoder(experiment.folder, experiment.cluster.device)
        if trained.record.codes_hash != manifest.autoencoder_hash:
            raise UserError(
                f"the autoencoder in {experiment.folder!r} is {trained.record.codes_hash[:12]}, but this job began "
                f"with {manifest.autoencoder_hash[:12]}: it was trained again meanwhile; encode again",
                stages=("latents",),
            )
        self.autoencoder, latents = trained.network, experiment.latents
        if latents.compile or latents.precision == "bfloat16":
            self.autoencoder.encoder = for_inference(
                self.autoencoder.encoder, latents.precision, compiled=latents.compile, graphs=False
            )
        self.turn = threading.Lock()
        self.decoder = ShardDecoder(experiment)

    def encode(self, job: Job) -> Encoded:
        """Encode one shard, unless its file is there already, byte for byte as it was written."""
        url, fault = files.join(self.experiment.folder, LATENTS, job.file), ""
        if files.exists(url):
            found = self._finished(job, url)
            if isinstance(found, Encoded):
                return found
            fault = f"{url!r} {found}, and is set aside as {set_aside(url)!r}"
        skipped = Skipped()
        latents = self.experiment.latents
        images = itertools.chain.from_iterable(self.decoder.batches(job.source, skipped))
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
        data = latent_shard_bytes(rows, {**self.manifest.identity(), **facts})
        files.write_bytes(url, data)
        file = describe_file(job.file, data, len(rows.key), facts["source"], job.split, skipped.counts)
        return Encoded(file, len(data), skipped, True, fault)

    def _finished(self, job: Job, url: str) -> Encoded | str:
        """The file of a job as it was finished earlier; or what is wrong with it."""
        try:
            data = read_file(url)
        except DamagedError as error:
            return error.reason
        if job.listed is not None:  # also those of early versions, which do not say their own sha256
            metadata = shard_metadata(data) if files.sha256(data) == job.listed.sha256 else None
        else:
            metadata = whole_shard_metadata(data)
        if metadata is None:
            return "is not what was written: it is damaged, or of an early version that could not tell"
        if metadata.get("source") != job.name or not self.manifest.made(metadata):
            return "was made from another shard, or in another way"
        skipped = Skipped(metadata["seen"], Counter(metadata["skipped"]), metadata["skipped_names"])
        file = describe_file(job.file, data, metadata["rows"], metadata["source"], job.split, skipped.counts)
        return Encoded(file, len(data), skipped, anew=False)


def _listed(folder: str) -> Sequence[LatentFile]:
    """The entries of the manifest, where there is one."""
    url = files.join(folder, MANIFEST)
    return Manifest.from_json(read_record(url, (LATENTS,))).files if files.exists(url) else []


def _faults(experiment: Experiment, jobs: Sequence[Job], *, deep: bool) -> list[Fault]:
    """What is wrong with a finished data set: by the sizes of its files, or with `deep` by all their bytes."""
    folder = files.join(experiment.folder, LATENTS)
    url = files.join(folder, MANIFEST)
    try:
        manifest = Manifest.from_json(read_record(url))
    except DamagedError as error:
        return [Fault(error.url, error.reason)]
    faults = latent_faults(folder, manifest, ("train", "validation"))
    due, listed = {job.file for job in jobs}, {file.file for file in manifest.files}
    if due != listed:  # then the files themselves are good, as far as anybody knows
        names = ", ".join(sorted(due ^ listed))
        return [Fault(url, f"does not name the files that these shards make ({names}): it was changed")]
    if deep:
        named = {fault.url for fault in faults}
        if not experiment.cluster.in_process:
            connect_ray(experiment.cluster)
        checked = map_on_actors(Verifier, (folder,), "check", manifest.files, experiment.cluster, "verify")
        faults += [fault for fault in checked if fault is not None and fault.url not in named]
    return faults


def verify_latents(experiment: Experiment) -> str:
    """Read every latent file again and compare it with the manifest; returns what was found, as a line of text.

    Raises:
        MissingError: the data set is not (completely) encoded.
        UserError: files that differ, are missing or are too many, each named.
    """
    folder = files.join(experiment.folder, LATENTS)
    location = files.join(folder, MANIFEST)
    if not files.exists(location):
        raise MissingError(f"{location!r} is missing: encode the data set first", stages=(LATENTS,))
    faults = _faults(experiment, _jobs(experiment), deep=True)
    if faults:
        raise faulty(LATENTS, folder, faults)
    listed = _listed(folder)
    rows, size = sum(file.rows for file in listed), sum(file.bytes or 0 for file in listed)
    return f"verified {len(listed)} files, {rows} rows, {size} bytes: all are as the manifest says"


class Verifier:
    """An actor that reads latent files again."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def check(self, listed: LatentFile) -> Fault | None:
        """Compare one file with what the manifest says of it."""
        folder, name = files.join(self.folder, listed.file).rsplit("/", 1)
        faults = part_faults(folder, {name: None}, {name: listed.part}, MANIFEST, deep=True)
        return faults[0] if faults else None
