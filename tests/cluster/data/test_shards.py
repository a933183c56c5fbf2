"""Making shards: the same bytes however the work is split, interrupted or stored, and nothing of others is touched."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bld_core.data.shards import read_shard, shard_size
from bld_core.storage import files
from cluster.data.shards import ShardConfig, make_shards
from tests.bld_core.toys import png_of, toy_images


def folder_of(path: Path, count: int, classes: int = 3) -> str:
    """A folder of images, each in the folder of its class; some with other endings, some that are no images."""
    for i, image in enumerate(toy_images(count)):
        where = path / f"class {i % classes}" if classes else path
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{i:05d}.{'PNG' if i % 7 == 0 else 'png'}").write_bytes(png_of(image.pixels) + bytes(i % 300))
        (where / "notes.txt").write_text("no image")
    return str(path)


def tars(folder: str) -> dict[str, bytes]:
    return {name: files.read_bytes(files.join(folder, name)) for name in files.listing(folder) if name.endswith(".tar")}


def test_the_bytes_depend_neither_on_threads_nor_on_where_they_go(tmp_path: Path, s3: str) -> None:
    source = folder_of(tmp_path / "source", 60)
    outputs = {1: str(tmp_path / "one"), 5: str(tmp_path / "five"), 3: f"{s3}/made"}
    made = {
        output: make_shards(ShardConfig(source=source, output=output, images_per_shard=7, threads=threads))
        for threads, output in outputs.items()
    }
    first, *others = [tars(output) for output in outputs.values()]
    assert len(first) == 9
    assert all(other == first for other in others)
    for output, shards in made.items():
        assert shards.classes == 3
        assert shards.patterns == {
            "train": f"{output}/train-{{0000..0007}}.tar",
            "validation": f"{output}/validation-{{0000..0000}}.tar",
        }
        assert files.listing(output) == ["classes.json", "shards.json", *sorted(first)]
        assert files.read_bytes(files.join(output, "classes.json")) == b'["class 0", "class 1", "class 2"]\n'
    assert make_shards(ShardConfig(source=source, output=f"{s3}/made", images_per_shard=7)) == made[f"{s3}/made"]


def test_every_image_is_in_one_shard_and_none_is_larger_than_it_may_be(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", 90)
    large = Path(source, "class 1", "large.png")
    large.write_bytes(bytes(3 << 20))
    for i in range(8):
        Path(source, "class 2", f"middling {i}.png").write_bytes(bytes(400 << 10))
    made = make_shards(ShardConfig(source=source, output=str(tmp_path / "out"), images_per_shard=40, mib_per_shard=1))
    keys: list[str] = []
    for url in (url for pattern in made.patterns.values() for url in files.expand(pattern)):
        samples, left, _ = read_shard(url, ["png"])
        size = sum(len(sample.data) for sample in samples)
        assert not left
        assert len(samples) <= 40
        assert size <= 1 << 20 or len(samples) == 1
        assert Path(url).stat().st_size == shard_size((len(sample.data), sample.label) for sample in samples)
        keys += [sample.key for sample in samples]
    assert sorted(keys) == [f"{i:08d}" for i in range(99)]


KILLED = """
import sys
from cluster.data.shards import ShardConfig, make_shards
make_shards(ShardConfig(source=sys.argv[1], output=sys.argv[2], images_per_shard=2, threads=1))
"""


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source, output = folder_of(tmp_path / "source", 400), tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "-c", KILLED, source, str(output)], stderr=subprocess.DEVNULL)
    while not (output / "train-0003.tar").exists():
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (output / "train-0199.tar.0123abcd.tmp").touch()  # what it was writing
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert "shards.json" not in files.listing(str(output))
    config = ShardConfig(source=source, output=str(output), images_per_shard=2)
    with pytest.raises(ValueError, match=r"holds shards made with .*, not .*: choose"):
        make_shards(ShardConfig(source=source, output=str(output), images_per_shard=3))
    make_shards(config)
    for name, written in finished.items():
        assert (output / name).stat().st_mtime_ns == written, f"{name} was made again"
    make_shards(ShardConfig(source=source, output=str(tmp_path / "whole"), images_per_shard=2))
    assert tars(str(output)) == tars(str(tmp_path / "whole"))
    assert files.listing(str(output)) == files.listing(str(tmp_path / "whole"))


def test_nothing_of_others_is_touched(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", 20)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty .* choose another --output"):
        make_shards(ShardConfig(source=source, output=str(output)))
    (output / "mine.txt").unlink()
    config = ShardConfig(source=source, output=str(output), images_per_shard=5)
    make_shards(config)
    (output / "shards.json").unlink()
    with pytest.raises(ValueError, match=r"is not empty"):
        make_shards(config)


def test_an_unfinished_output_refuses_another_source_and_shards_of_another_size(tmp_path: Path) -> None:
    source, output = folder_of(tmp_path / "source", 20), tmp_path / "out"
    config = ShardConfig(source=source, output=str(output), images_per_shard=5)
    make_shards(config)
    record = files.read_json(f"{output}/shards.json")
    images = sorted((str(path.relative_to(source)), path.stat().st_size) for path in Path(source).rglob("*.[pP]*"))
    digest = files.sha256("\n".join(f"{name} {size}" for name, size in images).encode())
    files.write_json(f"{output}/shards-unfinished.json", {"config": record["config"], "source": digest})
    (output / "shards.json").unlink()
    shard = output / "train-0001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"train-0001.tar' has 14 bytes; the shard of that name would have 20480"):
        make_shards(config)
    assert shard.read_bytes() == b"something else"
    shard.write_bytes(whole)
    folder_of(tmp_path / "source", 21)
    with pytest.raises(ValueError, match=r"holds unfinished shards of other images: files in .* were added"):
        make_shards(config)


def test_bad_sources_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="holds no images: looked for jpg, jpeg, png, webp, jfif, jpe, bmp, tif, tiff there"
    ):
        make_shards(ShardConfig(source=str(tmp_path), output=str(tmp_path / "out")))
    folder_of(tmp_path / "source", 6)
    folder_of(tmp_path / "source", 2, classes=0)
    with pytest.raises(ValueError, match=r"2 images such as '00000.PNG' lie in .* beside the folders of 3 classes"):
        make_shards(ShardConfig(source=str(tmp_path / "source"), output=str(tmp_path / "out")))
    for field, value in (("images_per_shard", 0), ("mib_per_shard", -1), ("validation_share", 1.0), ("threads", 0)):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            ShardConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_a_real_folder_has_links_and_what_systems_put_beside_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, image = tmp_path / "source", png_of(toy_images(1)[0].pixels)
    for name in ("10", "9", "1"):
        put(source / name / "a.png", image)
    put(tmp_path / "elsewhere" / "b.jfif", image)
    put(tmp_path / "elsewhere" / "deep" / "c.jpeg", image)
    (source / "2").symlink_to(tmp_path / "elsewhere")
    for name in (
        ".ipynb_checkpoints/a.png",
        "__MACOSX/1/._a.png",
        "1/._a.png",
        ".DS_Store",
        "9/.hidden/x.png",
        "@eaDir/a.png",
    ):
        put(source / name, image)
    for name in ("1/a.gif", "1/b.heic", "2/d.GIF", "9/labels.csv", "9/scan", "9/damaged.tif"):
        put(source / name, image[:90])
    made = make_shards(ShardConfig(source=str(source), output=str(tmp_path / "out"), validation_share=0))
    said = capsys.readouterr().out
    assert "left out: 2 .gif, 1 .heic, which shards do not hold: convert them to PNG" in said
    assert re.search(r"left out: 1 images that cannot be made PNG, such as: '9/damaged.tif' in .* cannot be read", said)
    assert "left out: 1 .csv, 1 without ending, which are no images by their names\n" in said
    assert made.classes == 4
    assert files.read_bytes(f"{tmp_path}/out/classes.json") == b'["1", "2", "9", "10"]\n'
    samples = read_shard(f"{tmp_path}/out/train-0000.tar", ["jpg", "jpeg", "png"]).samples
    assert sorted((sample.label, sample.extension) for sample in samples) == [
        *((0, "png"), (1, "jpeg"), (1, "jpg"), (2, "png"), (3, "png"))
    ]


def test_bmp_and_tiff_become_png_without_loss(tmp_path: Path) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    pictures = {
        "a.bmp": Image.fromarray(np.stack([grey, grey + 1, grey + 2], -1)),
        "b.TIFF": Image.fromarray(grey),
        "c.tif": Image.fromarray((grey.astype(np.uint16) << 8) + 7),
        "d.tif": Image.new("CMYK", (8, 6)),
    }
    (tmp_path / "source").mkdir()
    for name, picture in pictures.items():
        picture.save(tmp_path / "source" / name)
    Image.fromarray(grey).save(tmp_path / "source" / "e.tif", exif={274: 6})  # to be turned
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "source" / "f.tif")
    config = ShardConfig(source=str(tmp_path / "source"), output=str(tmp_path / "out"), validation_share=0)
    samples = read_shard(files.expand(make_shards(config).patterns["train"])[0], ["png"]).samples
    stored = {sample.key: Image.open(io.BytesIO(sample.data)) for sample in samples}
    assert sorted(stored) == [f"{i:08d}" for i in range(5)], "of floats no range is known"
    for key, picture in zip(sorted(stored), list(pictures.values())[:3], strict=False):
        assert np.array_equal(np.asarray(stored[key]), np.asarray(picture))
    assert stored["00000003"].mode == "RGB"
    assert np.array_equal(np.asarray(stored["00000004"]), np.rot90(grey, -1))


def test_a_link_in_a_circle_and_a_folder_of_other_images_are_one_message(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.gif", b"")
    with pytest.raises(ValueError, match=r"holds no images: looked for .*, found 1 .gif: convert them"):
        make_shards(ShardConfig(source=str(tmp_path / "a"), output=str(tmp_path / "out")))
    (tmp_path / "a" / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a/b' is a link to a folder that it lies in: remove it"):
        make_shards(ShardConfig(source=str(tmp_path / "a"), output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"missing' cannot be read .*No such file"):
        make_shards(ShardConfig(source=str(tmp_path / "missing"), output=str(tmp_path / "out")))
    put(tmp_path / "c" / "a.png", b"")
    (tmp_path / "c" / "b.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'b.png' in .* cannot be read .*: mend it, or move it away"):
        make_shards(ShardConfig(source=str(tmp_path / "c"), output=str(tmp_path / "out")))
