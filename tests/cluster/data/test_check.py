"""What a later stage would refuse is refused before the first, in one message; a person's usual odd files."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bld_core.data.images import ImageConfig, check_shards, decode, first_images, read_images, survey_shards
from bld_core.data.shards import Sample, parse_shard, write_shard
from bld_core.data.skipped import Left, Reason, Skipped
from bld_core.errors import UserError
from bld_core.prior.transformer import PriorConfig
from bld_core.storage import files
from bld_core.trained import read_autoencoder
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.data.check import check_data, shard_names, stem
from cluster.evaluation.config import EvaluationConfig
from cluster.runtime import ClusterConfig
from tests.bld_core.data.test_shards import File, tar_of
from tests.bld_core.toys import png_of, toy_images, write_latents
from tests.conftest import random_pair

IMAGES = [png_of(image.pixels) for image in toy_images(12)]


def shard(path: Path, labels: list[int]) -> str:
    path.parent.mkdir(exist_ok=True)
    write_shard(str(path), [Sample(f"{i:04d}", "png", IMAGES[i % 12], label) for i, label in enumerate(labels)])
    return str(path)


def experiment(folder: Path, train: str, validation: str, classes: int = 0, **evaluation: object) -> Experiment:
    return Experiment(
        root=str(folder / "runs"),
        data=ImageConfig(train=train, validation=validation, image_size=32, channels=1),
        prior=PriorConfig(layers=1, width=32, heads=2, classes=classes),
        evaluation=EvaluationConfig(**evaluation),  # pyright: ignore[reportArgumentType]
    )


CASES = {
    "no class": ([-1] * 4, [-1] * 4, 2, {}, r"prior.classes is 2, but no image of data.train has a class: looked for"),
    "beyond": ([0, 1, 2], [0, 1], 2, {}, r"prior.classes is 2, .* data.train has class 2: raise prior.classes to 3"),
    "null": ([0, 1], [0, 2], 2, {}, r"data.validation has class 2: raise prior.classes to 3"),
    "unseen": ([0, 1], [0, 2], 3, {}, r"data.validation has class 2, and the largest of data.train is 1"),
    "single": ([0] * 4, [0] * 4, 1, {"class_accuracy": True}, r"all images of data.train are of class 0; telling"),
    "figures": (
        [-1] * 4,
        [-1] * 4,
        0,
        {"classifier": True},
        r"evaluation.classifier is set, but no image of data.train",
    ),
    "held-out": ([0, 1], [-1, -1], 2, {"class_accuracy": True}, r"no image of data.validation has a class"),
    "cas": ([0, 1], [0, 1], 0, {"cas_steps": 2}, r"evaluation.cas_steps is 2, but prior.classes is 0"),
    "one held out": ([0, 1], [0], 2, {}, r"data.validation holds 1 image that can be read; .* need at least 2"),
    "few": (
        [-1] * 3,
        [-1] * 2,
        0,
        {"frechet": True, "precision_recall": True},
        r"3 images; .*precision_recall needs at",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(case: str, tmp_path: Path) -> None:
    train, validation, classes, evaluation, message = CASES[case]
    given = shard(tmp_path / "train.tar", train), shard(tmp_path / "validation.tar", validation)
    with pytest.raises(UserError, match=message):
        check_data(experiment(tmp_path, *given, classes, **evaluation))
    assert not (tmp_path / "runs").exists()


def test_classes_that_are_right_pass_and_shards_of_both_kinds_only_where_no_class_counts(tmp_path: Path) -> None:
    held_out = shard(tmp_path / "validation.tar", [0, 1])
    shard(tmp_path / "train-0.tar", [0, 1])
    shard(tmp_path / "train-1.tar", [-1, -1])
    both = f"{tmp_path}/train-{{0..1}}.tar"
    assert check_data(experiment(tmp_path, both, held_out)).train == [f"{tmp_path}/train-{i}.tar" for i in (0, 1)]
    check_data(experiment(tmp_path, f"{tmp_path}/train-0.tar", held_out, 2, class_accuracy=True, classifier=True))
    with pytest.raises(UserError, match=r"data.train '.*train-1.tar' has no classes and '.*train-0.tar' has"):
        check_data(experiment(tmp_path, both, held_out, 2))


def test_classes_by_name_need_the_list_and_have_it_beside_their_shards(tmp_path: Path) -> None:
    def named(name: str, *classes: str) -> str:
        members = [
            File(f"{i}.{kind}", data)
            for i, label in enumerate(classes)
            for kind, data in (("png", IMAGES[i]), ("json", json.dumps({"species": label}).encode()))
        ]
        (tmp_path / name).write_bytes(tar_of(members))
        return str(tmp_path / name)

    asked = experiment(tmp_path, named("train.tar", "cat", "dog"), named("validation.tar", "dog", "cat"), 2)
    with pytest.raises(UserError, match=r"in .json files for 'label'; set data.label_field or data.class_names"):
        check_data(asked)
    (tmp_path / "list.json").write_text('["cat", "dog"]')
    data = replace(asked.data, label_field="species", class_names=str(tmp_path / "list.json"))
    check_data(replace(asked, data=data))
    assert [image.label for image in first_images(data.validation, data, 2)] == [1, 0]


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", IMAGES[0])
    return out.getvalue()


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip": (zipped, "a zip archive: unpack it"),
    "page": (lambda: b"\n<!DOCTYPE html><html>not found</html>", "an HTML page: what a server answers"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "a Git LFS pointer: fetch .* git lfs",
    ),
    "png": (lambda: IMAGES[0], "a PNG image: put images into a tar"),
    "answer": (lambda: b'{"error": "expired"}', 'a text, \'{"error": "expired"}\': what a server answers'),
    "other": (lambda: b"Rar!\x1a\x07\x00" * 100, "a file of another kind, which begins with b'Rar!"),
    "twice": (lambda: gzip.compress(gzip.compress(tar_of([]))), "a file that gzip has packed twice"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_tar_is_named_by_its_first_bytes(kind: str, tmp_path: Path) -> None:
    make, what = KINDS[kind]
    (tmp_path / "a.tar").write_bytes(make())
    config = ImageConfig(train=f"{tmp_path}/a.tar", image_size=8)
    with pytest.raises(UserError, match=rf"shard '.*a.tar' is no tar file but {what}"):
        check_shards(config, "train")
    skipped = Skipped()
    assert list(read_images(config.train, config, skipped)) == []  # beyond the first 64, which are looked at
    assert skipped.counts == {Reason.NO_TAR: 1}


def test_gzip_is_unpacked_and_what_is_cut_off_there_counted(tmp_path: Path) -> None:
    whole = tar_of([File(f"{i}.png", IMAGES[i]) for i in range(8)])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole[:5120]) + gzip.compress(whole[5120:]))
    config = ImageConfig(train=f"{tmp_path}/a.tar.gz", image_size=8)
    assert survey_shards(config, "train").images == 8
    packed = gzip.compress(whole, 1)
    (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) // 2])
    skipped = Skipped()
    some = list(read_images(config.train, config, skipped))
    assert 0 < len(some) < 8
    assert skipped.counts == {Reason.TRUNCATED: 1}
    assert parse_shard(packed[:5], ["png"]).left == [Left(Reason.TRUNCATED, "gzip")]
    wrong = bytearray(packed)
    wrong[-8] ^= 1  # in the checksum of all
    shard = parse_shard(bytes(wrong), ["png"])
    assert [len(shard.samples), *(left.reason for left in shard.left)][:2] == [8, Reason.DAMAGED]
    wrong[len(wrong) // 2] ^= 255
    shard = parse_shard(bytes(wrong), ["png"])
    assert 0 < len(shard.samples) <= 8
    assert shard.left[0].reason == Reason.DAMAGED


@pytest.mark.parametrize("content", [b"", bytes(10240)], ids=["0 bytes", "no members"])
def test_empty_shards_are_left_out_and_counted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(content)
    shard(tmp_path / "a.tar", [1, 2])
    config = ImageConfig(train=f"{tmp_path}/{{a,b}}.tar", image_size=8)
    assert survey_shards(config, "train").images == 2
    skipped = Skipped()
    assert list(read_images(f"{tmp_path}/b.tar", config, skipped)) == []
    assert skipped.counts == {Reason.VACANT: 1}


def test_whatever_pillow_raises_of_one_image_costs_that_image(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.new("RGB", (16, 8)).save(good, "JPEG")
    make = b"\x01\x0f\x00\x05\x00\x00\x00\x01\x00\x00\x00\x26"  # Make as a RATIONAL, which is at byte 38
    turned = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # so that the tags are written anew
    odd = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + make + turned + bytes(4) + b"\x00\x00\x00\x01" * 2
    bad = io.BytesIO()
    Image.new("RGB", (16, 8)).save(bad, "JPEG", exif=odd)
    write_shard(
        f"{tmp_path}/a.tar",
        [Sample(key, "jpg", data.getvalue(), -1) for key, data in (("a", good), ("b", bad), ("c", good))],
    )
    skipped, config = Skipped(), ImageConfig(image_size=8)
    assert [image.key for image in read_images(f"{tmp_path}/a.tar", config, skipped)] == ["a", "c"]
    assert skipped.names == {Reason.UNREADABLE: ["a.tar/b"]}


def test_an_image_too_large_for_pad_is_refused_where_it_is_the_first_and_else_left_out(tmp_path: Path) -> None:
    large = io.BytesIO()
    Image.new("L", (40, 8)).save(large, "PNG")
    write_shard(f"{tmp_path}/a.tar", [Sample("a", "png", IMAGES[0], -1), Sample("b", "png", large.getvalue(), -1)])
    write_shard(f"{tmp_path}/b.tar", [Sample("b", "png", large.getvalue(), -1)])
    config = ImageConfig(train=f"{tmp_path}/a.tar", image_size=32, channels=1, fit="pad")
    check_shards(config, "train")
    skipped = Skipped()
    assert len(list(read_images(config.train, config, skipped))) == 1
    assert skipped.names == {Reason.NO_FIT: ["a.tar/b"]}
    with pytest.raises(
        UserError, match=r"'b' in shard '.*b.tar' is an image larger .*\(40, 8\) pixels, .*`image_size`"
    ):
        check_shards(replace(config, train=f"{tmp_path}/b.tar"), "train")
    assert decode(IMAGES[0], config).shape == (32, 32, 1)


def test_held_out_images_of_which_none_can_be_read_are_one_message(tmp_path: Path) -> None:
    write_shard(f"{tmp_path}/v.tar", [Sample("a", "png", b"x", -1), Sample("b", "png", b"", -1)])
    train = shard(tmp_path / "train.tar", [-1] * 4)
    with pytest.raises(
        UserError, match=r"none of the images of '.*v.tar' can be read: 2 of 2 samples left out: 1 unread"
    ):
        check_data(experiment(tmp_path, train, f"{tmp_path}/v.tar"))


def test_training_shards_without_an_image_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "train.tar").touch()
    with pytest.raises(UserError, match=r"none of the images of '.*train.tar' can be read: .*1 shard without samples"):
        check_data(experiment(tmp_path, f"{tmp_path}/train.tar", shard(tmp_path / "validation.tar", [-1] * 2)))


def test_shards_are_named_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert shard_names(["/d/a.tar", "/d/b.tar"]) == ["a.tar", "b.tar"]
    assert shard_names(["/d/date=1/a.tar", "/d/date=2/a.tar", "/d/b.tar"]) == ["date=1-a.tar", "date=2-a.tar", "b.tar"]
    assert shard_names(["/x/y/a.tar", "/z/y/a.tar"]) == ["x-y-a.tar", "z-y-a.tar"]
    assert [stem(name) for name in ("a.tar", "a.tar.gz", "a.tgz", "a.b")] == ["a", "a", "a", "a.b"]
    assert shard_names(["https://h/a.tar?X-Amz-Signature=1", "https://h/b.tar?s=a/b.tar"]) == ["a.tar", "b.tar"]
    with pytest.raises(UserError, match=r"names the same shard twice: 'https://h/a.tar\?s=\*\*\*'; leave"):
        shard_names(["https://h/a.tar?s=1", "https://h/a.tar?s=2"])
    with pytest.raises(UserError, match="cannot be told apart"):
        shard_names(["/x/a.tar", "/x-a.tar", "/y/a.tar", "/x/a.tgz"])


def test_what_is_relative_to_a_jobs_copy_of_the_code_is_refused_and_so_is_rays_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    given = shard(tmp_path / "train.tar", [-1] * 4)
    experiment(tmp_path, given, given)
    monkeypatch.chdir(copy)
    experiment(tmp_path, given, given)
    with pytest.raises(UserError, match=r"data.train is 'a.tar', relative to the copy of the code that Ray has made"):
        experiment(tmp_path, f"{given}::a.tar", given)
    with pytest.raises(UserError, match=r"data.class_names is 'names.json', relative to the copy of the code"):
        Experiment(root=str(tmp_path), data=ImageConfig(train=given, validation=given, class_names="names.json"))
    with pytest.raises(UserError, match=r"root is 'runs', relative to the copy .*: give an absolute path or a URL"):
        Experiment()
    with pytest.raises(
        UserError, match=r"cluster.address .* is 'ray://head:10001': Ray's client runs no training; give"
    ):
        ClusterConfig(address="ray://head:10001")


def test_a_prior_of_classes_is_refused_where_the_codes_have_none_or_others(
    tmp_path: Path, digits: dict[str, str]
) -> None:
    pair = random_pair(tmp_path, digits, "")
    folder, made_by = f"{pair.folder}/latents", read_autoencoder(pair.folder).hash
    write_latents(folder, train=[4], labelled=False, autoencoder_hash=made_by)
    with pytest.raises(UserError, match=r"prior.classes is 10, but the latents hold no class: set it to 0, or give"):
        open_encoded(pair)
    open_encoded(replace(pair, prior=replace(pair.prior, classes=0)))
    write_latents(folder, train=[4], autoencoder_hash=made_by)
    open_encoded(pair)
    with pytest.raises(UserError, match=r"the latents hold class 2; prior.classes is 2: raise it"):
        open_encoded(replace(pair, prior=replace(pair.prior, classes=2)))
    manifest = files.read_json(f"{folder}/manifest.json")
    for file in manifest["files"]:
        del file["classes"]
    files.write_json(f"{folder}/manifest.json", manifest)  # as an early version wrote it
    open_encoded(pair)


def test_folders_of_other_classes_than_those_of_training_are_refused(tmp_path: Path) -> None:
    given = [shard(tmp_path / split / "0.tar", [0, 1]) for split in ("train", "validation")]
    (tmp_path / "train/classes.json").write_text('["ant", "bee", "cat"]')
    (tmp_path / "validation/classes.json").write_text('["ant", "bee"]')
    check_data(experiment(tmp_path, given[0], given[1], 3))
    shutil.move(tmp_path / "validation", tmp_path / "other")  # a list is read once a process
    (tmp_path / "other/classes.json").write_text('["ant", "cat"]')
    held_out = f"{tmp_path}/other/0.tar"
    with pytest.raises(
        UserError, match=r"class 1 is 'bee' beside data.train and 'cat' beside data.validation, .*: make"
    ):
        check_data(experiment(tmp_path, given[0], held_out, 3))
    check_data(experiment(tmp_path, given[0], held_out))
