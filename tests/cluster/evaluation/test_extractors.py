"""Inception features by torch-fidelity, on weights that the test makes; the loading code is the real one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bld_core.autoencoder.perceptual import lpips_name
from bld_core.metrics.frechet import FeatureMoments
from bld_core.storage.weights import INCEPTION, VGG16
from cluster.evaluation.config import EvaluationConfig
from cluster.evaluation.extractors import EfficientNetLite0Features, Inception, metric_name
from tests.bld_core.toys import Arithmetic


def test_features_have_the_same_moments_however_they_are_batched(inception_weights: tuple[str, str]) -> None:
    inception = Inception(*inception_weights, torch.device("cpu"))
    real = torch.randint(0, 256, (6, 32, 32, 1), generator=torch.Generator().manual_seed(0)).byte()
    moments: list[FeatureMoments] = []
    for size in (6, 4):
        moments.append(FeatureMoments())
        for batch in real.split(size):
            moments[-1].update(inception(batch))
    whole, parts = moments
    assert whole.mean.shape == (2048,)
    assert whole.scatter.trace() > 0
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-4, atol=1e-7)
    assert (parts.scatter - whole.scatter).norm() < 1e-3 * whole.scatter.norm()


@pytest.mark.parametrize("side", [32, 224, 256])
def test_features_of_efficientnet_lite0_are_those_of_images_that_pillow_has_resized(side: int) -> None:
    images = torch.randint(0, 256, (5, side, side, 3), generator=torch.Generator().manual_seed(side)).byte()
    images = torch.cat([images, images[:1, :, :, :1].expand(-1, -1, -1, 3)])
    planes = [Image.fromarray(plane.numpy()) for plane in images.permute(0, 3, 1, 2).float().flatten(0, 1)]
    resized = np.stack([np.asarray(plane.resize((224, 224), Image.Resampling.BICUBIC)) for plane in planes])
    extractor = EfficientNetLite0Features(torch.device("cpu"))
    features = extractor(images)
    expected = extractor.network((torch.from_numpy(resized).view(6, 3, 224, 224).clamp(0, 255) - 127) / 128)
    assert features.shape == (6, 1280)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-3 * float(expected.std()))
    torch.testing.assert_close(extractor(images[-1:, :, :, :1]), features[-1:])


def test_features_and_logits_are_in_ieee_float32(inception_weights: tuple[str, str]) -> None:
    inception = Inception(*inception_weights, torch.device("cpu"))
    with Arithmetic() as seen:
        images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        inception.logits(inception(images))
        EfficientNetLite0Features(torch.device("cpu"))(images)
    assert seen.tf32 == {(False, False)}
    assert seen.dtypes == {torch.float32}


def test_other_weights_are_refused_and_never_called_fid(inception_weights: tuple[str, str], tmp_path: Path) -> None:
    path, sha256 = inception_weights
    with pytest.raises(ValueError, match=rf"sha256 {sha256}, expected 6726825d.*`inception_sha256`"):
        Inception(path, INCEPTION.sha256, torch.device("cpu"))
    with pytest.raises(ValueError, match="`inception_sha256` is 'abcdef00', but the file that is downloaded"):
        EvaluationConfig(inception_sha256="abcdef00")
    assert metric_name("rfd", "inception", sha256) == f"rfd_inception_{sha256[:8]}"
    assert metric_name("precision", "vgg16", sha256) == f"precision_vgg16_{sha256[:8]}"
    true = {
        metric_name(name, "inception", INCEPTION.sha256 + "0" * 8): name for name in ("fd", "rfd", "kd", "is", "recall")
    }
    assert list(true) == ["fid", "rfid", "kid", "inception_score", "recall"]
    assert metric_name("recall", "vgg16", VGG16.sha256) == "recall_vgg16"
    assert metric_name("fd", "classifier") == "fd_classifier"
    assert metric_name("kd", "efficientnet_lite0", "5" * 64) == "kd_efficientnet_lite0"
    assert (lpips_name(VGG16.sha256 + "0" * 56), lpips_name(sha256)) == ("lpips", f"lpips_{sha256[:8]}")
    names = {
        metric_name(figure, "inception", digits)
        for figure, digits in itertools.product(("fd", "rfd"), ("6" * 64, sha256, INCEPTION.sha256))
    }
    assert len(names) == 6
