"""Checkpoints that hold all experts of a block in few tensors, seen as if each expert had its own.

    gate and up   (experts, 2 * width, hidden)    an expert's gate projection above its up projection
    down          (experts, hidden, width)

Some lie across, (experts, hidden, 2 * width) and (experts, width, hidden); in some the outputs of gate and up
alternate; some have biases, (experts, 2 * width) and (experts, hidden). Every expert is one run of elements of them, so
that it can be read, and compared, on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optikit.errors import IntegrityError
from optikit.models.architectures import Architecture, Experts
from optikit.models.facts import TensorFacts
from optikit.models.traits import Storage

FIX = "the checkpoint is damaged or of another version: get it again, or save it with transformers"
NIBBLES = 32
"""4-bit codes that share a scale in stacked MXFP4 experts."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A projection of one expert inside a tensor that holds all of them.

    Attributes:
        name: What it is called on its own.
        elements: Where its expert's run begins and ends.
        run: Shape of that run.
        across: The run is (in, out).
        rows: Outputs of the run that are this projection's: first, last and one more, step.
        shape: Of the projection: (out, in), or (out,) of a bias.
    """

    name: str
    elements: tuple[int, int]
    run: tuple[int, ...]
    across: bool = False
    rows: tuple[int, int, int]
    shape: tuple[int, ...]

    @property
    def in_one_piece(self) -> bool:
        """Whether its elements lie one after the other, in order."""
        return not self.across and self.rows[2] == 1


def shapes(
    experts: Experts, count: int, wide: int, hidden: int, *, turned: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what holds gate and up, down, and where there are some their biases, of all experts.

    `turned` are those of a checkpoint that has the weights the other way round than transformers' module.
    """
    pairs = ((2 * wide, hidden), (hidden, wide))
    whole = tuple((count, *(pair[::-1] if experts.across != turned else pair)) for pair in pairs)
    return (*whole, (count, 2 * wide), (count, hidden)) if experts.biased else whole


