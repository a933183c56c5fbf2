"""pipelines -> cluster -> bld_core, and nothing else: read from the source, and run without the cluster's packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = {"lpips", "torchvision"}  # imported only where they are used
STORAGE = {"fsspec", "s3fs", "botocore", "aiohttp"}  # s3fs and what it raises
CORE = {"bld_core", "torch", "numpy", "pyarrow", "PIL", "safetensors", "webdataset", "braceexpand"} | STORAGE | OPTIONAL
CLUSTER = CORE | {
    "cluster",
    "ray",
    "mlflow",
    "sklearn",
    "threadpoolctl",
    "tqdm",
    "yaml",
    "torch_fidelity",
    "matplotlib",
    "jinja2",
    "pandas",
    "sqlalchemy",
}
PIPELINES = {"pipelines", "cluster", "jsonargparse"}
ALLOWED = {"bld_core": CORE, "cluster": CLUSTER, "pipelines": PIPELINES}


def sources(ring: str) -> list[Path]:
    found = sorted((ROOT / ring).rglob("*.py"))
    assert found
    return found


def trees(ring: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sources(ring):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a module imports anywhere, also in functions and for type checking."""
    packages = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add("(relative)" if node.level else (node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            packages.add(ast.unparse(node))
    return packages


@pytest.mark.parametrize("ring", ALLOWED)
def test_arrows_point_one_way_and_every_package_is_on_the_list(ring: str) -> None:
    allowed = ALLOWED[ring] | sys.stdlib_module_names
    assert {name: extra for name, tree in trees(ring) if (extra := imported(tree) - allowed)} == {}


def test_the_reader_of_imports_sees_every_form() -> None:
    code = "import ray.data as r\nfrom mlflow.x import y\nfrom . import z\ndef f():\n    import cluster"
    assert imported(ast.parse(code)) == {"ray", "mlflow", "(relative)", "cluster"}


def test_the_core_neither_prints_nor_pickles_nor_loads_loosely() -> None:
    for name, tree in trees("bld_core"):
        assert "pickle" not in imported(tree), name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert function not in ("print", "torch.save"), f"{name}:{node.lineno}"
                if function == "torch.load":  # which unpickles anything unless it is told not to
                    assert "weights_only=True" in map(ast.unparse, node.keywords), f"{name}:{node.lineno}"
                if function.endswith("load_state_dict"):
                    assert len(node.args) == 1, f"{name}:{node.lineno}"
                    assert not node.keywords, f"{name}:{node.lineno}"


def test_what_relies_on_privacies_of_ray_stands_in_one_file() -> None:
    private = re.compile(r"ray[\w.]*\._(internal|private)|ray\.experimental|\b_generator|\bRAY_(?!ADDRESS\b)\w+")
    files = [path for ring in ALLOWED for path in sources(ring)]
    assert [path.name for path in files if private.search(path.read_text())] == ["ray_private.py"]


def test_pipelines_stay_under_40_lines() -> None:
    entries = [path for path in sources("pipelines") if path.name not in ("__init__.py", "command.py")]
    assert {path.name: lines for path in entries if (lines := len(path.read_text().splitlines())) >= 40} == {}


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


WITHOUT_THE_CLUSTER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "mlflow", "jsonargparse", "cluster", "pipelines"):
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
"""


def test_without_ray_and_mlflow_both_stages_train() -> None:
    run(f"""{WITHOUT_THE_CLUSTER}
try:
    import ray
except ImportError:
    pass
else:
    raise SystemExit("the hook does not work")

import itertools
import torch
torch.set_num_threads(1)
from bld_core.diffusion import DiffusionConfig
from bld_core.images import stack
from bld_core.losses import LossConfig
from bld_core.objectives import AutoencoderObjective, PriorObjective
from bld_core.training import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, tiny_autoencoder, tiny_prior, toy_batches, toy_images

config = TrainingConfig(steps=10, batch_size=8, learning_rate=1e-3)
state = make_state(tiny_prior(), config)
reports = list(train(state, toy_batches(config, 20), PriorObjective(DiffusionConfig(), 0.1, 0), config))
assert len(reports) == state.step == 10

images = stack(toy_images(8))
batches = (Batch(images, torch.zeros(8).long(), torch.arange(8) + 8 * i, [""] * 8) for i in itertools.count())
state = make_state(tiny_autoencoder(), config)
objective = AutoencoderObjective(LossConfig(), TINY_AUTOENCODER.code_shape(8), 0)
reports = list(train(state, batches, objective, config))
assert len(reports) == state.step == 10
""")


def test_importing_the_core_loads_nothing_heavy() -> None:
    run("""
import sys
import bld_core
heavy = {"webdataset", "torchvision", "sklearn", "ray", "mlflow", "jsonargparse", "lpips", "pandas"} & set(sys.modules)
assert not heavy, heavy
""")
