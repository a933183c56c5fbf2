"""Ray Tune: what it would hand to its trials."""

from __future__ import annotations

import os

from ray.tune.execution import class_cache


def keep_keys_from_tune() -> None:
    """Ray Tune hands AWS_* of a command to its trials in a runtime environment, which Ray writes into its logs.

    Without it trials have the keys of their node, as all other work has.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update({name for name in os.environ if name.startswith("AWS_")})
