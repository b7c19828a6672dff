"""What this machine can do and what stands in its way: the checks behind `optikit doctor`.

Every check is a function that yields findings; none of them imports a heavy library or needs a device to be there.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Literal

from optikit import host
from optikit.environments import cuda
from optikit.errors import OptikitError, UnavailableError
from optikit.process import env_variables, program
from optikit.targets import nvidia

if TYPE_CHECKING:
    from optikit.targets.probe import Probe

Status = Literal["ok", "warn", "fail"]
GIB = 2**30
SAME_MEMORY = 0.1
"""How far the memory that a driver tells may be from that of the catalogue: error correction takes its share."""
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
    yield from gpus()
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


def gpus() -> Iterator[Finding]:
    """Look for NVIDIA GPUs through `nvidia-smi`, which comes with the driver, and for what runs on them."""
    smi = shutil.which("nvidia-smi")
    if smi is None and not Path("/dev/nvidiactl").exists():
        yield Finding(what="nvidia gpu", status="ok", detail="none; CPU stages and emitted GPU recipes still work")
        return
    driver = cuda.driver()
    if smi is None or driver is None:
        fix = "check that the driver is loaded: nvidia-smi"
        yield Finding(what="nvidia gpu", status="warn", detail="a driver is here that doesn't answer", fix=fix)
        return
    query = [smi, f"--query-gpu={','.join(nvidia.QUERY)}", "--format=csv,noheader,nounits"]
    listing = (program.run(command, seconds=cuda.SECONDS).output for command in (query, [smi, "-L"]))
    yield gpus_told(driver, *listing)
    yield from cuda_environments(cuda.offers(driver))


def gpus_told(driver: nvidia.Driver, rows: str, listing: str) -> Finding:
    """Judge what `nvidia-smi` says.

    Args:
        driver: Its driver.
        rows: Its answer to a query for `nvidia.QUERY`.
        listing: Its answer to `-L`.
    """
    found = nvidia.gpus(rows)
    runs = f"driver {driver.version}, CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    if not found:
        fix = "check which GPUs this process may see: CUDA_VISIBLE_DEVICES, `--gpus all` of a container"
        return Finding(what="nvidia gpu", status="warn", detail=f"{runs}, no GPU", fix=fix)
    named = ", ".join(_gpu(gpu) for gpu in found)
    targets = nvidia_targets(found)
    detail = f"{named}; {runs}; {f'target {targets[0]}' if targets else 'no target of the catalogue'}"
    if any(gpu.mig for gpu in found):
        detail += f"; MIG instances: {', '.join(nvidia.mig_profiles(listing)) or 'none'}"
        fix = "a process gets one instance; a target of your own says its memory: --targets FILE"
        return Finding(what="nvidia gpu", status="warn", detail=detail, fix=fix)
    return Finding(what="nvidia gpu", status="ok", detail=detail)


def _gpu(gpu: nvidia.Gpu) -> str:
    major, minor = gpu.capability
    capability = f", compute capability {major}.{minor}" if major else ""
    return f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB{capability})"


def nvidia_targets(found: tuple[nvidia.Gpu, ...]) -> tuple[str, ...]:
    """Return the rows of the catalogue that this many of these GPUs are, the one named most shortly first."""
    from optikit.targets import rows

    first = found[0]
    words = set(first.name.replace("-", " ").split())
    near = [
        target
        for target in rows().values()
        if target.device == "cuda"
        and target.accelerator.split(" ")[0] in words
        and target.compute_capability == 10 * first.capability[0] + first.capability[1]
        and abs((target.memory_gib or 0) / (first.memory_mib / 1024) - 1) < SAME_MEMORY
    ]
    same = [target.name for target in near if target.count == len(found)]
    return tuple(sorted(same or [target.name for target in near], key=len))


def cuda_environments(offers: tuple[cuda.Offer, ...]) -> Iterator[Finding]:
    """Say which environments for GPUs this machine gets, and why it doesn't get the others."""
    from optikit import environments as managed

    got = {offer.instead for offer in offers if offer.python}
    for offer in offers:
        what = f"env {offer.name}"
        if offer.python:
            yield Finding(what=what, status="ok", detail=f"for steps on --device cuda, python {offer.python}")
        else:
            on_cpu = offer.instead not in got and offer.instead in managed.names()
            instead = f"; {offer.instead} computes on the CPU" if on_cpu else ""
            yield Finding(what=what, status="ok", detail=f"not offered: {offer.why}{instead}")


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
