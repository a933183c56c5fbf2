"""Figures of merit: mergeable sums in float64, so that a result never depends on how the work was split."""
