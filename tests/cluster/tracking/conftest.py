from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.experiment import Experiment
from cluster.tracking.store import open_client
from tests.conftest import small_experiment


@pytest.fixture(scope="session")
def made_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database as MLflow makes it, which takes it seconds."""
    file = tmp_path_factory.mktemp("made") / "mlflow.db"
    open_client(f"sqlite:///{file}")
    return file.read_bytes()


@pytest.fixture
def beside(tmp_path: Path, made_database: bytes) -> Experiment:
    """An experiment with its database beside it, in a file that is a test's to spoil."""
    (tmp_path / "mlflow.db").write_bytes(made_database)
    return small_experiment(tmp_path, {"train": "t", "validation": "v"})
