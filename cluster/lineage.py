"""What a result was made from: data, weights and code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = "mlflow.source.git.commit"
"""Tag of a run or a version: the commit of this code."""


def git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BLD_GIT_COMMIT", "unknown")
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def lineage(autoencoder: Mapping[str, Any], prior: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a result was made from, as tags: data -> autoencoder -> latents -> prior, each by its hash.

    Args:
        autoencoder: the config.json of the autoencoder; its data are the names and sizes of its training shards.
        prior: that of the prior, where one is used.
    """
    made_from = {
        "bld.data_hash": autoencoder.get("data_hash", "unknown"),  # not noted by early versions
        "bld.autoencoder_hash": autoencoder["hash"],
    }
    if prior is not None:
        made_from |= {"bld.latents_hash": prior["latents_hash"], "bld.prior_hash": prior["hash"]}
    return made_from
