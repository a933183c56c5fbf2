from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bld_core.data.pictures import grid, png, read_picture, reconstruction_grid
from bld_core.data.tensors import stack
from bld_core.diffusion.process import DiffusionConfig
from bld_core.diffusion.sampling import SamplingConfig
from bld_core.errors import UserError
from bld_core.prior.transformer import PriorConfig
from bld_core.trained import PriorRecord
from tests.bld_core.toys import toy_images


def test_a_grid_holds_every_image_in_reading_order_and_survives_as_png() -> None:
    for channels in (1, 3):
        images = stack(toy_images(5, size=64, channels=channels))
        picture = grid(images, columns=3)
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
        back = np.asarray(Image.open(io.BytesIO(png(picture)))).reshape(134, 200, channels)
        for i in range(5):
            top, left = 2 + i // 3 * 66, 2 + i % 3 * 66
            np.testing.assert_array_equal(back[top : top + 64, left : left + 64], images[i].numpy())
        assert (back[:2] == 255).all()
        assert (back[68:, 134:] == 255).all()  # the empty place


@pytest.mark.parametrize("channels", [1, 3])
def test_columns_may_have_headings_above_the_same_grid(channels: int) -> None:
    images = stack(toy_images(3, size=64, channels=channels))
    plain, headed = (
        np.asarray(grid(images, 3, names)) for names in ([], ["cat", "", "Füchse und mehr als hier Platz hat"])
    )
    above = headed.shape[0] - plain.shape[0]
    assert above > 0
    np.testing.assert_array_equal(headed[above:], plain)
    written = [(headed[:above, left : left + 64] < 255).any() for left in (2, 68, 134)]
    assert written == [True, False, True]
    assert (headed[:above, 64:68] == 255).all()
    assert (headed[:above, 198:] == 255).all(), "it is cut to its column"


def test_names_that_are_the_numbers_of_their_classes_are_no_headings() -> None:
    record = PriorRecord(hash="", prior=PriorConfig(), diffusion=DiffusionConfig(), sampling=SamplingConfig())
    assert record.headings([0, 1]) == []
    assert replace(record, class_names=["0", "1"]).headings([0, 1]) == []
    assert replace(record, class_names=["cat", "dog"]).headings([1, -1, 0, 5]) == ["dog", "", "cat", ""]


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    images = stack(toy_images(1, size=8))
    back = torch.from_numpy(np.asarray(grid(images, 1)).copy())[2:-2, 2:-2]
    assert torch.equal(back[::8, ::8], images[0, :, :, 0])
    assert torch.equal(back[7::8, 7::8], images[0, :, :, 0])


def test_reconstructions_stand_below_their_images_and_above_the_differences() -> None:
    images = stack(toy_images(5, size=64))
    others = 255 - images
    differences = (128 + ((others.double() - images.double()) / 2).floor()).byte()
    back = np.asarray(reconstruction_grid(images, others, columns=2))
    assert back.shape == (6 * 66 + 2, 2 * 66 + 2)  # the fifth image has no row
    rows = [part[i : i + 2] for i in (0, 2) for part in (images, others, differences)]
    for row, source in enumerate(rows):
        for column in range(2):
            top, left = 2 + row * 66, 2 + column * 66
            np.testing.assert_array_equal(back[top : top + 64, left : left + 64], source[column, :, :, 0].numpy())


def test_differences_are_flat_grey_where_nothing_differs_and_never_wrap() -> None:
    black, white = torch.zeros(1, 64, 64, 3).byte(), torch.full((1, 64, 64, 3), 255).byte()
    for image, reconstruction, grey in ((white, white, 128), (black, white, 255), (white, black, 0)):
        back = np.asarray(reconstruction_grid(image, reconstruction))
        assert (back[2 + 2 * 66 : -2, 2:-2] == grey).all()


def test_whatever_pillow_raises_of_a_picture_is_one_message() -> None:
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, "DDS")
    odd = bytearray(out.getvalue())
    odd[80:84] = bytes(4)  # the flags of its pixels' format, of which its decoder raises NotImplementedError
    with pytest.raises(UserError, match=r"the mask cannot be read as an image: Unknown pixel format flags 0"):
        read_picture(bytes(odd), 16, 1, "the mask")
