"""How busy a machine is, in MLflow's names."""

from __future__ import annotations

import contextlib
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor


class SystemLoad:
    """How busy this machine is: MLflow's own monitors and names, without their thread and their clock."""

    def __init__(self) -> None:
        self._monitors: list[CPUMonitor | DiskMonitor | NetworkMonitor | GPUMonitor] = [
            CPUMonitor(),
            DiskMonitor(),
            NetworkMonitor(),
        ]
        with contextlib.suppress(RuntimeError):  # no GPU
            self._monitors.append(GPUMonitor())
        self.metrics()  # the use of the CPU is a mean since the call before

    def metrics(self) -> dict[str, float]:
        """Metrics named system/...: CPU since the call before, network since the object was made, the rest now."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            named: dict[str, Any] = monitor.aggregate_metrics()
            found |= {f"system/{name}": value for name, value in named.items()}
        return found
