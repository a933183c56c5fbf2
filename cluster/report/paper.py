"""What the paper reports, to stand beside our own metrics (Wang et al., CVPR 2023, Tables 1 to 5)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """A row of a table: what was measured, a number for each column, and the experiments here that it is about."""

    name: str
    values: tuple[float, ...]
    experiments: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
        title: what it shows.
        columns: heading of each column -> the metric of evaluation/report.json that it is.
        rows: the paper's.
    """

    title: str
    columns: dict[str, str]
    rows: tuple[PaperRow, ...]


_FID, _PRECISION, _RECALL = {"FID": "fid"}, {"precision": "precision"}, {"recall": "recall"}

RECONSTRUCTION = PaperTable(
    "Reconstruction: Table 4, LSUN Bedrooms, 256 x 256",
    {"PSNR, dB": "psnr", "SSIM": "ssim"},
    (
        PaperRow("vector quantizer, 16 x 16, 1,024 entries", (20.08, 0.62)),
        PaperRow("real-valued, 16 x 16 x 16", (24.08, 0.70)),
        PaperRow("binary, 16 x 16 x 32", (24.02, 0.75), ("lsun_bedrooms256",)),
        PaperRow("vector quantizer, 8 x 8, 2,048 entries", (17.20, 0.53)),
        PaperRow("real-valued, 8 x 8 x 64", (22.74, 0.62)),
        PaperRow("binary, 8 x 8 x 128", (22.82, 0.64)),
    ),
)

UNCONDITIONAL = PaperTable(
    "Samples: Table 1, 256 x 256, 50,000 samples",
    {**_FID, **_PRECISION, **_RECALL},
    (
        PaperRow("LSUN Bedrooms, 16 steps", (4.32, 0.62, 0.44), ("lsun_bedrooms256",)),
        PaperRow("LSUN Bedrooms, 64 steps", (3.85, 0.65, 0.44), ("lsun_bedrooms256",)),
        PaperRow("LSUN Churches, 16 steps", (4.96, 0.66, 0.48), ("lsun_churches256",)),
        PaperRow("LSUN Churches, 64 steps", (4.36, 0.68, 0.50), ("lsun_churches256",)),
        PaperRow("FFHQ, 16 steps", (6.48, 0.71, 0.45), ("ffhq256",)),
        PaperRow("FFHQ, 64 steps", (5.85, 0.73, 0.50), ("ffhq256",)),
        PaperRow("CelebA-HQ, 16 steps", (7.80, 0.67, 0.44), ("celebahq256",)),
        PaperRow("CelebA-HQ, 64 steps", (6.24, 0.71, 0.48), ("celebahq256",)),
    ),
)

CONDITIONAL = PaperTable(
    "Samples: Table 2, ImageNet, 256 x 256, 64 steps",
    {
        **_FID,
        "IS": "inception_score",
        **_PRECISION,
        **_RECALL,
        "CAS top-1, %": "cas_top1",
        "CAS top-5, %": "cas_top5",
    },
    (PaperRow("172M parameters", (8.21, 162.32, 0.72, 0.64, 65.07, 85.60), ("imagenet256",)),),
)

LARGE = PaperTable(
    "Samples: Table 3, 1024 x 1024, one shot",
    _FID,
    (
        PaperRow("FFHQ, 64 steps", (6.75,), ("ffhq1024",)),
        PaperRow("FFHQ, 256 steps", (6.35,), ("ffhq1024",)),
        PaperRow("CelebA-HQ, 64 steps", (6.12,), ("celebahq1024",)),
        PaperRow("CelebA-HQ, 256 steps", (6.03,), ("celebahq1024",)),
    ),
)

PRIORS = PaperTable(
    "Priors on the same binary codes: Table 5",
    _FID,
    (
        PaperRow("LSUN Churches, autoregressive, 256 steps", (7.25,), ("lsun_churches256",)),
        PaperRow("LSUN Churches, absorbing diffusion, 256 steps", (5.44,), ("lsun_churches256",)),
        PaperRow("LSUN Churches, binary diffusion, 64 steps", (4.36,), ("lsun_churches256",)),
        PaperRow("FFHQ, autoregressive, 256 steps", (8.23,), ("ffhq256",)),
        PaperRow("FFHQ, absorbing diffusion, 256 steps", (7.64,), ("ffhq256",)),
        PaperRow("FFHQ, binary diffusion, 64 steps", (5.85,), ("ffhq256",)),
    ),
)


def tables_for(image_size: int, classes: int) -> tuple[PaperTable, ...]:
    """The tables that an experiment is to be read beside."""
    if classes:
        return RECONSTRUCTION, CONDITIONAL
    return (RECONSTRUCTION, LARGE) if image_size >= 1024 else (RECONSTRUCTION, UNCONDITIONAL, PRIORS)
