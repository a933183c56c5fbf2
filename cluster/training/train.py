"""Ray Train: a TorchTrainer around the core training loop, for both stages."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil

import ray.train
import ray.train.torch
import torch
import torch.distributed
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
from torch import Tensor

from bld_core.autoencoder.critic import PatchCritic
from bld_core.autoencoder.perceptual import Perceptual, load_perceptual
from bld_core.data.skipped import Skipped, above
from bld_core.errors import NonFiniteError, UserError
from bld_core.precision import ieee_float32
from bld_core.splitmix import key_of
from bld_core.storage import files
from bld_core.storage.files import FullError
from bld_core.trained import AutoencoderRecord, read_autoencoder
from bld_core.training.checkpoint import CONFIG, save_model
from bld_core.training.loop import Report, TrainState, make_state, train
from cluster.config.artifacts import open_encoded
from cluster.config.experiment import Experiment
from cluster.console import Progress, on_terminal
from cluster.data.check import check_data
from cluster.data.ingest import check_feed
from cluster.lineage import lineage
from cluster.nodes.watch import died, node_name, nodes_watched
from cluster.ray_private.core import bar
from cluster.ray_private.train import PlainTrainer, death, quiet_training, quiet_training_worker
from cluster.runtime import ClusterConfig, unwrap
from cluster.stages import Stage, open_stage
from cluster.storage import run_storage
from cluster.tracking.load import SystemLoad
from cluster.tracking.runs import Run
from cluster.training.checkpoints import (
    FINAL,
    Keeper,
    candidates,
    chosen_weights,
    keep_snapshot,
    newest_step,
    resume,
    training_faults,
)
from cluster.training.history import Evaluated, keep_evaluation
from cluster.training.notices import Notices
from cluster.training.onward import TrainedStage, begin_with, first_checkpoint
from cluster.training.tasks import AutoencoderTask, ImageTask, PriorTask, Task, Worker

_LONGEST_COLLECTIVE, _DAY = 1800, 86_400  # seconds
_RESIZE_S = 30.0  # between two looks for nodes that are new: each change costs the steps since the last checkpoint
_RAYS_LIST = "checkpoint_manager_snapshot.json"
_SURE = 0.2  # bits of entropy a bit of a code, above which stage 1 ends with a warning
_ENTROPY_WEIGHT = 0.02  # of the entropy term, to begin with
_SMALL = 64  # pixels: enough to see whether a network takes an image


def train_autoencoder(
    experiment: Experiment,
    fresh: bool = False,
    mend: bool = False,
    told: UserCallback | None = None,
    start: str = "",
    exploited: str = "",
) -> str:
    """Stage 1: image shards -> <folder>/autoencoder/final.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.
        mend: read all that it made before, and make again what is damaged.
        told: hears of each evaluation, which is then also kept in the stage's folder: see `read_history`.
        start: experiment folder of a shorter training of the same settings, from which this one goes on.
        exploited: checkpoint of a shorter training whose settings may have been others, from which this one goes on.

    Returns:
        The folder of the finished model.

    Raises:
        UserError: bad input, each with its remedy, before anything is started.
    """
    shards = check_data(experiment).train
    check_feed(shards, experiment.cluster.replicas)
    check_losses(experiment)
    fingerprint = {
        **experiment.fingerprint("data", "augmentation", "autoencoder", "loss", "autoencoder_training"),
        "shards": files.fingerprint(shards),
    }
    first = first_checkpoint(experiment, "autoencoder", fingerprint, start, fresh=fresh, exploited=exploited)
    faults = partial(training_faults, files.join(experiment.folder, "autoencoder"), mend)
    result, reads = f"{FINAL}/{CONFIG}", shards[:1]
    with open_stage(
        experiment, "autoencoder", fingerprint, result, fresh=fresh, faults=faults, reads=reads, decodes=True
    ) as stage:
        if not stage.done:
            config = {
                "autoencoder": asdict(experiment.autoencoder),
                "code_shape": experiment.code_shape,
                "image_size": experiment.data.image_size,
                "channels": experiment.data.channels,
                "data_hash": fingerprint["shards"],
            }
            stage.run.tags({"bld.data_hash": fingerprint["shards"]})
            _begin(stage, "autoencoder", first)
            fit(stage, AutoencoderTask(experiment), config, told)
            sys.stderr.write(unsure_bits(experiment, read_autoencoder(experiment.folder)))
        return stage.url(FINAL)


def unsure_bits(experiment: Experiment, trained: AutoencoderRecord) -> str:
    """What is to be said of bits of which the encoder is not sure; nothing where it is."""
    entropy = trained.metrics.get("val_bit_entropy", 0.0)
    if entropy <= _SURE:
        return ""
    bits = math.prod(trained.code_shape)
    return (
        f"autoencoder: its bits are unsure, with an entropy of {entropy:.3f} bits each: {entropy * bits:.0f} of the "
        f"{bits} bits of a drawn code are noise, which no prior can predict, and its bound cannot be below "
        f"{entropy:.3f}; train with a higher loss.entropy, which is {experiment.loss.entropy:g} (try "
        f"{max(_ENTROPY_WEIGHT, 2 * experiment.loss.entropy):g}), before the data set is encoded\n"
    )


def check_losses(experiment: Experiment) -> None:
    """Find what the losses need, and try the critic on one image without content, before anything is started."""
    loss, data = experiment.loss, experiment.data
    if loss.perceptual:
        perceptual = load_perceptual(loss, torch.device("cpu"))
        image = torch.zeros(1, data.channels, data.image_size, data.image_size)
        if isinstance(perceptual, Perceptual):
            perceptual(image[..., :_SMALL, :_SMALL], image[..., :_SMALL, :_SMALL])
    if loss.adversarial:
        with torch.device("meta"):
            PatchCritic(loss, data.channels)(torch.empty(1, data.channels, data.image_size, data.image_size))


def train_prior(
    experiment: Experiment,
    fresh: bool = False,
    source: str = "",
    mend: bool = False,
    told: UserCallback | None = None,
    start: str = "",
    exploited: str = "",
) -> str:
    """Stage 2: cached latents -> <folder>/prior/final.

    Args:
        experiment: its configuration.
        fresh: start over, deleting what the stage made before.
        source: experiment folder of the latents and their autoencoder; by default the experiment's own.
        mend: read all that it made before, and make again what is damaged.
        told: as in `train_autoencoder`.
        start: as in `train_autoencoder`.
        exploited: as in `train_autoencoder`.

    Returns:
        The folder of the finished model.

    Raises:
        MissingError: no autoencoder or no latents yet.
        UserError: latents of another autoencoder, or other bad input, before anything is started.
    """
    source = source or experiment.folder
    found = open_encoded(experiment, source)
    assert found.codes is not None, "`open_encoded` opens them"
    autoencoder, latents = found.autoencoder, found.codes.train
    fingerprint = experiment.fingerprint("prior", "diffusion", "prior_training") | {"latents_hash": latents.hash}
    window = latents.window(experiment.cluster.latents_gb)
    if window < len(latents.shards):  # it streams, in an order that depends on the window
        fingerprint["latents_window"] = window
    first = first_checkpoint(experiment, "prior", fingerprint, start, fresh=fresh, exploited=exploited)
    faults = partial(training_faults, files.join(experiment.folder, "prior"), mend)
    with open_stage(experiment, "prior", fingerprint, f"{FINAL}/{CONFIG}", fresh=fresh, faults=faults) as stage:
        if not stage.done:
            names = list(latents.manifest.classes)[: experiment.prior.classes]
            config = {
                "prior": asdict(experiment.prior),
                "diffusion": asdict(experiment.diffusion),
                "sampling": asdict(experiment.sampling),
                "autoencoder_hash": autoencoder.codes_hash,
                "latents_hash": latents.hash,
                **({"class_names": names} if names else {}),
            }
            stage.run.tags(lineage(autoencoder) | {"bld.latents_hash": latents.hash})
            _begin(stage, "prior", first)
            fit(stage, PriorTask(experiment, source, found.codes), config, told)
        return stage.url(FINAL)


def _begin(stage: Stage, name: TrainedStage, checkpoint: str) -> None:
    """Let a stage go on from the checkpoint of another training, where there is one."""
    if checkpoint:
        begin_with(stage.experiment, name, checkpoint)
        stage.run.tags({"bld.started_from": checkpoint})


def fit(stage: Stage, task: Task, facts: Mapping[str, object], told: UserCallback | None = None) -> None:
    """Train, resuming where a checkpoint lies in the stage's folder, and write final/ from the averaged weights.

    Args:
        stage: open.
        task: what is trained.
        facts: what config.json is to say beside run and metrics; JSON values.
        told: hears of each evaluation, which is then also kept in the stage's folder.
    """
    cluster = stage.experiment.cluster
    quiet_training()
    # Early versions told Ray of their checkpoints. Ray stops where one of its list is gone; the folder is what counts.
    files.remove(stage.url(_RAYS_LIST))
    trainer = PlainTrainer(
        _work,
        reached=partial(newest_step, stage.folder),
        batch=task.training.batch_size // task.training.accumulate,
        train_loop_config={"job": Job(task, stage.name, stage.folder, stage.run, on_terminal(), told is not None)},
        scaling_config=ScalingConfig(
            num_workers=(cluster.fewest, cluster.workers) if cluster.min_workers else cluster.workers,
            use_gpu=cluster.gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpu_share} if cluster.gpu else {}),
            label_selector=cluster.worker_nodes or None,
            elastic_resize_monitor_interval_s=_RESIZE_S,
        ),
        run_config=RunConfig(
            name=stage.name,
            **run_storage(stage.experiment.folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[told] if told else [],
        ),
        # Rank 0 waits for MLflow between two collectives, and each worker for the others' share of an evaluation.
        torch_config=TorchConfig(timeout_s=_LONGEST_COLLECTIVE + ceil(min(stage.experiment.tracking.patience, _DAY))),
    )
    need = cluster.training_need(decodes=isinstance(task, ImageTask))
    try:
        with nullcontext() if cluster.in_process else nodes_watched(need, cluster.patience):
            result = trainer.fit()
    except TrainingFailedError as error:
        if (failure := _user_error(error) or _deaths(error, cluster)) is not None:
            raise failure from error
        raise
    if result.return_value is not None:
        raise result.return_value
    metrics, weights = chosen_weights(stage.folder, task.training)
    final = stage.url(FINAL)
    digest = save_model(final, weights, {**facts, "run": stage.run.run_id, "metrics": metrics})
    stage.run.tags({f"bld.{stage.name}_hash": digest})


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


@dataclass(frozen=True)
class Job:
    """What every worker of a training is told.

    Attributes:
        task: what is trained.
        label: of the progress lines.
        folder: of the stage.
        run: the MLflow run.
        bar: whether a person watches the command.
        told: whether somebody hears of its evaluations, and reads them.
    """

    task: Task
    label: str
    folder: str
    run: Run
    bar: bool
    told: bool = False


def _work(settings: dict[str, Job]) -> Exception | None:
    """One training worker; returns why all of them have stopped early: to start again would not help."""
    job = settings["job"]
    task = job.task
    training = task.training
    task.experiment.cluster.limit_threads()
    if remote := task.experiment.cluster.workers > 0:
        quiet_training_worker()
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), _device(task.experiment.cluster))
    torch.manual_seed(key_of(task.experiment.seed, "initial weights"))
    buckets = {"gradient_as_bucket_view": True}
    wrap = partial(ray.train.torch.prepare_model, move_to_device=worker.device, parallel_strategy_kwargs=buckets)
    state = make_state(task.network(), training, wrap)
    if (critic := task.critic()) is not None:
        state.critic = make_state(*critic, wrap)
    positions = resume(job.label, job.folder, state, worker)
    run: Run | None = job.run if worker.rank == 0 else None
    load = SystemLoad() if worker.rank == 0 else None
    shown = bar(remote) if job.bar else None
    progress = Progress(job.label, training.steps, state.step, shown) if worker.rank == 0 else None
    nodes = tuple(worker.said_by_all(node_name()).splitlines()) if job.told else ()
    batches = task.batches(state.step, positions, worker)
    notices = Notices()
    metrics: dict[str, float] = {}
    try:
        with Keeper(job.folder) as keeper:
            for report in train(state, batches, task.objective(worker), training):
                last = report.step == training.steps
                logs = last or report.step % training.log_every == 0
                notice = notices.new() if logs else ""
                keep = last or report.step % training.checkpoint_every == 0 or notice != ""
                if notice and worker.rank == 0:
                    sys.stderr.write(f"{job.label}: {notice}; keeping a checkpoint of step {report.step}\n")
                positions = _gather(task.position(), worker) if keep else []  # before what takes long on rank 0 alone
                if logs:
                    terms = _logged(report, state, task, worker)
                    if run is not None and load is not None and progress is not None:
                        named = {f"train_{name}": value for name, value in terms.items()}
                        run.metrics(named | load.metrics(), report.step)
                        progress.update(report.step, terms)
                    if _too_many(task, report.step, terms):
                        return UserError(
                            f"{worker.said_by_all(str(task.skipped))}; {above(task.experiment.data.max_skipped)}"
                        )
                due = last or report.step % training.evaluate_every == 0
                snapshot = bool(training.ema_lengths) and (last or report.step % training.snapshot_every == 0)
                if snapshot and worker.rank == 0:
                    keep_snapshot(job.folder, state)
                if due:
                    metrics = _evaluate(job, state, worker, nodes)
                if due or keep or snapshot:
                    failure = _meet(state, metrics, positions, worker, keeper, last=last, tell=job.told and due)
                    if failure is not None:
                        return failure
    except NonFiniteError as error:  # on every worker at once
        return NonFiniteError(worker.said_by_all(str(error)), *error.settings)
    finally:
        batches.close()  # a stream of Ray Data that is open when Ray ends starts it again, and the process never ends
    if progress is not None:
        progress.close()
    return None


def _device(cluster: ClusterConfig) -> torch.device:
    """Where this worker trains; Ray's local mode, of 0 workers, would take a GPU wherever there is one."""
    return ray.train.torch.get_device() if cluster.gpu else torch.device("cpu")


