"""Resume state of a walk, in the job's scratch directory: finished blocks and the hidden states after them.

    resume.json          which walk this is, how many blocks are done, sha256 of the hidden states after them
    block-00012-000.safetensors  what is written in place of block 12's weights, and the aims of corrected ones; each of
                         its experts has a file
    hidden-00013.bin     input of block 13, as it was in memory
    dense-00013.bin      the same in the dense model, where a technique looks at that too

resume.json is replaced last, atomically. A walk killed anywhere finds either the old state whole or the new one. Every
file has its sha256 beside it or in resume.json; where one is damaged, the walk begins again, and says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.fileio import file_sha256, is_intact, keep_checked
from optikit.formats.checkpoint import Entry, keep_tensors, locate

if TYPE_CHECKING:
    from typing_extensions import Buffer

STATE = "resume.json"
AIM = "aim:"
"""Opens the names of tensors that are kept for the verification, and not written into the model."""


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))


class HiddenStates:
    """Hidden states of all windows in a file: the page cache keeps what memory has room for.

    Args:
        path: The file.
        shape: (samples, tokens, width).
        dtype: Of the elements.
        batch: Windows that are read and written together.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, batch: int) -> None:
        self.path = path
        self.batches = -(-shape[0] // batch)
        self._shape, self._dtype, self._batch = shape, dtype, batch
        self._window_bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, index: int) -> Tensor:
        """Read batch `index`, (windows, tokens, width)."""
        start = index * self._batch
        count = min(self._batch, self._shape[0] - start)
        tensor = torch.empty((count, *self._shape[1:]), dtype=self._dtype)
        with self.path.open("rb") as file:
            file.seek(start * self._window_bytes)
            view = as_bytes(tensor)
            if file.readinto(view) != len(view):
                raise IntegrityError(f"{self.path} ended early", fix="run again")
        return tensor

    def write(self, batches: Iterator[Tensor]) -> str:
        """Write all batches in order; return the sha256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("wb") as file:
            for tensor in batches:
                view = as_bytes(tensor.contiguous())
                file.write(view)
                digest.update(view)
        return digest.hexdigest()

    def intact(self, sha256: str) -> bool:
        """Return whether the file is there and holds what was written."""
        return self.path.exists() and file_sha256(self.path) == sha256


class ResumeState:
    """The finished part of a walk.

    Args:
        directory: Where it is kept.
        identity: Which walk it is: what another one left there is of no use.
        note: Told of damage.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], note: Callable[[str], None] = lambda _: None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._identity = dict(identity)
        self.done = 0
        self.hidden_sha256 = self.dense_sha256 = ""
        self.linears: list[str] = []
        self.facts: dict[str, Any] = {}
        self._parts: list[int] = []
        self._stashed = 0
        path = directory / STATE
        if not is_intact(path, note):
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["identity"] != self._identity:
            return
        if all(is_intact(path, note) for path in self._paths(found["parts"])):
            self.done = found["done"]
            self.hidden_sha256, self.dense_sha256 = found["hidden_sha256"], found["dense_sha256"]
            self.linears, self.facts, self._parts = found["linears"], found["facts"], found["parts"]

    def reset(self) -> None:
        """Begin again: the state found is of another walk, or damaged."""
        self.done, self.linears, self.facts, self._parts, self._stashed = 0, [], {}, [], 0
        self.hidden_sha256 = self.dense_sha256 = ""

    def hidden_path(self, index: int) -> Path:
        """Return the file of the input of block `index`."""
        return self._directory / f"hidden-{index:05}.bin"

    def dense_path(self, index: int) -> Path:
        """Return the file of the input of block `index` in the dense model."""
        return self._directory / f"dense-{index:05}.bin"

    def _block_path(self, index: int, part: int) -> Path:
        return self._directory / f"block-{index:05}-{part:03}.safetensors"

    def _paths(self, parts: list[int]) -> Iterator[Path]:
        for index, count in enumerate(parts):
            yield from (self._block_path(index, part) for part in range(count))

    def stash(self, tensors: Mapping[str, Tensor]) -> None:
        """Put new tensors of the block that is being worked on aside: they count when it is committed."""
        if tensors:
            keep_tensors(self._block_path(self.done, self._stashed), tensors)
            self._stashed += 1

    def commit(
        self,
        tensors: Mapping[str, Tensor],
        linears: list[str],
        facts: Mapping[str, Any],
        hidden_sha256: str,
        dense_sha256: str = "",
    ) -> None:
        """Make one more block final: its new tensors, the linears they replace, and the hidden states after it."""
        keep_tensors(self._block_path(self.done, self._stashed), tensors)
        self._advance(linears, facts, hidden_sha256, dense_sha256)

    def commit_written(self, write: Callable[[Path], Mapping[str, Any]]) -> None:
        """Make one more part final whose tensors `write` writes to a file itself; it returns facts about them."""
        path = self._block_path(self.done, self._stashed)
        partial = path.with_name(path.name + ".whole")
        facts = write(partial)
        keep_checked(partial, path)
        self._advance([], facts, "", "")

    def _advance(self, linears: list[str], facts: Mapping[str, Any], hidden_sha256: str, dense_sha256: str) -> None:
        index = self.done
        self._parts = [*self._parts, self._stashed + 1]
        self._stashed = 0
        self.done, self.hidden_sha256, self.dense_sha256 = index + 1, hidden_sha256, dense_sha256
        self.linears = [*self.linears, *linears]
        self.facts = {**self.facts, **facts}
        state = {
            "identity": self._identity,
            "done": self.done,
            "hidden_sha256": hidden_sha256,
            "dense_sha256": dense_sha256,
            "parts": self._parts,
            "linears": self.linears,
            "facts": self.facts,
        }
        partial = self._directory / f"{STATE}.part"
        partial.write_text(json.dumps(state), encoding="utf-8")
        keep_checked(partial, self._directory / STATE)
        self.hidden_path(index).unlink(missing_ok=True)
        self.dense_path(index).unlink(missing_ok=True)

    def entries(self) -> dict[str, Entry]:
        """Return where the tensors of all finished blocks lie.

        Raises:
            IntegrityError: One is damaged; the next run begins the walk again.
        """
        return {name: entry for name, entry in self._located() if not name.startswith(AIM)}

    def aims(self) -> dict[str, Entry]:
        """Return where the aims of all finished blocks lie, by name without `AIM`.

        Raises:
            IntegrityError: One is damaged; the next run begins the walk again.
        """
        return {name.removeprefix(AIM): entry for name, entry in self._located() if name.startswith(AIM)}

    def _located(self) -> Iterator[tuple[str, Entry]]:
        for path in self._paths(self._parts):
            if not is_intact(path):
                message = f"{path} changed on the disk after it was written"
                raise IntegrityError(message, fix="run again: this step begins anew; check the disk")
            yield from locate(path).items()
