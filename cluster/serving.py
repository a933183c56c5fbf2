"""What registered versions name as their loader: the name is stored, and stays wherever the code behind it lives."""

from cluster.registry.serving import load_served as _load_pyfunc  # MLflow looks for this name

__all__ = ["_load_pyfunc"]
