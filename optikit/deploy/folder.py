"""The folder of a server, `serve/NAME/`: everything to start it, to check it, and to read first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from optikit.deploy import kubernetes, sagemaker
from optikit.deploy.bundle import ROOT, Bundle, Served

PROMPT = "The capital of France is"
WAIT_SECONDS = 1200
"""How long a start may take: weights are read, kernels are compiled."""


def files(server: str, bundle: Bundle, served: Served, *, replicas: int = 1, checked: str = "") -> dict[str, str]:
    """Return every file of the folder, name → text.

    Args:
        server: What the recipe calls it.
        bundle: How it is started.
        served: What it serves.
        replicas: Copies in Kubernetes, or instances behind a SageMaker endpoint.
        checked: How such a bundle was checked.
    """
    found = dict(bundle.files)
    if bundle.sagemaker is not None:
        found |= sagemaker.files(server, bundle, served, replicas)
    else:
        found["Dockerfile"] = dockerfile(server, bundle)
        found["compose.yaml"] = compose(server, bundle, served)
    if bundle.health and bundle.sagemaker is None:
        found["check.sh"] = check(bundle)
        found["kubernetes.yaml"] = kubernetes.deployment(server, bundle, served, replicas)
        found["kserve.yaml"] = kubernetes.inference_service(server, bundle, served, replicas)
    found["README.md"] = "\n\n".join(page(server, bundle, served, sorted(found), checked)) + "\n"
    return found


def dockerfile(server: str, bundle: Bundle) -> str:
    """Return a Dockerfile that puts the artifact into the image; its build context is the output directory."""
    needs = (*bundle.needs, *([f"serve/{server}"] if bundle.files else []))
    lines = [f"# docker build -f serve/{server}/Dockerfile -t {bundle.name} .", f"FROM {bundle.image}"]
    lines += [bundle.build] if bundle.build else []
    lines += [f"COPY {name} {ROOT}/{name}" for name in dict.fromkeys(needs)]
    lines += [f"COPY {name} {place}" for name, place in bundle.mounts]
    lines += [f"ENV {name}={json.dumps(value)}" for name, value in bundle.environment.items()]
    lines += [f"EXPOSE {bundle.port}"] if bundle.port else []
    lines += [f"ENTRYPOINT {json.dumps(list(bundle.command))}"] if bundle.command else []
    lines += [f"CMD {json.dumps(list(bundle.arguments))}"] if bundle.arguments else []
    return "\n".join(lines) + "\n"


def compose(server: str, bundle: Bundle, served: Served) -> str:
    """Return a compose file that mounts the output directory, read only, and publishes the port to this machine."""
    service: dict[str, Any] = {"image": bundle.image}
    if bundle.build:
        service = {"build": {"context": "../..", "dockerfile": f"serve/{server}/Dockerfile"}}
    if bundle.command:
        service["entrypoint"] = list(bundle.command)
    if bundle.arguments:
        service["command"] = list(bundle.arguments)
    if bundle.environment:
        service["environment"] = dict(bundle.environment)
    service["volumes"] = [
        f"../..:{ROOT}" + ("" if bundle.writes else ":ro"),
        *(f"../../{name}:{place}:ro" for name, place in bundle.mounts),
    ]
    if bundle.port:
        service["ports"] = [f"127.0.0.1:{bundle.port}:{bundle.port}"]
    if bundle.shared_memory:
        service["shm_size"] = f"{bundle.shared_memory}gb"
    if bundle.health:
        service["healthcheck"] = _healthcheck(bundle)
    service |= dict(_devices(served))
    head = f"# docker compose -f serve/{server}/compose.yaml up\n"
    return head + kubernetes.dumped({"services": {bundle.name: service}})


def _healthcheck(bundle: Bundle) -> dict[str, Any]:
    url = f"http://127.0.0.1:{bundle.port}{bundle.health}"
    asked = f"import urllib.request; urllib.request.urlopen({url!r})"
    test = f"curl -fsS -o /dev/null {url} || python3 -c {shlex.quote(asked)}"
    return {"test": ["CMD-SHELL", test], "interval": "10s", "timeout": "5s", "start_period": f"{WAIT_SECONDS}s"}


def _devices(served: Served) -> Iterator[tuple[str, Any]]:
    if served.gpus:
        asked = {"driver": "nvidia", "count": served.gpus, "capabilities": ["gpu"]}
        yield "deploy", {"resources": {"reservations": {"devices": [asked]}}}
    elif served.neuron_chips:
        yield "devices", [f"/dev/neuron{index}:/dev/neuron{index}" for index in range(served.neuron_chips)]


def check(bundle: Bundle) -> str:
    """Return a script that waits for the server and asks it for a few tokens."""
    path, body = request(bundle)
    return CHECK.format(
        port=bundle.port, health=bundle.health, path=path, body=shlex.quote(json.dumps(body)), seconds=WAIT_SECONDS
    )


def request(bundle: Bundle) -> tuple[str, Mapping[str, Any]]:
    """Return the path and the body of a request for eight tokens."""
    if bundle.api == "triton":
        parameters = {"stream": False, "temperature": 0, "max_tokens": 8}
        return f"/v2/models/{bundle.model}/generate", {"text_input": PROMPT, "parameters": parameters}
    body = {"model": bundle.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return f"{bundle.prefix}/completions", body


CHECK = """#!/bin/sh
# Wait until the server is ready, then ask for a few tokens. sh check.sh [URL] [SECONDS]: exit code 0 if they come.
set -eu
url=${{1:-http://127.0.0.1:{port}}}
end=$(( $(date +%s) + ${{2:-{seconds}}} ))
until curl -fsS -o /dev/null "$url{health}" 2> /dev/null; do
  if [ "$(date +%s)" -ge "$end" ]; then echo "$url{health} doesn't answer" >&2; exit 1; fi
  sleep 2
done
curl -fsS "$url{path}" -H 'Content-Type: application/json' -d {body}
echo
"""


def page(server: str, bundle: Bundle, served: Served, names: list[str], checked: str) -> Iterator[str]:
    """Yield the paragraphs of README.md: what to type, from the output directory."""
    yield f"# {server}"
    yield f"Serves {', '.join(f'`{name}`' for name in bundle.needs)} on {served.target.name} as `{bundle.model}`."
    commands = "\n".join(_commands(server, bundle, names))
    yield f"From the output directory:\n\n```\n{commands}\n```"
    if bundle.limits:
        yield "## Limits\n\n" + "\n".join(f"- {each}" for each in bundle.limits)
    yield f"Checked: {checked or 'emitted only'}. Commands and keys: {bundle.source}."


def _commands(server: str, bundle: Bundle, names: list[str]) -> Iterator[str]:
    if bundle.sagemaker is not None:
        yield f"python serve/{server}/deploy.py --bucket BUCKET --role ARN --dry-run   # what would be sent"
        yield f"python serve/{server}/deploy.py --bucket BUCKET --role ARN"
        return
    yield f"docker compose -f serve/{server}/compose.yaml up"
    if "check.sh" in names:
        yield f"sh serve/{server}/check.sh"
    yield f"docker build -f serve/{server}/Dockerfile -t {bundle.name} .   # an image with the artifact in it"
    if "kubernetes.yaml" in names:
        claim = kubernetes.claim(bundle)
        yield f"kubectl apply -f serve/{server}/kubernetes.yaml   # the output directory on the volume claim {claim}"
        yield f"kubectl apply -f serve/{server}/kserve.yaml       # or with KServe, on the same claim"
