"""The Frechet distance between two sets of feature vectors, from moments that merge (FID: Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bld_core.errors import UserError


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class FeatureMoments:
    """Mean and covariance of feature vectors, from parts that merge: add the parts of all workers.

    Kept as count, mean and scatter, the sum of (x - mean)(x - mean)^T, and merged by Chan, Golub and LeVeque (1983).
    No difference of large sums is ever taken, so features far from zero lose no digits, and every way to split the
    same vectors into batches and workers gives the same moments up to float64 rounding.

    Attributes:
        count: vectors seen.
        mean: float64 (F,), on the CPU; (0,) before the first vector.
        scatter: float64 (F, F), on the CPU; (0,) before the first vector.
    """

    count: int = 0
    mean: Tensor = field(default_factory=_nothing)
    scatter: Tensor = field(default_factory=_nothing)

    def update(self, features: Tensor) -> None:
        """Add the feature vectors of some images.

        Args:
            features: (B, F), any device and any real type; B may be 0.

        Raises:
            ValueError: not (B, F), or a number of features other than before.
            UserError: a value that is not finite.
        """
        if features.ndim != 2:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; it must be (B, F), a row for each image: flatten each "
                "image's features, or average them over positions"
            )
        if not len(features):
            return
        x_BF = features.detach().cpu().double()
        if not x_BF.isfinite().all():
            wrong = int((~x_BF.isfinite()).any(1).sum())
            raise UserError(
                f"{wrong} of {len(x_BF)} feature vectors hold NaN or infinity, and a moment would too: look for the "
                "images or the precision that the extractor cannot take"
            )
        mean = x_BF.mean(0)
        x_BF = x_BF - mean
        self.merge(FeatureMoments(len(x_BF), mean, x_BF.T @ x_BF))

    def merge(self, other: FeatureMoments) -> None:
        """Add another worker's part.

        Raises:
            ValueError: another number of features.
        """
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return
        _check_sizes(self, other)
        count = self.count + other.count
        delta = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / count)
        self.mean = self.mean + delta * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Tensor:
        """The covariance (n - 1), float64 (F, F).

        Raises:
            UserError: fewer than 2 vectors.
        """
        if self.count < 2:
            raise UserError(f"{self.count} feature vectors; a covariance needs at least 2: add images")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Frechet (2-Wasserstein) distance, squared, of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The usual code takes sqrtm of A B, which is not symmetric: for singular covariances, such as those of fewer images
    than features, that iteration is unstable, and its answer complex or NaN until something is added to the diagonal.
    Here A = R_a R_a^T and B = R_b R_b^T come from symmetric eigendecompositions, and tr (A B)^(1/2), the sum of the
    square roots of the eigenvalues of A^(1/2) B A^(1/2), is the sum of the singular values of R_a^T R_b: no root is
    taken of rounding errors, and nothing is added.

    Args:
        a: moments of at least 2 vectors.
        b: the same of the other set; the distance is symmetric.

    Returns:
        The distance, finite and at least 0, in squared units of the features.

    Raises:
        UserError: fewer than 2 vectors.
        ValueError: feature vectors of different lengths.
    """
    covariances = a.covariance, b.covariance
    _check_sizes(a, b)
    spread = sum(float(covariance.trace()) for covariance in covariances)
    root_a, root_b = (_factor(covariance) for covariance in covariances)
    overlap = float(torch.linalg.svdvals(root_a.T @ root_b).sum())
    return max(0.0, float((a.mean - b.mean).square().sum()) + spread - 2 * overlap)


def _factor(covariance: Tensor) -> Tensor:
    """R, (F, rank), with covariance = R R^T; eigenvalues within rounding of zero, of either sign, are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _check_sizes(a: FeatureMoments, b: FeatureMoments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"feature vectors of lengths {len(a.mean)} and {len(b.mean)}; they must be equal: take both sets from the "
            "same layer of the same extractor"
        )
