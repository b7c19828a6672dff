"""The contract of `deploy/bundles`: what a server is told of an artifact, and what it is started with.

A module there turns a row's options and an artifact into a `Bundle`; `folder.files` makes a folder of that: image,
compose file, Kubernetes manifests, SageMaker requests, a check, and a page that says what to type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from packaging.specifiers import SpecifierSet

from optikit.deploy import support
from optikit.models.facts import ModelFacts
from optikit.targets import Target, neuron, parallel

ROOT = "/out"
"""Where a container sees the output directory."""
METHODS: Mapping[str, str] = MappingProxyType(
    {"v1": "medusa", "vllm": "medusa", "draft": "draft", "lookup": "lookup", "eagle3": "eagle3"}
)
"""What support.toml calls a layout → the method of speculation that it is for."""
EVERYWHERE = "0.0.0.0"  # noqa: S104
"""Inside a container a server listens at all of its addresses; which are reached, the container's network says."""
BATCH = 8
"""Requests that are answered at a time, where the recipe doesn't say."""
Api = Literal["openai", "generate", "triton", "ollama", "none"]
"""What clients speak: OpenAI's completions, TGI's or Triton's generate, Ollama's, or no HTTP at all."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What there is to serve.

    Attributes:
        name: What clients call it where the author didn't say.
        folders: Parts of the output: `model`, `compiled/ENGINE`, `speculator`, `speculator/LAYOUT`, ….
        files: Every file of the output.
        size: Bytes of all of them.
        context: Longest text that the model was made for, tokens.
        speculation: speculator.json: method, lengths, and what servers are told; empty without one.
        target: Where it will run.
        facts: The model; None where nobody read it.
    """

    name: str
    folders: frozenset[str]
    files: frozenset[str]
    size: int
    context: int
    speculation: Mapping[str, Any] = field(default_factory=dict)
    target: Target
    facts: ModelFacts | None = None

    def tensor_parallel(self, server: str, options: Any) -> int:
        """Return how many GPUs or cores share every layer: what the recipe says, or as many as the server can use."""
        return int(options.tensor_parallel or widest(server, options, self.target, self.facts))

    @property
    def gpus(self) -> int:
        """Number of GPUs of the target."""
        return self.target.count if self.target.device == "cuda" else 0

    @property
    def neuron_chips(self) -> int:
        """Number of Neuron chips of the target."""
        return self.target.count if self.target.device == "neuron" else 0


def widest(server: str, options: Any, target: Target, facts: ModelFacts | None) -> int:
    """Return the tensor-parallel degree of a server's folder where its entry in the recipe names none."""
    left = max(1, target.devices // (getattr(options, "pipeline_parallel", None) or 1))
    if facts is None:
        return left
    return neuron.widest(target, facts) if target.device == "neuron" else parallel.widest(server, facts, left)


@dataclass(frozen=True, kw_only=True)
class SageMaker:
    """A SageMaker container: what lies under the model's prefix in S3, and what the container is told.

    Attributes:
        uploads: (path in the output, place under the prefix), files or folders.
        environment: Variables of the container.
        base: Where heads that lie on top look for their model; "" without such heads.
    """

    uploads: tuple[tuple[str, str], ...]
    environment: Mapping[str, str]
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A server, ready to start.

    Attributes:
        image: Container image.
        build: Lines of the Dockerfile that it needs on top of that image.
        command: Entry point instead of the image's own; empty keeps that.
        arguments: What it is started with.
        environment: Variables of the container.
        port: What it listens at.
        health: Path that answers 200 once it is ready; "" where there is no HTTP.
        api: What clients speak there.
        prefix: Where OpenAI's API lies.
        name: What manifests, images and endpoints are called.
        model: What a request calls the model.
        files: Further files of the folder: name → text.
        mounts: What the container sees elsewhere, too: (path in the output, path in the container).
        needs: Folders of the output that are read.
        writes: It also writes there: links to weights, what is compiled at the first start.
        shared_memory: Size of /dev/shm, 2³⁰ bytes; 0 leaves Docker's 64 MiB.
        sagemaker: How SageMaker runs it; None where it doesn't.
        limits: What is known not to work, a sentence each.
        source: Where commands and keys were read.
    """

    image: str
    build: str = ""
    command: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int
    health: str
    api: Api
    prefix: str = "/v1"
    name: str
    model: str
    files: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...]
    writes: bool = False
    shared_memory: int = 0
    sagemaker: SageMaker | None = None
    limits: tuple[str, ...] = ()
    source: str


class Bundled(Protocol):
    """What a module of `deploy/bundles` has."""

    SUMMARY: str
    """One line."""
    CHECKED: str
    """How this bundle was checked here: loaded, parsed or emitted, and by what."""

    def bundle(self, options: Any, served: Served) -> Bundle:
        """Return how to start it; `options` are those of its row in `deploy.servers`."""
        ...


def release(asked: str | None, usual: str) -> str:
    """Return the release to take: the one asked for, filled up by the usual one where that is meant.

    >>> release("3.3", "3.3.7"), release("3.2", "3.3.7"), release(None, "3.3.7")
    ('3.3.7', '3.2', '3.3.7')
    """
    return usual if asked is None or f"{usual}.".startswith(f"{asked}.") else asked


def words(options: Mapping[str, object]) -> tuple[str, ...]:
    """Return options of a command line as its words.

    >>> words({"--port": 8000})
    ('--port', '8000')
    """
    return tuple(word for name, value in options.items() for word in (name, str(value)))


def speculation(server: str, served: Served, version: str) -> tuple[str, str]:
    """Return the method of speculation that a server uses here, and its folder; ("", "") where it can't use any.

    Args:
        server: Its name in support.toml.
        served: The artifact: speculator.json, and the layouts that were written.
        version: Its release, as the rows of support.toml count them.
    """
    method = str(served.speculation.get("method", ""))
    if not method:
        return "", ""
    for row in support.rows():
        place = "" if row.what == "lookup" else f"speculator/{row.what}"
        known = (
            row.server == server and method == METHODS.get(row.what) and SpecifierSet(row.versions).contains(version)
        )
        if known and (not place or place in served.folders):
            return method, place
    return "", ""
