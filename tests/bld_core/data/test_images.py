from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bld_core.data.images import (
    AugmentationConfig,
    BadImage,
    ImageConfig,
    View,
    check_shards,
    decode,
    decode_samples,
    first_images,
    read_images,
)
from bld_core.data.shards import Sample, write_shard
from bld_core.data.skipped import Reason, Skipped
from bld_core.data.tensors import stack
from tests.bld_core.toys import png_of, toy_images, toy_samples


def gradient(width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    """An image in which every pixel tells its place."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, x + y][:channels], axis=-1).astype(np.uint8)


def test_pixels_of_the_right_size_are_untouched() -> None:
    for image in toy_images(3, channels=3) + toy_images(3, channels=1):
        channels = image.pixels.shape[-1]
        config = ImageConfig(image_size=8, channels=3 if channels == 3 else 1)
        np.testing.assert_array_equal(decode(png_of(image.pixels), config), image.pixels)


@pytest.mark.parametrize(("width", "height"), [(20, 8), (8, 21), (40, 16), (16, 16), (5, 4), (4, 9)])
def test_crop_scales_the_short_side_and_takes_the_centre(width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = (np.arange(width) * 255 // (width - 1))[None]
    pixels[:, :, 1] = (np.arange(height) * 255 // (height - 1))[:, None]
    square = decode(png_of(pixels), ImageConfig(image_size=8)).astype(int)
    assert square.shape == (8, 8, 3)
    for axis, channel in ((1, 0), (0, 1)):  # the centre of the image stays in the centre
        line = square[:, :, channel].mean(1 - axis)
        assert abs(line.mean() - 127) <= 255 / 2 / 8 + 2  # half a pixel of rounding
        assert (np.diff(line) > 0).all()


def test_crop_of_an_unscaled_image_is_a_plain_cut() -> None:
    pixels = gradient(20, 8)
    np.testing.assert_array_equal(decode(png_of(pixels), ImageConfig(image_size=8)), pixels[:, 6:14])


def test_pad_centres_the_image_on_black() -> None:
    pixels = gradient(4, 6) + 1
    padded = decode(png_of(pixels), ImageConfig(image_size=8, fit="pad"))
    np.testing.assert_array_equal(padded[1:7, 2:6], pixels)
    assert padded.sum() == pixels.sum()
    grey = decode(png_of(pixels[:, :, :1]), ImageConfig(image_size=8, channels=1, fit="pad"))
    np.testing.assert_array_equal(grey[1:7, 2:6], pixels[:, :, :1])


def test_pad_refuses_a_larger_image_with_both_sizes() -> None:
    with pytest.raises(BadImage, match=r"image larger than its square.*: \(9, 4\) pixels, the square has 8"):
        decode(png_of(gradient(9, 4)), ImageConfig(image_size=8, fit="pad"))


def test_grey_becomes_rgb_and_rgb_grey() -> None:
    grey = gradient(8, 8, 1) * 20
    as_rgb = decode(png_of(grey), ImageConfig(image_size=8, channels=3))
    np.testing.assert_array_equal(as_rgb, np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(decode(png_of(as_rgb), ImageConfig(image_size=8, channels=1)), grey)
    palette = io.BytesIO()
    Image.fromarray(as_rgb).convert("P").save(palette, format="PNG")
    assert decode(palette.getvalue(), ImageConfig(image_size=8)).shape == (8, 8, 3)


PAPER = AugmentationConfig(resize=1.05, flip=True)


def places(count: int, width: int, height: int, augmentation: AugmentationConfig) -> set[tuple[int, int]]:
    """(left, top) of the squares cut out for `count` keys, read from the pixels."""
    config = ImageConfig(image_size=8)
    found = set[tuple[int, int]]()
    for i in range(count):
        view = augmentation.view(0, 0, f"image {i}")
        square = decode(png_of(gradient(width, height)), config, view)
        left, top = (int(place) for place in square[0, 0, :2])
        np.testing.assert_array_equal(square, gradient(width, height)[top : top + 8, left : left + 8])
        found.add((left, top))
    return found


def test_no_augmentation_is_no_view_and_the_same_pixels() -> None:
    plain = AugmentationConfig()
    samples = [Sample(str(i), "png", png_of(gradient(9 + i, 30 - i)), -1) for i in range(12)]
    assert all(plain.view(0, epoch, sample.key) is None for epoch in range(3) for sample in samples)
    for fit, size in (("crop", 8), ("pad", 32)):
        config = ImageConfig(image_size=size, fit=fit)  # pyright: ignore[reportArgumentType]
        images = decode_samples("a", samples, config, Skipped(), lambda key: plain.view(0, 1, key))
        for image, sample in zip(images, samples, strict=True):
            np.testing.assert_array_equal(image.pixels, decode(sample.data, config))


def test_a_view_is_a_function_of_seed_epoch_and_key_alone() -> None:
    samples = [Sample(str(i), "png", png_of(gradient(40, 50)), -1) for i in range(20)]
    config = ImageConfig(image_size=32)

    def shown(seed: int, epoch: int, order: list[Sample]) -> dict[str, bytes]:
        images = decode_samples("a", order, config, Skipped(), lambda key: PAPER.view(seed, epoch, key))
        return {image.key: image.pixels.tobytes() for image in images}

    first = shown(0, 0, samples)
    assert shown(0, 0, samples[::-1]) == first
    assert shown(0, 0, samples[7:9]) == {key: first[key] for key in ("7", "8")}
    for other in (shown(0, 1, samples), shown(1, 0, samples)):
        assert sum(other[key] != first[key] for key in first) >= 10
    assert len(set(first.values())) >= 10  # the same image under 20 keys


def test_squares_are_cut_at_every_place_and_nowhere_else() -> None:
    # The short side is twice image_size already, so that nothing is scaled and pixels tell their place.
    augmentation = AugmentationConfig(resize=2)
    assert places(400, 16, 16, augmentation) == {(left, top) for left in range(9) for top in range(9)}
    assert places(300, 20, 16, augmentation) <= {(left, top) for left in range(13) for top in range(9)}
    nearly_1 = 1 - 2.0**-24
    corner = decode(png_of(gradient(20, 16)), ImageConfig(image_size=8), View(2, nearly_1, nearly_1, mirrored=False))
    np.testing.assert_array_equal(corner, gradient(20, 16)[8:, 12:])


def test_the_short_side_is_scaled_before_the_cut() -> None:
    pixels = gradient(200, 100)
    whole = Image.fromarray(pixels).resize((134, 67), Image.Resampling.LANCZOS)
    for left, top in ((0.0, 0.0), (0.5, 0.99)):
        square = decode(png_of(pixels), ImageConfig(image_size=64), View(1.05, left, top, mirrored=False))
        x, y = int(left * 71), int(top * 4)
        np.testing.assert_array_equal(square, np.asarray(whole)[y : y + 64, x : x + 64])


def test_a_flip_is_an_exact_mirror_of_half_of_the_images() -> None:
    augmentation = AugmentationConfig(flip=True)
    data, config = png_of(gradient(20, 8)), ImageConfig(image_size=8)
    plain = decode(data, config)
    mirrored = 0
    for i in range(200):
        view = augmentation.view(0, 0, f"image {i}")
        assert view is not None
        np.testing.assert_array_equal(decode(data, config, view), plain[:, ::-1] if view.mirrored else plain)
        mirrored += view.mirrored
    assert 80 <= mirrored <= 120
    never = [AugmentationConfig(resize=1.1).view(0, 0, str(i)) for i in range(50)]
    assert not any(view is None or view.mirrored for view in never)
    padded = ImageConfig(image_size=24, fit="pad")
    mirror = View(1, 0, 0, mirrored=True)
    np.testing.assert_array_equal(decode(data, padded, mirror), decode(data, padded)[:, ::-1])
    assert decode(data, config, mirror).flags.c_contiguous


def test_validation_and_encoding_take_images_as_they_are(tmp_path: Path) -> None:
    url = str(tmp_path / "a.tar")
    samples = [Sample(str(i), "png", png_of(gradient(20 + i, 16)), -1) for i in range(5)]
    write_shard(url, samples)
    config = ImageConfig(image_size=8)
    plain = [decode(sample.data, config) for sample in samples]
    for images in (list(read_images(url, config, Skipped())), first_images(url, config, 5)):
        np.testing.assert_array_equal(stack(images).numpy(), np.stack(plain))


def test_an_impossible_augmentation_is_refused() -> None:
    for resize in (0.9, 2.1, float("nan")):
        with pytest.raises(ValueError, match=rf"`resize` is {resize}; it must be in \[1, 2\]"):
            AugmentationConfig(resize=resize)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.tar")
    good, bad = toy_samples(6), (1, 4)
    samples = [sample._replace(data=sample.data[:60]) if i in bad else sample for i, sample in enumerate(good)]
    samples += [Sample("text", "png", b"not an image", 0), Sample("nothing", "png", b"", 0)]
    write_shard(url, samples)
    skipped = Skipped()
    images = list(read_images(url, ImageConfig(image_size=8, channels=1), skipped))
    assert [image.key for image in images] == ["0000", "0002", "0003", "0005"]
    assert skipped.counts == {Reason.UNREADABLE: 3, Reason.EMPTY: 1}
    assert skipped.names == {
        Reason.UNREADABLE: ["a.tar/0001", "a.tar/0004", "a.tar/text"],
        Reason.EMPTY: ["a.tar/nothing"],
    }
    assert skipped.seen == 8
    for image, truth in zip(images, (toy_images(6)[i] for i in (0, 2, 3, 5)), strict=True):
        assert image.label == truth.label % 4
        np.testing.assert_array_equal(image.pixels, truth.pixels)


def reason(data: bytes, **fields: object) -> Reason:
    with pytest.raises(BadImage) as caught:
        decode(data, ImageConfig(image_size=8, **fields))  # pyright: ignore[reportArgumentType]
    return caught.value.reason


def test_a_damaged_header_is_an_unreadable_image_too() -> None:
    header = b"IHDR" + bytes(5)  # 13 bytes are wanted
    data = b"\x89PNG\r\n\x1a\n" + (5).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    assert reason(data) == Reason.UNREADABLE


def test_images_over_the_pixel_limit_are_left_out_before_they_are_decoded() -> None:
    data = png_of(gradient(20, 16))
    assert decode(data, ImageConfig(image_size=8, max_pixels=320)).shape == (8, 8, 3)
    assert reason(data, max_pixels=319) == Reason.TOO_LARGE
    chunks = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]), b"IDAT" + zlib.compress(bytes(1000))
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    )
    assert reason(bomb) == Reason.TOO_LARGE  # 10.8 GB, if it were decoded
    sliver = png_of(np.zeros((1, 20_000), np.uint8))  # scaled to 8 x 160,000
    assert reason(sliver, max_pixels=1 << 20) == Reason.TOO_LARGE


def test_other_formats_are_no_images_whatever_they_are_called() -> None:
    other = io.BytesIO()
    Image.new("RGB", (8, 8)).save(other, "GIF")
    assert reason(other.getvalue()) == Reason.UNREADABLE


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_parts_show_white(form: str) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (10, 200, 30, 255)
    pixels[4:] = (10, 200, 30, 0)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    found = decode(saved(Image.fromarray(pixels), form, **options), ImageConfig(image_size=8))
    assert (found[:4] == (10, 200, 30)).all()
    assert (found[4:] == 255).all()


def test_transparent_palettes_and_grey_show_white_too() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    found = decode(saved(palette, "PNG", transparency=0), ImageConfig(image_size=8))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert (found[1:] == (200, 100, 50)).all()
    grey = Image.merge("LA", (Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 127)))
    found = decode(saved(grey, "PNG"), ImageConfig(image_size=8, channels=1))
    assert abs(int(found[0, 0, 0]) - (100 + 255) / 2) <= 1


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000) + 7
    found = decode(saved(Image.fromarray(deep), "PNG"), ImageConfig(image_size=8, channels=1))
    np.testing.assert_array_equal(found[..., 0], deep >> 8)
    as_rgb = decode(saved(Image.fromarray(deep), "PNG"), ImageConfig(image_size=8))
    np.testing.assert_array_equal(as_rgb, np.repeat(found, 3, axis=2))


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    found = decode(saved(cmyk, "JPEG", quality=95), ImageConfig(image_size=8)).astype(int)
    assert (abs(found - (255, 0, 0)) <= 3).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(form: str, orientation: int) -> None:
    """A camera stores an image turned by EXIF orientation o; the turn that undoes it is in Pillow's documentation."""
    upright = Image.fromarray(np.kron([[0, 80], [160, 255]], np.ones((8, 8))).astype(np.uint8))
    undone_by = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # Image.Transpose, of the stored image
    inverse = {0: 0, 1: 1, 2: 4, 3: 3, 4: 2, 5: 5, 6: 6}
    stored = upright
    if orientation > 1:
        stored = upright.transpose(Image.Transpose(inverse[undone_by[orientation]]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    data = saved(stored, form, exif=exif, **options)
    found = decode(data, ImageConfig(image_size=16, channels=1)).astype(int)
    assert (abs(found[..., 0] - np.asarray(upright).astype(int)) <= 12).all()
    damaged = data.replace(exif.tobytes()[6:], b"II*\0\xff\xff\xff\xff" + exif.tobytes()[14:])
    if damaged != data and form == "JPEG":  # the image is still there, its orientation is not
        assert decode(damaged, ImageConfig(image_size=16, channels=1)).shape == (16, 16, 1)


def test_draft_changes_large_jpegs_a_little_and_nothing_else() -> None:
    y, x = np.mgrid[:240, :240]
    waves = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 13 + x / 31)).astype(np.uint8)
    photo = Image.fromarray(np.stack([waves, waves.T, waves[::-1]], -1))
    plain, draft = ImageConfig(image_size=32), ImageConfig(image_size=32, draft=True)
    large = saved(photo, "JPEG", quality=92)
    full, reduced = (decode(large, config).astype(int) for config in (plain, draft))
    assert 0 < np.square(full - reduced).mean() < 255**2 / 10**4  # above 40 dB
    for data, size in ((large, 61), (saved(photo, "PNG"), 32), (large, 240)):
        same = ImageConfig(image_size=size), ImageConfig(image_size=size, draft=True)
        np.testing.assert_array_equal(decode(data, same[0]), decode(data, same[1]))


def test_first_images_cross_shards_in_order(tmp_path: Path) -> None:
    samples = toy_samples(10)
    write_shard(str(tmp_path / "s-0.tar"), samples[:4])
    write_shard(str(tmp_path / "s-1.tar"), samples[4:])
    images = first_images(str(tmp_path / "s-*.tar"), ImageConfig(image_size=8, channels=1), 6)
    assert [image.key for image in images] == [sample.key for sample in samples[:6]]
    assert stack(images).shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(stack(images)[5].numpy(), toy_images(6)[5].pixels)


def test_check_shards_finds_what_is_wrong_before_the_work(tmp_path: Path) -> None:
    good, empty = str(tmp_path / "good.tar"), str(tmp_path / "empty.tar")
    write_shard(good, toy_samples(2))
    write_shard(empty, [Sample("0", "txt", b"", 1)])
    Path(tmp_path, "broken.tar").write_bytes(b"\0" + Path(good).read_bytes()[1:])
    assert check_shards(ImageConfig(train=str(tmp_path / "broken.tar")), "train")  # bad data is for the account
    assert check_shards(ImageConfig(train=good), "train") == [good]
    with pytest.raises(ValueError, match=r"`validation` is empty"):
        check_shards(ImageConfig(train=good), "validation")
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        check_shards(ImageConfig(train=str(tmp_path / "none.tar")), "train")
    with pytest.raises(ValueError, match=r"empty\.tar.*found cls, txt"):
        check_shards(ImageConfig(validation=str(tmp_path / "{good,empty}.tar")), "validation")
    write_shard(str(tmp_path / "dots.tar"), [Sample(f"img.{i}", "png", b"", -1) for i in range(100)])
    with pytest.raises(ValueError, match=r"found (\d+\.png, ){8}and 92 more; set `extensions`, or rename files whose"):
        check_shards(ImageConfig(validation=str(tmp_path / "dots.tar")), "validation")


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"`image_size` is 0.*at least 1"):
        ImageConfig(image_size=0)
    with pytest.raises(ValueError, match=r"`extensions` is empty"):
        ImageConfig(extensions=[])
    with pytest.raises(ValueError, match=r"`extensions` names \['tiff'\]; images are jpg, jpeg, png, webp"):
        ImageConfig(extensions=["png", "tiff"])
    with pytest.raises(ValueError, match=r"`max_pixels` is 0; it must be 1 to 178956970"):
        ImageConfig(max_pixels=0)
    with pytest.raises(ValueError, match=r"`max_skipped` is 1\.5; it is a share"):
        ImageConfig(max_skipped=1.5)
