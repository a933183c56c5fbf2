"""Real servers for tests: S3, MLflow and Ray nodes that can be stopped and started again, and a wire that breaks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from ray.util import get_node_ip_address


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class S3Server:
    """`rclone serve s3` over a folder, whose sub-folders are the buckets; always on the same free loopback port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The variables that name it."""
        return {
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def start(self) -> None:
        """Start, and wait until it listens."""
        rclone = str(Path(sys.executable).with_name("rclone"))
        flags = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", "tester,testsecret"]
        self._process = subprocess.Popen([rclone, "serve", "s3", *flags, str(self.folder)], stderr=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("rclone does not listen")

    def stop(self) -> None:
        """Stop at once, in the middle of whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class HttpServer:
    """A command that serves HTTP on a loopback port, in a process group of its own."""

    def __init__(self, command: list[str], health: str, log: Path, **environment: str) -> None:
        self.command, self.health, self.log = command, health, log
        self.environment = os.environ | environment
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(1200):
            try:
                with urllib.request.urlopen(self.health, timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class MlflowServer(HttpServer):
    """A real `mlflow server` on SQLite, which keeps artifacts, too."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        super().__init__(command, f"{self.uri}/health", folder / "log", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")


class Nodes:
    """A Ray cluster of nodes of one core that are processes of this machine.

    Args:
        folder: of their logs.
        lacking: beginnings of the names of variables that they are not to have.
        head_cpus: cores of the head.
        grows: how many nodes of one core Ray's own autoscaler may start.
        labels: of the head, as "pool=gpu".
    """

    def __init__(self, folder: Path, *lacking: str, head_cpus: int = 1, labels: str = "", grows: int = 0) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        names = {name for name in os.environ if not name.startswith(("RAY_", *lacking))}
        self.environment = {name: os.environ[name] for name in names}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment |= {"RAY_idle_worker_killing_time_threshold_ms": "60000"}
        self.processes: list[subprocess.Popen[bytes]] = []
        words = ("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}")
        self.start(*words, *(self._autoscaler(grows) if grows else ()), cpus=head_cpus, labels=labels)

    def _autoscaler(self, most: int) -> tuple[str]:
        """The real one, whose cloud is this machine: what of `ray start` makes it run."""
        head = f"{0:051}".replace("0", "f") + "00000"  # as that cloud numbers its nodes
        self.environment |= {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        self.environment |= {"RAY_CLOUD_INSTANCE_ID": head, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
        cloud = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        address = f"{get_node_ip_address()}:{self.port}"
        kinds = {"ray.head.default": (0, 0), "small": (1, most)}
        nothing = {name: [] for name in ("initialization_commands", "setup_commands", "head_setup_commands")}
        nothing |= {name: [] for name in ("worker_setup_commands", "head_start_ray_commands", "rsync_exclude")}
        nothing |= {name: [] for name in ("worker_start_ray_commands", "cluster_synced_files", "rsync_filter")}
        settings = {
            "cluster_name": "small",
            "max_workers": most,
            "idle_timeout_minutes": 5,
            "provider": {
                "type": "external",
                "module": cloud,
                "launch_multiple": True,
                "head_node_id": head,
                "gcs_address": address,
            },
            "available_node_types": {
                kind: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": count}
                for kind, (cpus, count) in kinds.items()
            },
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "docker": {},
            "auth": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **nothing,
        }
        (self.folder / "autoscaler.json").write_text(json.dumps(settings))
        return (f"--autoscaling-config={self.folder}/autoscaler.json",)

    def start(self, *words: str, cpus: int = 1, labels: str = "") -> None:
        words = words or (f"--address=127.0.0.1:{self.port}", "--include-log-monitor=false")  # one a machine is enough
        words += (f"--labels={labels}",) if labels else ()
        words += (f"--dashboard-agent-listen-port={free_port()}", f"--num-cpus={cpus}", "--disable-usage-stats")
        command = [str(Path(sys.executable).with_name("ray")), "start", *words, "--block"]
        with open(self.folder / f"node-{len(self.processes)}.log", "wb") as log:
            self.processes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def kill(self) -> None:
        """Kill the node that was started last."""
        process = self.processes.pop()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)

    def end(self) -> None:
        while self.processes:
            self.kill()


class Wire:
    """A TCP connection to a server, through a port of its own, that can be made to break.

    Attributes:
        port: where to connect to.
        connections: made so far.
        breaks_after: bytes from the server after which a connection breaks; each number serves for one connection.
    """

    def __init__(self, server_port: int) -> None:
        self.connections = 0
        self.breaks_after: list[int] = []
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self.connections += 1
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, breaks: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):  # the other side has gone
            while data := source.recv(1 << 16):
                carried += len(data)
                if breaks and self.breaks_after and carried > self.breaks_after[0]:
                    self.breaks_after.pop(0)
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
