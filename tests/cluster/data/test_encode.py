"""The encode job: the same bytes however the work is split or interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from bld_core.data.images import first_images
from bld_core.data.tensors import stack, to_float
from bld_core.latents.bits import unpack_bits
from bld_core.latents.reader import open_latents
from bld_core.latents.writer import LatentConfig, encode_images
from bld_core.noise import uniform
from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.storage.files import read_json
from bld_core.trained import load_autoencoder
from cluster.config.experiment import Experiment
from cluster.data.encode import encode_latents, verify_latents
from cluster.tracking.runs import Run
from tests.conftest import copy_of, small_experiment


def latent_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix == ".parquet"
    }


def test_every_image_is_encoded_once_and_the_manifest_says_so(encoded: Experiment) -> None:
    folder = f"{encoded.folder}/latents"
    train, validation = open_latents(folder), open_latents(folder, "validation")
    assert len(train) == 1617
    assert len(validation) == 180
    assert train.shape == (4, 4, 8)
    assert train.classes == validation.classes == 10
    rows = train.read()
    assert len({*rows.keys.to_pylist(), *validation.read().keys.to_pylist()}) == 1797
    assert set(rows.labels.tolist()) == set(range(10))
    assert all(file.skipped == {} for file in train.manifest.files)
    run = Run(encoded.tracking.resolve(encoded.root), read_json(f"{folder}/stage.json")["run"])
    figures = run.client.get_run(run.run_id).data.metrics
    assert figures["images"] == figures["rows"] == 1797
    assert figures["images_per_second"] > 0


def test_an_interrupted_job_resumes_and_ends_with_the_same_bytes(encoded: Experiment, tmp_path: Path) -> None:
    whole = Path(encoded.folder, "latents")
    experiment = replace(
        encoded,
        root=str(copy_of(encoded, tmp_path, "autoencoder", "latents")),
        cluster=replace(encoded.cluster, workers=2, decode_tasks=1),
    )
    folder = Path(experiment.folder, "latents")
    (folder / "manifest.json").unlink()
    (folder / "train" / "train-0001.parquet").unlink()
    kept = folder / "train" / "train-0000.parquet"
    written = kept.stat().st_mtime_ns
    encode_latents(experiment)
    assert latent_files(folder) == latent_files(whole)
    assert read_json(f"{folder}/manifest.json") == read_json(f"{whole}/manifest.json")
    assert kept.stat().st_mtime_ns == written, "a finished shard was encoded again"


# --- Killed anywhere ------------------------------------------------------------------------------------------------


def long_experiment(root: str, digits: dict[str, str]) -> Experiment:
    """Encoding takes long enough to be killed in the middle: many draws, in small batches."""
    latents = LatentConfig(draws=6, mirror=True, batch_size=8)
    small = small_experiment(Path(root), digits)
    return replace(small, latents=latents, cluster=replace(small.cluster, decode_tasks=1))


def work(root: str, digits: dict[str, str], address: str) -> None:
    """What the driver that is to be killed does, in a process of its own."""
    experiment = long_experiment(root, digits)
    encode_latents(replace(experiment, cluster=replace(experiment.cluster, address=address)))


def descendants(pid: int, title: str) -> list[int]:
    """The processes below one whose title starts like that."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue

    def below(child: int) -> bool:
        while child in parents:
            child = parents[child]
            if child == pid:
                return True
        return False

    return [child for child, said in titles.items() if said.startswith(title) and below(child)]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def kill(title: str) -> None:
    """Kill one of this session's Ray workers, by what it says that it does."""
    wait_for(lambda: descendants(os.getpid(), title))
    os.kill(descendants(os.getpid(), title)[0], signal.SIGKILL)


