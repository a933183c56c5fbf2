"""The metrics of an evaluation: how each is called and shown, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.console import aligned
from cluster.evaluation.config import SPREADS

_IMAGES, _CODES, _SAMPLES = GROUPS = ("Reconstruction", "Health of the code", "Prior and samples")


class MetricInfo(NamedTuple):
    """How a metric is shown: where, its name, its digits and unit, and what it says."""

    group: str
    title: str
    form: str
    says: str


class ShownMetric(NamedTuple):
    """A metric as it is shown."""

    group: str
    title: str
    value: str
    spread: str
    says: str


_FIGURES = {
    "psnr": MetricInfo(_IMAGES, "PSNR", "{:.2f} dB", "held-out images and their reconstructions; higher is better"),
    "ssim": MetricInfo(_IMAGES, "SSIM", "{:.3f}", "the same by structure; 1 is equal"),
    "code_bits": MetricInfo(_IMAGES, "Bits an image", "{:,.0f}", "size of the code of an image"),
    "code_bits_entropy": MetricInfo(
        _IMAGES, "... of the encoder's draws", "{:,.1f}", "of these, what draws leave to chance: the encoder's entropy"
    ),
    "code_bits_bound": MetricInfo(
        _IMAGES, "... that the prior needs", "{:,.1f}", "the likelihood bound, over all bits of held-out codes"
    ),
    "lpips": MetricInfo(_IMAGES, "LPIPS", "{:.4f}", "the same in features of VGG16; 0 is equal"),
    "rfid": MetricInfo(
        _IMAGES, "rFID", "{:.2f}", "between held-out images and reconstructions, as sets; lower is better"
    ),
    "skipped_images": MetricInfo(_IMAGES, "Images left out", "{:.0f}", "held-out images that could not be read"),
    "dead_bits": MetricInfo(_CODES, "Dead bits", "{:.1%}", "bits with the same value in over 99 % of all positions"),
    "bit_entropy": MetricInfo(_CODES, "Entropy", "{:.3f} bits", "how unsure the encoder is of a bit; 0 is sure"),
    "bit_usage_mean": MetricInfo(_CODES, "Share of ones", "{:.3f}", "over all bits; 1/2 is balanced"),
    "bit_correlation": MetricInfo(_CODES, "Correlation", "{:.3f}", "mean |Pearson correlation| of two bits; 0 is best"),
    "bound": MetricInfo(_SAMPLES, "Likelihood bound", "{:.4f}", "bits for each bit of held-out codes; 1 knows nothing"),
    "bound_sampling": MetricInfo(
        _SAMPLES, "Likelihood bound, steps sampled", "{:.4f}", "of the steps that samples take"
    ),
    "fid": MetricInfo(_SAMPLES, "FID", "{:.2f}", "between training images and samples, as sets; lower is better"),
    "fdr": MetricInfo(
        _SAMPLES, "FDr", "{:.3f}", "FID of samples by that of as many held-out images; 1 where samples are as near"
    ),
    "fdr_mean": MetricInfo(_SAMPLES, "FDr, mean", "{:.3f}", "over the extractors"),
    "mind": MetricInfo(
        _SAMPLES, "MIND", "{:.4g}", "as FID, by sliced transport: small sets say much; compare equal numbers"
    ),
    "inception_score": MetricInfo(
        _SAMPLES, "Inception score", "{:.2f}", "sure of a class, and of all; higher is better"
    ),
    "kid": MetricInfo(_SAMPLES, "KID", "{:.4f}", "as FID, by kernels: of no bias with few samples; lower is better"),
    "precision": MetricInfo(_SAMPLES, "Precision", "{:.3f}", "share of samples among real images"),
    "recall": MetricInfo(_SAMPLES, "Recall", "{:.3f}", "share of real images among samples"),
    "cas_top1": MetricInfo(_SAMPLES, "CAS, top-1", "{:.1f} %", "a ResNet-50 trained on samples, on held-out images"),
    "cas_top5": MetricInfo(_SAMPLES, "CAS, top-5", "{:.1f} %", "the same, among its five likeliest classes"),
    "class_accuracy": MetricInfo(_SAMPLES, "Samples of their class", "{:.1%}", "by logistic regression on pixels"),
    "class_accuracy_real": MetricInfo(_SAMPLES, "... real images", "{:.1%}", "the same classifier on held-out images"),
}
# The same in other features, whose name stands behind that of the metric.
_KINDS = {
    "rfd": MetricInfo(_IMAGES, "Frechet distance", "{:.4g}", _FIGURES["rfid"].says),
    "fd": MetricInfo(_SAMPLES, "Frechet distance", "{:.4g}", _FIGURES["fid"].says),
    "fdr": MetricInfo(
        _SAMPLES, "FDr", "{:.3f}", "Frechet distance of samples by that of as many held-out images; 1 where as near"
    ),
    "mind": MetricInfo(_SAMPLES, "MIND", "{:.4g}", "as Frechet distance, by sliced transport; compare equal numbers"),
    "is": _FIGURES["inception_score"],
    "lpips": _FIGURES["lpips"],
    "kd": MetricInfo(_SAMPLES, "Kernel distance", "{:.4g}", "as Frechet distance, of no bias with few samples"),
    "precision": _FIGURES["precision"],
    "recall": _FIGURES["recall"],
    "neighbour_ratio": MetricInfo(
        _SAMPLES,
        "Nearest training image",
        "{:.3f}",
        "how far samples are from it, by how far held-out images are; near 0 where images are learnt by heart",
    ),
}
_OWN = "; not FID"
_HELD_OUT = "_held_out"


def about(name: str) -> MetricInfo:
    """How a metric is shown; one that nobody knows, by its name alone."""
    if name.endswith(_HELD_OUT):
        same = about(name.removesuffix(_HELD_OUT))
        return same._replace(title="... held-out images", says="as far as real images are from one another")
    if name in _FIGURES:
        return _FIGURES[name]
    for kind, metric in _KINDS.items():
        if name == kind or name.startswith(f"{kind}_"):
            space = name[len(kind) + 1 :].replace("_", " ") or "inception"
            own = _OWN if space == "classifier" and kind in ("fd", "rfd") else ""
            return metric._replace(title=f"{metric.title}, {space}", says=metric.says + own)
    return MetricInfo(_SAMPLES, name.replace("_", " "), "{:.4g}", "")


def rank(name: str) -> int:
    """Where a metric stands among those that are known; the others come last."""
    return list(_FIGURES).index(name) if name in _FIGURES else len(_FIGURES)


def shown_metrics(metrics: Mapping[str, float]) -> dict[str, ShownMetric]:
    """The metrics as they are shown; a deviation or an error stands behind the metric that it belongs to."""
    found: dict[str, ShownMetric] = {}
    for name, value in metrics.items():
        if any(name.endswith(end) and name.removesuffix(end) in metrics for end in SPREADS):
            continue
        shown = about(name)
        spreads = [f"{short} {metrics[name + end]:.2g}" for end, short in SPREADS.items() if name + end in metrics]
        found[name] = ShownMetric(shown.group, shown.title, shown.form.format(value), ", ".join(spreads), shown.says)
    return found


def report_table(report: Mapping[str, Any]) -> str:
    """The metrics of a report as lines of text, by the names that they have in report.json and MLflow."""
    shown = shown_metrics(report["figures"])
    text = aligned([(name, row.value, row.spread, row.says) for name, row in shown.items()])
    line_of = dict(zip(shown, text, strict=True))
    lines: list[str] = []
    for group in GROUPS:
        of_group = [name for name, row in shown.items() if row.group == group]
        if group == _SAMPLES and "samples" in report:
            lines.append(f"{group} ({report['samples']:,} of {report['sampling']['steps']} steps)")
        elif of_group:
            lines.append(group)
        lines += [f"  {line_of[name]}" for name in of_group]
    return "\n".join(lines)
