"""pipelines -> cluster -> bld_core, and nothing else: read from the source, and run without the cluster's packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {"lpips", "torchvision"}  # imported only where they are used
STORAGE = {"fsspec", "s3fs", "botocore", "aiohttp", "filelock", "tenacity"}  # s3fs, its errors, waiting
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
    "pydantic",
    "sqlalchemy",
    "optuna",
    "fastapi",
    "starlette",
}
PIPELINES = {"pipelines", "cluster", "jsonargparse", "omegaconf", "yaml"}
ALLOWED = {"bld_core": CORE, "cluster": CLUSTER, "pipelines": PIPELINES}

# The rooms and wings of each ring, the lowest first: each imports from those that stand before it and that it names.
# A wing's `config` is a room of its own: settings are read where the wing itself is not needed.
ARROWS = {
    "bld_core": "generator",
    "bld_core.errors": "",
    "bld_core.splitmix": "",
    "bld_core.noise": "splitmix",
    "bld_core.precision": "",
    "bld_core.storage": "errors",
    "bld_core.data": "errors splitmix noise storage",
    "bld_core.training": "errors precision storage",
    "bld_core.diffusion": "errors noise precision",
    "bld_core.autoencoder": "errors noise storage data training",
    "bld_core.latents": "errors splitmix noise precision storage data training autoencoder",
    "bld_core.prior": "errors noise training diffusion",
    "bld_core.metrics": "errors splitmix noise precision data training autoencoder",
    "bld_core.trained": "errors precision storage data training diffusion autoencoder prior",
    "bld_core.generator": "errors splitmix precision training diffusion prior trained",
    "cluster": "",
    "cluster.secrets": "",
    "cluster.nodes.labels": "",
    "cluster.ray_private": "nodes.labels",
    "cluster.nodes": "ray_private nodes.labels",
    "cluster.plots": "",
    "cluster.storage": "",
    "cluster.evaluation.config": "",
    "cluster.sweep.config": "",
    "cluster.studio.config": "",
    "cluster.console": "secrets",
    "cluster.lineage": "secrets",
    "cluster.runtime": "console nodes ray_private nodes.labels",
    "cluster.config": "secrets console runtime evaluation.config sweep.config studio.config",
    "cluster.tracking": "secrets lineage config",
    "cluster.stages": "secrets console nodes runtime config tracking",
    "cluster.data": "secrets ray_private console lineage runtime config stages",
    "cluster.training": "ray_private nodes plots storage console lineage runtime config tracking stages data",
    "cluster.sampling": "lineage runtime config stages",
    "cluster.evaluation": "secrets plots lineage runtime config stages data training sampling evaluation.config",
    "cluster.study": "plots console data config runtime stages training sampling evaluation",
    "cluster.report": "secrets plots console lineage config tracking stages evaluation evaluation.config",
    "cluster.sweep": "ray_private nodes plots storage console lineage runtime config tracking stages data"
    " training report sweep.config",
    "cluster.registry": "secrets lineage config tracking evaluation",
    "cluster.studio": "nodes runtime registry studio.config",
    "cluster.serving": "studio",
}
# Within a wing: comparators are known to the seam alone.
SEAMS = {"bld_core.autoencoder": "bld_core.autoencoder.model", "bld_core.prior": "bld_core.prior.model"}


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


def test_what_relies_on_privacies_of_ray_stands_in_one_place() -> None:
    private = re.compile(r"ray[\w.]*\._(internal|private)|ray\.experimental|\b_generator|\bRAY_(?!ADDRESS\b)\w+")
    files = [path for ring in ALLOWED for path in sources(ring)]
    assert {path.parent.name for path in files if private.search(path.read_text())} == {"ray_private"}


def test_the_reader_of_imports_sees_every_form() -> None:
    code = "import ray.data as r\nfrom mlflow.x import y\nfrom . import z\ndef f():\n    import cluster"
    assert imported(ast.parse(code)) == {"ray", "mlflow", "(relative)", "cluster"}


def modules_imported(tree: ast.AST, ring: str) -> Iterator[str]:
    """The modules of a ring that a module of it imports: `from bld_core.storage import files` is that of files."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == ring)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == ring:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                path = ROOT.joinpath(*module.split("."))
                yield module if path.is_dir() or path.with_suffix(".py").is_file() else node.module


def room(module: str) -> str:
    """The room or wing that a module belongs to."""
    return module if module in ARROWS else ".".join(module.split(".")[:2])


def wrong_arrows(module: str, tree: ast.AST) -> set[str]:
    """What a module imports from other wings that its wing does not name, and comparators that are not its to know."""
    ring, here = module.partition(".")[0], room(module)
    found = set[str]()
    for target in modules_imported(tree, ring):
        there = room(target)
        if there != here and there.removeprefix(f"{ring}.") not in ARROWS[here].split():
            found.add(f"{module} -> {target}")
        if ".baselines." in target and ".baselines." not in module and module not in SEAMS.values():
            found.add(f"{module} -> {target}")
    return found


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("ring", ["bld_core", "cluster"])
def test_the_wings_arrows_point_one_way(ring: str) -> None:
    rooms = [name for name in ARROWS if name.partition(".")[0] == ring]
    for number, name in enumerate(rooms[1:], 1):  # the order of ARROWS is one in which nothing points upwards
        assert {f"{ring}.{below}" for below in ARROWS[name].split()} <= set(rooms[1:number]), name
    found = {named(path): ast.parse(path.read_text()) for path in sources(ring)}
    assert {room(name) for name in found} == set(rooms)
    assert set[str]().union(*(wrong_arrows(name, tree) for name, tree in found.items())) == set()
    used = {room(name): set[str]() for name in found}
    for name, tree in found.items():
        used[room(name)] |= {room(target) for target in modules_imported(tree, ring)} - {room(name)}
    assert {name: {f"{ring}.{below}" for below in ARROWS[name].split()} for name in rooms} == used, "no arrow is idle"


