"""The studio on Ray Serve: a door, which is the HTTP API, and behind it replicas that hold the pair.

    browser -> Serve's proxy -> Door (app.py) -> Replica (engine.py), one of several

The door holds no networks. What it asks of a replica is a function of the request alone, so when one dies, the door
asks another one the same, and its user sees none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from dataclasses import replace
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from bld_core.errors import UserError
from cluster.nodes.placement import check_nodes, nodes_there, part_of_cluster
from cluster.runtime import ClusterConfig, connect_ray
from cluster.studio.api import BusyError, Model, Pictures, SamplesRequest, Step
from cluster.studio.app import digest, make_app
from cluster.studio.config import ServeConfig
from cluster.studio.engine import Answer, AnyRequest, Engine
from cluster.studio.pair import Source

T = TypeVar("T")
APP = "studio"
_TRIES = 8
_PAUSE_S = 0.5
_AGAIN_S = 5  # until a dead replica has been replaced, perhaps
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)  # and so nothing of a request is in a log
_DRAIN_S = 20.0
_log = logging.getLogger(__name__)


class Replica:
    """An actor with the pair, which looks for a newer one from time to time."""

    def __init__(self, source: Source, config: ServeConfig, cluster: ClusterConfig) -> None:
        cluster.limit_threads()
        self._source, self._config = source, config
        pair = source.newer("")
        assert pair is not None, "any pair is newer than none"
        self._engine = Engine(pair, config)
        self._watch: asyncio.Task[None] | None = None

    async def answer(self, request: AnyRequest) -> Answer | UserError:
        """See `Studio`; errors are returned: Serve would write each that is raised into its log."""
        try:
            return await self._engine.answer(request)
        except UserError as error:
            return error

    async def watch(self, request: SamplesRequest) -> AsyncIterator[Step | Pictures | UserError]:
        """See `Studio`, and `answer`."""
        try:
            async for event in self._engine.watch(request):
                yield event
        except UserError as error:
            yield error

    async def model(self) -> Model:
        """See `Studio`."""
        return await self._engine.model()

    async def report(self) -> str:
        """See `Studio`."""
        return await self._engine.report()

    async def check_health(self) -> None:
        """Called by Serve every other second, the first time once it is there: a replica that raises is replaced."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._look())
        if self._engine.failure is not None:
            raise self._engine.failure

    async def _look(self) -> None:
        """Take up each newer pair, opened beside the one that serves. What has begun, ends with its own."""
        while True:
            await asyncio.sleep(self._config.watch)
            version = self._engine.pair.model.version
            try:
                pair = await asyncio.to_thread(self._source.newer, version)
            except Exception as error:  # MLflow is away, say, or the newer one does not fit beside this one
                _log.warning("version %s stays: %s", version, error, exc_info=not isinstance(error, UserError))
                continue
            if pair is not None:
                self._engine.pair = pair


class Remote:
    """A `Studio` of replicas elsewhere: what a dead one was asked, is asked another one."""

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas

    async def model(self) -> Model:
        """See `Studio`."""
        return await _again(lambda: self._replicas.model.remote())

    async def report(self) -> str:
        """See `Studio`."""
        return await _again(lambda: self._replicas.report.remote())

    async def answer(self, request: AnyRequest) -> Answer:
        """See `Studio`."""
        return _raised(await _again(lambda: self._replicas.answer.remote(request)))

    async def watch(self, request: SamplesRequest) -> AsyncIterator[Step | Pictures]:
        """See `Studio`. Another replica begins anew: steps that were seen are left out, its answer never is."""
        seen = set[tuple[int, int]]()
        for left in reversed(range(_TRIES)):
            async with _tried(left):
                events: Any = self._replicas.options(stream=True).watch.remote(request)
                async for event in events:
                    made = _raised(event)
                    if isinstance(made, Step):
                        if (made.first, made.step) in seen:
                            continue
                        seen.add((made.first, made.step))
                    yield made
                return


async def _again(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask until a replica lives to answer.

    Raises:
        BusyError: too many wait for one, or all die.
    """
    for left in reversed(range(_TRIES)):
        async with _tried(left):
            return await ask()
    raise AssertionError("the last try returns or raises")


@contextlib.asynccontextmanager
async def _tried(left: int) -> AsyncGenerator[None]:
    """One try to ask a replica; where it dies, the block ends after a pause, so that another one can be asked.

    Args:
        left: tries that are left after this one.

    Raises:
        BusyError: too many wait, or this was the last try.
    """
    try:
        yield
    except RayActorError as error:
        if not left:
            raise BusyError(_AGAIN_S) from error
        await asyncio.sleep(_PAUSE_S)
    except BackPressureError as error:
        raise BusyError(1) from error


def _raised(answer: T | UserError) -> T:
    """An answer that is an error, raised."""
    if isinstance(answer, UserError):
        raise answer
    return answer


@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Door:
    """The actor of the HTTP API."""

    def __init__(self, replicas: DeploymentHandle[Any], body_mb: int, token: str) -> None:
        self._app = make_app(Remote(replicas), body_mb, token)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Asked by Serve."""
        return self._app


@contextlib.contextmanager
def studio(source: Source, config: ServeConfig, cluster: ClusterConfig) -> Generator[str]:
    """The studio while it is open: yields its address.

    Args:
        source: of the pair.
        config: of the studio.
        cluster: address, cores and GPUs.

    Raises:
        UserError: another program listens there, or another studio is open on this cluster; and the errors of
            `connect_ray`.
    """
    if not cluster.joined:
        _check_free(config)
    connect_ray(replace(cluster.of_work(decodes=False), workers=1, min_workers=0))
    nodes, where = nodes_there(cluster.worker_nodes), part_of_cluster({"cluster.worker_nodes": cluster.worker_nodes})
    check_nodes(config.min_replicas, cluster.cpus_per_worker, cluster.gpus_per_worker, nodes, where)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    there = serve.status()
    if APP in there.applications:
        raise UserError(
            "a studio is open on this Ray cluster: stop the command that has opened it; where that was killed, "
            "`serve shutdown` ends all that the cluster serves"
        )
    if there.proxies:
        _log.warning("this Ray cluster serves other applications, too, at the address that was chosen for the first")
    serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=config.host, port=config.port), logging_config=_QUIET)
    replicas = serve.deployment(
        name="Replica",
        max_ongoing_requests=config.queue,
        max_queued_requests=config.queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=2 * config.batch,
        ),
        ray_actor_options={
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "label_selector": cluster.worker_nodes,
        },
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        max_constructor_retry_count=3,
        logging_config=_QUIET,
    )(Replica)
    door = serve.deployment(
        name="Door",
        max_ongoing_requests=4 * config.queue * config.max_replicas,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_QUIET,
    )(Door)
    bound = door.bind(replicas.bind(source, config, cluster), config.body_mb, digest(os.environ.get("BLD_TOKEN", "")))
    try:
        serve.run(bound, name=APP, route_prefix="/")
        yield f"http://{config.host}:{config.port}/"
    finally:
        serve.delete(APP)  # once what is under way is answered
        if cluster.joined and not serve.status().applications:  # else it ends with this process, or serves others
            serve.shutdown()


def _check_free(config: ServeConfig) -> None:
    """See that nobody listens where the studio is to."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"`host` is {config.host} and `port` {config.port}, where the studio cannot listen ({error}): choose "
                "others, or end what listens there",
                config,
            ) from error
