"""Our streamed and merged figures are torch-fidelity's own, on the same features, and the features are the same.

Inception takes 100 ms an image here, so 2,000 feature vectors are made up, and torch-fidelity's functions are called on
them; that our extractor gives the vectors of its pipeline is shown on a few images. `benchmarks/exactness.py` goes the
whole way, from 2,000 images to every figure, both ways.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

from bld_core.metrics.bootstrap import poisson_counts
from bld_core.metrics.dinov2 import DINOv2
from bld_core.metrics.frechet import FeatureMoments, frechet_distance
from cluster.config.experiment import Experiment
from cluster.evaluation.actors import Drawn
from cluster.evaluation.config import RESAMPLED, EvaluationConfig
from cluster.evaluation.extractors import DINOv2Features, Inception, VGG16Features, metric_name
from cluster.evaluation.references import Reference, Space
from cluster.evaluation.sample_metrics import SampleMetrics, Samples, kernel_distance, precision_recall

COUNT, SIZE = 2000, 96
SPACE = Space("inception", "0" * 64)


class Images(Dataset[Tensor]):
    """Images as torch-fidelity reads them: uint8 (3, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def vectors(seed: int, count: int = COUNT, size: int = SIZE) -> Tensor:
    """Feature vectors as Inception's are: correlated, not negative, not centred; float32 (count, size)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(9)) / size**0.5
    return (0.1 * seed + torch.randn(count, size, generator=generator) @ mixing).relu()


def measured(samples: Tensor, logits: Tensor, real: Tensor, batch: int, **asked: bool) -> dict[str, float]:
    """Our figures, the samples in batches, the training images in parts that merge."""
    moments = FeatureMoments()
    for part in real.split(7 * batch):
        other = FeatureMoments()
        for some in part.split(batch):
            other.update(some)
        moments.merge(other)
    config = EvaluationConfig(samples=len(samples), frechet=True, **asked)  # pyright: ignore[reportArgumentType]
    figures = SampleMetrics(config, Reference(SPACE, "", "", moments, real, {}), 0)
    for start in range(0, len(samples), batch):
        some = slice(start, start + batch)
        figures.update(samples[some], logits[some], start)
    return figures.metrics()


@pytest.mark.long
def test_figures_of_2000_samples_are_those_of_torch_fidelity() -> None:
    samples, real, logits = vectors(1), vectors(2), 3 * vectors(3)
    expected = {
        "fd": fid_statistics_to_metric(fid_features_to_statistics(samples), fid_features_to_statistics(real), False)[
            "frechet_inception_distance"
        ]
    }
    score = isc_features_to_metric(logits)
    expected |= {"is": score["inception_score_mean"], "is_std": score["inception_score_std"]}
    kernel = kid_features_to_metric(samples, real, verbose=False)
    expected |= {"kd": kernel["kernel_inception_distance_mean"], "kd_std": kernel["kernel_inception_distance_std"]}
    expected["precision"], expected["recall"] = calculate_precision_recall_full(samples, real)
    named = {
        f"{name.removesuffix('_std')}_inception_00000000{'_std' if name.endswith('_std') else ''}": value
        for name, value in expected.items()
    }
    assert 0.05 < expected["precision"] < 0.95
    assert 0.05 < expected["recall"] < 0.95
    for batch in (100, 33):
        found = measured(samples, logits, real, batch, inception_score=True, kid=True, precision_recall=True)
        assert found == pytest.approx(named, rel=1e-6)


def test_fewer_samples_than_features_give_the_distance_of_torch_fidelity() -> None:
    samples, real = vectors(1, 40), vectors(2, 60)
    statistics = [fid_features_to_statistics(x.double()) for x in (samples, real)]
    truth = fid_statistics_to_metric(statistics[0], statistics[1], False)["frechet_inception_distance"]
    [found] = measured(samples, samples, real, 16).values()
    assert found == pytest.approx(truth, rel=1e-6)


def test_fdr_is_by_as_many_held_out_images_and_1_for_the_same_images() -> None:
    train, held_out, more = vectors(1, 300, 8), vectors(1, 90, 8) + 0.1, vectors(2, 200, 8)
    of_train, of_held_out = FeatureMoments(), FeatureMoments()
    of_train.update(train)
    of_held_out.update(held_out)
    names = [space.metric_name("fd") + "_held_out" for space in (SPACE, Space("classifier"))]
    real = frechet_distance(of_train, of_held_out)
    config = EvaluationConfig(samples=290, frechet=True, classifier=True)

    def ratios(samples: Tensor, real: float, count: int) -> dict[str, float]:
        references = [
            Reference(space, "", "", of_train, torch.zeros(0), {name: real}, count)
            for space, name in zip((SPACE, Space("classifier")), names, strict=True)
        ]
        metrics = Samples(config, Experiment(), references, None)
        for start in range(0, len(samples), 70):
            some = samples[start : start + 70]
            metrics.add(Drawn(0, start, {"inception": some, "classifier": 2 * some}, None, None, 0.0))
        return {name: value for name, value in metrics.metrics().items() if name.startswith("fdr")}

    found = ratios(torch.cat([held_out, more]), real, 90)
    assert found["fdr_inception_00000000"] == pytest.approx(1, rel=1e-9)
    assert found["fdr_mean"] == pytest.approx((1 + found["fdr_classifier"]) / 2)
    assert found["fdr_classifier"] > 2
    apart = ratios(torch.cat([more, held_out]), real, 90)["fdr_inception_00000000"]
    first = FeatureMoments()
    first.update(more[:90])
    assert apart == pytest.approx(frechet_distance(of_train, first) / real)
    assert abs(apart - 1) > 0.1
    assert ratios(held_out, real, 0) == {}, "an early reference did not count the held-out images"
    assert ratios(held_out, 0.0, 90) == {}


def test_precision_is_of_samples_and_recall_of_real_images() -> None:
    line = torch.arange(20.0)[:, None]
    assert precision_recall(line[:5] + 0.25, line) == (1, pytest.approx(8 / 20))  # all are real; 0..7 are reached
    assert precision_recall(line, line[:5] + 0.25) == (pytest.approx(8 / 20), 1)
    assert precision_recall(line + 100, line) == (0, 0)


def test_constant_images_and_single_classes_have_figures_and_too_few_images_have_none() -> None:
    point = torch.full((1200, 8), 0.7)
    found = measured(point, point, point, 100, inception_score=True, kid=True, precision_recall=True)
    names = ("fd", "is", "is_std", "kd", "kd_std", "precision", "recall")
    truth = dict(zip(names, (0, 1, 0, 0, 0, 1, 1), strict=True))
    short = {name.replace("_inception_00000000", ""): value for name, value in found.items()}
    assert short == pytest.approx(truth, abs=1e-4), "torch-fidelity sums kernels in float32"
    assert precision_recall(point, point + 1) == (0, 0)
    one_class = torch.tensor([1000.0, 0.0, 0.0]).repeat(1200, 1)  # p = 0, of which torch-fidelity's log is infinite
    assert measured(point, one_class, point, 100, inception_score=True)["is_inception_00000000"] == 1
    with pytest.raises(ValueError, match=r"999 real images for a kernel distance of subsets of 1000"):
        kernel_distance(point, point[:999])
    with pytest.raises(ValueError, match=r"3 samples for precision and recall"):
        precision_recall(point[:3], point)
    few = {"kid": 1000, "bootstrap": RESAMPLED, "inception_score": 10, "precision_recall": 4, "frechet": 2}
    for asked, least in few.items():
        settings = {"frechet": True, asked: True, "samples": least - 1}
        with pytest.raises(ValueError, match=rf"evaluation.samples is {least - 1}; evaluation.{asked} needs at least"):
            EvaluationConfig(**settings)  # pyright: ignore[reportArgumentType]
    for name in ("kid", "mind", "inception_score", "precision_recall", "vgg16", "bootstrap"):
        with pytest.raises(ValueError, match=rf"evaluation.{name} is .*, which needs evaluation\.\w+"):
            EvaluationConfig(**{name: True})  # pyright: ignore[reportArgumentType]


def features_by_torch_fidelity(extractor: str, layers: list[str], weights: str, images: Tensor) -> dict[str, Tensor]:
    """What torch-fidelity itself makes of images, uint8 (B, H, W, channels), by layer."""
    theirs = create_feature_extractor(
        extractor, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
    )
    return extract_featuresdict_from_input_id(
        1, theirs, input1=Images(images), batch_size=len(images), cuda=False, verbose=False, save_cpu_ram=True
    )


def test_replicates_of_as_many_samples_as_a_bootstrap_asks_for_have_a_covariance() -> None:
    drawn = poisson_counts(0, torch.arange(RESAMPLED), 10_000)
    assert drawn.sum(0).min() >= 2
    assert drawn[:4].sum(0).min() < 2, "of 4 samples some have none"


def test_features_and_logits_are_those_of_torch_fidelitys_pipeline(inception_weights: tuple[str, str]) -> None:
    images = torch.randint(0, 256, (5, 32, 32, 1), generator=torch.Generator().manual_seed(0)).byte()
    layers = ["2048", "logits_unbiased"]
    expected = features_by_torch_fidelity("inception-v3-compat", layers, inception_weights[0], images)
    inception = Inception(*inception_weights, torch.device("cpu"))
    features = inception(images)
    assert torch.equal(features, expected["2048"])
    assert torch.equal(inception.logits(features), expected["logits_unbiased"])


def small_file(network: nn.Module, file: Path) -> tuple[str, str]:
    """Random weights of a large network, of the usual scale and of both signs, which take little room in the file.

    Each output's weights are those of the output before, moved by one: windows of one row of numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def made(shape: torch.Size) -> Tensor:
        each = shape[1:].numel()
        numbers = torch.randn(shape[0] + each, generator=generator) * (2 / each) ** 0.5
        return numbers.as_strided(shape, (1, *torch.empty(shape[1:], device="meta").stride()))

    torch.save({name: made(weights.shape) for name, weights in network.state_dict().items()}, file)
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()


def test_features_of_dinov2_are_those_of_images_that_are_resized_and_scaled_as_torch_fidelity_does(
    tmp_path: Path,
) -> None:
    with torch.device("meta"):
        network = DINOv2()
    assert sum(weights.numel() for weights in network.parameters()) == 304_368_640  # of the authors' ViT-L/14
    path, sha256 = small_file(network, tmp_path / "dinov2.pth")
    image = torch.randint(0, 256, (1, 32, 32, 1), generator=torch.Generator().manual_seed(0)).byte()
    features = DINOv2Features(path, sha256, torch.device("cpu"))(image)
    network.load_state_dict(torch.load(path, weights_only=True), assign=True)
    x = image.float().permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(224, 224), align_corners=False) / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((x - mean) / deviation)
    assert expected.shape == (1, 1024)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert metric_name("fd", "dinov2", sha256) == f"fd_dinov2_{sha256[:8]}"
    assert EvaluationConfig(samples=4, dinov2_weights=path, dinov2_sha256=sha256).samples == 4
    with pytest.raises(ValueError, match=r"`dinov2_sha256` is ''"):
        EvaluationConfig(dinov2_weights=path)


def test_features_of_vgg16_are_those_of_torch_fidelitys_pipeline_for_precision_and_recall(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    with torch.device("meta"):
        network = vgg16()
    file, sha256 = small_file(network, tmp_path / "vgg16.pth")
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    layer = FeatureExtractorVGG16.get_default_feature_layer_for_metric("prc")
    expected = features_by_torch_fidelity("vgg16", [layer], file, images)[layer]
    features = VGG16Features(file, sha256, torch.device("cpu"))(images)
    assert features.shape == (2, 4096)
    assert torch.equal(features, expected)
    assert not torch.equal(features[0], features[1])
    with pytest.raises(ValueError, match=r"sha256 .*, expected 00000000"):
        VGG16Features(file, "0" * 8, torch.device("cpu"))
