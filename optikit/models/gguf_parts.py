"""A gguf model in several files, `NAME-00001-of-00003.gguf` and on, as llama-gguf-split writes them: one is named.

Each part has a header of its own with `split.no`, `split.count` and how many tensors there are in all; the settings of
the model are in the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from optikit.errors import InputMissingError, IntegrityError
from optikit.models.gguf_header import GgufHeader, read_header
from optikit.models.strict_json import FIX

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def files(path: Path) -> tuple[Path, ...]:
    """Return the files of a model of which one is named, in order.

    Raises:
        InputMissingError: A part isn't there; the message names it.
    """
    found = tuple(path.with_name(name) for name in names(path.name))
    missing = next((part for part in found if not part.is_file()), None)
    if missing is not None and len(found) > 1:
        message = f"{path.name} is one of {len(found)} parts, and {missing.name} isn't beside it"
        raise InputMissingError(message, fix=f"put all parts into {path.parent}")
    return found


def names(name: str) -> Iterable[str]:
    """Yield what the parts of a model are called, by the name of any; the name itself where it is whole.

    >>> list(names("a-00002-of-00002.gguf")), list(names("a.gguf"))
    (['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf'], ['a.gguf'])
    """
    part = _PART.fullmatch(name)
    if part is None or not 1 <= int(part["number"]) <= int(part["count"]):
        yield name
        return
    yield from (f"{part['name']}-{index:05}-of-{part['count']}.gguf" for index in range(1, int(part["count"]) + 1))


def whole(found: Iterable[str]) -> list[str]:
    """Return the models among names of files: of one in parts only the first."""
    return [name for name in found if next(iter(names(name))) == name]


def read(path: Path) -> GgufHeader:
    """Read and check the headers of a model, as if it were in one file.

    Raises:
        InputMissingError: A part isn't there.
        IntegrityError: A part is damaged, or says something else of the others than their names.
    """
    parts = files(path)
    headers = [read_header(part) for part in parts]
    for index, (part, header) in enumerate(zip(parts, headers, strict=True)):
        _check(part, header, index, len(parts))
    if len(parts) == 1:
        return headers[0]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    held = sum(len(header.tensors) for header in headers)
    if len(tensors) != held:
        raise IntegrityError(f"{path.name}: two of its {len(parts)} parts have the same tensor", fix=FIX)
    told = headers[0].metadata.get("split.tensors.count", held)
    if told != held:
        raise IntegrityError(f"{parts[0].name} tells of {told!r} tensors, and its parts have {held}", fix=FIX)
    return GgufHeader(metadata=headers[0].metadata, tensors=tensors)


def _check(part: Path, header: GgufHeader, index: int, count: int) -> None:
    """Hold what a part says of itself to its name."""
    told = header.metadata.get("split.count", 0)
    if told in (0, 1) and count == 1:
        return
    if told != count:
        message = f"{part.name} says that it is one of {told!r} parts, and by its name it is one of {count}"
        raise IntegrityError(message, fix="give the parts their names back: NAME-00001-of-00003.gguf and on")
    number = header.metadata.get("split.no")
    if number != index:
        raise IntegrityError(f"{part.name} says that it is part {number!r} of {count}, counted from 0", fix=FIX)
