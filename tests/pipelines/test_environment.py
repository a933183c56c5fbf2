"""Whose error it is does not depend on where the environment lies: inside the checkout or outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# A mistake of the user's, then a fault of ours that shows within a library, as a ValueError, too.
FAULTS = """
import sys
import numpy
from pipelines.command import command

assert numpy.__file__.startswith(sys.argv[1]), numpy.__file__
for flags in (["--prior.layers", "0"], ["--data.image_size", "64"]):
    sys.argv[1:] = flags
    try:
        command(None, lambda experiment, _: numpy.stack([]))
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.long
def test_the_same_faults_get_the_same_answers_with_the_environment_inside_and_outside(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answers: list[tuple[int, str, list[str]]] = []
    for where in ("inside", "outside"):
        checkout = tmp_path / where / "checkout"
        for ring in ("bld_core", "cluster", "pipelines"):
            shutil.copytree(REPOSITORY / ring, checkout / ring, ignore=shutil.ignore_patterns("__pycache__"))
        place = (checkout if where == "inside" else tmp_path / where) / ".venv"
        place.symlink_to(sys.prefix)  # of which Python keeps the name, not what it leads to
        ended = subprocess.run(
            [place / "bin" / "python", "-c", FAULTS, place],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = ended.stderr.replace(str(place), "<environment>").replace(str(checkout), "<checkout>")
        answers.append((ended.returncode, ended.stdout, said.splitlines()))
    assert answers[0] == answers[1]
    code, printed, said = answers[0]
    assert (code, printed) == (1, "2\n")
    assert said[0].startswith("error: prior.layers is 0")
    assert said[1] == "Traceback (most recent call last):"
    assert said[-1] == "ValueError: need at least one array to stack"
