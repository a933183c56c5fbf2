"""What the first page and docs/ say is true: commands parse and run, Python lines run, links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from bld_core.data.images import ImageConfig, first_images
from bld_core.data.shards import read_shard
from bld_core.storage.files import expand, read_json
from cluster.config.experiment import Experiment
from cluster.data.check import check_data
from cluster.data.shards import ShardConfig, make_shards
from cluster.data.suggest import first_flags
from pipelines.command import command
from tests.conftest import copy_of
from tests.pipelines.test_commands import run

REPOSITORY = Path(__file__).parents[2]
PAGES = ["README.md", "docs/commands.md", "docs/operating.md", "benchmarks/README.md", "cluster/manifests/README.md"]
TEXT = {page: (REPOSITORY / page).read_text() for page in PAGES}
SHELL = "\n".join(block for text in TEXT.values() for block in re.findall(r"```bash\n(.*?)```", text, re.S))
MAKE = re.findall(r"^make (\w[\w-]*)", SHELL, re.M)


def commands(shell: str) -> list[list[str]]:
    """The words of each `python pipelines/...` in lines for a shell, whatever stands before it."""
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line[line.index("python pipelines/") :]) for line in lines if "python pipelines/" in line]


def recipe(target: str) -> str:
    """What `make <target>` runs."""
    return subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("words", [*commands(SHELL), *commands(recipe("demo"))], ids=" ".join)
def test_every_command_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("BLD_DATA", "/shards")
    script = words[1].removeprefix("pipelines/")
    assert run(monkeypatch, script, *words[2:], "--print_config") == 0, capsys.readouterr().err


def test_a_job_is_sent_all_of_the_code_and_no_data() -> None:
    excluded = get_excludes_from_ignore_files(REPOSITORY, include_gitignore=True)
    code = [path for ring in ("bld_core", "cluster", "pipelines", "configs") for path in (REPOSITORY / ring).rglob("*")]
    left_out = [path for path in code if any(exclude(path) for exclude in excluded)]
    assert [path for path in left_out if "__pycache__" not in path.parts] == []
    data = ["data/mine/notes.txt", "runs/demo/stage.json", "mine/train-0000.tar", ".venv/bin/python"]
    assert all(any(exclude(REPOSITORY / path) for exclude in excluded) for path in data)


def test_every_target_of_make_is_there() -> None:
    assert {"demo", "test"} <= set(MAKE)
    assert all(recipe(target) for target in {*MAKE, *re.findall(r"`make (\w[\w-]*)`", "".join(TEXT.values()))})


def image_folder(folder: Path, count: int) -> None:
    """Grey images, each of another shade, in two classes by turns."""
    for i in range(count):
        name = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), i, np.uint8)).save(name)


def test_a_folder_of_images_becomes_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = next(words for words in commands(TEXT["README.md"]) if words[1].endswith("make_shards.py"))
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "path/to/images", 20)
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


@pytest.mark.parametrize(
    ("classes", "side", "count", "size"), [(2, 8, 10, 32), (0, 90, 20, 64)], ids=["classes, small", "none, large"]
)
def test_the_next_command_that_is_printed_is_whole(
    classes: int, side: int, count: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(2 * count):
        name = tmp_path / "images" / (str(i % classes) if classes else "") / f"{i}.webp"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side + 2, 3), i, np.uint8)).save(name)
    made = make_shards(ShardConfig(source="images", output="data/mine", images_per_shard=9))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.setattr(sys, "argv", ["run_all.py", *first_flags(made, "mine")])
    read: list[Experiment] = []
    command(None, lambda experiment, _: read.append(experiment))
    (experiment,) = read
    assert (experiment.name, experiment.data.image_size, experiment.data.channels) == ("mine", size, 3)
    assert experiment.prior.classes == classes
    assert experiment.evaluation.efficientnet_lite0 == (size == 64), "photographs have an experiment of their own"
    shards = check_data(experiment)
    assert len(shards.train) == len(list((tmp_path / "data/mine").glob("train-*")))


def test_where_a_split_or_a_second_shard_is_missing_the_next_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", 4)
    made = make_shards(ShardConfig(source="images", output="out", validation_share=0))
    flags = first_flags(made, "mine")
    assert "--data.validation=NAME_YOUR_SHARDS" in flags, "the demo's own would be taken"
    assert "--cluster.workers=1" in flags
    assert "--data.channels=3" in flags


@pytest.mark.long
def test_images_of_your_own_go_all_the_way(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, whole = commands(TEXT["README.md"])[:2]
    image_folder(tmp_path / "path/to/images", count := 110)
    if data := os.environ.get("BLD_REAL_DATA"):
        photographs = read_shard(f"{data}/imagenet-160/imagenet1k-160-0000.tar", ["jpg"]).samples[:count]
        for drawn, photograph in zip(sorted(tmp_path.glob("path/to/images/*/*")), photographs, strict=True):
            drawn.unlink()
            drawn.with_suffix(".jpg").write_bytes(photograph.data)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLD_ROOT", str(tmp_path / "runs"))
    assert run(monkeypatch, "make_shards.py", *shards[2:], "--images_per_shard", "10") == 0
    short = [
        *("--autoencoder_training.steps", "2", "--prior_training.steps", "2", "--evaluation.samples", "20"),
        *("--diffusion.steps", "8", "--sampling.steps", "4"),
        *("--cluster.workers", "0", "--cluster.decode_tasks", "0"),
    ]
    capsys.readouterr()
    assert run(monkeypatch, "run_all.py", *whole[2:], *short) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    space = "efficientnet_lite0"
    named = re.findall(rf"^  (\w+_{space}\w*) ", said, re.M)
    metrics = ["rfd", "fd", "fdr", "mind", "precision", "recall", "neighbour_ratio"]
    assert sorted(named) == sorted([*(f"{metric}_{space}" for metric in metrics), f"fd_{space}_held_out"])
    assert re.search(r"^  code_bits +2,048 ", said, re.M)
    assert (tmp_path / "runs/mine/evaluation/report.html").exists()
    assert read_json(f"{tmp_path}/runs/mine/evaluation/report.json")["neighbours_by"] == f"features of {space}"


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_the_python_lines_run_without_ray(page: str, finished: Experiment) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT[page], re.S)
    names: dict[str, object] = {}
    exec(block.replace("runs/demo", finished.folder), names)  # the page's own lines
    shapes = {
        "images": (3, 32, 32, 1),
        "again": (3, 32, 32, 1),
        "completed": (3, 4, 32, 32, 1),
        "wider": (3, 32, 64, 1),
    }
    made = names.keys() & shapes
    assert "images" in made
    assert {name: getattr(names[name], "shape", ()) for name in made} == {name: shapes[name] for name in made}


def test_the_pictures_are_made_by_the_command_that_is_named(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = re.findall(r"`python (docs/\S+\.py)`", TEXT["README.md"])
    root = copy_of(finished, tmp_path / "runs", "autoencoder", "prior")
    page = root / finished.name / "evaluation/report.html"
    page.parent.mkdir()
    page.write_text("<h1>A report</h1>")
    for name in ("demo", "fashion_mnist"):
        (root / name).symlink_to(root / finished.name)
    monkeypatch.setattr(sys, "argv", [command, "--root", str(root), "--output", str(tmp_path)])
    runpy.run_path(str(REPOSITORY / command), run_name="__main__")
    shown = re.findall(r"!\[[^\]]+\]\((\S+)\)", TEXT["README.md"])
    assert shown == ["docs/images.png", "docs/report.png", "docs/studio.png"]
    assert Image.open(tmp_path / "images.png").size == Image.open(REPOSITORY / "docs/images.png").size
    assert all((REPOSITORY / name).stat().st_size < 300_000 for name in shown)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", TEXT[page]) if "://" not in link]
    missing = [link for link in links if not (REPOSITORY / page).parent.joinpath(link).exists()]
    assert not missing


def listing(ring: str) -> dict[str, str]:
    """What the listing of a ring says of each of its files and folders; words that go on stand two columns further."""
    (block,) = re.findall(rf"```\n({ring}/ .*?)```", (REPOSITORY / ring / "README.md").read_text(), re.S)
    column = re.match(r"\S+ +", block).end()  # pyright: ignore[reportOptionalMemberAccess]
    said, folders = dict[str, str](), list[str]()
    for line in block.splitlines():
        assert len(line) <= 120, f"{len(line)} characters: {line}"
        if line.startswith(" " * (column + 2)):
            said["".join(folders)] += f" {line.strip()}"
            continue
        indent, name, words = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        folders[len(indent) // 2 :] = [name]
        assert "".join(folders) not in said, f"{name} is listed twice"
        said["".join(folders)] = words
    return said


def public_names(path: Path) -> set[str]:
    """The public functions and classes of a module, and the public methods of these classes as Class.method."""
    names = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            methods = node.body if isinstance(node, ast.ClassDef) else []
            found = [method.name for method in methods if isinstance(method, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{name}" for name in found if not name.startswith("_"))}
    return names


@pytest.mark.parametrize("ring", ["bld_core", "cluster"])
def test_the_listing_of_a_ring_is_its_tree(ring: str) -> None:
    tree = [
        f"{path.relative_to(REPOSITORY).as_posix()}{'/' if path.is_dir() else ''}"
        for path in (REPOSITORY / ring, *(REPOSITORY / ring).rglob("*"))
        if not {"__pycache__", "__init__.py", "README.md"} & {*path.parts}
    ]
    assert sorted(listing(ring)) == sorted(tree)


@pytest.mark.parametrize("ring", ["bld_core", "cluster"])
def test_the_listing_of_a_ring_names_the_entry_points_of_its_files(ring: str) -> None:
    files = [name for both in ("bld_core", "cluster") for name in listing(both) if name.endswith(".py")]
    for name, words in listing(ring).items():
        if not name.endswith(".py"):
            continue
        own, named = public_names(REPOSITORY / name), {*re.findall(r"`([^`]*)`", words)}
        others = [
            file for other in re.findall(r"[\w/]+\.py\b", words) for file in files if f"/{file}".endswith(f"/{other}")
        ]
        assert not own or own & named, f"{name} has {sorted(own)}, and its line names none of them: {words}"
        unknown = named - own.union(*(public_names(REPOSITORY / other) for other in others))
        assert not unknown, f"the line of {name} names what is not in it: {sorted(unknown)}"


def test_every_text_that_is_named_is_in_the_repository() -> None:
    folders = ("bld_core", "cluster", "pipelines", "configs", "tests", "benchmarks", "docs")
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    for path in [*found, *(REPOSITORY / name for name in ("README.md", "Makefile", "pyproject.toml"))]:
        if path.suffix not in ("", ".py", ".md", ".yaml", ".toml", ".html"):
            continue
        for name in re.findall(r"\w[\w/-]*\.md\b", path.read_text()):
            assert any(place.as_posix().endswith(f"/{name}") for place in [*found, REPOSITORY / "README.md"]), (
                f"{path} names {name}, which is not in the repository"
            )
