"""Where an MLflow run is, for processes that may never write to it: MLflow takes a second of a core to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.tracking.runs import Run


@dataclass(frozen=True)
class RunAddress:
    """What a `Run` is opened by, and becomes on its way to another process.

    Attributes:
        uri: tracking URI.
        run_id: of an existing run.
        waiting: folder for what waits; empty where nobody would come back to it: then the store is waited for.
        patience: seconds to wait for a store that is away, at a run's end, and wherever nothing is kept.
    """

    uri: str
    run_id: str
    waiting: str = ""
    patience: float = 480.0

    def open(self) -> Run:
        """The run."""
        from cluster.tracking.runs import Run

        return Run(self.uri, self.run_id, self.waiting, self.patience)
