"""Samples as one file for other people's evaluators, written a batch at a time."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Generator, Sequence

import numpy as np
from torch import Tensor

from bld_core.storage import files


@contextlib.contextmanager
def samples_npz(
    url: str, shape: tuple[int, int, int, int], labels: Sequence[int] | None
) -> Generator[Callable[[Tensor], None]]:
    """Open an npz in ADM's layout: arr_0, uint8 (N, H, W, channels), and arr_1, int64 (N,), where there are classes.

    What the block is given writes the next images, uint8 (B, H, W, channels); they go straight to the file, which takes
    its name only if the block ends without an error. Nothing is compressed, and
    no time is written: the same images are the same bytes.

    Args:
        url: the file.
        shape: of arr_0.
        labels: the class of each sample.
    """
    with files.commit(url) as file, zipfile.ZipFile(file, "w") as archive:
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels))
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)

            def write(images: Tensor) -> None:
                entry.write(images.numpy().tobytes())

            yield write
