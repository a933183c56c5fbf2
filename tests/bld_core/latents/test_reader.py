"""An encoded data set comes back as it was written, or with a message that says which file is wrong and why."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bld_core.errors import MissingError
from bld_core.latents.reader import open_latents
from bld_core.latents.writer import MANIFEST, LatentConfig, Manifest, describe_file, encode_images, latent_shard_bytes
from bld_core.storage import cache, files
from tests.bld_core.toys import random_latents, tiny_autoencoder, toy_images, write_latents

Change = Callable[[dict[str, Any]], object]

# --- What comes back --------------------------------------------------------------------------------------------------


def test_a_data_set_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    images, config = toy_images(12), LatentConfig(draws=2, mirror=True, batch_size=4)
    parts = [encode_images(tiny_autoencoder(), images[a:b], config, 0) for a, b in ((0, 4), (4, 9))]
    for folder in (str(tmp_path), f"memory://{tmp_path.name}"):
        entries = []
        for i, part in enumerate(parts):
            data = latent_shard_bytes(part, {"shape": [2, 2, 8]})
            files.write_bytes(files.join(folder, f"{i}.parquet"), data)
            entries.append(describe_file(f"{i}.parquet", data, len(part.key), f"{i}.tar", "train", {}))
        files.write_json(files.join(folder, MANIFEST), Manifest(shape=(2, 2, 8), files=entries).to_json())
        latents = open_latents(folder)
        rows = latents.read()
        assert latents.shape == rows.shape == (2, 2, 8)
        assert latents.classes == 3
        assert len(latents) == len(rows) == 36
        assert latents.sizes == [16, 20]
        assert rows.keys.to_pylist() == [key for part in parts for key in part.key]
        assert rows.labels.tolist() == [label for part in parts for label in part.label]
        assert torch.equal(torch.from_numpy(rows.packed), torch.cat([part.bits for part in parts]))
        some = np.array([17, 0, 35])
        truth = np.unpackbits(rows.packed[some], axis=1).reshape(3, 4, 8)
        assert np.array_equal(rows.codes(some).numpy(), truth)


def test_some_shards_are_read_in_the_order_asked_for() -> None:
    latents = random_latents(3, 1, 4)
    whole, part = latents.read(), latents.read([2, 0])
    rows = [4, 5, 6, 7, 0, 1, 2]
    assert part.keys.to_pylist() == [f"{row:04d}" for row in rows]
    assert np.array_equal(part.packed, whole.packed[rows])
    assert np.array_equal(part.labels, whole.labels[rows])


def test_the_hash_tells_data_sets_apart(tmp_path: Path) -> None:
    for name, shards in {"a": [4], "b": [4], "c": [2, 2]}.items():
        write_latents(str(tmp_path / name), train=shards)
    a, b, c = (open_latents(str(tmp_path / name)).hash for name in "abc")
    assert a == b != c


def test_data_of_before_the_number_of_classes_was_written_down_opens(tmp_path: Path) -> None:
    write_latents(str(tmp_path), train=[4])
    change_manifest(tmp_path, lambda manifest: [entry.pop("classes") for entry in manifest["files"]])
    assert open_latents(str(tmp_path)).classes == 0


# --- What is refused --------------------------------------------------------------------------------------------------


def change_manifest(folder: Path, change: Change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_an_unfinished_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json.*is missing: encode the data set first"):
        open_latents(str(tmp_path))


OTHER_MANIFESTS: list[tuple[Change, str]] = [
    (lambda manifest: manifest.update(format=2), "has format 2; this version reads 1"),
    (lambda manifest: manifest.pop("format"), "has format None; this version reads 1"),
    (lambda manifest: manifest["files"].clear(), r"holds no train codes; set `train` and encode again"),
    (lambda manifest: manifest["files"][0].update(rows=0), "holds no train codes"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_MANIFESTS)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    write_latents(str(tmp_path), train=[4])
    change_manifest(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_latents(str(tmp_path))


def test_half_a_manifest_is_refused(tmp_path: Path) -> None:
    write_latents(str(tmp_path), train=[4])
    (tmp_path / MANIFEST).write_bytes((tmp_path / MANIFEST).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"manifest\.json' is not JSON .* damaged; bring it back"):
        open_latents(str(tmp_path))


def test_missing_files_are_counted_and_named_at_once(tmp_path: Path) -> None:
    write_latents(str(tmp_path), train=[4, 3, 2])
    (tmp_path / "train/1.parquet").unlink()
    with pytest.raises(ValueError, match=r"train/1\.parquet' is missing; bring it back"):
        open_latents(str(tmp_path))
    assert len(open_latents(str(tmp_path), "validation")) == 3  # which is another folder
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(ValueError, match=r"train/0\.parquet' is missing, as 2 other files are faulty"):
        open_latents(str(tmp_path))


def test_a_changed_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    write_latents(str(tmp_path), train=[4, 3])
    path = tmp_path / "train/1.parquet"
    data = bytearray(path.read_bytes())
    expected = files.sha256(bytes(data))
    data[40] ^= 1
    path.write_bytes(data)
    latents = open_latents(str(tmp_path))
    with pytest.raises(ValueError, match=rf"1\.parquet.*{files.sha256(bytes(data))[:12]}.*{expected[:12]}.*made again"):
        latents.read()
    assert len(latents.read([0])) == 4  # which is another file


OTHER_CONTENTS: list[tuple[Change, str]] = [
    (
        lambda manifest: manifest.update(shape=[2, 2, 16]),
        r"4 rows of fixed_size_binary\[4\], the manifest says 4 of fixed_size_binary\[8\], for codes of shape "
        r"\(2, 2, 16\)",
    ),
    (lambda manifest: manifest["files"][0].update(rows=5), r"4 rows of .*, the manifest says 5 of"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_CONTENTS)
def test_files_of_another_shape_or_length_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    write_latents(str(tmp_path), train=[4])
    change_manifest(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_latents(str(tmp_path)).read()


# --- The cache of remote files ----------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """Latents behind a real HTTP server, with an empty cache."""
    monkeypatch.setenv("BLD_CACHE", str(tmp_path / "cache"))
    write_latents(str(tmp_path / "latents"), train=[4, 3, 2])
    remote = Remote(tmp_path)
    threading.Thread(target=remote.serve_forever, args=(0.01,), daemon=True).start()
    yield remote
    remote.shutdown()
    remote.server_close()


class Remote(http.server.ThreadingHTTPServer):
    """A server that counts how often each file is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/latents"
        self.folder = folder / "latents"
        self.fetched = Counter[str]()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Remote)
        self.server.fetched[self.path] += 1
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def train_files(fetched: Counter[str]) -> dict[str, int]:
    return {path: count for path, count in fetched.items() if path.endswith(".parquet")}


