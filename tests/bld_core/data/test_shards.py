"""Shards of every kind, whole and damaged: each sample is delivered, or counted under its reason."""

from __future__ import annotations

import http.server
import io
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from bld_core.data.images import ImageConfig, read_images
from bld_core.data.shards import Sample, parse_shard, read_shard, write_shard
from bld_core.data.skipped import Left, Reason, Skipped
from bld_core.storage import files
from bld_core.storage.patience import StorageError
from tests.bld_core.toys import png_of, toy_images, toy_samples

IMAGE = png_of(toy_images(1)[0].pixels)


class File(NamedTuple):
    """A member to be: a plain file unless its kind says otherwise."""

    name: str
    data: bytes = IMAGE
    kind: bytes = tarfile.REGTYPE


def tar_of(members: list[File], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def found(members: list[File], form: int = tarfile.USTAR_FORMAT) -> tuple[list[str], list[Left]]:
    """Keys delivered, and what is left out."""
    shard = parse_shard(tar_of(members, form), ["jpg", "png"])
    return [sample.key for sample in shard.samples], shard.left


def pair(key: str, label: int = 1) -> list[File]:
    return [File(f"{key}.png"), File(f"{key}.cls", str(label).encode())]


def test_shards_have_deterministic_bytes(tmp_path: Path) -> None:
    digests = set[str]()
    for name in ("a.tar", "b.tar"):
        assert write_shard(str(tmp_path / name), toy_samples(10)) == 10
        digests.add(files.sha256((tmp_path / name).read_bytes()))
    assert len(digests) == 1


def test_samples_survive_the_way_into_a_shard_and_back(tmp_path: Path) -> None:
    samples = toy_samples(10)
    assert {sample.label for sample in samples} == {0, 1, 2, 3}
    for url in (str(tmp_path / "a.tar"), f"memory://images/{tmp_path.name}.tar"):
        for these in (samples, [sample._replace(label=-1) for sample in samples]):
            write_shard(url, these)
            assert read_shard(url, ["jpg", "png"]) == (these, [], set())


def test_webdataset_reads_what_is_written_and_writes_the_same_bytes(tmp_path: Path) -> None:
    samples = [*toy_samples(5), Sample("k" * 150, "png", IMAGE, -1), Sample("folder/ü", "jpg", b"x", 12)]
    url = str(tmp_path / "a.tar")
    write_shard(url, samples)
    read = list(WebDataset(url, shardshuffle=False))
    assert [fields["__key__"] for fields in read] == [sample.key for sample in samples]
    for fields, sample in zip(read, samples, strict=True):
        assert fields[sample.extension] == sample.data
        assert int(fields.get("cls", -1)) == sample.label
    with open(tmp_path / "b.tar", "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:  # pyright: ignore[reportArgumentType]
        for fields in read:
            writer.write({name: value for name, value in fields.items() if name[:2] != "__" or name == "__key__"})
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()


def test_a_shard_that_fails_half_way_does_not_exist(tmp_path: Path) -> None:
    def broken(count: int) -> list[Sample]:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_shard(str(tmp_path / "a.tar"), (sample for part in (toy_samples, broken) for sample in part(3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_reads_as_pythons_own_reader_reads_it(form: int) -> None:
    names = ["a", "folder/b", "./c", "d" * 90, f"{'e' * 60}/{'f' * 80}", "ü"]
    names += [] if form == tarfile.USTAR_FORMAT else ["g" * 300, f"{'h' * 200}/{'i' * 200}"]
    members = [file for i, name in enumerate(names) for file in (File(f"{name}.png", b"%d" % i), File(f"{name}.txt"))]
    members.insert(3, File("folder", b"", tarfile.DIRTYPE))
    keys, left = found(members, form)
    with tarfile.open(fileobj=io.BytesIO(tar_of(members, form))) as tar:
        assert [f"{key}.png" for key in keys] == [member.name for member in tar if member.name.endswith(".png")]
    assert keys == names
    assert left == []


def test_large_sizes_are_binary_and_times_in_fractions_are_extended_headers(tmp_path: Path) -> None:
    data = bytearray(tar_of([File("a.png")]))
    data[124:136] = b"\x80" + len(IMAGE).to_bytes(11, "big")
    header = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = b"%06o\0 " % sum(header)
    assert parse_shard(bytes(data), ["png"]).samples == [Sample("a", "png", IMAGE, -1)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:  # as Python writes it by default, from a file's own time
        info = tarfile.TarInfo("a.png")
        info.mtime, info.size = 1700000000.25, len(IMAGE)
        tar.addfile(info, io.BytesIO(IMAGE))
    assert (tmp_path / "a.tar").read_bytes()[156:157] == b"x"
    assert read_shard(str(tmp_path / "a.tar"), ["png"]).samples == [Sample("a", "png", IMAGE, -1)]


def test_the_first_wanted_extension_is_taken_whatever_its_case() -> None:
    members = [File("a.PNG"), File("a.jpg", b"1"), File("a.seg.png", b"2"), File("b.png")]
    [a, b] = parse_shard(tar_of(members), ["jpg", "png"]).samples
    assert a == Sample("a", "jpg", b"1", -1)
    assert b == Sample("b", "png", IMAGE, -1)


def test_what_belongs_to_no_sample_is_passed_over() -> None:
    members = [File("README"), File("__notes__/x.png"), File(".hidden.png"), File("._a.png"), *pair("a")]
    assert found(members) == (["a"], [])


LABELS = {
    b"3": 3,
    b" 12\n": 12,
    b"-1": -1,
    b'{"label": 4}': 4,
    b'{"cls": 5, "caption": "x"}': 5,
    b'{"label": "cat"}': -1,
    b'{"label": true}': -1,
    b"[1]": -1,
    b"{}": -1,
}


@pytest.mark.parametrize("text", LABELS)
def test_classes_come_from_cls_or_json(text: bytes) -> None:
    extension = "cls" if text.strip().lstrip(b"-").isdigit() else "json"
    [sample] = parse_shard(tar_of([File("a.png"), File(f"a.{extension}", text)]), ["png"]).samples
    assert sample.label == LABELS[text]


@pytest.mark.parametrize(
    "file",
    [
        *(File("b.cls", text) for text in (b"", b"cat", b"-2", b"1.5", str(2**31).encode(), b"9" * 5000)),
        *(File("b.json", text) for text in (b"", b"{", b"\xff", b"[" * 100_000, b'{"label": -7}')),
    ],
    ids=lambda file: f"{file.name} {file.data[:8]!r}",
)
def test_a_class_that_cannot_be_read_is_counted(file: File) -> None:
    keys, left = found([*pair("a"), File("b.png"), file])
    assert (keys, [each[:2] for each in left]) == (["a"], [(Reason.BAD_LABEL, "b")])


def test_one_sample_with_a_class_means_that_all_need_one() -> None:
    assert found([File("a.png"), File("b.png")]) == (["a", "b"], [])
    expected = [Left(Reason.NO_LABEL, "a"), Left(Reason.NO_LABEL, "c")]
    assert found([File("a.png"), *pair("b"), File("c.png")]) == (["b"], expected)


def test_a_sample_without_an_image_is_counted_and_its_extensions_told() -> None:
    shard = parse_shard(tar_of([File("a.tiff"), File("a.cls", b"1"), *pair("b")]), ["png"])
    assert [sample.key for sample in shard.samples] == ["b"]
    assert shard.left == [Left(Reason.NO_IMAGE, "a")]
    assert shard.others == {"tiff", "cls"}
    assert found([]) == ([], [Left(Reason.VACANT, "10240 bytes")])


def test_of_a_key_that_comes_again_the_first_is_kept() -> None:
    duplicate = [Left(Reason.DUPLICATE, "a")]
    assert found([*pair("a"), *pair("b"), *pair("a")]) == (["a", "b"], duplicate)
    assert found([*pair("a"), *pair("a"), *pair("a"), *pair("b")]) == (["a", "b"], 2 * duplicate)
    first, again = File("a.png", b"1"), File("a.png", b"2")
    shard = parse_shard(tar_of([first, again, File("a.cls", b"7")]), ["png"])
    assert shard == ([Sample("a", "png", b"1", 7)], duplicate, set())


def test_a_sample_in_two_places_is_counted_once() -> None:
    a = pair("a")
    for members in ([a[0], *pair("b"), a[1]], [a[1], *pair("b"), *pair("c"), a[0]]):
        keys, left = found(members)
        assert "a" not in keys
        assert left == [Left(Reason.APART, "a")]


@pytest.mark.parametrize("key", ["/a", "../a", "b/../../a", "b\0c", "b\udcffc"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_names_are_counted_once_a_sample(key: str, form: int) -> None:
    keys, left = found([*pair("before"), *pair(key), *pair("behind")], form)
    assert keys == ["before", "behind"]
    assert [reason for reason, *_ in left] == [Reason.HOSTILE]
    left[0].key.encode()  # can be written into a report


def test_hostile_names_that_are_no_samples_are_counted_by_themselves() -> None:
    members = [File("/etc/passwd"), File("a/..", b"", tarfile.LNKTYPE), File("x" * 9000 + "/" * 1000), *pair("a")]
    assert [reason for reason, *_ in found(members, tarfile.PAX_FORMAT)[1]] == 3 * [Reason.HOSTILE]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_counted_and_never_followed(kind: bytes) -> None:
    a, b, c = pair("a"), pair("b"), pair("c")
    assert found([*a, File("b.png", b"", kind), b[1], *c]) == (["a", "c"], [Left(Reason.NO_FILE, "b")])


def test_a_damaged_header_costs_its_own_file_and_no_other() -> None:
    data = tar_of([*pair("a"), *pair("b"), *pair("c")])
    start = data.index(b"b.png")
    for damage in (b"x", b"\0" * 512):
        shard = parse_shard(data[:start] + damage + data[start + len(damage) :], ["png"])
        assert [sample.key for sample in shard.samples] == ["a", "c"]
        assert {reason for reason, *_ in shard.left} == {Reason.DAMAGED, Reason.NO_IMAGE}
        assert len(shard.left) == 2


def test_a_tar_file_behind_another_is_read_and_the_seam_counted() -> None:
    shard = parse_shard(tar_of(pair("a")) + tar_of(pair("b")), ["png"])
    assert [sample.key for sample in shard.samples] == ["a", "b"]
    assert [reason for reason, *_ in shard.left] == [Reason.DAMAGED]


def test_a_tar_file_cut_off_anywhere_gives_what_comes_before_the_cut() -> None:
    data = tar_of([file for key in "abc" for file in pair(key)])
    ends = {key: data.index(f"{key}.cls".encode()) + 513 for key in "abc"}  # a block of header, a byte of class
    for cut in range(64, len(data), 64):
        shard = parse_shard(data[:cut], ["png"])
        whole = [key for key, end in ends.items() if cut >= end]
        first_image = 512 + len(IMAGE) <= cut < ends["a"] - 1  # all there is, and as far as it tells, it needs no class
        assert [sample.key for sample in shard.samples] == (["a"] if first_image else whole)
        reasons = Counter(reason for reason, *_ in shard.left)
        assert reasons[Reason.TRUNCATED] == (cut < ends["c"] + 512)  # the zeros at the end begin there
        assert not reasons.keys() - {Reason.TRUNCATED, Reason.NO_LABEL}


def test_a_size_beyond_the_file_is_a_cut_off_file() -> None:
    data = bytearray(tar_of([*pair("a"), File("b.png")]))
    start = data.index(b"b.png")
    data[start + 124 : start + 136] = b"\x80" + b"\xff" * 11
    header = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    shard = parse_shard(bytes(data), ["png"])
    assert [sample.key for sample in shard.samples] == ["a"]
    assert shard.left == [Left(Reason.TRUNCATED, "b")]


def test_what_is_no_tar_file_at_all_is_counted() -> None:
    reasons = {b"": Reason.VACANT, b"x": Reason.TRUNCATED, b"<html>not found</html>" * 100: Reason.NO_TAR}
    for data, reason in reasons.items():
        shard = parse_shard(data, ["png"])
        assert shard.samples == []
        assert [left.reason for left in shard.left] == [reason]


def test_a_transfer_that_breaks_off_is_an_error_and_no_truncated_tar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says how long the file is, and closes the connection half-way."""
    data = tar_of([file for i in range(20) for file in pair(f"{i:04d}")])
    monkeypatch.setenv("BLD_STORAGE_SECONDS", "1")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(data[: len(data) // 2])

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(StorageError, match=r"cannot .*a.tar.*BLD_STORAGE_SECONDS is how long to try"):
                read_shard(f"http://127.0.0.1:{server.server_port}/a.tar", ["png"])
        finally:
            server.shutdown()


# --- 200 mutations of good shards -----------------------------------------------------------------------------------

KEYS = [f"{i:02d}" for i in range(12)]
TRUTH = dict(zip(KEYS, toy_images(len(KEYS)), strict=True))
GOOD = [file for key in KEYS for file in (File(f"{key}.png", png_of(TRUTH[key].pixels)), File(f"{key}.cls", b"1"))]


class Mutant(NamedTuple):
    """A shard, the keys that it may lose, and what must be counted; `possible` if it may also be unharmed."""

    data: bytes
    lost: set[str]
    counts: dict[Reason, int]
    possible: bool = False


def flip_in_header(rng: random.Random) -> Mutant:
    data, i = bytearray(tar_of(GOOD)), rng.randrange(len(GOOD))
    place = rng.choice([*range(148), *range(156, 512)])  # everywhere but in the checksum itself
    data[data.index(GOOD[i].name.encode()) + place] ^= rng.randrange(1, 256)
    rest = Reason.NO_LABEL if i % 2 else Reason.NO_IMAGE
    return Mutant(bytes(data), {KEYS[i // 2]}, {Reason.DAMAGED: 1, rest: 1})


def flip_in_image(rng: random.Random) -> Mutant:
    data, key = bytearray(tar_of(GOOD)), rng.choice(KEYS)
    start = data.index(f"{key}.png".encode()) + 512
    data[start + rng.randrange(len(png_of(TRUTH[key].pixels)))] ^= rng.randrange(1, 256)
    return Mutant(bytes(data), {key}, {Reason.UNREADABLE: 1}, possible=True)


def flip_behind_the_end(rng: random.Random) -> Mutant:
    data = bytearray(tar_of(GOOD))
    end = data.rindex(b"1") + 512
    data[rng.randrange(end, len(data))] ^= rng.randrange(1, 256)
    return Mutant(bytes(data), set(), {Reason.DAMAGED: 1})


def truncate(rng: random.Random) -> Mutant:
    data = tar_of(GOOD)
    starts = [data.index(file.name.encode()) for file in GOOD] + [data.rindex(b"1") + 512]
    cut = rng.randrange(starts[2], starts[-1])
    whole = [i for i in range(len(GOOD)) if cut >= starts[i] + 512 + len(GOOD[i].data)]
    kept = len(whole) // 2
    counts = {Reason.TRUNCATED: 1}
    if len(whole) % 2 and cut < starts[len(whole)] + 512:  # an image is whole, and of its class not even the header
        counts[Reason.NO_LABEL] = 1
    return Mutant(data[:cut], set(KEYS[kept:]), counts)


def drop(rng: random.Random) -> Mutant:
    i = rng.randrange(len(GOOD))
    rest = Reason.NO_LABEL if i % 2 else Reason.NO_IMAGE
    return Mutant(tar_of(GOOD[:i] + GOOD[i + 1 :]), {KEYS[i // 2]}, {rest: 1})


def duplicate(rng: random.Random) -> Mutant:
    i = rng.randrange(len(KEYS))
    again = GOOD[2 * i : 2 * i + 2][: rng.choice([1, 2])]
    place = 2 * rng.randrange(i + 1, len(KEYS) + 1)
    return Mutant(tar_of(GOOD[:place] + again + GOOD[place:]), set(), {Reason.DUPLICATE: 1})


def rename(rng: random.Random) -> Mutant:
    i, form = rng.randrange(len(KEYS)), rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    hostile = rng.choice(["/{}", "../{}", "a/../../{}", "{}\0", "/../" * 30 + "{}", "\udc80{}", "{}\0/" + "x" * 200])
    members = [file._replace(name=hostile.format(file.name[:2]) + file.name[2:]) for file in GOOD[2 * i : 2 * i + 2]]
    return Mutant(tar_of(GOOD[: 2 * i] + members + GOOD[2 * i + 2 :], form), {KEYS[i]}, {Reason.HOSTILE: 1})


def empty(rng: random.Random) -> Mutant:
    i = rng.randrange(len(GOOD))
    members = [file._replace(data=b"") if file is GOOD[i] else file for file in GOOD]
    return Mutant(tar_of(members), {KEYS[i // 2]}, {Reason.BAD_LABEL if i % 2 else Reason.EMPTY: 1})


def tear_apart(rng: random.Random) -> Mutant:
    i = rng.randrange(len(GOOD))
    rest = GOOD[:i] + GOOD[i + 1 :]
    half = i - i % 2  # where its other half is then
    place = rng.choice([*range(0, half, 2), *range(half + 3, len(GOOD), 2)])
    return Mutant(tar_of([*rest[:place], GOOD[i], *rest[place:]]), {KEYS[i // 2]}, {Reason.APART: 1})


def replace_by_a_link(rng: random.Random) -> Mutant:
    i = rng.randrange(len(GOOD))
    kind = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    members = [File(file.name, b"", kind) if file is GOOD[i] else file for file in GOOD]
    return Mutant(tar_of(members), {KEYS[i // 2]}, {Reason.NO_FILE: 1})


MUTATIONS: list[Callable[[random.Random], Mutant]] = [
    *(flip_in_header, flip_in_image, flip_behind_the_end, truncate, drop),
    *(duplicate, rename, empty, tear_apart, replace_by_a_link),
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_sample_of_a_mutant_is_delivered_or_counted(
    mutate: Callable[[random.Random], Mutant], tmp_path: Path
) -> None:
    for seed in range(20):
        mutant = mutate(random.Random(f"{mutate.__name__} {seed}"))
        (tmp_path / "a.tar").write_bytes(mutant.data)
        skipped = Skipped()
        images = list(read_images(str(tmp_path / "a.tar"), ImageConfig(image_size=8, channels=1), skipped))
        keys = [image.key for image in images]
        unharmed = mutant.possible and not skipped.total
        assert keys == (KEYS if unharmed else [key for key in KEYS if key not in mutant.lost]), seed
        assert skipped.counts == ({} if unharmed else mutant.counts), seed
        assert skipped.seen == len(images) + skipped.total
        for image in images:
            if image.key not in mutant.lost:
                np.testing.assert_array_equal(image.pixels, TRUTH[image.key].pixels)


def test_noise_never_crashes_and_everything_is_accounted_for(tmp_path: Path) -> None:
    """Many damages at once, of which nothing is predicted but that reading ends and every image is one of the set."""
    for seed in range(100):
        rng = random.Random(seed)
        data = bytearray(tar_of(GOOD, rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
        for _ in range(rng.randrange(1, 40)):
            start = rng.randrange(len(data))
            run = rng.choice([1, 8, 512, 2000])
            match rng.randrange(4):
                case 0:
                    data[start : start + run] = rng.randbytes(run)
                case 1:
                    data[start : start + run] = bytes(run)
                case 2:
                    del data[start : start + run]
                case _:
                    data[start:start] = data[rng.randrange(len(data)) :][:run]
        (tmp_path / "a.tar").write_bytes(data)
        skipped = Skipped()
        images = list(read_images(str(tmp_path / "a.tar"), ImageConfig(image_size=8, channels=1), skipped))
        assert skipped.seen == len(images) + skipped.total
        assert len({image.key for image in images}) == len(images)
        assert len(images) == len(KEYS) or skipped.total
