"""What the README says is true: its commands parse, its shards command and Python lines run, its tree is the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bld_core.data.images import ImageConfig, first_images
from bld_core.storage.files import expand
from cluster.config.experiment import Experiment
from tests.pipelines.test_commands import run

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    shlex.split(line[line.index("python pipelines/") :])
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "python pipelines/" in line
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    script = words[1].removeprefix("pipelines/")
    assert run(monkeypatch, script, *words[2:], "--print_config") == 0, capsys.readouterr().err


def test_a_folder_of_images_becomes_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = next(words for words in COMMANDS if words[1].endswith("make_shards.py"))
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        folder = tmp_path / "path/to/images" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), i, np.uint8)).save(folder / f"{i}.png")
    assert run(monkeypatch, "make_shards.py", *words[2:]) == 0
    said = capsys.readouterr().out
    patterns = dict(re.findall(r"--data\.(\w+)=(\S+)", said.replace("'", "")))
    images = [
        image
        for split in ("train", "validation")
        for image in first_images(patterns[split], ImageConfig(image_size=8), 100)
    ]
    assert sorted((int(image.pixels[0, 0, 0]), image.label) for image in images) == [(i, 1 - i % 2) for i in range(20)]
    assert len(expand(patterns["validation"])) == 1
    assert run(monkeypatch, "make_shards.py", *words[2:]) == 0
    assert "already done" in capsys.readouterr().out
    assert run(monkeypatch, "make_shards.py", *words[2:], "--images_per_shard", "7") == 2
    assert "choose another --output" in capsys.readouterr().err


def test_the_python_lines_run_without_ray(finished: Experiment) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(block.replace("runs/demo", finished.folder), names)  # the README's own lines
    assert tuple(getattr(names["images"], "shape", ())) == (3, 32, 32, 1)
    assert getattr(names["again"], "shape", None) == getattr(names["images"], "shape", ())


def test_the_tree_names_every_file_of_the_three_rings() -> None:
    for ring in ("bld_core", "cluster"):
        for path in sorted((REPOSITORY / ring).glob("*.py")):
            assert path.name == "__init__.py" or re.search(rf"^  {path.name}\s", README, re.M), f"{path} is missing"