def test_a_planted_wrong_arrow_is_found() -> None:
    planted = ast.parse(
        "from bld_core.prior.transformer import Prior\ndef f():\n    from bld_core.storage import files"
    )
    assert wrong_arrows("bld_core.diffusion.sampling", planted) == {
        "bld_core.diffusion.sampling -> bld_core.prior.transformer",
        "bld_core.diffusion.sampling -> bld_core.storage.files",
    }
    comparator = ast.parse("from bld_core.autoencoder.baselines.vector import VectorBottleneck")
    assert wrong_arrows("bld_core.autoencoder.network", comparator)
    assert not wrong_arrows("bld_core.autoencoder.model", comparator)


# Parameters that are tables without a type: JSON as it is read, written or received, keywords handed on, Ray's own.
BORDER = {
    "bld_core.generator": {"settle", "_draw"},  # keywords of SamplingConfig
    "bld_core.latents.writer": {"latent_shard_bytes", "from_json"},
    "bld_core.storage.files": {"write_json", "json_bytes"},
    "bld_core.storage.records": {"write_record", "_digest", "named_faults"},
    "bld_core.trained": {"_known"},
    "bld_core.training.checkpoint": {"save_state", "snapshot", "save_model", "read_tensors", "_read"},
    "cluster.config.experiment": {"_flatten"},
    "cluster.console": {"user_errors_answered", "_told"},  # the command line, parsed
    "cluster.data.ingest": {"_execute"},  # rows of a Ray data set
    "cluster.data.shards": {"_compare"},
    "cluster.evaluation.pieces": {"_result", "_reconstructions"},  # JSON beside tensors
    "cluster.study.code": {"code_table", "_plot"},  # table.json
    "cluster.study.study": {"_best", "_names", "study_table", "_plot"},  # table.json
    "cluster.registry.registry": {"_register", "_check", "_make_version"},  # report.json
    "cluster.studio.pyfunc": {"read_row"},
    "cluster.studio.reference": {"_routes", "_resolved", "_field"},  # the OpenAPI description
    "cluster.report.page": {"_summary", "_pictures"},
    "cluster.report.tables": {"report_table"},
    "cluster.sweep.board": {"on_trial_result"},  # Tune's
    "cluster.sweep.run": {"_run", "_train", "_tuner", "run_trial"},  # the space, Tune's
    "cluster.sweep.search": {"domains", "values_of", "optuna_search"},
    "cluster.training.replicas": {"after_report"},  # Ray Train's
}


def test_tables_without_a_type_stay_at_the_border() -> None:
    found = dict[str, set[str]]()
    for ring in ALLOWED:
        for path in sources(ring):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    types = [ast.unparse(a.annotation) for a in arguments if a.annotation is not None]
                    if any(f"{kind}[str, Any]" in each for each in types for kind in ("dict", "Mapping")):
                        found.setdefault(named(path), set()).add(node.name)
    assert found == BORDER


def test_no_folder_is_crowded() -> None:
    for ring in ("bld_core", "cluster"):
        folders = [ROOT / ring, *(path for path in (ROOT / ring).rglob("*") if path.is_dir())]
        counts = {str(path): len([f for f in path.iterdir() if f.is_file()]) for path in folders}
        assert {name: count for name, count in counts.items() if count > 12} == {}


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
from bld_core.diffusion.process import DiffusionConfig
from bld_core.data.tensors import stack
from bld_core.autoencoder.losses import LossConfig
from bld_core.autoencoder.objective import AutoencoderObjective
from bld_core.prior.binary import PriorObjective
from bld_core.prior.transformer import PriorConfig
from bld_core.training.loop import Batch, TrainingConfig, make_state, train
from tests.bld_core.toys import TINY_AUTOENCODER, tiny_autoencoder, tiny_prior, toy_batches, toy_images

config = TrainingConfig(steps=10, batch_size=8, learning_rate=1e-3)
state = make_state(tiny_prior(), config)
reports = list(train(state, toy_batches(config, 20), PriorObjective(DiffusionConfig(), PriorConfig(), 0), config))
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


def test_what_decodes_images_loads_no_torch() -> None:
    """480 MB and 3 seconds for each process of it, of which a machine of eight GPUs may have eighty."""
    run("""
import sys
import bld_core.data.blocks
assert "torch" not in sys.modules
""")


def test_what_trains_loads_no_mlflow() -> None:
    """Of a training's workers and its controller, the first worker alone writes to it, and imports it then."""
    run("""
import sys
import cluster.training.replicas
assert "mlflow" not in sys.modules
""")
