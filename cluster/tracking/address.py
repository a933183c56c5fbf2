"""Where an MLflow run is, for processes that may never write to it: MLflow takes a second of a core to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.tracking.runs import Run


@dataclass(frozen=True)
class RunAddress:
    """What a `Run` is opened by; its attributes are those of that."""

    uri: str
    run_id: str
    waiting: str = ""
    patience: float = 480.0

    def open(self) -> Run:
        """The run."""
        from cluster.tracking.runs import Run

        return Run(self.uri, self.run_id, self.waiting, self.patience)
