"""The door for model directories: what may be in one, checked before any loader sees it.

Files are admitted by name and by content: weights as safetensors, configuration as JSON, tokenizers, chat templates,
the model card and the licence as text. Nothing else is read, shipped or part of a digest. Links lead anywhere, so only
those of a hub's cache are followed, from a snapshot to its blobs.

Keys that are refused, and why: `auto_map`, `trust_remote_code`, `model_file` and `custom_generate` name Python to
import (CVE-2026-5843 for `model_file`), and a recipe's model is seen without its `auto_map` (`store.plain_view`);
`_attn_implementation_internal` did so in transformers before 5.3 (CVE-2026-4372); an attention implementation that
isn't a plain word, and `kernel_config`, are fetched from the hub as kernels; a tokenizer or processor named inside
`quantization_config` is fetched from another repository, code and all (optimum-intel issue 1510);
`custom_ops_library` is a shared library that onnxruntime would load.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, RefusedError
from optikit.models.strict_json import FIX, read_object, read_text
from optikit.models.tokenizer import POINTER, TEMPLATES, template_files

RUNS_CODE = frozenset(
    {"auto_map", "trust_remote_code", "model_file", "custom_pipelines", "custom_generate"}
    | {"kernel_config", "use_kernels", "custom_ops_library"}
)
"""Keys that make some loader import Python, or load a library, that comes with the model."""
NAMES_REPOSITORY = frozenset(
    {"tokenizer", "tokenizer_id", "tokenizer_name", "tokenizer_name_or_path", "processor", "processor_id"}
    | {"assistant_model", "draft_model", "_experts_implementation"}
)
"""Keys whose value, where it has a slash, makes some loader fetch another repository."""
IMPLEMENTATIONS = frozenset({"_attn_implementation", "attn_implementation"})
PLAIN_WORD = re.compile(r"[a-z0-9_|]*")

VOCABULARIES = re.compile(r"(tokenizer|vocab|added_tokens|tekken)\.json|.*\.index\.json")
"""JSON whose keys are tokens or tensors, not settings."""
MODEL_FILES = ("*.safetensors", "*.json", "vocab.txt", "merges.txt", "*.jinja", "*.tiktoken", "*.model")
"""What a model directory is read from: weights, configuration, tokenizer, chat template; as patterns of names."""
PAPERS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""What goes along with it: model card and licence."""
OTHER_FILES = ("consolidated*", "adapter_model*", "training_args*", "artifact.json", ".*")
"""Matched by MODEL_FILES but not the model: second copies of the weights, adapters, our own seal."""
_PAPER = re.compile(r"README\.md|(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([-_]\w+)?(\.(txt|md))?")
_MODEL = re.compile(r"[^.].*\.(safetensors|json|jinja|tiktoken|model)|vocab\.txt|merges\.txt")
_OTHER = re.compile(r"consolidated.*|adapter_model.*|training_args.*|artifact\.json")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
MOST_PARSED = 2**23
"""Bytes of a vocabulary above which only its edges are looked at: its tokenizer reads it anyway."""
MOST_SETTINGS = 2**22
"""Bytes of a config.json above which it can't be one."""
MOST_TEXT = 2**29
"""Bytes of a tokenizer or a text above which it can't be one."""


def is_model_file(name: str) -> bool:
    """Say whether a file of that name, as a path below a model directory, goes with the model.

    >>> [is_model_file(name) for name in ("model.safetensors", "LICENSE", "LICENSE.py", "pytorch_model.bin", ".x.json")]
    [True, True, False, False, False]
    >>> [is_model_file(name) for name in ("onnx/config.json", "additional_chat_templates/rag.jinja")]
    [False, True]
    """
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and bool(_MODEL.fullmatch(file)) and file.endswith(".jinja")
    return not _OTHER.fullmatch(name) and bool(_MODEL.fullmatch(name) or _PAPER.fullmatch(name))


def model_files(directory: Path) -> tuple[str, ...]:
    """Return the names of the files that go with a model, sorted; each is regular and what its name says.

    Raises:
        RefusedError: One is a link out of the directory, no regular file, or holds something else.
        IntegrityError: Weights or JSON are damaged, or stand for a file that Git LFS hasn't fetched.
    """
    with os.scandir(directory) as entries:
        names = sorted(each.name for each in entries if is_model_file(each.name) and not _is_folder(each))
    names += template_files(directory)
    for name in names:
        _require_regular(directory, name)
        _require_fetched(directory / name)
        why = _content(name)(directory / name)
        if why:
            damaged = name.endswith((".safetensors", ".json"))  # another text than its name says was put there
            error = IntegrityError if damaged else RefusedError
            raise error(f"{directory / name} is not what its name says: {why}", fix=FIX)
    return tuple(names)


