"""What a Neuron compile cache holds: graphs by compiler version, hash of the graph and hash of the flags.

The compiler's wrapper keeps `neuronxcc-VERSION/MODULE_GRAPH+FLAGS/model.neff`, where FLAGS is a hash of its flags, so
that another version or flag is another entry (awsdocs-neuron, neuron-features/neuron-caching); the vLLM plugin keeps
`neuron/compile_cache/KEY/` (vllm-neuron docs, compilation_cache). Both also lie in S3, under the same names.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optikit.errors import InputMissingError, UnavailableError
from optikit.process import program

WRAPPER = re.compile(
    r"(?:.*/)?neuronxcc-(?P<compiler>[^/]+)/MODULE_(?P<graph>[^/+]+)\+(?P<flags>[^/]+)/(?P<file>[^/]+)$"
)
PLUGIN = re.compile(r"(?:.*/)?compile_cache/(?P<graph>[0-9a-f]{32})/(?P<file>.+)$")
DONE = ".neff"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One compiled graph.

    Attributes:
        compiler: Version of neuronx-cc; "" where the cache doesn't tell.
        graph, flags: Hashes of what was compiled, and of the compiler's flags.
        size_bytes: Of all its files.
        compiled: There is a result; without one, compiling failed or still runs.
    """

    compiler: str
    graph: str
    flags: str
    size_bytes: int
    compiled: bool


def listed(place: str) -> list[Graph]:
    """Return the graphs in a cache: a directory, or s3://BUCKET/PREFIX by way of the `aws` command.

    Raises:
        InputMissingError: There is no such directory, or S3 doesn't answer for it.
        UnavailableError: `aws` can't be found.
    """
    return graphs(_in_s3(place) if place.startswith("s3://") else _in_directory(Path(place)))


def graphs(files: Iterable[tuple[str, int]]) -> list[Graph]:
    """Return the graphs that files of a cache make, by their names and sizes.

    >>> graphs([("neuronxcc-2.21.1+ab/MODULE_12+d41d8cd9/model.neff", 7)])
    [Graph(compiler='2.21.1+ab', graph='12', flags='d41d8cd9', size_bytes=7, compiled=True)]
    """
    sizes: dict[tuple[str, str, str], int] = {}
    done = set()
    for name, size in files:
        found = WRAPPER.fullmatch(name) or PLUGIN.fullmatch(name)
        if found is None:
            continue
        said = found.groupdict()
        key = (said.get("compiler") or "", said["graph"], said.get("flags") or "")
        sizes[key] = sizes.get(key, 0) + size
        done |= {key} if said["file"].endswith(DONE) else set()
    return [
        Graph(compiler=key[0], graph=key[1], flags=key[2], size_bytes=size, compiled=key in done)
        for key, size in sorted(sizes.items())
    ]


def _in_directory(directory: Path) -> Iterator[tuple[str, int]]:
    if not directory.is_dir():
        raise InputMissingError(f"there is no directory {directory}", fix="name the cache with --directory")
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(directory.parent).as_posix(), path.stat().st_size


def _in_s3(url: str) -> Iterator[tuple[str, int]]:
    aws = shutil.which("aws")
    if aws is None:
        raise UnavailableError("`aws` can't be found, and it reads S3", fix="pip install awscli")
    command = [aws, "s3", "ls", "--recursive", url.rstrip("/") + "/"]
    done = program.run(command)
    if done.code:
        why = done.errors.strip().splitlines()[-1:] or ["nothing lies there"]
        raise InputMissingError(f"{url} can't be listed: {why[0]}", fix="check the URL, and the role that reads it")
    for line in done.output.splitlines():
        _, _, size, name = line.split(maxsplit=3)
        yield name, int(size)
