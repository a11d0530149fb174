"""packaging/kubernetes/: valid objects, which fit together, to the server, and to docs/scaling.md."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
pytest.importorskip("yaml", reason="needs the extra dev")

import kubernetes_validate
import yaml
from typer.main import get_command

from helpers import DOCS, ROOT
from qwen3vl_export.cli import run
from runtime.server.metrics import EngineCollector
from runtime.server.routes import health
from runtime.server.settings import ServerSettings

FOLDER = ROOT / "packaging" / "kubernetes"
BASE, GPU, MONITORING = FOLDER / "base", FOLDER / "gpu", FOLDER / "monitoring"
OLDEST, LATEST = "1.27", kubernetes_validate.latest_version()
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


KUSTOMIZATION = read(BASE / "kustomization.yaml")
OBJECTS = {path.name: read(path) for path in sorted(BASE.glob("*.yaml")) if path.name != "kustomization.yaml"}
DEPLOYMENT = OBJECTS["deployment.yaml"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
LABELS = {"app.kubernetes.io/name": "qwen3vl"}


def built(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def validate(thing: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_objects_are_valid(name: str, version: str) -> None:
    validate(OBJECTS[name], version)


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("deployment.yaml", ("spec", "template", "spec", "containers", 0, "readinessPobe"), {}),
        ("deployment.yaml", ("spec", "template", "spec", "terminationGracePeriodSeconds"), "long"),
        ("deployment.yaml", ("spec", "selector"), None),
        ("service.yaml", ("spec", "ports", 0, "targetPorts"), 1),
        ("pod_disruption_budget.yaml", ("spec", "maxUnavailble"), 1),
        ("horizontal_pod_autoscaler.yaml", ("spec", "maxReplicas"), None),
        ("horizontal_pod_autoscaler.yaml", ("spec", "behavior", "scaleUp", "policies", 0, "value"), "100%"),
        ("network_policy.yaml", ("spec", "egres"), []),
    ],
)
def test_what_is_wrong_is_found(name: str, place: tuple[Any, ...], value: Any, version: str) -> None:
    sabotaged = copy.deepcopy(OBJECTS[name])
    *path, last = place
    holder = sabotaged
    for each in path:
        holder = holder[each]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(sabotaged, version)


def test_the_kustomization_has_all_objects() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(OBJECTS)
    assert {each["kind"] for each in OBJECTS.values()} == {
        *("Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"),
    }
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == SERVER["image"]
    overlay = read(GPU / "kustomization.yaml")
    assert [(GPU / each).resolve() for each in overlay["resources"]] == [BASE]
    assert overlay["images"][0]["name"] == image["newName"] and overlay["patches"] == [{"path": "deployment.yaml"}]


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("folder", [BASE, GPU], ids=["base", "gpu"])
def test_kustomize_builds_valid_objects(folder: Path, version: str) -> None:
    objects = built(folder)
    assert len(objects) == len(OBJECTS)
    for each in objects:
        validate(each, version)


def test_a_gpu_is_added_and_nothing_is_lost() -> None:
    base, changed = (next(each for each in built(folder) if each["kind"] == "Deployment") for folder in (BASE, GPU))
    pod, server = changed["spec"]["template"]["spec"], changed["spec"]["template"]["spec"]["containers"][0]
    for kind in ("requests", "limits"):
        assert server["resources"][kind] == {**SERVER["resources"][kind], "nvidia.com/gpu": "1"}
    assert server["image"].endswith("-cuda") and changed["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    scratch = {"name": "scratch", "mountPath": "/tmp"}
    mounts = {each["name"]: each for each in server["volumeMounts"]}
    assert mounts == {each["name"]: each for each in [scratch, *SERVER["volumeMounts"]]}
    assert {each["name"] for each in pod["volumes"]} == {"scratch", "engine", "keys"}
    kept = base["spec"]["template"]["spec"]["containers"][0]
    for name in ("args", "securityContext", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"):
        assert server[name] == kept[name]


def test_selectors_find_the_pods() -> None:
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"] == LABELS
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        OBJECTS["service.yaml"]["spec"]["selector"],
        OBJECTS["pod_disruption_budget.yaml"]["spec"]["selector"]["matchLabels"],
        OBJECTS["network_policy.yaml"]["spec"]["podSelector"]["matchLabels"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        read(MONITORING / "pod_monitor.yaml")["spec"]["selector"]["matchLabels"],
    ]
    assert selectors == [LABELS] * len(selectors)
    target = OBJECTS["horizontal_pod_autoscaler.yaml"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", DEPLOYMENT["metadata"]["name"])
    assert "replicas" not in DEPLOYMENT["spec"]  # which each apply would set back


def test_the_server_takes_its_arguments_and_answers_the_probes() -> None:
    command = get_command(run.app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    with serve.make_context("serve", list(SERVER["args"])) as context:
        values = context.params
    (port,) = SERVER["ports"]
    assert (values["host"], values["port"]) == ("0.0.0.0", port["containerPort"])
    mounts = {each["mountPath"] for each in SERVER["volumeMounts"]}
    assert str(values["api_key_file"].parent) in mounts and set(values["models"]) <= mounts
    paths = {route.path for route in health.router.routes}  # type: ignore[attr-defined]
    probes = [SERVER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {each["path"] for each in probes} == {"/health", "/ready"} <= paths
    ports = [each["port"] for each in probes] + [OBJECTS["service.yaml"]["spec"]["ports"][0]["targetPort"]]
    ports.append(OBJECTS["network_policy.yaml"]["spec"]["ingress"][0]["ports"][0]["port"])
    assert set(ports) == {port["name"]}
    drain_s, (_, sleep_s) = values["drain_timeout"], SERVER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] > drain_s + int(sleep_s)
    assert drain_s >= ServerSettings.request_timeout_s
    assert f"{sleep_s} s (`preStop`)" in PAGE and f"{drain_s:g} s at most (`--drain-timeout`)" in PAGE


def test_pods_are_locked_up() -> None:
    dockerfile = (ROOT / "packaging" / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"^USER (\d+):\1$", dockerfile, re.MULTILINE)
    pod, server = POD["securityContext"], SERVER["securityContext"]
    assert {pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]} == {int(user)} and pod["runAsNonRoot"]
    assert server["readOnlyRootFilesystem"] and not server["allowPrivilegeEscalation"]
    assert server["capabilities"] == {"drop": ["ALL"]} and not POD["automountServiceAccountToken"]
    assert all(each["readOnly"] for each in SERVER["volumeMounts"])
    assert SERVER["resources"]["requests"] == SERVER["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert "four whole cores and 8 GiB a pod" in PAGE
    volumes = {each["name"]: each for each in POD["volumes"]}
    assert volumes["keys"]["secret"]["defaultMode"] == 0o440
    credentials = read(MONITORING / "pod_monitor.yaml")["spec"]["podMetricsEndpoints"][0]["authorization"][
        "credentials"
    ]
    assert credentials["name"] == volumes["keys"]["secret"]["secretName"]
    assert f"kubectl create secret generic {credentials['name']} --from-file=api_keys" in PAGE
    assert f"--from-literal={credentials['key']}=" in PAGE
    assert f"`{volumes['engine']['persistentVolumeClaim']['claimName']}`" in PAGE


def exported() -> set[str]:
    """Names of the series of /metrics."""
    names = set()
    for family in EngineCollector({}, {}, lambda: 0).collect():  # type: ignore[arg-type]
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}[family.type]
        names |= {f"{family.name}{end}" for end in ends}
    return names


def test_the_autoscaler_reads_a_metric_that_the_server_has() -> None:
    (rule,) = read(MONITORING / "prometheus_adapter.yaml")["rules"]["custom"]
    (series,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert series in exported()
    (metric,) = OBJECTS["horizontal_pod_autoscaler.yaml"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert f"({metric['pods']['target']['averageValue']} a pod)" in PAGE


def test_the_page_watches_metrics_that_the_server_has() -> None:
    named = set(re.findall(r"\b(?:vllm|qwen3vl):[a-z_]+", PAGE))
    assert len(named) > 8 and named <= exported()
    assert "vllm:num_requests_waiting" in exported() and "vllm:num_requests_waitin" not in exported()


def test_the_page_names_what_was_not_run() -> None:
    assert "**no\ncluster has run them**" in PAGE and f"Kubernetes {OLDEST}" in PAGE
