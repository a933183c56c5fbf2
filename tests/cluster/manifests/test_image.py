"""What the image's Dockerfile runs, run: its installation, and the MLflow server that the manifests start in it."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.servers import HttpServer, free_port

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "cluster/manifests"
DOCKERS_OWN = ("apt-get ", "useradd ")  # steps that need the image's system


def steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in their order: (RUN, what it runs)."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in (line.split(" ", 1) for line in lines)]


def sent(path: str) -> bool:
    """Whether Docker is sent a file, by the ignore file: the last line that matches it or a folder above decides."""
    ignored = False
    for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, above = line.removeprefix("!"), [path, *map(str, Path(path).parents)]
        if any(fnmatch.fnmatch(part, pattern) or f"**/{Path(part).name}" == pattern for part in above if part != "."):
            ignored = not line.startswith("!")
    return not ignored


def test_docker_is_sent_what_the_image_is_made_of_and_nothing_else() -> None:
    copied = [word for kind, rest in steps() if kind == "COPY" for word in rest.split()[:-1]]
    assert all((REPOSITORY / source).exists() and sent(source) for source in copied)
    assert not any(
        map(sent, ["runs/demo/stage.json", ".git/config", "storage.env", "tests/conftest.py", ".venv/bin/ray"])
    )
    assert sent("cluster/training/train.py")
    assert not sent("cluster/training/__pycache__/train.cpython-311.pyc")
    assert {path.name for path in REPOSITORY.iterdir() if sent(path.name)} == {*copied}


def test_the_image_does_not_run_as_root_and_its_stages_follow_each_other() -> None:
    stages = [rest for kind, rest in steps() if kind == "FROM"]
    assert re.fullmatch(rf"python:3\.{sys.version_info.minor}-\S+ AS cpu", stages[0])
    assert stages[1:] == ["cpu AS gpu", "${DEVICE}"]
    users = [rest for kind, rest in steps() if kind == "USER"]
    assert users == ["1000", "0", "1000"], "each stage ends as the user that useradd makes"


@pytest.mark.long
def test_the_steps_of_the_image_run_in_a_fresh_environment(tmp_path: Path) -> None:
    """Packages of this environment are taken as they are, if they are the pinned ones: torch is not installed twice."""
    image, home = tmp_path / "image", tmp_path / "environment"
    venv.create(home, with_pip=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BLD_ROOT")}
    environment["PATH"] = f"{home / 'bin'}{os.pathsep}{environment['PATH']}"
    image.mkdir()
    ran = 0
    for kind, rest in steps():
        if kind == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (REPOSITORY / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__", "manifests")
                    shutil.copytree(REPOSITORY / source, image / target, ignore=ignore)
                else:
                    shutil.copy(REPOSITORY / source, image / target)
        elif kind == "RUN" and not rest.startswith(DOCKERS_OWN):
            done = subprocess.run(
                ["sh", "-c", rest], cwd=image, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            ran += 1
    assert ran == 3
    ask = "import bld_core, boto3, googleapiclient, psycopg2; print(bld_core.__file__)"
    found = subprocess.run(["python", "-c", ask], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(packages))


@pytest.mark.long
def test_the_mlflow_server_of_the_manifests_keeps_artifacts_in_s3_and_knows_its_callers(
    s3: str, tmp_path: Path
) -> None:
    documents = list(yaml.safe_load_all((FOLDER / "mlflow.yaml").read_text()))
    (container,) = next(
        each["spec"]["template"]["spec"]["containers"] for each in documents if each["kind"] == "Deployment"
    )
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["mlflow"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    allowed = given["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert compose["command"] == container["args"]
    assert allowed == compose["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    port = free_port()
    changed: dict[str, str] = {"5000": str(port), "0.0.0.0": "127.0.0.1", "s3://bld/mlflow": f"{s3}/mlflow"}
    command = [str(changed.get(word, word)) for word in container["args"]]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    command[command.index("--workers") + 1] = "1"
    uri = f"http://localhost:{port}"
    server = HttpServer(
        command,
        f"{uri}/health",
        tmp_path / "log",
        MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path}/mlflow.db",
        MLFLOW_SERVER_ALLOWED_HOSTS=allowed,
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )
    try:
        client = MlflowClient(uri)
        kept = client.create_run(client.create_experiment("real")).info.run_id
        client.log_text(kept, "here", "note.txt")
        stored = client.download_artifacts(kept, "note.txt", str(tmp_path))
        assert Path(stored).read_text() == "here"
        asked = f"{uri}/api/2.0/mlflow/runs/get?run_id={kept}"
        for host, answer in (("mlflow:5000", 200), ("elsewhere:5000", 403)):
            try:
                with urllib.request.urlopen(urllib.request.Request(asked, headers={"Host": host})) as said:
                    code = said.status
            except urllib.error.HTTPError as error:
                code = error.code
            assert code == answer, host
    finally:
        server.kill()
