"""`Target`: one row of targets.toml, frozen. What isn't documented is None, never guessed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from optikit import host
from optikit.errors import InputMissingError, RecipeError
from optikit.problems import Problem, did_you_mean

Device = Literal["cpu", "cuda", "neuron"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an artifact will run.

    Attributes:
        name: What a recipe writes, e.g. `cpu`, `l4`, `ml.g5.12xlarge`.
        device: Kind of processor that does the matrix products.
        accelerator: Product name, e.g. `A10G`.
        count: Number of accelerators (chips for Neuron).
        memory_gib: Memory of one accelerator; for `cpu` the machine's own, found when planning.
        bandwidth_gb_s: Memory bandwidth of one accelerator, 10⁹ bytes per second.
        bf16_tflops: Dense bf16 peak of one accelerator, 10¹² operations per second.
        fp16_tflops: Dense fp16 peak, for accelerators without bf16.
        int8_tops: Dense int8 peak of one accelerator.
        compute_capability: CUDA compute capability times ten: 86 for 8.6.
        cores: Neuron cores in all, as the SDK counts them by default (on Trainium2 two physical cores are one).
        core_memory_gb: Memory of one such core, 10⁹ bytes.
        host_memory_gib: Memory of the instance's processors, through which models are loaded.
        tensor_parallel: Degrees that the hardware allows; empty where not documented.
        older_tensor_parallel: Degrees that only older texts allow: warned about.
        engines: Compile engines and servers that run here.
        usd_per_hour: On-demand price, with its source and date in `price_source`.
        price_source: Where the price was read, and when.
        source: Where the hardware figures were read.
    """

    name: str
    device: Device
    accelerator: str = ""
    count: int = 1
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    bf16_tflops: float | None = None
    fp16_tflops: float | None = None
    int8_tops: float | None = None
    compute_capability: int | None = None
    cores: int | None = None
    core_memory_gb: float | None = None
    host_memory_gib: float | None = None
    tensor_parallel: tuple[int, ...] = ()
    older_tensor_parallel: tuple[int, ...] = ()
    engines: tuple[str, ...] = ()
    usd_per_hour: float | None = None
    price_source: str = ""
    source: str = ""

    @property
    def memory_bytes(self) -> int | None:
        """Memory of all accelerators together; of Neuron's what its cores may hold, where that is known."""
        if self.core_memory_gb is not None and self.cores is not None:
            return int(self.core_memory_gb * 1e9 * self.cores)
        return None if self.memory_gib is None else int(self.memory_gib * self.count * 2**30)

    @property
    def capability(self) -> str | None:
        """CUDA compute capability as NVIDIA writes it: 8.9."""
        return None if self.compute_capability is None else f"{self.compute_capability / 10:.1f}"

    @property
    def devices(self) -> int:
        """Accelerators, or Neuron cores: what degrees of parallelism count."""
        return self.cores or self.count

    def copies(self, devices: int) -> int:
        """Return how many copies of a model that takes so many devices have room side by side."""
        return max(1, self.devices // devices)

    def part(self, devices: int) -> Target:
        """Return the part that one copy of a model takes which lies on so many devices, at its share of the price."""
        share = self.count * devices / self.devices

        def scaled(value: float | None) -> float | None:
            return None if value is None else value * share

        return replace(
            self,
            count=1,
            cores=None if self.cores is None else devices,
            memory_gib=scaled(self.memory_gib),
            bandwidth_gb_s=scaled(self.bandwidth_gb_s),
            bf16_tflops=scaled(self.bf16_tflops),
            fp16_tflops=scaled(self.fp16_tflops),
            int8_tops=scaled(self.int8_tops),
            usd_per_hour=None if self.usd_per_hour is None else self.usd_per_hour / self.copies(devices),
        )


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("device", "accelerator", "price_source", "source", "like"), str),
    **dict.fromkeys(("count", "compute_capability", "cores"), int),
    **dict.fromkeys(("tensor_parallel", "older_tensor_parallel", "engines"), list),
    **dict.fromkeys(
        (
            "memory_gib",
            "bandwidth_gb_s",
            "bf16_tflops",
            "fp16_tflops",
            "int8_tops",
            "core_memory_gb",
            "host_memory_gib",
            "usd_per_hour",
        ),
        (int, float),
    ),
}
_NOT_INHERITED = frozenset({"like", "usd_per_hour", "price_source"})

Rows = Mapping[str, Mapping[str, Any]]


def load(text: str, file: str, known: Rows | None = None) -> dict[str, Target]:
    """Read rows of targets from TOML text; `known` rows may be named by `like`.

    Raises:
        RecipeError: The text is no TOML, a row contradicts itself or a known row, or lacks what its device needs;
            the message names file and row.
    """
    try:
        rows: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{file} can't be read: {error}", fix="one table per target: [my-box]") from error
    everything = {**(known or {}), **rows}
    targets = {}
    for name, row in rows.items():
        for complaint, fix in _faults(name, row, known or {}):
            raise RecipeError(f"{file}: target {name!r} {complaint}", fix=fix)
        targets[name] = _build(name, everything, file)
    return targets


