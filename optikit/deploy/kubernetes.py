"""Kubernetes manifests of a server: volume claim, deployment and service, or KServe's InferenceService."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from optikit.deploy.bundle import ROOT, Bundle, Served

PROBE_SECONDS = 10
STARTS = 120
"""Probes until a start has failed: twenty minutes for weights to be read."""
HEADROOM = 1.5
"""Memory asked for on a CPU: the artifact, its cache and the program."""


def dumped(*documents: Mapping[str, Any]) -> str:
    """Return documents as YAML, in the order of their keys."""
    apart = json.loads(json.dumps(documents))  # what two places share would become an anchor
    return str(yaml.safe_dump_all(apart, sort_keys=False, width=4096))


def claim(bundle: Bundle) -> str:
    """Return the name of the volume claim that holds the output directory."""
    return f"{bundle.name}-artifact"


def deployment(server: str, bundle: Bundle, served: Served, replicas: int) -> str:
    """Return a volume claim, a deployment with probes, and a service."""
    labels = {"app.kubernetes.io/name": bundle.name, "app.kubernetes.io/component": server}
    pod = {"containers": [_container(bundle, served, bundle.name)], "volumes": _volumes(bundle)}
    spec = {
        "replicas": replicas,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"terminationGracePeriodSeconds": 60, **pod}},
    }
    ports = [{"name": "http", "port": 80, "targetPort": bundle.port}]
    return dumped(
        _claim(bundle, served),
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _named(bundle, labels), "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _named(bundle, labels),
            "spec": {"selector": labels, "ports": ports},
        },
    )


def inference_service(server: str, bundle: Bundle, served: Served, replicas: int) -> str:
    """Return KServe's InferenceService with a container of its own, on the same volume claim."""
    predictor = {
        "minReplicas": replicas,
        "maxReplicas": replicas,
        "containers": [_container(bundle, served, "kserve-container")],
        "volumes": _volumes(bundle),
    }
    metadata = _named(bundle, {"app.kubernetes.io/component": server})
    version = "serving.kserve.io/v1beta1"
    return dumped(
        {"apiVersion": version, "kind": "InferenceService", "metadata": metadata, "spec": {"predictor": predictor}}
    )


def _named(bundle: Bundle, labels: Mapping[str, str]) -> dict[str, Any]:
    return {"name": bundle.name, "labels": dict(labels)}


def _claim(bundle: Bundle, served: Served) -> dict[str, Any]:
    size = f"{-(-served.size // 2**30) + 1}Gi"
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim(bundle)}, "spec": spec}


def _volumes(bundle: Bundle) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "artifact", "persistentVolumeClaim": {"claimName": claim(bundle), "readOnly": not bundle.writes}}
    ]
    if bundle.shared_memory:
        found.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{bundle.shared_memory}Gi"}})
    return found


def _container(bundle: Bundle, served: Served, name: str) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [{"name": "artifact", "mountPath": ROOT, "readOnly": not bundle.writes}]
    mounts += [
        {"name": "artifact", "mountPath": place, "subPath": path, "readOnly": True} for path, place in bundle.mounts
    ]
    if bundle.shared_memory:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    found: dict[str, Any] = {"name": name, "image": bundle.name if bundle.build else bundle.image}
    if bundle.command:
        found["command"] = list(bundle.command)
    if bundle.arguments:
        found["args"] = list(bundle.arguments)
    found["env"] = [{"name": key, "value": value} for key, value in bundle.environment.items()]
    found["ports"] = [{"containerPort": bundle.port}]
    found["resources"] = _resources(served)
    probe = {"httpGet": {"path": bundle.health, "port": bundle.port}, "periodSeconds": PROBE_SECONDS}
    found["startupProbe"] = {**probe, "failureThreshold": STARTS}
    found["readinessProbe"] = probe
    found["livenessProbe"] = {**probe, "failureThreshold": 6}
    found["volumeMounts"] = mounts
    return found


def _resources(served: Served) -> dict[str, Any]:
    if served.gpus:
        return {"limits": {"nvidia.com/gpu": str(served.gpus)}}
    if served.neuron_chips:
        return {"limits": {"aws.amazon.com/neuron": str(served.neuron_chips)}}
    return {"requests": {"memory": f"{int(served.size * HEADROOM) // 2**20 + 512}Mi"}}