@pytest.mark.long
def test_decoder_encoder_and_driver_killed_the_same_command_ends_with_the_bytes_of_an_undisturbed_run(
    encoded: Experiment, ray_cluster: None, digits: dict[str, str], tmp_path: Path
) -> None:
    calm, killed = (long_experiment(str(copy_of(encoded, tmp_path / n, "autoencoder")), digits) for n in ("a", "b"))
    calm = replace(calm, cluster=replace(calm.cluster, workers=2, decode_tasks=3))  # another split, another order
    address = ray.get_runtime_context().gcs_address
    call = "import json, sys; from tests.cluster.data.test_encode import work; work(*json.loads(sys.argv[1]))"
    arguments = [sys.executable, "-c", call, json.dumps([killed.root, digits, address])]
    folder = Path(killed.folder, "latents")
    with subprocess.Popen(arguments, start_new_session=True) as driver:
        kill("ray::decode_shard")
        wait_for(lambda: latent_files(folder))
        with pytest.raises(ValueError, match=rf"in use by process {driver.pid} on "):
            encode_latents(killed)
        kill("ray::Encoder")
        before = len(latent_files(folder))
        wait_for(lambda: len(latent_files(folder)) > before)
        assert driver.poll() is None, "the driver was over before it could be killed"
        driver.kill()
    assert not (folder / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    encode_latents(killed)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished shard was encoded again"
    encode_latents(calm)
    assert latent_files(folder) == latent_files(Path(calm.folder, "latents"))
    assert (folder / "manifest.json").read_bytes() == Path(calm.folder, "latents/manifest.json").read_bytes()


# --- The same bytes -------------------------------------------------------------------------------------------------


def test_another_batch_size_changes_only_bits_that_rounding_decides(encoded: Experiment) -> None:
    autoencoder = load_autoencoder(encoded.folder).network
    images = first_images(encoded.data.validation, encoded.data, 180)
    one, other = (encode_images(autoencoder, images, LatentConfig(batch_size=size), encoded.seed) for size in (64, 7))
    assert one.key == other.key
    with torch.no_grad():
        logits = autoencoder.encode(to_float(stack(images)))
    index = torch.tensor([key_of(image.key) for image in images])
    u = uniform(encoded.seed, "code draw 0 view 0", index, logits[0].numel()).view_as(logits)
    close = ((torch.sigmoid(logits) - u).abs() <= 1e-5).permute(0, 2, 3, 1)
    changed = unpack_bits(one.bits, encoded.code_shape) != unpack_bits(other.bits, encoded.code_shape)
    assert not (changed & ~close).any()


def test_a_compiled_encoder_is_part_of_what_its_latents_are(
    encoded: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a compiler, so that the bits are the same; a real one rounds otherwise."""
    asked: list[dict[str, Any]] = []

    def ask(_network: nn.Module, **how: Any) -> None:
        asked.append(how)

    monkeypatch.setattr(nn.Module, "compile", ask)
    alone = replace(encoded.cluster, workers=0, decode_tasks=0)
    plain = replace(encoded, root=str(copy_of(encoded, tmp_path, "autoencoder")), cluster=alone)
    compiled = replace(plain, latents=replace(plain.latents, compile=True))
    folder = encode_latents(compiled)
    assert asked == [{"mode": "default", "dynamic": False}], "shards take turns in several threads: no CUDA graphs"
    one, other = (open_latents(f"{each.folder}/latents") for each in (encoded, compiled))
    assert (one.read().packed == other.read().packed).all()
    assert other.manifest.identity() == one.manifest.identity() | {"compile": True}

    with pytest.raises(ValueError, match=r"latents.compile: True -> "):
        encode_latents(plain)
    mixed = replace(plain, root=str(tmp_path / "mixed"))
    shutil.copytree(Path(plain.folder, "autoencoder"), Path(mixed.folder, "autoencoder"))
    there = Path(encode_latents(mixed))
    for name, data in latent_files(Path(folder)).items():
        files.write_bytes(str(there / name), data)
    (there / "manifest.json").unlink()
    capsys.readouterr()
    encode_latents(mixed)
    assert capsys.readouterr().out.count("was made from another shard, or in another way") == 5


# --- Verified -------------------------------------------------------------------------------------------------------


def test_verify_reads_everything_and_names_what_differs(encoded: Experiment, tmp_path: Path) -> None:
    assert verify_latents(encoded).startswith("verified 5 files, 1797 rows, ")
    spoiled = replace(encoded, root=str(copy_of(encoded, tmp_path, "latents")))
    folder = Path(spoiled.folder, "latents/train")
    data = bytearray((folder / "train-0000.parquet").read_bytes())
    data[100] ^= 1
    (folder / "train-0000.parquet").write_bytes(data)
    (folder / "train-0001.parquet").unlink()
    (folder / "foreign.parquet").touch()
    with pytest.raises(ValueError, match="3 faults in ") as found:
        verify_latents(spoiled)
    said = str(found.value)
    assert "train/foreign.parquet is not named in manifest.json" in said
    assert f"train/train-0000.parquet has sha256 {files.sha256(bytes(data))[:12]}, manifest.json says" in said
    assert "train/train-0001.parquet is missing" in said
    assert said.endswith("pipelines/encode_latents.py --mend")