def _build(name: str, rows: Rows, file: str) -> Target:
    values = _inherited(name, rows, file, ())
    for complaint, fix in _contradictions(values):
        raise RecipeError(f"{file}: target {name!r} {complaint}", fix=fix)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Target(name=name, **fields)


def _inherited(name: str, rows: Rows, file: str, heirs: tuple[str, ...]) -> dict[str, Any]:
    row = rows[name]
    base = row.get("like")
    own = {key: value for key, value in row.items() if key != "like"}
    if base is None:
        return own
    if base in heirs or base == name:
        raise RecipeError(f"{file}: target {name!r} is like itself", fix="name another row in `like`")
    if base not in rows:
        raise RecipeError(f"{file}: target {name!r} is like {base!r}, which isn't there", fix=did_you_mean(base, rows))
    inherited = _inherited(base, rows, file, (*heirs, name))
    return {**{key: value for key, value in inherited.items() if key not in _NOT_INHERITED}, **own}


def _faults(name: str, row: Any, known: Rows) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a row as written: complaint and fix."""
    if not isinstance(row, dict):
        yield f"is {row!r}, not a table", "write its fields under [name]"
        return
    if name in known:
        yield "is a row of optikit's own", f'give yours another name, with `like = "{name}"` for the figures it shares'
    for key, value in row.items():
        if key not in _TYPES:
            yield f"has unknown field {key!r}", did_you_mean(key, _TYPES)
        elif isinstance(value, bool) or not isinstance(value, _TYPES[key]):
            yield f"has {key} = {value!r}, of the wrong type", f"see `optikit targets --json` for {key} of other rows"


def _contradictions(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what can't be true of a complete row."""
    device = row.get("device")
    if device not in get_args(Device):
        yield f"has device {device!r}", f"choose from {', '.join(get_args(Device))}"
    for key in _NEEDED.get(str(device), ()):
        if row.get(key) is None:
            yield f"lacks {key}, which a {device} target needs", f"add {key}"
    for key, owner in _BELONGS.items():
        if row.get(key) is not None and device != owner:
            yield f"has {key}, but its device is {device}", f"{key} is for {owner} targets"
    yield from _figures(row)


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, (int, float)) and value <= 0:
            yield f"has {key} = {value}", "figures are positive; leave out what isn't known"
    if row.get("usd_per_hour") is not None and not row.get("price_source"):
        yield "has a price without price_source", "say where the price was read, and when"
    cores = row.get("cores")
    if cores is not None and any(degree > cores for degree in row.get("tensor_parallel", ())):
        yield f"allows tensor_parallel above its {cores} cores", "list degrees up to the number of cores"


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "cuda": ("memory_gib", "compute_capability"),
    "neuron": ("memory_gib", "cores"),
}
_BELONGS: Mapping[str, str] = {
    "compute_capability": "cuda",
    "cores": "neuron",
    "core_memory_gb": "neuron",
    "host_memory_gib": "neuron",
    "older_tensor_parallel": "neuron",
}


def _own_text() -> str:
    return resources.files("optikit.targets").joinpath("targets.toml").read_text(encoding="utf-8")


@cache
def _rows() -> Mapping[str, Target]:
    return load(_own_text(), "targets.toml")


def rows(extra: Path | None = None) -> Mapping[str, Target]:
    """Return every target by name: optikit's own rows and those of the user's file.

    Raises:
        InputMissingError: The user's file isn't there.
        RecipeError: It has rows that can't be true.
    """
    if extra is None:
        return _rows()
    try:
        if not extra.is_file():
            extra.stat()  # nothing there is told as that
            raise RecipeError(f"{extra} is not a regular file", fix="one TOML table per target, in a file")
        text = extra.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputMissingError(f"no targets file {str(extra)!r}", fix="check the path after --targets") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{extra} can't be read: {error}", fix="one TOML table per target") from error
    return {**_rows(), **load(text, str(extra), tomllib.loads(_own_text()))}


def names(extra: Path | None = None) -> tuple[str, ...]:
    """Return the names of all targets."""
    return tuple(rows(extra))


def find(name: str, extra: Path | None = None) -> Target | None:
    """Return the target of that name, or None. What a `cpu` row leaves open is this machine's."""
    target = rows(extra).get(name)
    return None if target is None else present(target)


def unknown(name: str, known: Iterable[str]) -> Problem:
    """Return what is wrong with a recipe whose target isn't among the known ones."""
    message, fix = f"unknown target {name!r}", did_you_mean(name, known)
    return Problem(code="unknown-target", message=message, fix=fix, loc=("target",))


def present(target: Target) -> Target:
    """Fill in this machine's memory, and its bandwidth if it was measured, where a `cpu` row leaves them open."""
    from optikit.targets.probe import measured

    if target.device != "cpu":
        return target
    probe = measured()
    return replace(
        target,
        accelerator=target.accelerator or host.cpu_model(),
        memory_gib=target.memory_gib or host.memory_bytes() / 2**30,
        bandwidth_gb_s=target.bandwidth_gb_s or (probe.bandwidth_gb_s if probe else None),
        bf16_tflops=target.bf16_tflops or (probe.bf16_tflops if probe else None),
    )
