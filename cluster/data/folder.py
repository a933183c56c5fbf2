"""The images that shards are made of: a folder as people have them, or the digits that ship inside scikit-learn."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bld_core.data.images import EXTENSIONS
from bld_core.data.pictures import png
from bld_core.errors import UserError

_DIGITS_SIZE = 32
_AS_JPEG = ("jfif", "jpe")  # other names of it
_AS_PNG = ("bmp", "tif", "tiff")  # kept without loss, as files that every reader of shards knows
_OTHER_IMAGES = ("avif", "gif", "heic", "j2k", "jp2", "jxl", "pgm", "pnm", "ppm", "psd", "tga")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # folders


class SourceImage(NamedTuple):
    """An image yet to be stored.

    Attributes:
        name: of its file, within the source folder.
        size: of its file, in bytes.
        label: its class, -1 for none.
        content: the file itself, in the demo set.
    """

    name: str
    size: int
    label: int
    content: bytes | None = None


def read_image(source: str, name: str) -> bytes:
    """An image file as it is stored."""
    try:
        if _extension(name) in _AS_PNG:
            return _as_png(Path(source, name))
        return Path(source, name).read_bytes()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(source, name, error) from error


def _as_png(path: Path) -> bytes:
    """The first image of a BMP or TIFF file, upright, as PNG; 8 or 16 bits a channel stay as they are.

    Raises:
        ValueError: its pixels are of another form, of which no range is known.
    """
    # Not by its path: a TIFF that is to be turned is torn where Pillow (13.0) maps the file, or turns it unloaded.
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        if image.mode in ("F", "I"):
            raise ValueError(f"its pixels are of mode {image.mode}, neither 8 nor 16 bits")
        return png(image if image.mode in _PNG_MODES else image.convert("RGB"))


def _size(source: str, name: str) -> int:
    try:
        return os.path.getsize(os.path.join(source, name))
    except OSError as error:  # a link that leads nowhere, for one
        raise _unreadable(source, name, error) from error


def _unreadable(source: str, name: str, error: Exception) -> UserError:
    return UserError(f"{name!r} in {source!r} cannot be read ({error}): mend it, or move it away")


def read_folder(source: str) -> tuple[list[SourceImage], list[str]]:
    """The images of a folder, and the names of its classes in their order; what is left out is printed.

    Raises:
        UserError: no images, some that cannot be read, some beside the folders of classes, or a link in a circle.
    """
    paths, convertible, others = list[str](), Counter[str](), Counter[str]()
    for path in _walk(source, ()):
        extension = _extension(path)
        if extension in (*EXTENSIONS, *_AS_JPEG, *_AS_PNG):
            paths.append(os.path.relpath(path, source))
        else:
            counts = convertible if extension in _OTHER_IMAGES else others
            counts[f".{extension}" if extension else "without ending"] += 1
    left, rest = (", ".join(f"{n} {kind}" for kind, n in sorted(found.items())) for found in (convertible, others))
    if not paths:
        found = f", found {left}: convert them" if left else f", found {rest}" if rest else ""
        taken = ", ".join((*EXTENSIONS, *_AS_JPEG, *_AS_PNG))
        raise UserError(f"{source!r} holds no images: looked for {taken} there and below{found}")
    if left:
        print(f"left out: {left}, which shards do not hold: convert them to PNG, to have them too")
    if rest:
        print(f"left out: {rest}, which are no images by their names")
    paths.sort(key=lambda path: path.split(os.sep))
    classes = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    if classes and all(re.fullmatch("[0-9]+", name) for name in classes):
        classes.sort(key=lambda name: (int(name), name))
    number = {name: i for i, name in enumerate(classes)}
    sizes = _sizes(source, paths)
    images = [SourceImage(path, size, number.get(path.split(os.sep)[0], -1)) for path, size in sizes.items()]
    loose = [image.name for image in images if image.label < 0]
    if classes and loose:
        raise UserError(
            f"{len(loose)} images such as {loose[0]!r} lie in {source!r} beside the folders of {len(classes)} classes "
            "and have no class: move them into one of those, or elsewhere"
        )
    return images, classes


def _sizes(source: str, paths: list[str]) -> dict[str, int]:
    """The sizes of image files as they are stored; those that are to become PNG and cannot are left out."""
    sizes: dict[str, int] = {}
    damaged: list[str] = []
    for path in paths:
        if _extension(path) not in _AS_PNG:
            sizes[path] = _size(source, path)
            continue
        try:
            sizes[path] = len(read_image(source, path))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        print(f"left out: {len(damaged)} images that cannot be made PNG, such as: {damaged[0]}")
    if not sizes:
        raise UserError(f"{source!r} holds no image that can be read: {damaged[0]}")
    return sizes


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The files in a folder and below, also behind links; but not what systems and editors put beside images.

    Raises:
        UserError: a link to a folder above it.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder!r} is a link to a folder that it lies in: remove it")
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder!r} cannot be read ({error}): give a folder of images, or the right to read it"
        ) from error
    for name in entries:
        path = os.path.join(folder, name)
        if name.startswith(".") or name in _OF_SYSTEMS:
            continue
        if os.path.isdir(path):
            yield from _walk(path, (*above, real))
        else:
            yield path


def stored_as(name: str) -> str:
    """The extension of an image in its shard."""
    extension = _extension(name)
    return "jpg" if extension in _AS_JPEG else "png" if extension in _AS_PNG else extension


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def read_digits() -> tuple[list[SourceImage], list[str]]:
    """The demo set, and the names of its classes."""
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = load_digits()
    assert isinstance(digits, Bunch), "a tuple comes only with return_X_y"
    scans = [_digit_png(pixels) for pixels in digits.images]
    images = [
        SourceImage(f"{i}.png", len(scan), int(label), scan)
        for i, (scan, label) in enumerate(zip(scans, digits.target, strict=True))
    ]
    return images, [str(digit) for digit in range(10)]


def _digit_png(digit: NDArray[np.float64]) -> bytes:
    """An 8 x 8 scan with values 0..16, enlarged, as a PNG file."""
    scan = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return png(scan.resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC))
