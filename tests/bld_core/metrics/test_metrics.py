from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bld_core.metrics.bootstrap import FrechetBootstrap, poisson_counts
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from bld_core.metrics.inception_score import InceptionScore, split_of_samples
from bld_core.metrics.reconstruction import Moments, ReconstructionQuality, psnr, ssim
from bld_core.metrics.selection import Selection
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


def test_moments_of_one_image_have_no_spread_and_those_of_none_are_nan() -> None:
    one = Moments()
    assert math.isnan(one.mean)
    assert math.isnan(one.deviation)
    one.update(torch.tensor([0.1]))
    assert one.mean == pytest.approx(0.1)
    assert one.deviation == 0


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


def features(count: int, size: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated feature vectors, float64 (count, size)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return shift + scale * torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing


def moments_of(*parts: Tensor) -> FeatureMoments:
    moments = FeatureMoments()
    for part in parts:
        moments.update(part)
    return moments


def test_feature_moments_are_mean_and_covariance() -> None:
    x = features(50, 6, shift=3)
    moments = moments_of(x)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    assert moments_of(x.float()).covariance.dtype == torch.float64


@pytest.mark.parametrize("cuts", [[50], [1, 99], [0, 30, 30, 70], list(range(100))])
def test_feature_moments_do_not_depend_on_batches_or_workers(cuts: list[int]) -> None:
    x = features(100, 5, shift=1e6)  # sums of squares would lose 12 of 16 digits here
    whole = moments_of(x)
    batches = moments_of(*torch.tensor_split(x, cuts))
    workers = FeatureMoments()
    for part in torch.tensor_split(x, cuts):
        workers.merge(moments_of(part))
    for moments in (batches, workers):
        assert moments.count == 100
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.covariance, whole.covariance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)


def test_merging_leaves_the_other_part_alone() -> None:
    part, more = moments_of(features(5, 3)), moments_of(features(5, 3, seed=1))
    mean, scatter = part.mean.clone(), part.scatter.clone()
    total = FeatureMoments()
    for other in (part, FeatureMoments(), more):
        total.merge(other)
    assert (part.count, total.count) == (5, 10)
    assert torch.equal(part.mean, mean)
    assert torch.equal(part.scatter, scatter)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_frechet_distance_is_the_usual_formula_with_sqrtm(size: int) -> None:
    a, b = moments_of(features(200, size)), moments_of(features(150, size, seed=1, scale=1.5, shift=0.3))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    spread = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    truth = float((a.mean - b.mean).square().sum() + spread)
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(truth, rel=1e-8)


def test_frechet_distance_of_gaussians_in_one_dimension_is_its_closed_form() -> None:
    line = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    a, b = moments_of(2 + 3 * line), moments_of(-1 + 0.5 * line)
    truth = 3.0**2 + (2.5 * float(line.std())) ** 2
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("count", [2, 10, 300])
def test_a_set_is_at_distance_0_from_itself_and_shifted_at_the_shift(count: int) -> None:
    x = features(count, 30)
    a, shifted = moments_of(x), moments_of(x + 0.5)
    scale = float(a.covariance.trace())
    assert 0 <= frechet_distance(a, a) < 1e-12 * scale
    assert frechet_distance(a, moments_of(x.flip(0))) < 1e-8 * scale
    assert frechet_distance(a, shifted) == pytest.approx(30 * 0.25, abs=1e-10 * scale)


def test_singular_covariances_keep_all_their_digits() -> None:
    # Fewer vectors than features: both live in a plane, where the answer is the one of the plane's coordinates.
    x, y = features(40, 2), features(30, 2, seed=1, shift=1)
    basis = torch.linalg.qr(features(50, 50, seed=2)).Q[:, :2]
    truth = frechet_distance(moments_of(x), moments_of(y))
    assert frechet_distance(moments_of(x @ basis.T), moments_of(y @ basis.T)) == pytest.approx(truth, rel=1e-10)
    # Planes at right angles have nothing in common.
    a, b = moments_of(x @ basis.T), moments_of(x @ torch.linalg.qr(features(50, 50, seed=2)).Q[:, 2:4].T)
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(float(apart), rel=1e-10)


