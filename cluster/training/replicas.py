"""Ray Train: a TorchTrainer around the work of each training worker, whose weights are copies or shared out."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig

from bld_core.errors import UserError
from bld_core.storage import files
from bld_core.training.sharding import shard
from cluster.nodes.watch import died
from cluster.ray_private.core import remote_bar
from cluster.ray_private.train import PlainTrainer, death, quiet_training, quiet_training_worker
from cluster.runtime import ClusterConfig, unwrap
from cluster.storage import run_storage
from cluster.training.checkpoints import newest_step
from cluster.training.notices import Notices
from cluster.training.tasks import Worker
from cluster.training.work import Job, Peers, Told, work

_LONGEST_COLLECTIVE, _DAY = 1800, 86_400  # seconds
_RESIZE_S = 30.0  # between two looks for nodes that are new: each change costs the steps since the last checkpoint


def train_replicas(job: Job, told: Told | None) -> Exception | None:
    """Train on the workers of Ray Train; returns why all of them have stopped early.

    Args:
        job: what they are told.
        told: hears of each evaluation, from Ray Train's controller, in a process of its own.

    Raises:
        UserError: a mistake of the user's, or they have died too often.
    """
    experiment, training = job.task.experiment, job.task.training
    cluster = experiment.cluster
    quiet_training()
    trainer = PlainTrainer(
        _work,
        reached=partial(newest_step, job.folder),
        batch=training.batch_size // training.accumulate,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(cluster.fewest, cluster.workers) if cluster.min_workers else cluster.workers,
            use_gpu=cluster.gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpu_share} if cluster.gpu else {}),
            label_selector=cluster.worker_nodes or None,
            elastic_resize_monitor_interval_s=_RESIZE_S,
        ),
        run_config=RunConfig(
            name=job.label,
            **run_storage(experiment.folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[_Controller(told)] if told else [],
        ),
        # Rank 0 waits for MLflow between two collectives, and each worker for the others' share of an evaluation.
        torch_config=TorchConfig(timeout_s=_LONGEST_COLLECTIVE + ceil(min(experiment.tracking.patience, _DAY))),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        if (failure := _user_error(error) or _deaths(error, cluster)) is not None:
            raise failure from error
        raise


class _Controller(UserCallback):
    """Ray Train's controller hears of each evaluation, and tells it on."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called after each report, of which some have no evaluation."""
        if metrics[0]:
            self._told(metrics[0])


def _work(settings: dict[str, Job]) -> Exception | None:
    """One training worker; returns why all of them have stopped early: to start again would not help."""
    job = settings["job"]
    quiet_training_worker()
    context = ray.train.get_context()
    # Asked on a machine with GPUs, Ray names one, whether it was asked for or not.
    device = ray.train.torch.get_device() if job.task.experiment.cluster.gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    training, buckets = job.task.training, {"gradient_as_bucket_view": True}
    wrap = partial(ray.train.torch.prepare_model, move_to_device=device, parallel_strategy_kwargs=buckets)
    if training.fsdp:
        wrap = partial(shard, device=device, reduce_precision=training.reduce_precision)
    peers = Peers(wrap, ray.train.report, Notices().new)
    return work(job, worker, peers, remote_bar())


def _user_error(error: TrainingFailedError) -> UserError | None:
    """What a training says that failed by a user's mistake, or as storage was away: the same as any other stage."""
    failures = [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else []
    failures += [error.controller_failure] if isinstance(error, ControllerError) else []
    found = [files.full(failure) or failure for failure in map(unwrap, failures)]
    return next((failure for failure in found if isinstance(failure, UserError)), None)


def _deaths(error: TrainingFailedError, cluster: ClusterConfig) -> UserError | None:
    """What to say of a training whose workers, or their nodes, have died too often; the others fail by that, too."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    deaths = [found for failure in failures if (found := death(failure)) is not None]
    if not deaths:
        return None
    return died("a training worker" if len(deaths) == 1 else "training workers", cluster.max_failures + 1, deaths[0])
