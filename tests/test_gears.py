"""Two gears: what is marked `long` is left to `make test-long`, and `make test` still uses every module.

That it runs every command is in tests/pipelines/test_commands.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for ring in ("bld_core", "cluster")
    for path in (ROOT / ring).rglob("*.py")
    if path.name != "__init__.py"
}

# Modules that no test imports, each with a test of the short gear that runs it through others.
THROUGH = {
    "bld_core.data.tar": (
        "bld_core/data/test_shards.py::test_a_transfer_that_breaks_off_is_an_error_and_no_truncated_tar"
    ),
    "bld_core.errors": "pipelines/test_commands.py::test_a_mistake_is_one_message_and_exit_code_2",
    "bld_core.training.layers": "bld_core/autoencoder/test_network.py::test_training_reduces_the_loss",
    "bld_core.training.replicas": (
        "bld_core/autoencoder/test_losses.py::test_two_workers_use_the_weight_and_the_gradient_of_the_whole_batch"
    ),
    "cluster.console": "pipelines/test_commands.py::test_a_mistake_is_one_message_and_exit_code_2",
    "cluster.data.decoding": (
        "cluster/data/test_encode.py::test_an_interrupted_job_resumes_and_ends_with_the_same_bytes"
    ),
    "cluster.data.folder": "cluster/data/test_shards.py::test_bmp_and_tiff_become_png_without_loss",
    "cluster.ray_private.autoscaler": (
        "cluster/test_admission.py::test_a_node_that_comes_ends_the_waiting_and_where_none_is_to_come_nothing_waits"
    ),
    "cluster.training.notices": (
        "cluster/training/test_train.py::test_two_workers_hold_the_same_weights_and_follow_the_curve_of_one"
    ),
    "cluster.ray_private.core": (
        "cluster/training/test_train.py::test_two_workers_hold_the_same_weights_and_follow_the_curve_of_one"
    ),
    "cluster.ray_private.data": (
        "cluster/data/test_ingest.py::test_images_that_are_decoded_in_the_worker_are_those_of_ray_data"
    ),
    "cluster.ray_private.tune": "pipelines/test_commands.py::test_every_command_does_its_work",
    "cluster.studio.pyfunc": (
        "cluster/registry/test_registry.py::test_the_served_pair_answers_with_the_class_asked_for"
    ),
    "cluster.report.paper": (
        "cluster/report/test_page.py::test_the_page_holds_figures_curves_the_papers_rows_and_where_they_come_from"
    ),
    "cluster.serving": "test_older_format.py::test_an_older_registry_hands_out_its_champion_and_knows_the_pair_again",
    "cluster.studio.api": "cluster/studio/test_app.py::test_the_model_is_described",
    "cluster.studio.reference": "cluster/studio/test_app.py::test_the_model_is_described",
    "cluster.studio.passes": (
        "cluster/studio/test_app.py::test_samples_are_those_of_the_pair_and_their_bits_decode_to_them"
    ),
    "cluster.sweep.board": "pipelines/test_commands.py::test_every_command_does_its_work",
    "cluster.sweep.page": "pipelines/test_commands.py::test_every_command_does_its_work",
    "cluster.sweep.search": "pipelines/test_commands.py::test_every_command_does_its_work",
    "cluster.tracking.outbox": (
        "cluster/tracking/test_runs.py::test_a_database_that_is_gone_stops_no_training_and_the_next_start_tells_it"
    ),
    "cluster.storage": (
        "cluster/training/test_train.py::test_two_workers_hold_the_same_weights_and_follow_the_curve_of_one"
    ),
}


def is_long(node: ast.AST) -> bool:
    """Whether this is a test that is marked long."""
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(mark) == "pytest.mark.long" for mark in node.decorator_list
    )


def used(tree: ast.Module) -> set[str]:
    """The modules whose names a file of tests uses outside its long tests."""
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            homes |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                homes[each.asname or each.name] = whole if whole in MODULES else node.module
    short = [node for node in tree.body if not is_long(node)]
    return {homes.get(name.id, "") for node in short for name in ast.walk(node) if isinstance(name, ast.Name)}


def test_what_only_a_long_test_uses_is_not_used() -> None:
    code = (
        "from cluster.runtime import connect_ray\nfrom bld_core import noise\nimport cluster.lineage as lineage\n"
        "@pytest.mark.long\ndef test_a():\n    connect_ray()\n"
        "@pytest.fixture\ndef b():\n    return noise.key_of()\ndef test_c():\n    lineage.git_commit()"
    )
    assert used(ast.parse(code)) & MODULES == {"bld_core.noise", "cluster.lineage"}


def test_the_short_gear_uses_every_module() -> None:
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    seen = {module for tree in trees.values() for module in used(tree)}
    assert MODULES - seen - THROUGH.keys() == set(), (
        "used by no test of the short gear: write one, or name one in THROUGH"
    )
    assert THROUGH.keys() - MODULES == set(), "modules that are no more: take them out of THROUGH"
    for test in THROUGH.values():
        file, name = test.split("::")
        nodes = [
            node
            for node in trees[ROOT / "tests" / file].body
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert [is_long(node) for node in nodes] == [False], f"{test} is no test of the short gear"
