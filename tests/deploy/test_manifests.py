"""The deployment files: right by their schemas, at one with each other and with the pod's code."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from loader.config.settings import Settings
from loader.peers.members import parse_peers
from loader.pod.place import Place
from loader.pod.pod import KILL_AFTER_S
from loader.status.metrics import exposition
from loader.status.state import Boot
from loader.timeline import Span

DEPLOY = Path(__file__).parents[2] / "deploy"
RELEASE = "1.37"
DASHBOARD = DEPLOY / "grafana.json"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def document(name: str, kind: str) -> dict[str, Any]:
    return next(one for one in documents(name) if one["kind"] == kind)


@pytest.fixture
def deployed() -> dict[str, Any]:
    """The Deployment's pod."""
    spec: dict[str, Any] = document("kubernetes/podloader.yaml", "Deployment")["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


@pytest.fixture
def composed() -> dict[str, Any]:
    service: dict[str, Any] = documents("compose.yaml")[0]["services"]["podloader"]
    return service


@pytest.mark.parametrize("name", ["podloader", "secret", "servicemonitor", "peers", "nodes"])
def test_kubernetes_would_take_them(name: str) -> None:
    own = [d for d in documents(f"kubernetes/{name}.yaml") if "coreos" not in d["apiVersion"]]
    for one in own:
        kubernetes_validate.validate(one, RELEASE, strict=True)


def test_the_schema_refuses_what_kubernetes_would() -> None:
    broken = document("kubernetes/podloader.yaml", "Deployment")
    broken["spec"]["template"]["spec"]["gracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, RELEASE, strict=True)


def test_every_node_knows_its_place_and_where_node_0_is() -> None:
    nodes = document("kubernetes/nodes.yaml", "StatefulSet")
    pod = nodes["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = {one["name"] for one in container["env"] if "valueFrom" in one}
    count = nodes["spec"]["replicas"]
    for_vllm = container["args"][container["args"].index("--") + 1 :]
    for rank in range(count):
        words = [word.replace("$(NODE_RANK)", str(rank)) for word in for_vllm]
        place = Place.read(words)
        assert (place.count, place.rank) == (count, rank)
    assert {"NODE_RANK", "VLLM_HOST_IP"} <= variables
    service = nodes["spec"]["serviceName"]
    assert place.address == f"{nodes['metadata']['name']}-0.{service}"
    headless, public = (d for d in documents("kubernetes/nodes.yaml") if d["kind"] == "Service")
    assert headless["metadata"]["name"] == service
    assert headless["spec"]["publishNotReadyAddresses"]
    assert headless["spec"]["ports"][0]["port"] == place.port + 1
    assert public["spec"]["selector"]["apps.kubernetes.io/pod-index"] == "0"
    config = document("kubernetes/nodes.yaml", "ConfigMap")["data"]["config.yaml"]
    args = Settings.load(yaml.safe_load(config)).engine_args
    sizes = [args[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline")]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert math.prod(map(int, map(str, sizes))) == gpus * count


def test_the_prometheus_operator_would_take_its_monitor() -> None:
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor  # takes seconds

    given = document("kubernetes/servicemonitor.yaml", "ServiceMonitor")
    back = json.loads(ServiceMonitor.model_validate(given).model_dump_json(by_alias=True))
    assert list(lost(given, back)) == []


def test_docker_compose_would_take_it() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def lost(given: Any, back: Any, place: str = "") -> Iterator[str]:
    """Yield what a model made of *given* does not know any more."""
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(back, dict) or name not in back:
                yield f"{place}.{name}"
            else:
                yield from lost(value, back[name], f"{place}.{name}")
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for index, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from lost(one, other, f"{place}[{index}]")
    elif given != back:
        yield f"{place}: {back!r}"


def read_by_grafana(given: Any) -> Any:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(given)))


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    given = json.loads(DASHBOARD.read_text())
    assert list(lost(given, read_by_grafana(given))) == []
    given["panels"][0]["targetz"] = []
    assert list(lost(given, read_by_grafana(given))) == [".panels[0].targetz"]


def test_the_dashboard_shows_each_metric_that_a_pod_exports_and_no_other() -> None:
    boot = Boot("ready", "", 2.0, ready_s=1.0, spans=(Span("fetch", 0.0, 1.0),))
    families = text_string_to_metric_families(exposition(boot).decode())
    exported = {s.name for f in families for s in f.samples if not s.name.endswith("_created")}
    shown = re.findall(r"podloader_\w+", DASHBOARD.read_text())
    assert set(shown) == exported


def test_one_config_everywhere() -> None:
    inline = document("kubernetes/podloader.yaml", "ConfigMap")["data"]["config.yaml"]
    assert yaml.safe_load(inline) == yaml.safe_load((DEPLOY / "config.yaml").read_text())
    settings = Settings.load(DEPLOY / "config.yaml")
    assert settings.artifacts == ("baseten",)
    assert str(settings.training.download_folder).startswith("/cache/")


def drain_s(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return how long a pod with these *variables* may take to end."""
    for name, value in variables.items():
        if name.startswith("PODLOADER_"):
            monkeypatch.setenv(name, value)
    return Settings.load(DEPLOY / "config.yaml").drain_timeout_s + KILL_AFTER_S


def test_nobody_kills_a_pod_that_drains(
    deployed: dict[str, Any], composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = deployed["containers"]
    given = {one["name"]: one.get("value", "") for one in container["env"]}
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed_s = before_s + drain_s(given, monkeypatch)
    assert deployed["terminationGracePeriodSeconds"] > needed_s
    alive = container["livenessProbe"]  # /health says 503 while it drains
    assert alive["periodSeconds"] * alive["failureThreshold"] > needed_s
    variables = {k: v or "" for k, v in composed["environment"].items()}
    assert float(composed["stop_grace_period"][:-1]) > drain_s(variables, monkeypatch)


def test_a_start_may_take_an_hour(deployed: dict[str, Any]) -> None:
    (container,) = deployed["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 3600
    spec = document("kubernetes/podloader.yaml", "Deployment")["spec"]
    assert spec["progressDeadlineSeconds"] > 3600
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"] == {"path": "/health", "port": "http"}


def test_what_the_pod_writes_to_is_mounted(
    deployed: dict[str, Any], composed: dict[str, Any]
) -> None:
    (container,) = deployed["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
    assert mounts == {"/cache", "/tmp", "/dev/shm"}
    volumes = {volume["name"] for volume in deployed["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (shm,) = (v["emptyDir"] for v in deployed["volumes"] if v["name"] == "shm")
    assert shm["medium"] == "Memory"
    assert composed["read_only"]
    assert "cache:/cache" in composed["volumes"]


def test_secrets_are_named_as_they_are_made(deployed: dict[str, Any]) -> None:
    (container,) = deployed["containers"]
    refs = [one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one]
    secret = document("kubernetes/secret.yaml", "Secret")
    assert {ref["name"] for ref in refs} == {secret["metadata"]["name"]}
    assert {ref["key"] for ref in refs} == set(secret["stringData"])


def test_the_peers_that_are_commented_out_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DEPLOY / "kubernetes/podloader.yaml").read_text()
    taken = re.sub(r"^( +)# (- |  )", r"\1\2", text, flags=re.MULTILINE)
    (deployment,) = [d for d in yaml.safe_load_all(taken) if d["kind"] == "Deployment"]
    kubernetes_validate.validate(deployment, RELEASE, strict=True)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one for one in container["env"]}
    secret, service, policy = documents("kubernetes/peers.yaml")
    ref = given["PODLOADER_PEERS_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert ref == {"name": secret["metadata"]["name"], "key": next(iter(secret["stringData"]))}
    monkeypatch.setenv("PODLOADER_PEERS", given["PODLOADER_PEERS"]["value"])
    monkeypatch.setenv("PODLOADER_PEERS_TOKEN", "x" * 64)
    settings = Settings.load(DEPLOY / "config.yaml")
    name, _ = parse_peers(settings.peers, settings.peers_port)
    (port,) = service["spec"]["ports"]
    assert name == f"{service['metadata']['name']}:{port['port']}"
    assert settings.peers_token is not None
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports[port["targetPort"]] == settings.peers_port
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"], "they find each other while they start"
    everybody, pods = policy["spec"]["ingress"]
    assert everybody == {"ports": [{"port": "http"}]}
    assert pods["ports"] == [{"port": port["targetPort"]}]
    chosen = [policy["spec"]["podSelector"], *(one["podSelector"] for one in pods["from"])]
    assert all(one["matchLabels"].items() <= labels.items() for one in chosen)


def test_the_services_find_the_pod_and_the_monitor_finds_one_of_them() -> None:
    spec = document("kubernetes/podloader.yaml", "Deployment")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    services = [
        document("kubernetes/podloader.yaml", "Service"),
        document("kubernetes/servicemonitor.yaml", "Service"),
    ]
    for service in services:
        assert service["spec"]["selector"].items() <= labels.items()
    monitor = document("kubernetes/servicemonitor.yaml", "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    (found,) = [s for s in services if wanted <= s["metadata"]["labels"].items()]
    assert monitor["endpoints"][0]["port"] in {p["name"] for p in found["spec"]["ports"]}


RAY_SPEC = {"serveConfigV2": str, "rayClusterConfig": dict}
RAY_CLUSTER = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list}
RAY_HEAD = {"rayStartParams": dict, "template": dict}
RAY_WORKERS = RAY_HEAD | {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
}
"""The fields that are used of KubeRay's ``ray.io/v1``, by its own name and type."""


def test_kuberay_would_take_its_service() -> None:
    config, service = documents("kubernetes/rayservice.yaml")
    kubernetes_validate.validate(config, RELEASE, strict=True)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    head = cluster["headGroupSpec"]
    for given, known in [
        (service["spec"], RAY_SPEC),
        (cluster, RAY_CLUSTER),
        (head, RAY_HEAD),
        (workers, RAY_WORKERS),
    ]:
        assert {name: type(value) for name, value in given.items()} == known
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": group["template"],
        }
        kubernetes_validate.validate(template, RELEASE, strict=True)
    # The policy of peers.yaml shuts what Ray's processes need of each other.
    policy = documents("kubernetes/peers.yaml")[2]["spec"]["podSelector"]["matchLabels"]
    assert not policy.items() <= head["template"]["metadata"]["labels"].items()


def test_rays_service_prepares_on_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    config, service = documents("kubernetes/rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (llm,) = application["args"]["llm_configs"]
    callback = llm["callback_config"]
    module, _, name = callback["callback_class"].partition(":")
    file = DEPLOY.parent / (module.replace(".", "/") + ".py")
    assert f"class {name}(CallbackBase)" in file.read_text()
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    folder, _, file_name = callback["callback_kwargs"]["config"].rpartition("/")
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in workers["template"]["spec"]["volumes"]}
    assert volumes[mounts[folder]]["configMap"] == {"name": config["metadata"]["name"]}
    settings = Settings.load(yaml.safe_load(config["data"][file_name]))
    assert parse_peers(settings.peers, settings.peers_port) == ("ray", ())
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports["peers"] == settings.peers_port
    assert any(str(settings.training.download_folder).startswith(f"{path}/") for path in mounts)
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    sizes = llm["engine_kwargs"]
    wanted = sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"]
    assert gpus * workers["replicas"] == wanted
    secrets = [document("kubernetes/secret.yaml", "Secret"), documents("kubernetes/peers.yaml")[0]]
    known = {(s["metadata"]["name"], key) for s in secrets for key in s["stringData"]}
    refs = [one["valueFrom"]["secretKeyRef"] for one in container["env"]]
    assert {(ref["name"], ref["key"]) for ref in refs} == known


def test_ray_serve_would_take_its_config() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    _, service = documents("kubernetes/rayservice.yaml")
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    read = schema.ServeDeploySchema.model_validate(given)
    assert list(lost(given, json.loads(read.model_dump_json()))) == []