def admit(directory: Path) -> None:
    """Refuse a model directory that could make a loader run code, or read what isn't the model's.

    Raises:
        RefusedError: Saying which file and why.
        IntegrityError: A configuration isn't a JSON object.
    """
    model_files(directory)
    require_harmless(directory)


def require_harmless(directory: Path) -> None:
    """Refuse settings, in any JSON of a directory, that make loaders run code or fetch another repository.

    Raises:
        RefusedError: Naming file and key.
        IntegrityError: A configuration isn't a JSON object.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if os.path.lexists(directory / name):
            message = f"{directory} holds an adapter ({name}): a loader would fetch the base model that it names"
            raise RefusedError(message, fix="merge the adapter into its base model and save that")
    for path in sorted(directory.glob("*.json")):
        if path.is_dir() or not is_model_file(path.name) or VOCABULARIES.fullmatch(path.name):
            continue
        told = path.name.endswith("config.json")
        loaded = read_object(path, most_bytes=MOST_SETTINGS) if told else _loose(path)
        for key, value in _dangers(loaded):
            message = f"{path}: {key} is {reprlib.repr(value)}, which makes loaders run foreign code"
            raise RefusedError(message, fix=f"remove {key} from the file, if the model works without it")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _require_regular(directory: Path, name: str) -> None:
    path = directory / name
    if path.is_symlink() and not _is_of_a_hub_cache(directory.resolve(), path):
        message = f"{path} is a symbolic link to {path.readlink()}, out of the model's directory"
        raise RefusedError(message, fix="put the file itself there")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise RefusedError(f"{path} can't be read: {error.strerror}", fix="get the model again") from error
    if not stat.S_ISREG(mode):
        raise RefusedError(f"{path} is not a regular file", fix="get the model again from a source that you trust")


def _require_fetched(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise IntegrityError(f"{path} is a pointer of Git LFS, not the file", fix="run `git lfs pull` beside it")


def _is_of_a_hub_cache(directory: Path, link: Path) -> bool:
    """Say whether a link leads from a snapshot of a hub's cache to the blobs of the same repository."""
    if directory.parent.name != "snapshots":
        return False
    return link.resolve().parent == directory.parent.parent / "blobs"


def _content(name: str) -> Callable[[Path], str]:
    """Return what says why a file isn't what its name promises, "" where it is."""
    if name.endswith(".safetensors"):
        return _no_safetensors
    if name.endswith(".json"):
        return _no_json
    return _no_tokenizer if name.endswith(".model") else _no_text


def _no_safetensors(path: Path) -> str:
    with path.open("rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return "" if first == b"{" and length + 8 <= path.stat().st_size else "no header of a safetensors file"


def _no_json(path: Path) -> str:
    if path.stat().st_size > MOST_PARSED:
        with path.open("rb") as file:
            first = file.read(64).lstrip()[:1]
            file.seek(-64, os.SEEK_END)
            edges = first + file.read().rstrip()[-1:]
        return "" if edges in (b"{}", b"[]") and path.stat().st_size <= MOST_TEXT else "no JSON"
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"no JSON: {str(error)[:60]}"
    return ""


def _no_tokenizer(path: Path) -> str:
    """SentencePiece models are protocol buffers that begin with field 1, the pieces; others are text."""
    with path.open("rb") as file:
        return "" if file.read(1) == b"\x0a" else _no_text(path)


def _no_text(path: Path) -> str:
    if path.stat().st_size > MOST_TEXT:
        return f"{path.stat().st_size} bytes"
    try:
        found = _CONTROL.search(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return "no UTF-8 text"
    return f"it has the control character {found[0]!r}" if found else ""


def _loose(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None


def _dangers(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from ((key, inner) for key, inner in item.items() if _is_dangerous(key, inner))
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _is_dangerous(key: str, value: Any) -> bool:
    if key in RUNS_CODE or key.endswith("_implementation_internal"):
        return bool(value)
    if key in IMPLEMENTATIONS:
        words = value.values() if isinstance(value, dict) else (value,)
        return any(isinstance(word, str) and not PLAIN_WORD.fullmatch(word) for word in words)
    return key in NAMES_REPOSITORY and isinstance(value, str) and "/" in value
