"""A second torch device on machines that have one: its tensors lie in ordinary memory, and nothing may forget that.

`install()` makes a device `cudasim` of torch's slot for foreign backends. Its tensors wrap tensors on the processor, so
that numbers are the processor's own, bit by bit; what CUDA refuses is refused here as well:

- an operation on tensors of both devices, but for those that CUDA allows: copies, single numbers, indices;
- `numpy()`, and whatever reads memory without asking for a copy on the processor first;
- drawing from a generator of the processor;
- products of integer matrices, which CUDA has no kernel for.

It is for the whole process and can't be taken back. So tests start one: `python -m tests.cuda.second_device DIR PART`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "cudasim"
BETWEEN = {"copy_", "_to_copy", "_copy_from"}
"""Operations from one device to the other."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that take indices from either."""
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
CPU = torch.device("cpu")


class MixedDevicesError(RuntimeError):
    """What CUDA would refuse."""


class Elsewhere(torch.Tensor):
    """A tensor of the second device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        assert not isinstance(inner, Elsewhere), "wrapped twice"
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, dict(kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["inner"])

    def tolist(self) -> Any:
        """Return the numbers, as CUDA does: it waits and copies."""
        return self.detach().inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, in CUDA's words."""
        if force:
            return self.detach().inner.numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents, too
        return f"{self.detach().inner!r} on {NAME}"


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do an operation on the processor; what it gives lies where the operands do, or where it is asked for."""
    in_parts = function.decompose(*args, **kwargs)  # what is made of other operations is looked at in those
    if in_parts is not NotImplemented:
        return in_parts
    name = function._schema.name.removeprefix("aten::")
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    elsewhere = any(isinstance(each, Elsewhere) for each in tensors)
    _refuse(name, args, kwargs, tensors)
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        elsewhere = asked.type == NAME
        kwargs["device"] = CPU if elsewhere else asked
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    if name == "copy_":
        elsewhere = isinstance(args[0], Elsewhere)
    out = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "_to_copy" and elsewhere != any(isinstance(each, Elsewhere) for each in tensors):
        out = out.clone() if out is _inner(args[0]) else out
    if not elsewhere:
        return out
    wrapped = tree_map(lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) else each, out)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would."""
    ours = [each for each in tensors if isinstance(each, Elsewhere)]
    if not ours:
        return
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise MixedDevicesError(f"{name}: expected a '{NAME}' generator, got one of the {generator.device}")
    if name in PRODUCTS and not ours[0].is_floating_point() and not ours[0].is_complex():
        raise NotImplementedError(f"{name} has no kernel for {ours[0].dtype} on CUDA")
    if name in BETWEEN:
        return
    looked_at = [args[0], *args[2:3]] if name in INDEXED else tensors
    strange = [
        each for each in looked_at if isinstance(each, torch.Tensor) and not isinstance(each, Elsewhere) and each.dim()
    ]
    if strange and (name not in INDEXED or isinstance(args[0], Elsewhere) or ours):
        shapes = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
        raise MixedDevicesError(f"{name}: expected all tensors to be on the same device: {shapes}")


class _Module:
    """What torch asks a backend's module for."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Have nothing to seed: draws are the processor's."""

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        """Have one device only."""

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Have nothing to wait for."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


FACTORIES: dict[str, Callable[..., torch.Tensor]] = {
    "empty.memory_format": lambda size, **how: torch.empty(size, dtype=how.get("dtype")),
    "empty_strided": lambda size, stride, **how: torch.empty_strided(size, stride, dtype=how.get("dtype")),
    "arange": lambda *ends, **how: torch.arange(*ends, dtype=how.get("dtype")),
    "arange.start": lambda *ends, **how: torch.arange(*ends, dtype=how.get("dtype")),
    "arange.start_step": lambda *ends, **how: torch.arange(*ends, dtype=how.get("dtype")),
}


def install() -> None:
    """Make the device."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name, make in FACTORIES.items():
        library.impl(name, lambda *args, make=make, **how: Elsewhere(make(*args, **how)), "PrivateUse1")
    library.impl("_to_copy", _to_elsewhere, "PrivateUse1")
    globals()["_library"] = library


def _to_elsewhere(tensor: torch.Tensor, **how: Any) -> torch.Tensor:
    return Elsewhere(_inner(tensor).to(how.get("dtype") or tensor.dtype, copy=True))


def compare(directory: Path, wanted: list[str]) -> None:
    """Do parts on the processor and on the second device; print what differs, a JSON object per part and line."""
    from torch.utils import _foreach_utils as foreach

    from optikit.algorithms import precision
    from tests.cuda import parts

    install()
    precision.BF16_INSTRUCTIONS = frozenset()  # the second device computes in float32, and so does the processor then
    torch.backends.cuda.enable_flash_sdp(False)  # the processor's own attention, which the second device hasn't
    foreach._foreach_supported_types.append(Elsewhere)
    adam: Any = sys.modules["torch.optim.adam"]
    adam._default_to_fused_or_foreach = lambda *_, **__: (False, False)
    world = parts.make_world(directory / "world")
    for name, do in parts.PARTS.items():
        if name in parts.OWN_PROCESS or (wanted and name not in wanted):
            continue
        error = ""
        try:
            here, there = (do(world, directory / name / device, device) for device in ("cpu", NAME))
            differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
            error = "; ".join(f"{key}: {there.get(key)}, not {here.get(key)}" for key in differing)
        except Exception:  # noqa: BLE001 - the next part is done whatever this one does
            error = traceback.format_exc()
        print(json.dumps({"what": name, "error": error}), flush=True)


if __name__ == "__main__":
    from tests.cuda import second_device  # not `__main__`: one module, one class

    second_device.compare(Path(sys.argv[1]), sys.argv[2:])
