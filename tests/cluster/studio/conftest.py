"""A studio in this process: the app over an engine, behind a real HTTP server, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from cluster.studio.app import digest, make_app
from cluster.studio.config import ServeConfig
from cluster.studio.engine import Engine
from cluster.studio.pair import Pair, open_folder
from tests.conftest import random_pair
from tests.servers import free_port

TOKEN = "open-sesame-4711"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str]) -> Pair:
    """A pair of random weights, with ten classes."""
    return open_folder(random_pair(tmp_path_factory.mktemp("served"), digits, "").folder, "pair", "", "cpu")


class AppServer:
    """`make_app` over an `Engine`, on a free loopback port."""

    def __init__(self, pair: Pair, config: ServeConfig, token: str = "") -> None:
        self.engine, port = Engine(pair, config), free_port()
        self.url = f"http://127.0.0.1:{port}"
        app = make_app(self.engine, config.body_mb, digest(token))
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="session")
def app(pair: Pair) -> Iterator[AppServer]:
    """The studio of the random pair."""
    server = AppServer(pair, ServeConfig(batch=4))
    yield server
    server.close()
