"""The latent shard: its bytes are a contract, so they are pinned, as bytes and as readable text."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bld_core.autoencoder.model import make_autoencoder
from bld_core.autoencoder.network import AutoencoderConfig
from bld_core.data.images import LabelledImage
from bld_core.data.tensors import stack, to_float
from bld_core.latents.bits import unpack_bits
from bld_core.latents.writer import (
    FORMAT_VERSION,
    LatentConfig,
    LatentRows,
    describe_file,
    encode_images,
    latent_shard_bytes,
    shard_metadata,
    whole_shard_metadata,
)
from bld_core.noise import uniform
from bld_core.splitmix import key_of
from bld_core.storage import files
from tests.bld_core.toys import tiny_autoencoder, toy_images

GOLDEN = Path(__file__).parents[2] / "golden" / "latent_shard.json"
SHAPE = (2, 2, 8)  # of the tiny autoencoder on 8 x 8 images
WIDTH = math.prod(SHAPE) // 8


def golden_rows() -> LatentRows:
    count, width = 6, 4
    bits = (uniform(0, "golden shard", torch.arange(count), width) * 256).to(torch.uint8)
    keys = [f"{i:05d}" for i in range(3)] * 2
    return LatentRows(keys, [0, 7, -1] * 2, [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], bits)


def golden_metadata() -> dict[str, Any]:
    return {"shape": [2, 2, 8], "autoencoder_hash": "0123abcd", "seed": 0}


# --- The format -----------------------------------------------------------------------------------------------------


def test_the_golden_shard_reads_with_plain_pyarrow() -> None:
    golden = json.loads(GOLDEN.read_text())
    table = pq.read_table(io.BytesIO(latent_shard_bytes(golden_rows(), golden_metadata())))
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == golden["schema"]
    rows = [{**row, "bits": row["bits"].hex()} for row in table.to_pylist()]
    assert rows == golden["rows"]


def test_the_golden_shard_says_how_it_was_made() -> None:
    golden = json.loads(GOLDEN.read_text())
    table = pq.read_table(io.BytesIO(latent_shard_bytes(golden_rows(), golden_metadata())))
    metadata = json.loads(table.schema.metadata[b"bld_latents"])
    assert len(metadata.pop("sha256")) == 64
    assert metadata == golden["metadata"]


@pytest.mark.skipif(
    json.loads(GOLDEN.read_text())["pyarrow"] != pa.__version__,
    reason="Parquet files carry the version of their writer",
)
def test_the_golden_shard_has_its_bytes() -> None:
    assert (
        files.sha256(latent_shard_bytes(golden_rows(), golden_metadata())) == json.loads(GOLDEN.read_text())["sha256"]
    )


def test_no_compression_and_no_dictionary() -> None:
    metadata = pq.read_metadata(io.BytesIO(latent_shard_bytes(golden_rows(), golden_metadata())))
    for i in range(metadata.num_columns):
        column = metadata.row_group(0).column(i)
        assert column.compression == "UNCOMPRESSED"
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)


def test_the_metadata_survives() -> None:
    data = latent_shard_bytes(golden_rows(), golden_metadata())
    assert whole_shard_metadata(data) == {"format": FORMAT_VERSION, **golden_metadata()}
    with pytest.raises(ValueError, match="format: 9"):
        shard_metadata(latent_shard_bytes(golden_rows(), {"format": 9}))


def test_a_foreign_file_is_refused() -> None:
    foreign = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(ValueError, match=r"not a latent shard of format 1 \(format: None\)"):
        shard_metadata(foreign.getvalue())


def test_a_thousand_codes_cost_at_most_a_tenth_more_than_their_bits() -> None:
    h, w, c = 16, 16, 32
    count, width = 1000, h * w * c // 8
    keys = [f"{i:08d}" for i in range(count)]
    bits = (uniform(0, "size", torch.arange(count), width) * 256).to(torch.uint8)
    data = latent_shard_bytes(
        LatentRows(keys, list(range(count)), [0] * count, [0] * count, bits),
        {"shape": [h, w, c], "autoencoder_hash": "0" * 64, "preprocessing": {"image_size": 256}, "seed": 0},
    )
    entry = describe_file("train-0000.parquet", data, count, "s3://bucket/train-0000.tar", "train", {"unreadable": 1})
    assert len(data) + len(json.dumps(asdict(entry), indent=2)) <= 1.10 * width * count


# --- Encoding -------------------------------------------------------------------------------------------------------


def shard_of(images: list[LabelledImage], config: LatentConfig, seed: int = 0) -> bytes:
    return latent_shard_bytes(encode_images(tiny_autoencoder(), iter(images), config, seed), golden_metadata())


def rows_by_name(rows: LatentRows) -> dict[tuple[str, int, int], tuple[int, list[int]]]:
    names = zip(rows.key, rows.draw, rows.view, strict=True)
    return dict(zip(names, zip(rows.label, rows.bits.tolist(), strict=True), strict=True))


def test_repeated_runs_give_the_same_bytes() -> None:
    config = LatentConfig(draws=2, mirror=True, batch_size=4)
    assert shard_of(toy_images(11), config) == shard_of(toy_images(11), config)
    assert shard_of(toy_images(11), config) != shard_of(toy_images(11), config, seed=1)


def test_a_row_does_not_depend_on_what_it_is_encoded_with() -> None:
    autoencoder, images = tiny_autoencoder(), toy_images(11)
    config = LatentConfig(draws=2, mirror=True, batch_size=4)
    whole = rows_by_name(encode_images(autoencoder, images, config, 0))
    assert len(whole) == 11 * 2 * 2
    for part in (images[:1], images[3:], images[::-1], images[2:9:3]):
        rows = rows_by_name(encode_images(autoencoder, part, config, 0))
        assert rows == {name: row for name, row in whole.items() if name[0] in {image.key for image in part}}


def test_draws_and_views_make_rows_that_are_keyed_on_the_sample() -> None:
    autoencoder, images = tiny_autoencoder(), toy_images(5)
    rows = encode_images(autoencoder, images, LatentConfig(draws=3, mirror=True, batch_size=4), seed=9)
    names = set(zip(rows.key, rows.draw, rows.view, strict=True))
    assert names == set(itertools.product([image.key for image in images], range(3), range(2)))
    assert rows.bits.shape == (30, WIDTH)
    x = to_float(stack(images))
    for i, name in enumerate(zip(rows.key, rows.draw, rows.view, strict=True)):
        key, draw, view = name
        number = int(key)
        assert rows.label[i] == images[number].label
        with torch.no_grad():
            logits = autoencoder.encode((x.flip(-1) if view else x)[number : number + 1])
        u = uniform(9, f"code draw {draw} view {view}", torch.tensor([key_of(key)]), logits.numel()).view_as(logits)
        sure = (u - torch.sigmoid(logits)).abs() > 1e-4  # where rounding in another batch cannot matter
        truth = (u < torch.sigmoid(logits)).permute(0, 2, 3, 1)[0]
        found = unpack_bits(rows.bits[i : i + 1], SHAPE)[0].bool()
        assert ((found == truth) | ~sure.permute(0, 2, 3, 1)[0]).all()


def test_no_draws_store_the_mode() -> None:
    autoencoder, images = tiny_autoencoder(), toy_images(5)
    rows = encode_images(autoencoder, images, LatentConfig(draws=0, batch_size=5), seed=0)
    with torch.no_grad():
        mode = autoencoder.encode(to_float(stack(images))).permute(0, 2, 3, 1) > 0
    assert torch.equal(unpack_bits(rows.bits, SHAPE).bool(), mode)
    assert (rows.draw, rows.view) == ([0] * 5, [0] * 5)
    other = encode_images(autoencoder, images, LatentConfig(draws=0, batch_size=5), seed=1)
    assert torch.equal(rows.bits, other.bits)


def test_draws_are_1_as_often_as_the_probability_says() -> None:
    torch.manual_seed(0)
    autoencoder = make_autoencoder(AutoencoderConfig(bits=8, channels=4, multipliers=[1, 1], blocks=1, attention=[]), 1)
    images = toy_images(1)
    rows = encode_images(autoencoder, images, LatentConfig(draws=127, batch_size=1), seed=0)
    with torch.no_grad():
        y = torch.sigmoid(autoencoder.encode(to_float(stack(images)))).permute(0, 2, 3, 1)[0]
    share = unpack_bits(rows.bits, (4, 4, 8)).float().mean(0)
    assert ((share - y).abs() < 5 * (y * (1 - y) / 127).sqrt() + 1e-6).all()


@pytest.mark.parametrize(("field", "value"), [("draws", -1), ("draws", 128), ("batch_size", 0)])
def test_a_bad_field_is_named_with_its_value(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` is {value}"):
        LatentConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def test_a_shard_says_by_itself_whether_it_is_whole() -> None:
    data = latent_shard_bytes(golden_rows(), golden_metadata())
    for position in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        assert whole_shard_metadata(bytes(flipped)) is None, position
    for length in range(0, len(data), 50):
        assert whole_shard_metadata(data[:length]) is None, length
    assert whole_shard_metadata(data + b"x") is None
