"""`Target`: one row of targets.toml, frozen. What isn't documented is None, never guessed."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, Literal

from optikit.errors import RecipeError

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
        int8_tops: Dense int8 peak of one accelerator.
        compute_capability: CUDA compute capability times ten: 86 for 8.6.
        cores: Neuron cores in all.
        tensor_parallel: Degrees that the hardware allows; empty where not documented.
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
    int8_tops: float | None = None
    compute_capability: int | None = None
    cores: int | None = None
    tensor_parallel: tuple[int, ...] = ()
    engines: tuple[str, ...] = ()
    usd_per_hour: float | None = None
    price_source: str = ""
    source: str = ""


def _row(name: str, row: dict[str, Any]) -> Target:
    known = {f.name for f in fields(Target)}
    unknown = sorted(set(row) - known)
    if unknown:
        raise RecipeError(f"target {name!r} has unknown field {unknown[0]!r}", fix=f"known: {', '.join(sorted(known))}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Target(name=name, **values)


@cache
def _rows() -> dict[str, Target]:
    text = resources.files("optikit.targets").joinpath("targets.toml").read_text(encoding="utf-8")
    return {name: _row(name, row) for name, row in tomllib.loads(text).items()}


def names() -> tuple[str, ...]:
    """Return the names of all targets."""
    return tuple(_rows())


def find(name: str) -> Target | None:
    """Return the target of that name, or None."""
    return _rows().get(name)