def is_turned(architecture: Architecture, sizes: Mapping[str, int], name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a stacked tensor of a family that has them either way lies the other way round than its module's.

    Of a square one that can't be told: transformers, too, takes it as it lies.
    """
    experts = architecture.experts
    if experts is None or not experts.either:
        return False
    which, figures = experts.stacked.index(inside_block(architecture, name)), _figures(sizes)
    return shape != shapes(experts, *figures)[which] and shape == shapes(experts, *figures, turned=True)[which]


def _figures(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    return sizes["experts"], sizes["expert_width"], sizes["hidden"]


def apart(
    architecture: Architecture, sizes: Mapping[str, int], tensors: Mapping[str, TensorFacts], where: Path
) -> dict[str, TensorFacts]:
    """Return the headers of a model with those of stacked experts taken apart.

    Args:
        architecture: Its family.
        sizes: Figures, with those of experts.
        tensors: Headers, under the names of the language model on its own.
        where: The directory, for messages.

    Raises:
        IntegrityError: A stacked tensor hasn't the shape that config.json describes, or lies across.
    """
    experts = architecture.experts
    if experts is None or not experts.stacked:
        return dict(tensors)
    wanted = dict(zip(experts.stacked, shapes(experts, *_figures(sizes)), strict=True))
    found = {}
    for name, tensor in tensors.items():
        inside = inside_block(architecture, name)
        if inside not in wanted:
            found[name] = tensor
            continue
        turned = is_turned(architecture, sizes, name, tensor.shape)
        if tensor.shape != wanted[inside] and not turned:
            across = " lies across: it" if tensor.shape == (tensor.shape[0], *wanted[inside][:0:-1]) else ""
            message = f"{where}: {name}{across} has shape {tensor.shape}, and {wanted[inside]} is promised"
            raise IntegrityError(message, fix=FIX)
        found |= {
            part.name: TensorFacts(dtype=tensor.dtype, shape=part.shape)
            for part in parts(architecture, sizes, name, turned=turned)
        }
    return found


def inside_block(architecture: Architecture, name: str) -> str:
    """Return a tensor's name relative to its block, "" outside of blocks."""
    rest = name.removeprefix(f"{architecture.blocks}.")
    return rest.partition(".")[2] if rest != name else ""


def parts(architecture: Architecture, sizes: Mapping[str, int], name: str, *, turned: bool = False) -> Iterator[Part]:
    """Yield the projections inside a stacked tensor, expert by expert.

    Args:
        architecture: A family with stacked experts.
        sizes: Figures, with those of experts.
        name: The stacked tensor, in the language model on its own.
        turned: It lies the other way round than transformers' module has it.
    """
    experts = architecture.experts
    if experts is None:
        return
    inside = inside_block(architecture, name)
    block, which = name.removesuffix(inside), experts.stacked.index(inside)
    _, *run = shapes(experts, *_figures(sizes), turned=turned)[which]
    leaf, across = ("weight", experts.across != turned) if which < 2 else ("bias", False)
    held = (0, 1) if which % 2 == 0 else (2,)
    outputs, size = run[-1 if across else 0], 1
    for side in run:
        size *= side
    for expert in range(sizes["experts"]):
        for place, part in enumerate(held):
            each = outputs // len(held)
            alternate = experts.interleaved and len(held) > 1
            rows = (place, outputs, 2) if alternate else (place * each, place * each + each, 1)
            inputs = tuple(run[:-1] if across else run[1:])
            found = Part(
                name=f"{block}{experts.linear(expert, part)}.{leaf}",
                elements=(expert * size, expert * size + size),
                run=tuple(run),
                across=across,
                rows=rows,
                shape=(each, *inputs),
            )
            yield _alone(found) if found.in_one_piece else found


def _alone(part: Part) -> Part:
    """Return a projection that lies in one piece as a run of its own."""
    (first, last, _), size = part.rows, 1
    for side in part.shape[1:]:
        size *= side
    start = part.elements[0]
    elements = (start + first * size, start + last * size)
    return Part(name=part.name, elements=elements, run=part.shape, rows=(0, part.shape[0], 1), shape=part.shape)


def unpacked(
    architecture: Architecture, storage: Storage, tensors: Mapping[str, TensorFacts], dtype: str, where: Path
) -> dict[str, TensorFacts] | None:
    """Return the headers that a checkpoint has once its stacked experts are floats; None where they aren't packed.

    Args:
        architecture: Its family.
        storage: How its weights are stored.
        tensors: Headers, under the names of the language model on its own.
        dtype: Of the floats.
        where: The directory, for messages.

    Raises:
        IntegrityError: Codes and scales don't go together, or aren't there.
    """
    experts = architecture.experts
    if experts is None or not experts.stacked or storage.joint != "_":
        return None
    found = dict(tensors)
    wholes = [name for name in tensors if storage.split(name)[1] == storage.codes]
    if not wholes:
        message = f"{where}: config.json promises weights that are {storage.told}, and not one is packed"
        raise IntegrityError(message, fix="take quantization_config out of config.json, if the weights are dense")
    for name in wholes:
        whole, _ = storage.split(name)
        codes, scales = found.pop(name), found.pop(storage.tensor(whole, "scales"), None)
        if scales is None:
            raise IntegrityError(f"{where}: {name} has no scales beside it", fix=FIX)
        _check_codes(codes, scales, f"{where}: {name}", storage)
        count, rows, groups, _ = codes.shape
        found[whole] = TensorFacts(dtype=dtype, shape=(count, groups * NIBBLES, rows))
    return found


def _check_codes(codes: TensorFacts, scales: TensorFacts, where: str, storage: Storage) -> None:
    fits = len(codes.shape) == 4 and codes.shape[-1] * 2 == NIBBLES and scales.shape == codes.shape[:3]
    if not fits or {codes.dtype, scales.dtype} != {"U8"}:
        told = f"{codes.dtype} {codes.shape} and scales of {scales.dtype} {scales.shape}"
        message = f"{where} is {told}; {storage.told} is U8 (experts, out, groups, 16), a scale a group"
        raise IntegrityError(message, fix=FIX)