def test_constant_features_are_points() -> None:
    a, b = (moments_of(torch.full((5, 4), value)) for value in (0.1, 1.1))
    assert frechet_distance(a, a) == 0
    assert frechet_distance(a, b) == pytest.approx(4, rel=1e-6)  # 0.1 is a float32
    x = features(20, 4)
    truth = (x.mean(0) - b.mean).square().sum() + torch.cov(x.T).trace()
    assert frechet_distance(moments_of(x), b) == pytest.approx(float(truth), rel=1e-12)


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 feature vectors.*at least 2: add images"):
        FeatureMoments().covariance  # noqa: B018
    with pytest.raises(ValueError, match=r"^1 feature vectors"):
        frechet_distance(moments_of(features(1, 3)), moments_of(features(9, 3)))
    with pytest.raises(ValueError, match=r"lengths 3 and 4.*same extractor"):
        frechet_distance(moments_of(features(9, 3)), moments_of(features(9, 4)))
    with pytest.raises(ValueError, match=r"lengths 3 and 4"):
        moments_of(features(9, 3), features(9, 4))
    with pytest.raises(ValueError, match=r"\(9, 3, 1\); it must be \(B, F\)"):
        moments_of(features(9, 3)[:, :, None])
    bad = features(9, 3)
    bad[[2, 5], 1] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    with pytest.raises(ValueError, match="2 of 9 feature vectors hold NaN"):
        moments_of(bad)


def test_selections_keep_the_same_images_however_they_are_split() -> None:
    x, keys = features(40, 3).float(), [f"image-{i}" for i in range(40)]
    whole = Selection(7)
    whole.update(keys, x)
    parts = [Selection(7) for _ in range(3)]
    for start in (0, 30, 10, 20):
        parts[start % 3].update(keys[start : start + 10], x[start : start + 10])
    merged = Selection(7)
    for part in parts:
        merged.merge(part)
    assert torch.equal(merged.features, whole.features)
    assert torch.equal(merged.ranks, whole.ranks)
    assert whole.features.shape == (7, 3)
    assert {tuple(row) for row in whole.features.tolist()} < {tuple(row) for row in x.tolist()}
    few = Selection(100)
    few.update(keys, x)
    assert len(few.features) == 40
    nothing = Selection(0)
    nothing.update(keys, x)
    assert not len(nothing.features)


def test_inception_scores_of_samples_that_are_sure_and_balanced_are_the_number_of_classes() -> None:
    logits = 100.0 * torch.eye(5).repeat(40, 1)
    split = split_of_samples(200, 4)
    assert torch.bincount(split).tolist() == [50] * 4
    score = InceptionScore(200, 1)
    score.update(logits, 0)
    assert float(score.scores()) == pytest.approx(5, rel=1e-12)
    sure = InceptionScore(200, 4)  # of one class: no information
    sure.update(logits[:1].repeat(200, 1), 0)
    torch.testing.assert_close(sure.scores(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("cuts", [[50], [1, 99], list(range(1, 100))])
def test_inception_scores_do_not_depend_on_batches(cuts: list[int]) -> None:
    logits = features(100, 6).float()
    whole, parts = InceptionScore(100), InceptionScore(100)
    whole.update(logits, 0)
    for start, end in zip([0, *cuts], [*cuts, 100], strict=True):
        parts.update(logits[start:end], start)
    torch.testing.assert_close(parts.scores(), whole.scores(), rtol=1e-12, atol=0)


def test_inception_scores_that_would_be_of_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 samples.*10 splits"):
        InceptionScore(9)
    score = InceptionScore(20)
    score.update(features(10, 3), 0)
    with pytest.raises(ValueError, match=r"10 of 20 samples were seen"):
        score.scores()


def test_a_bootstrap_draws_each_sample_once_on_average_and_the_same_way_in_any_batch() -> None:
    counts = poisson_counts(1, torch.arange(20_000), 5)
    shares = torch.bincount(counts.flatten(), minlength=4)[:4] / counts.numel()
    truth = torch.tensor([1, 1, 1 / 2, 1 / 6]) * math.exp(-1)
    torch.testing.assert_close(shares, truth, rtol=0, atol=0.005)
    assert torch.equal(poisson_counts(1, torch.arange(50, 60), 3), counts[50:60, :3])
    assert not torch.equal(poisson_counts(2, torch.arange(100), 5), counts[:100])


def test_the_bootstrap_error_is_that_of_distances_of_other_samples() -> None:
    reference = moments_of(features(4000, 3))
    drawn = features(40_400, 3)[4000:] + 0.5
    distances = [frechet_distance(reference, moments_of(part)) for part in drawn.split(400)[:60]]
    bootstrap = FrechetBootstrap(60, 0)
    for start in range(0, 400, 100):
        bootstrap.update(drawn[start : start + 100], start)
    truth = float(torch.tensor(distances, dtype=torch.float64).std())
    assert bootstrap.standard_error(reference) == pytest.approx(truth, rel=0.35)  # 60 replicates: 9 % each
