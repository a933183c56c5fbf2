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


@pytest.mark.parametrize("ring", ["bld_core", "cluster"])
def test_the_listing_of_a_ring_is_its_tree(ring: str) -> None:
    (block,) = re.findall(rf"```\n({ring}/ .*?)```", (REPOSITORY / ring / "README.md").read_text(), re.S)
    listed, folders = list[str](), list[str]()
    for line in block.splitlines():
        indent, name, words = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert words
        folders[len(indent) // 2 :] = [name]
        listed.append("".join(folders))
    tree = [
        f"{path.relative_to(REPOSITORY).as_posix()}{'/' if path.is_dir() else ''}"
        for path in (REPOSITORY / ring, *(REPOSITORY / ring).rglob("*"))
        if not {"__pycache__", "__init__.py", "README.md"} & {*path.parts}
    ]
    assert sorted(listed) == sorted(tree)


def test_every_text_that_is_named_is_in_the_repository() -> None:
    folders = ("bld_core", "cluster", "pipelines", "configs", "tests", "benchmarks")
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    for path in [*found, *(REPOSITORY / name for name in ("README.md", "Makefile", "pyproject.toml"))]:
        if path.suffix not in ("", ".py", ".md", ".yaml", ".toml", ".html"):
            continue
        for name in re.findall(r"\w[\w/-]*\.md\b", path.read_text()):
            assert any(place.as_posix().endswith(f"/{name}") for place in [*found, REPOSITORY / "README.md"]), (
                f"{path} names {name}, which is not in the repository"
            )
