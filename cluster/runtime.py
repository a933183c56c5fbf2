"""The Ray runtime: a cluster that is already there, or a local one for this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from bld_core.errors import UserError
from cluster.console import Progress
from cluster.nodes.labels import NODE_ID, check_selector
from cluster.nodes.placement import (
    Bundle,
    Need,
    check_match,
    check_nodes,
    cluster_has,
    cluster_has_free,
    nodes_there,
    part_of_cluster,
    rooms,
)
from cluster.nodes.watch import LOOK_S, Watch, died, say_if_busy, wait_until_held
from cluster.ray_private.core import local_cluster, set_environment

DECODE_CPUS = 0.25
"""Cores reserved by one task that decodes a block of images."""
_DECODE_TASKS_BESIDE = 2  # Ray Data looks for finished tasks every 0.1 s: no core waits until then for its next block
_READ_AHEAD = 64  # MiB: a block is at most 16 decoded and 16 as files, and waits before and behind its task


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where and how wide the work runs.

    Args:
        address: Ray cluster to connect to, "auto" for the one on this machine; empty uses RAY_ADDRESS (set inside
            `ray job submit`) or else starts a local one that ends with the command.
        workers: training workers, and actors of the encode and evaluation jobs. 0
            trains in the process of the command, without the processes that Ray Train starts: the same weights some
            20 seconds earlier, for small experiments on one machine; the other jobs then take one actor, or, where
            decode_tasks is 0, too, that process: Ray is not started, and a debugger sees everything. A sweep starts it,
            and each of its trials then trains in one process of Ray Tune's, which the next trial takes over, and hears
            of no node that will be taken away.
        min_workers: fewest training workers; 0: always `workers`. With it a training that has begun goes on with as
            many as the cluster holds, of the numbers up to `workers` that divide the batch: a lost node shrinks the
            group, a new one lets it grow within a minute, and each change goes on from the last checkpoint. In stage 2
            every step has the same samples whatever the number; stage 1 begins its epoch again, and sees some twice.
        cpus_per_worker: CPU cores reserved for each worker; leave some for the tasks that decode images.
        decode_tasks: cores that decode images for each training worker of stage 1, where two more blocks of images are
            under way, so that none of them waits for the scheduler; and for each actor that encodes or compares images,
            which works on so many shards at a time. 0 decodes in the worker, between its steps.
        gpu: give each worker one GPU.
        gpu_share: of a GPU, for each worker where `gpu` is set: below 1, small trials of a sweep, each of one worker,
            or replicas of the studio stand side by side on one.
        worker_nodes: labels of the nodes that take workers, by Ray's label selectors: {pool: gpu}, {pool: "!spot"},
            {pool: "in(a,b)"} or {pool: "!in(a,b)"}; empty: all nodes. A node has its labels of `ray start --labels`,
            and of Ray itself ray.io/accelerator-type, such as H100.
        decode_nodes: labels of the nodes that decode images for them; empty: all nodes. Of these, that of the worker
            which takes the images comes first, while it has a core free.
        latents_gb: memory of each training worker of stage 2 that packed codes may take, in units of 10^9 bytes; a
            larger data set streams through it, in an order that depends on it.
        max_failures: times that training restarts from the same checkpoint after a worker or node has died (a newer one
            begins the count again), and that a piece of work of another job is begun again; a trial of a sweep without
            workers is begun again so often in all, from its checkpoint, after failures of any kind.
        patience: seconds to wait for nodes that were there and are gone, before the command ends.
        wait_for_nodes: seconds to wait, before the work begins, for nodes that are yet to join; 0 refuses at once what
            the cluster does not hold, nor its autoscaler, if it has one, can make: that is asked, and waited for, for
            `patience` seconds.
    """

    address: str = ""
    workers: int = 1
    min_workers: int = 0
    cpus_per_worker: float = 1.0
    decode_tasks: int = 2
    gpu: bool = False
    gpu_share: float = 1.0
    worker_nodes: dict[str, str] = field(default_factory=dict[str, str])
    decode_nodes: dict[str, str] = field(default_factory=dict[str, str])
    latents_gb: float = 8.0
    max_failures: int = 3
    patience: float = 1800.0
    wait_for_nodes: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(
                f"cluster.workers is {self.workers}; it must be at least 1, or 0 to train in the command's own process"
            )
        if not 0 <= self.min_workers <= self.workers:
            raise UserError(
                f"cluster.min_workers is {self.min_workers}; it must be from 0, which is always all of them, to "
                f"cluster.workers, which is {self.workers}"
            )
        if self.address.startswith("ray://"):
            raise UserError(
                f"cluster.address (or RAY_ADDRESS) is {self.address!r}: Ray's client runs no training; give HOST:PORT "
                "of the cluster on one of its nodes, or submit the command as a job: ray job submit --working-dir . "
                "-- python ..."
            )
        if self.decode_tasks < 0:
            raise UserError(
                f"cluster.decode_tasks is {self.decode_tasks}; it must be at least 1, or 0 to decode in the workers"
            )
        if not 0 < self.gpu_share <= 1:
            raise UserError(f"cluster.gpu_share is {self.gpu_share}; it must be above 0 and at most 1")
        if self.gpu_share < 1 and self.workers > 1:
            raise UserError(
                f"cluster.gpu_share is {self.gpu_share} with cluster.workers {self.workers}: two workers of a training "
                "might share a GPU, which NCCL, by which they speak, refuses: set one of the two to 1"
            )
        check_selector("cluster.worker_nodes", self.worker_nodes)
        check_selector("cluster.decode_nodes", self.decode_nodes)
        if self.cpus_per_worker <= 0:
            raise UserError(f"cluster.cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        if not self.patience >= 0:
            raise UserError(f"cluster.patience is {self.patience}; it must be 0 seconds or more")
        if not self.wait_for_nodes >= 0:
            raise UserError(f"cluster.wait_for_nodes is {self.wait_for_nodes}; it must be 0 seconds or more")
        if self.latents_gb <= 0:
            raise UserError(f"cluster.latents_gb is {self.latents_gb}; it must be above 0")

    @property
    def blocks(self) -> int:
        """Blocks of images that are decoded at the same time for each training worker of stage 1."""
        return self.decode_tasks + _DECODE_TASKS_BESIDE

    @property
    def shards_at_once(self) -> int:
        """Shards that an actor works on at the same time, while the images of each are decoded for it."""
        return max(1, self.decode_tasks)

    @property
    def read_ahead(self) -> int:
        """Bytes of shared memory for all these blocks together; with half of it, images come more slowly."""
        return self.blocks * _READ_AHEAD << 20

    @property
    def replicas(self) -> int:
        """Processes that work at the same time."""
        return max(1, self.workers)

    @property
    def device(self) -> str:
        """Where a worker's networks run."""
        return "cuda" if self.gpu else "cpu"

    @property
    def joined(self) -> str:
        """The address of the cluster that is there already; "" where a local one is started."""
        return self.address or os.environ.get("RAY_ADDRESS", "")

    @property
    def in_process(self) -> bool:
        """Whether the process of the command does all of the work of a stage, without Ray."""
        return not self.workers and not self.decode_tasks

    @property
    def gpus_per_worker(self) -> float:
        """GPUs, or the share of one, that each worker takes."""
        return self.gpu_share if self.gpu else 0

    @property
    def need(self) -> Need:
        """What all workers, and one task that decodes, reserve: together, and each on its nodes."""
        workers = Need(self.replicas * self.cpus_per_worker, self.replicas * self.gpus_per_worker, (self.worker_nodes,))
        decoding = Need(self.decode_cpus, 0, (self.decode_nodes,))
        on = (self.worker_nodes, self.decode_nodes) if self.decode_tasks else (self.worker_nodes,)
        parts = tuple(part for part in (workers, decoding) if part.cpus and all(part.on))
        return Need(workers.cpus + decoding.cpus, workers.gpus, on if all(on) else (), parts)

    @property
    def bundles(self) -> list[Bundle]:
        """The same, each part as a node has to hold it."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpu else {}
        decodes = [Bundle({"CPU": self.decode_cpus}, self.decode_nodes)] if self.decode_tasks else []
        return [Bundle({"CPU": self.cpus_per_worker} | gpus, self.worker_nodes)] * self.replicas + decodes

    @property
    def decode_cpus(self) -> float:
        """What one task that decodes reserves; 0 where there is none."""
        return DECODE_CPUS if self.decode_tasks else 0.0

    @property
    def fewest(self) -> int:
        """Training workers without which it does not go on."""
        return self.min_workers or self.workers

    def training_need(self, *, decodes: bool) -> Need:
        """What the fewest training workers reserve, and one task that decodes, where the training has some."""
        return replace(self.of_work(decodes=decodes), workers=self.fewest).need

    def of_work(self, *, decodes: bool) -> ClusterConfig:
        """The settings for work that decodes by tasks; or for what does not, for which `decode_nodes` may be gone."""
        return self if decodes else replace(self, decode_nodes={})

    @property
    def decode_options(self) -> dict[str, Any]:
        """Where Ray is to run the tasks that decode for this process: on its node while it has cores, or elsewhere."""
        if not self.decode_tasks:
            return {}
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        return {
            "label_selector": here | self.decode_nodes,
            "fallback_strategy": [{"label_selector": self.decode_nodes}],
        }

    def check_device(self) -> None:
        """See that the GPU is there that work in this process is to have; elsewhere Ray knows.

        Raises:
            UserError: it is not.
        """
        if self.gpu and not torch.cuda.is_available():
            raise UserError(
                "cluster.gpu is true, but this process, which trains where cluster.workers is 0, sees no GPU: set it "
                "to false, or cluster.workers to 1 or more"
            )

    def limit_threads(self) -> None:
        """Keep this worker's CPU arithmetic to the cores reserved for it, of those that there are."""
        torch.set_num_threads(max(1, min(round(self.cpus_per_worker), os.cpu_count() or 1)))


def connect_ray(config: ClusterConfig, *, many: bool = False) -> None:
    """Connect to Ray once a process, and check that the cluster holds the work, or wait until it does.

    Args:
        config: which cluster, and what the work needs of it.
        many: whether trainings come and go on it, as the trials of a sweep: what those leave is freed.

    Raises:
        UserError: fewer CPU cores or GPUs than the workers ask for, or none of the nodes has enough, and no nodes come:
            Ray would wait for ever.
    """
    if not ray.is_initialized():
        set_environment()
        handler = signal.getsignal(signal.SIGTERM)
        if address := config.joined:
            replace(config, address=address)  # checks it, too
            try:
                ray.init(address=address, logging_level=logging.WARNING)
            except ConnectionError as error:
                raise UserError(
                    f"no Ray cluster answers at {address!r} ({error}); start it, or correct cluster.address or the "
                    "variable RAY_ADDRESS"
                ) from error
        else:
            with local_cluster(dashboard=many) as options:
                ray.init(address="local", logging_level=logging.WARNING, **options)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # that of a command: Ray has set its own
    wait_until_held(partial(_check, config), config.wait_for_nodes, config.bundles, config.patience)
    in_trial = ray.get_runtime_context().get_actor_id() is not None  # which has its cores already
    if config.joined and not in_trial:  # a local cluster has nobody else
        say_if_busy(config.need, cluster_has_free)


def _check(config: ClusterConfig) -> None:
    """Whether the cluster, as it is now, holds the work."""
    need = config.need
    workers = {"cluster.worker_nodes": config.worker_nodes}
    decoding = {"cluster.decode_nodes": config.decode_nodes} if config.decode_tasks else {}
    for name, selector in (workers | decoding).items():
        check_match(name, selector)
    have, there = cluster_has(*need.on)["CPU"], part_of_cluster(workers | decoding)
    if need.cpus > have:
        raise UserError(
            f"{config.replicas} workers of {config.cpus_per_worker} CPU cores and {config.decode_cpus:g} for decoding "
            f"need {need.cpus:g}, but {there} has {have:g}: lower cluster.workers or cluster.cpus_per_worker"
        )
    have, there = cluster_has(config.worker_nodes)["GPU"], part_of_cluster(workers)
    if need.gpus > have:
        raise UserError(
            f"{config.replicas} workers need {need.gpus:g} GPUs, but {there} has {have:g}: "
            "lower cluster.workers, or set cluster.gpu to false"
        )
    nodes = nodes_there(config.worker_nodes)
    check_nodes(config.replicas, config.cpus_per_worker, config.gpus_per_worker, nodes, there)
    if decoding and not any(rooms(config.decode_cpus, 0, nodes_there(config.decode_nodes))):
        raise UserError(
            f"a task that decodes images takes {config.decode_cpus:g} CPU cores, which no single node of "
            f"{part_of_cluster(decoding)} has: correct cluster.decode_nodes, or give such nodes a core"
        )


def map_on_actors(
    actor_class: type,
    arguments: tuple[Any, ...],
    method: str,
    items: Iterable[Any],
    config: ClusterConfig,
    label: str,
    calls: int = 1,
    *,
    decodes: bool = False,
) -> Generator[Any]:
    """Call `method(item)` for every item on a pool of actors; yields the results in the order of the items.

    Args:
        actor_class: built once on each actor with `arguments`, for example loading a model.
        arguments: of its constructor.
        method: name of the method to call.
        items: arguments of the calls; they wait in a queue for the next free actor.
        config: how many actors, and what each may use.
        label: for the progress line.
        calls: as in `finished_on_actors`.
        decodes: likewise.
    """
    work = list(items)
    finished: dict[int, Any] = {}
    progress = Progress(label, len(work))
    following = 0
    try:
        for position, result in finished_on_actors(
            actor_class, arguments, method, work, config, calls, decodes=decodes
        ):
            finished[position] = result
            while following in finished:
                yield finished.pop(following)
                following += 1
                progress.update(following)
    finally:
        progress.close()


def finished_on_actors(
    actor_class: type,
    arguments: tuple[Any, ...],
    method: str,
    items: Sequence[Any],
    config: ClusterConfig,
    calls: int = 1,
    *,
    decodes: bool = False,
) -> Iterator[tuple[int, Any]]:
    """The same, each result with the position of its item as soon as it is there.

    Args:
        actor_class: as in `map_on_actors`; work that is done in this process has one of it here.
        arguments: of its constructor.
        method: name of the method to call.
        items: arguments of the calls.
        config: how many actors, and what each may use.
        calls: that an actor works on at the same time, each in a thread of its own.
        decodes: whether they have tasks of their own that decode images.

    Raises:
        Exception: what a call has raised, as it was raised there.
        UserError: an actor has died too often; or nodes are gone, and have not come back.
    """
    if config.in_process:
        if items:
            here = actor_class(*arguments)
            yield from ((position, getattr(here, method)(item)) for position, item in enumerate(items))
        return
    holder = type(actor_class.__name__, (_Holder,), {})  # Ray shows the name, of its processes, too
    remote = ray.remote(
        num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, label_selector=config.worker_nodes
    )(holder)

    def start() -> Any:
        return remote.options(max_concurrency=calls).remote(actor_class, arguments)

    actors = [start() for _ in range(min(config.replicas, len(items)))]
    idle = [*range(len(actors))] * calls
    waiting = deque(range(len(items)))
    running: dict[Any, tuple[int, int, Any]] = {}
    deaths: Counter[int] = Counter()
    watch = Watch(config.of_work(decodes=decodes).need, config.patience)
    try:
        while running or waiting:
            while idle and waiting:
                slot, position = idle.pop(), waiting.popleft()
                running[actors[slot].call.remote(method, items[position])] = position, slot, actors[slot]
            done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
            if (over := watch.look()) is not None:
                raise over
            if not done:
                continue
            [done] = done
            position, slot, actor = running.pop(done)
            idle.append(slot)
            try:
                result = fetch(done)
            # Ray's own max_restarts and max_task_retries raise ActorUnavailableError through themselves (2.60).
            except ObjectLostError as error:  # gone with a node: a result not yet here, or what a call had asked for
                deaths[position] += 1
                if deaths[position] > config.max_failures:
                    what = f"what the actor {actor_class.__name__} had made, or was given,"
                    raise died(what, deaths[position], error, how="was lost") from error
                waiting.appendleft(position)
            except RayActorError as error:  # it or its node has died: another one does the work again
                deaths[position] += 1
                if error.actor_init_failed:
                    raise
                if deaths[position] > config.max_failures:
                    raise died(f"the actor {actor_class.__name__}", deaths[position], error) from error
                if actors[slot] is actor:
                    ray.kill(actor)
                    actors[slot] = start()
                waiting.appendleft(position)
            else:
                yield position, result
    finally:
        if ray.is_initialized():  # else it would start again to kill what is dead
            for actor in actors:
                ray.kill(actor)


class _Holder:
    """An actor around the one that does the work: what that one's constructor raises is raised by the calls, as it was.

    Of an actor whose own constructor fails, Ray hands back a text with the whole traceback, and no exception.
    """

    def __init__(self, actor_class: type, arguments: tuple[Any, ...]) -> None:
        self._failure: Exception | None = None
        try:
            self._held = actor_class(*arguments)
        except Exception as error:
            self._failure = error

    def call(self, method: str, item: Any) -> Any:
        """Call a method of the held one."""
        if self._failure is not None:
            raise self._failure
        return getattr(self._held, method)(item)


def fetch(reference: Any) -> Any:
    """The value of a Ray reference.

    Raises:
        Exception: what the call behind it has raised, as it was raised there and not in Ray's wrapping, so that a
            user's mistake reads the same from far away.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise unwrap(error) from error


def unwrap(error: Exception) -> Exception:
    """The error within Ray's wrappings."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error
