from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bld_core.metrics.reconstruction import Moments, ReconstructionQuality, psnr, ssim
from bld_core.noise import uniform


def random_images(count: int, size: int = 16, channels: int = 3, purpose: str = "images") -> Tensor:
    u = uniform(0, purpose, torch.arange(count), size * size * channels)
    return (u * 256).to(torch.uint8).view(count, size, size, channels)


def test_psnr_is_its_closed_form() -> None:
    grey = torch.full((3, 4, 4, 1), 100, dtype=torch.uint8)
    for error in (1, 5, 155):
        truth = 20 * math.log10(255 / error)
        torch.testing.assert_close(psnr(grey, grey + error), torch.full((3,), truth, dtype=torch.float64))
    black, white = torch.zeros(1, 4, 4, 3).byte(), torch.full((1, 4, 4, 3), 255).byte()
    assert float(psnr(black, white)) == pytest.approx(0)


def test_psnr_of_an_exact_copy_is_finite_and_above_any_error() -> None:
    images = random_images(2)
    worst = images.clone()
    worst[:, 0, 0, 0] ^= 1  # one pixel value, one grey level
    copy, near = psnr(images, images), psnr(images, worst)
    assert copy.isfinite().all()
    torch.testing.assert_close(copy - near, torch.full((2,), 20 * math.log10(2), dtype=torch.float64))


def test_ssim_of_equal_images_is_1_and_below_it_otherwise() -> None:
    for size in (2, 8, 11, 16):
        images = random_images(3, size)
        torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (ssim(images, random_images(3, size, purpose="others")) < 0.9).all()


def test_ssim_is_symmetric_and_has_a_closed_form_on_constant_images() -> None:
    x, y = random_images(4), random_images(4, purpose="others")
    torch.testing.assert_close(ssim(x, y), ssim(y, x), rtol=0, atol=1e-12)
    a, b, c1 = 40, 200, (0.01 * 255) ** 2
    constant = [torch.full((1, 16, 16, 1), value, dtype=torch.uint8) for value in (a, b)]
    assert float(ssim(*constant)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_ssim_is_the_definition_summed_by_hand() -> None:
    # An image as large as the window has one position: the definition, with weighted sums.
    x, y = random_images(1, 11, 1), random_images(1, 11, 1, purpose="others")
    offset = torch.arange(-5, 6, dtype=torch.float64)
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    p, q = x[0, :, :, 0].double(), y[0, :, :, 0].double()
    mean_p, mean_q = (weight * p).sum(), (weight * q).sum()
    var_p, var_q = (weight * (p - mean_p) ** 2).sum(), (weight * (q - mean_q) ** 2).sum()
    covariance = (weight * (p - mean_p) * (q - mean_q)).sum()
    c1, c2 = 2.55**2, 7.65**2
    truth = (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
    truth /= (mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)
    assert float(ssim(x, y)) == pytest.approx(float(truth), abs=1e-12)


@pytest.mark.parametrize("cuts", [[50], [1, 99], [0, 30, 30, 70], list(range(100))])
def test_moments_merged_from_any_split_are_those_of_the_whole(cuts: list[int]) -> None:
    values = 30 + 5 * torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Moments()
    whole.update(values)
    merged = Moments()
    for part in torch.tensor_split(values, cuts):
        moments = Moments()
        moments.update(part)
        merged.merge(moments)
    assert merged.count == 100
    assert merged.mean == pytest.approx(whole.mean, rel=1e-12)
    assert merged.deviation == pytest.approx(whole.deviation, rel=1e-12)
    assert whole.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert whole.deviation == pytest.approx(float(values.std()), rel=1e-12)


def test_moments_of_too_little_are_nan() -> None:
    one = Moments()
    assert math.isnan(one.mean)
    one.update(torch.tensor([3.0]))
    assert one.mean == 3
    assert math.isnan(one.deviation)


def test_quality_is_the_same_however_the_images_are_split() -> None:
    x, y = random_images(12), random_images(12, purpose="others")
    whole, merged = ReconstructionQuality(), ReconstructionQuality()
    whole.update(x, y)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        quality = ReconstructionQuality()
        quality.update(x[part], y[part])
        merged.merge(quality)
    assert merged.psnr.mean == pytest.approx(float(psnr(x, y).mean()), rel=1e-12)
    assert merged.ssim.mean == pytest.approx(float(ssim(x, y).mean()), rel=1e-12)
    assert merged.psnr.deviation == pytest.approx(whole.psnr.deviation, rel=1e-12)
    assert merged.ssim.deviation == pytest.approx(whole.ssim.deviation, rel=1e-12)
