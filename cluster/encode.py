"""The encode job: every image shard, once, to a packed latent shard; the manifest last."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

from bld_core import files
from bld_core.checkpoint import read_model_config
from bld_core.generator import AUTOENCODER, load_autoencoder
from bld_core.images import check_shards, read_images
from bld_core.latents import (
    FORMAT_VERSION,
    MANIFEST,
    Split,
    encode_images,
    latent_shard_bytes,
    manifest_entry,
    shard_metadata,
)
from bld_core.skipped import Skipped
from cluster.experiment import Experiment
from cluster.runtime import map_on_actors
from cluster.stages import open_stage


class Job(NamedTuple):
    """One shard to encode: its source, its split, and the file, relative to the latents folder, that it becomes."""

    source: str
    split: Split
    file: str


def encode_latents(experiment: Experiment, fresh: bool = False) -> str:
    """Image shards -> <folder>/latents: a Parquet file for each shard, and manifest.json when all are there.

    A shard that an interrupted run has finished is not encoded again.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.

    Returns:
        The latents folder.

    Raises:
        FileNotFoundError: no autoencoder yet.
        ValueError: bad input, each with its remedy, before anything is started.
    """
    autoencoder = read_model_config(files.join(experiment.folder, AUTOENCODER))
    experiment.check_autoencoder(autoencoder)
    jobs = _jobs(experiment)
    fingerprint = {
        **experiment.fingerprint("data", "latents"),
        "shards": files.fingerprint([job.source for job in jobs]),
        "autoencoder_hash": autoencoder["hash"],
    }
    with open_stage(experiment, "latents", fingerprint, MANIFEST, fresh=fresh) as stage:
        if not stage.done:
            work = map_on_actors(
                Encoder, (experiment, autoencoder["hash"]), "encode", jobs, experiment.cluster, "encode"
            )
            entries: list[dict[str, Any]] = []
            left_out = Skipped()
            for entry, skipped in work:
                entries.append(entry)
                left_out.merge(skipped)
                left_out.check(experiment.data.max_skipped, whole=len(entries) == len(jobs))
                stage.run.metrics({"rows": sum(e["rows"] for e in entries)}, len(entries))
            stage.run.metrics({f"skipped {reason}": count for reason, count in left_out.counts.items()}, len(entries))
            manifest = {"format": FORMAT_VERSION, **_identity(experiment, autoencoder["hash"]), "files": entries}
            files.write_json(files.join(stage.folder, MANIFEST), manifest)
            stage.run.tags({"bld.autoencoder_hash": autoencoder["hash"]})
        return stage.folder


def _jobs(experiment: Experiment) -> list[Job]:
    splits: tuple[Split, ...] = ("train", "validation")
    jobs = [
        Job(url, split, f"{split}/{files.name(url).removesuffix('.tar')}.parquet")
        for split in splits
        for url in check_shards(experiment.data, split)
    ]
    taken = Counter(job.file for job in jobs)
    twice = [job.source for job in jobs if taken[job.file] > 1]
    if twice:
        raise ValueError(f"two shards of one split have the same file name: {', '.join(twice)}; rename one of them")
    return jobs


def _identity(experiment: Experiment, autoencoder_hash: str) -> dict[str, Any]:
    """What every latent shard and the manifest say of how they were made."""
    data = experiment.data
    return {
        "shape": list(experiment.code_shape),
        "autoencoder_hash": autoencoder_hash,
        "seed": experiment.seed,
        "preprocessing": {"image_size": data.image_size, "channels": data.channels, "fit": data.fit},
        **asdict(experiment.latents),
    }


class Encoder:
    """An actor that holds the encoder and turns image shards into latent shards."""

    def __init__(self, experiment: Experiment, autoencoder_hash: str) -> None:
        experiment.cluster.limit_threads()
        self.experiment = experiment
        self.identity = _identity(experiment, autoencoder_hash)
        trained = load_autoencoder(experiment.folder, experiment.cluster.device)
        if trained.config["hash"] != autoencoder_hash:
            raise ValueError(
                f"the autoencoder in {experiment.folder!r} is {trained.config['hash'][:12]}, but this job began with "
                f"{autoencoder_hash[:12]}: it was trained again meanwhile; run encode_latents.py again"
            )
        self.autoencoder = trained.network

    def encode(self, job: Job) -> tuple[dict[str, Any], Skipped]:
        """Encode one shard, unless its file is there already; returns its manifest entry and what was left out."""
        url = files.join(self.experiment.folder, "latents", job.file)
        if files.exists(url):
            data = files.read_bytes(url)
            metadata = shard_metadata(data)
            if metadata.items() >= {**self.identity, "source": files.name(job.source)}.items():
                skipped = Skipped(metadata["seen"], Counter(metadata["skipped"]), metadata["skipped_names"])
                return manifest_entry(
                    job.file, data, metadata["rows"], metadata["source"], job.split, metadata["skipped"]
                ), skipped
        skipped = Skipped()
        images = read_images(job.source, self.experiment.data, skipped)
        rows = encode_images(self.autoencoder, images, self.experiment.latents, self.experiment.seed)
        facts: dict[str, Any] = {
            "source": files.name(job.source),
            "rows": len(rows.key),
            "seen": skipped.seen,
            "skipped": dict(skipped.counts),
            "skipped_names": skipped.names,
        }
        data = latent_shard_bytes(rows, {**self.identity, **facts})
        files.write_bytes(url, data)
        return manifest_entry(job.file, data, len(rows.key), facts["source"], job.split, skipped.counts), skipped