def _logged(report: Report, state: TrainState, task: Task, worker: Worker) -> dict[str, float]:
    """The step's losses, the mean over all workers; how the step went; and what all of them have left out."""
    terms = torch.stack([*report.terms.values()]).double()
    values = torch.cat([terms, terms.new_tensor([task.left_out() * worker.world])])
    if worker.world > 1:
        torch.distributed.all_reduce(values)
    *means, left_out = (values / worker.world).tolist()
    logged = dict(zip(report.terms, means, strict=True))
    logged |= {"gradient_norm": float(report.gradient_norm), "learning_rate": report.learning_rate}
    if state.skipped:
        logged["skipped"] = state.skipped
    if left_out:
        logged["skipped_images"] = left_out
    return logged


def _too_many(task: Task, step: int, logged: dict[str, float]) -> bool:
    """Whether all workers together have left out too many images; each of them gets the same answer."""
    left_out = round(logged.get("skipped_images", 0))
    account = Skipped(step * task.training.batch_size + left_out, Counter(images=left_out))
    return account.too_many(task.experiment.data.max_skipped, whole=False)


def _evaluate(job: Job, state: TrainState, worker: Worker, nodes: tuple[str, ...]) -> dict[str, float]:
    """Evaluate the averaged weights, the best of them: each worker a part of the held-out data; rank 0 tells of it.

    After the last step those that are made of the snapshots in the stage's folder are among them.
    """
    task, run = job.task, job.run
    averages = candidates(state, job.folder, task.training, worker)
    networks = [copy.deepcopy(state.module).eval() for _ in averages]
    for network, (_, _, weights) in zip(networks, averages, strict=True):
        network.load_state_dict(weights)
        if worker.world > 1:  # statistics, as of batch norm, are each replica's own; those of rank 0 are kept
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
    with torch.no_grad(), ieee_float32():
        best = task.choose(networks, worker) if len(networks) > 1 else 0
        metrics, pictures, per_code = task.evaluate(networks[best], worker)
    name, value, _ = averages[best]
    metrics[name] = value
    if worker.rank:
        return metrics
    run.metrics(metrics, state.step)
    for name, picture in pictures.items():
        run.picture(picture, f"{name}/step-{state.step:07d}.png")
    if job.told:
        keep_evaluation(job.folder, Evaluated(state.step, metrics, per_code, nodes))
    return metrics