def test_remote_files_are_fetched_once(remote: Remote) -> None:
    first, second = open_latents(remote.url).read(), open_latents(remote.url).read()
    local = open_latents(str(remote.folder)).read()
    for codes in (first, second):
        assert np.array_equal(codes.packed, local.packed)
        assert codes.keys.to_pylist() == local.keys.to_pylist()
    assert train_files(remote.fetched) == {f"/latents/train/{shard}.parquet": 1 for shard in range(3)}


def test_a_file_is_checked_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"as it was written")
    digest = files.sha256(b"as it was written")
    assert cache.verified(str(file), digest) == file
    seen = file.stat()
    file.write_bytes(b"as it was changed")
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # a change that does not show
    assert cache.verified(str(file), digest) == file
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"file' has sha256 .*, the manifest says .*: it was damaged or replaced"):
        cache.verified(str(file), digest)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="'" + str(tmp_path / "gone")):
        cache.verified(str(tmp_path / "gone"), "0" * 64)


def test_processes_of_one_machine_share_what_they_fetch(remote: Remote) -> None:
    wanted = [(f"{remote.url}/{shard.file}", shard.sha256) for shard in open_latents(remote.url).shards]
    code = f"from bld_core.storage.cache import verified\nfor file in {wanted}:\n    verified(*file)"
    readers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [reader.wait() for reader in readers] == [0, 0, 0]
    assert train_files(remote.fetched) == {f"/latents/train/{shard}.parquet": 1 for shard in range(3)}
    assert {path.name for path in cache.folder().iterdir()} >= {sha256 for _, sha256 in wanted}


@pytest.mark.parametrize("damage", ["half of it", "a byte"])
def test_a_damaged_file_of_the_cache_is_fetched_again(remote: Remote, damage: str) -> None:
    latents = open_latents(remote.url)
    whole = latents.read()
    kept = cache.folder() / latents.shards[1].sha256
    data = kept.read_bytes()
    kept.write_bytes(data[: len(data) // 2] if damage == "half of it" else data[:60] + b"x" + data[61:])
    assert np.array_equal(latents.read().packed, whole.packed)
    assert kept.read_bytes() == data
    assert train_files(remote.fetched)["/latents/train/1.parquet"] == 2
    assert sum(train_files(remote.fetched).values()) == 4


def test_what_is_wrong_at_the_source_is_never_kept(remote: Remote) -> None:
    latents = open_latents(remote.url)
    path = remote.folder / "train/1.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train/1\.parquet' has sha256 .* the manifest says"):
        latents.read()
    assert not (cache.folder() / latents.shards[1].sha256).exists()


def test_a_cache_that_cannot_be_written_is_named(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLD_CACHE", str(remote.folder / MANIFEST))  # a file
    with pytest.raises(ValueError, match=r"cannot keep remote files in .*manifest\.json .* set the variable BLD_CACHE"):
        open_latents(remote.url).read()
