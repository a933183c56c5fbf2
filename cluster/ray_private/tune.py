"""Ray Tune: what it would hand to its trials, and how another process tells it of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ray.train._internal.session import get_session
from ray.tune.execution import class_cache


def keep_keys_from_tune() -> None:
    """Ray Tune hands AWS_* of a command to its trials in a runtime environment, which Ray writes into its logs.

    Without it trials have the keys of their node, as all other work has.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update({name for name in os.environ if name.startswith("AWS_")})


def reporter_for_others() -> Callable[[dict[str, Any]], None]:
    """`ray.tune.report` of this trial, for another process: Ray Train's controller. It takes one more, which queues."""
    session = get_session()
    assert session is not None, "a trial has one"
    return session._get_or_create_inter_actor_queue().put  # pyright: ignore[reportPrivateUsage]
