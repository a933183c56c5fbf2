"""What each training worker does: its part of every step, and its share of evaluations and checkpoints."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed
import tqdm
from torch import Tensor, nn

from bld_core.data.skipped import Skipped, above
from bld_core.errors import NonFiniteError, UserError
from bld_core.precision import ieee_float32
from bld_core.splitmix import key_of
from bld_core.storage.files import FullError
from bld_core.training.checkpoint import snapshot
from bld_core.training.loop import Report, TrainState, make_state, train
from bld_core.training.sharding import is_sharded, whole
from cluster.console import Progress
from cluster.nodes.watch import node_name
from cluster.tracking.address import RunAddress
from cluster.training.checkpoints import Keeper, candidates, keep_snapshot, resume
from cluster.training.history import Evaluated, keep_evaluation
from cluster.training.tasks import Task, Worker

if TYPE_CHECKING:
    from cluster.tracking.load import SystemLoad
    from cluster.tracking.runs import Run

Told = Callable[[dict[str, float]], None]
"""Hears of each evaluation: its step and its metrics."""


class Peers(NamedTuple):
    """How a worker goes along with the others.

    Attributes:
        wrap: a network as the replica that this worker trains.
        meet: waits, without a time limit, until all workers have come here; takes what rank 0 has to tell: step and
            metrics of an evaluation, or nothing.
        notice: what is new of nodes that will be taken away; "" for nothing.
    """

    wrap: Callable[[nn.Module], nn.Module]
    meet: Callable[[dict[str, float]], None]
    notice: Callable[[], str]


@dataclass(frozen=True)
class Job:
    """What every worker of a training is told.

    Attributes:
        task: what is trained.
        label: of the progress lines.
        folder: of the stage.
        run: where the MLflow run is, which rank 0 writes.
        bar: whether a person watches the command.
        told: whether somebody hears of its evaluations, and reads them.
    """

    task: Task
    label: str
    folder: str
    run: RunAddress
    bar: bool
    told: bool = False


def work_alone(job: Job, told: Told | None) -> Exception | None:
    """Train in this process, as the only worker; returns why the training has stopped early.

    Args:
        job: what is trained.
        told: hears of each evaluation.
    """
    cluster = job.task.experiment.cluster
    cluster.check_device()
    device = torch.device("cuda:0" if cluster.gpu else "cpu")

    def placed(module: nn.Module) -> nn.Module:
        return module.to(device)

    def meet(evaluated: dict[str, float]) -> None:
        if told is not None and evaluated:
            told(evaluated)

    def no_notice() -> str:
        return ""

    peers = Peers(placed, meet, no_notice)
    return work(job, Worker(0, 1, device), peers, tqdm.tqdm)


def work(job: Job, worker: Worker, peers: Peers, bar: type) -> Exception | None:
    """One training worker; returns why all of them have stopped early: to start again would not help.

    Args:
        job: what all workers are told.
        worker: this one.
        peers: how it goes along with the others.
        bar: the class of its progress bar.
    """
    task, training = job.task, job.task.training
    task.experiment.cluster.limit_threads()
    torch.manual_seed(key_of(task.experiment.seed, "initial weights"))
    state = make_state(task.network(), training, peers.wrap)
    if (critic := task.critic()) is not None:
        state.critic = make_state(*critic, peers.wrap)
    positions = resume(job.label, job.folder, state, worker)
    run: Run | None = None
    load: SystemLoad | None = None
    progress: Progress | None = None
    if worker.rank == 0:
        from cluster.tracking.load import SystemLoad  # imports MLflow, which no other rank needs

        run, load = job.run.open(), SystemLoad()
        progress = Progress(job.label, training.steps, state.step, bar if job.bar else None)
    nodes = tuple(worker.said_by_all(node_name()).splitlines()) if job.told else ()
    batches = task.batches(state.step, positions, worker)
    metrics: dict[str, float] = {}
    try:
        with Keeper(job.folder) as keeper:
            for report in train(state, batches, task.objective(worker), training):
                last = report.step == training.steps
                logs = last or report.step % training.log_every == 0
                notice = peers.notice() if logs else ""
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
                snaps = bool(training.ema_lengths) and (last or report.step % training.snapshot_every == 0)
                if snaps:
                    keep_snapshot(job.folder, state, worker)
                if due:
                    metrics = _evaluate(job, run, state, worker, nodes)
                if due or keep or snaps:
                    full = _keep(state, metrics, positions, keeper, worker, peers, last=last)
                    peers.meet({"step": state.step} | metrics if job.told and due else {})
                    if full := worker.said_by_all(full):
                        return FullError(full)
    except NonFiniteError as error:  # on every worker at once
        return NonFiniteError(worker.said_by_all(str(error)), *error.settings)
    finally:
        batches.close()  # a stream of Ray Data that is open when Ray ends starts it again, and the process never ends
    if progress is not None:
        progress.close()
    return None


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


def _evaluate(job: Job, run: Run | None, state: TrainState, worker: Worker, nodes: tuple[str, ...]) -> dict[str, float]:
    """Evaluate the averaged weights, the best of them: each worker a part of the held-out data; rank 0 tells `run`.

    After the last step those that are made of the snapshots in the stage's folder are among them.
    """
    task = job.task
    averages = candidates(state, job.folder, task.training, worker)
    # One network takes their weights in turn: where they are shared out, no more of them is whole at a time.
    network = (task.network().to(worker.device) if _sharded(state) else copy.deepcopy(state.module)).eval()

    def average(number: int) -> nn.Module:
        for name, weight in network.state_dict().items():
            weight.copy_(whole(averages[number][2][name]))
        if worker.world > 1:  # statistics, as of batch norm, are each replica's own; those of rank 0 are kept
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        return network

    with torch.no_grad(), ieee_float32():
        best = task.choose(map(average, range(len(averages))), worker) if len(averages) > 1 else 0
        metrics, pictures, per_code = task.evaluate(average(best), worker)
    name, value, _ = averages[best]
    metrics[name] = value
    if run is None:
        return metrics
    run.metrics(metrics, state.step)
    for name, picture in pictures.items():
        run.picture(picture, f"{name}/step-{state.step:07d}.png")
    if job.told:
        keep_evaluation(job.folder, Evaluated(state.step, metrics, per_code, nodes))
    return metrics


def _keep(
    state: TrainState,
    metrics: dict[str, float],
    positions: list[list[int]],
    keeper: Keeper,
    worker: Worker,
    peers: Peers,
    *,
    last: bool,
) -> str:
    """Given positions, keep a checkpoint; returns that there is no space for one, which no restart would change.

    Rank 0 writes it; where weights are shared out, every worker has a part in the copy. Where the disk does not tell,
    the write beside training finds out, which is known a meeting later, and after the last step at once. It is written
    by us, where an upload that fails is an error: pyarrow, which Ray would copy it with, closes remote files without
    looking whether that went well. Ray is not told of it.
    """
    first = worker.rank == 0
    full = _full(keeper.wait if positions else keeper.look) if first else ""
    if positions and _sharded(state):
        peers.meet({})  # the first may have waited for longer than a collective may take
    if positions and (first or _sharded(state)):
        saved = snapshot(state, {"positions": positions, "metrics": metrics})
        if first and not full:
            full = _full(partial(keeper.keep, saved))
    if first and last and not full:
        full = _full(keeper.wait)
    return full


def _full(act: Callable[[], None]) -> str:
    """Do something; returns that there is no space for it."""
    try:
        act()
    except FullError as error:
        return str(error)
    return ""


def _sharded(state: TrainState) -> bool:
    """Whether the workers share out the weights."""
    return any(is_sharded(weight) for weight in state.module.parameters())


def _gather(position: list[int], worker: Worker) -> list[list[int]]:
    """Every worker's position, in the order of the ranks."""
    if worker.world == 1:
        return [position]
    mine = torch.tensor(position, dtype=torch.int64, device=worker.device)
    everyone: list[Tensor] = [torch.empty_like(mine) for _ in range(worker.world)]
    torch.distributed.all_gather(everyone, mine)
    return [other.tolist() for other in everyone]