def _meet(
    state: TrainState,
    metrics: dict[str, float],
    positions: list[list[int]],
    worker: Worker,
    keeper: Keeper,
    *,
    last: bool,
    tell: bool,
) -> FullError | None:
    """All ranks wait for rank 0 in Ray's report, which has no time limit; given positions, it keeps a checkpoint.

    Returns on every rank that there is no space for one, which no restart would change; where the disk does not tell,
    the write beside training finds out, which is known a meeting later, and after the last step at once. It is written
    by us, where an upload that fails is an error: pyarrow, which Ray would copy it with, closes remote files without
    looking whether that went well. Ray is not told of it.
    """
    full = ""
    if worker.rank == 0:
        try:
            keeper.look()
            if positions:
                keeper.keep(state, positions, metrics)
            if last:
                keeper.wait()
        except FullError as error:
            full = str(error)
    ray.train.report({"step": state.step} | (metrics if tell else {}))
    full = worker.said_by_all(full)
    return FullError(full) if full else None


def _gather(position: list[int], worker: Worker) -> list[list[int]]:
    """Every worker's position, in the order of the ranks."""
    if worker.world == 1:
        return [position]
    mine = torch.tensor(position, dtype=torch.int64, device=worker.device)
    everyone: list[Tensor] = [torch.empty_like(mine) for _ in range(worker.world)]
    torch.distributed.all_gather(everyone, mine)
    return [other.tolist() for other in everyone]
