"""The loader that registered versions name: they store this module's name, so it must not move."""

from cluster.studio.pyfunc import load_served as _load_pyfunc  # MLflow looks for this name

__all__ = ["_load_pyfunc"]
