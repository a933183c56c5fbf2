"""What a result was made from: data, weights and code."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.secrets import without_secrets

if TYPE_CHECKING:
    from bld_core.trained import AutoencoderRecord, PriorRecord

COMMIT = "mlflow.source.git.commit"
"""Tag of a run or a version: the commit of this code."""


def git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it.

    Outside a checkout it is the variable BLD_GIT_COMMIT, or "unknown": also where the code is installed within another
    repository, which does not track it.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BLD_GIT_COMMIT", "unknown")


def command_line(*words: str) -> str:
    """A command as it may be shown and stored: quoted for a shell, without secrets."""
    return without_secrets(shlex.join(["python", *words]))


def _git(*words: str) -> str:
    """What git says of the folder of this file."""
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def lineage(autoencoder: AutoencoderRecord, prior: PriorRecord | None = None) -> dict[str, str]:
    """What a result was made from, as tags: data -> autoencoder -> latents -> prior, each by its hash.

    Args:
        autoencoder: its data are the names and sizes of its training shards.
        prior: where one is used.
    """
    made_from = {"bld.data_hash": autoencoder.data_hash, "bld.autoencoder_hash": autoencoder.hash}
    if prior is not None:
        made_from |= {"bld.latents_hash": prior.latents_hash, "bld.prior_hash": prior.hash}
    return made_from
