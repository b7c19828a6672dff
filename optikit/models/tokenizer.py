"""The tokenizer of a model directory: what tokenizer.json does, read as JSON; the same file, loaded.

A file keeps more than a tokenizer: the truncation and padding of whoever saved it. `load` switches both off, for every
text that optikit reads. `encode` puts before a text what the tokenizer's own template puts there, the beginning of a
text, and never what it puts behind one: a model that is to go on must not be told that the text has ended.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.models.strict_json import read_object

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FILE = "tokenizer.json"
DEFAULT_TEMPLATE = "default"
"""Name of the chat template that is used where none is named: chat_template.jinja's, for one."""
FILES = (FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
"""Folder with chat templates that have names; the one without is chat_template.jinja."""
POINTER = b"version https://git-lfs"
_DAMAGED = "get it again from where the model came from"

_WHOLE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"ByteLevel": {"use_regex": True}, "Metaspace": {"prepend_scheme": "always", "split": True}}
)
"""What a part of a pipeline has where a file leaves it out and it isn't nothing."""
_IDLE = frozenset({"trim_offsets", "str_rep"})
"""Keys that decide no token."""
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Described:
    """What is known of a tokenizer without loading it.

    Attributes:
        sha256: Of what decides which text is which tokens: vocabulary, merges, added tokens, normalizer, how words are
            split and joined. Files that differ in layout, version or stored truncation have the same.
        tokens: Rows that an embedding needs for it: its largest token id and one.
    """

    sha256: str
    tokens: int


def describe(directory: Path) -> Described | None:
    """Describe the tokenizer of a model directory; None where it has no tokenizer.json.

    Raises:
        IntegrityError: The file is damaged, or stands for one that Git LFS hasn't fetched.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    now = path.stat()
    return _described(path.resolve(), now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=8)
def _described(path: Path, _size: int, _changed_ns: int) -> Described:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise IntegrityError(f"{path} is a pointer of Git LFS, not the file", fix="run `git lfs pull` beside it")
    content = read_object(path)
    try:
        ids = _ids(content)
        text = json.dumps(_behaviour(content, ids), sort_keys=True)
        return Described(hashlib.sha256(text.encode()).hexdigest(), 1 + max(ids.values(), default=-1))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f"{path} is no tokenizer: {type(error).__name__}: {error}"
        raise IntegrityError(message, fix=_DAMAGED) from error


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Return every token's id: those of the vocabulary, a mapping or a list of [token, score], and the added ones."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {each[0]: index for index, each in enumerate(vocab)}
    return ids | {each["content"]: each["id"] for each in content.get("added_tokens") or ()}


def _behaviour(content: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return what decides which text is which tokens, the same for every way to write it."""
    model = dict(content["model"])
    vocab, merges = model.pop("vocab"), model.pop("merges", None) or ()
    added = sorted(content.get("added_tokens") or (), key=lambda each: each["id"])
    return {
        "ids": sorted((index, token) for token, index in ids.items()),
        "scores": [] if isinstance(vocab, dict) else [each[1] for each in vocab],
        "merges": [each.replace(" ", "\0", 1) if isinstance(each, str) else "\0".join(each) for each in merges],
        "added": [[each["id"], *(bool(each.get(flag)) for flag in _FLAGS)] for each in added],
        "model": _part(model),
        **{name: _part(content.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")},
    }


def _part(value: Any) -> Any:
    """Return a part of a pipeline as any version writes it: defaults filled in, and what is off or idle left out."""
    if isinstance(value, list):
        return [_part(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _part(each) for key, each in _whole(value).items() if key not in _IDLE}
    return {
        key: each for key, each in kept.items() if each is not None and each is not False and each not in ("", [], {})
    }


def _whole(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part with its defaults filled in and its keys as they are called now."""
    whole = {**_WHOLE.get(value.get("type", ""), {}), **value}
    if value.get("type") == "Metaspace":
        spaced = whole.pop("add_prefix_space", True)
        if "prepend_scheme" not in value:  # before tokenizers 0.15
            whole["prepend_scheme"] = "always" if spaced else "never"
    return whole


def load(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory, without the truncation and padding that its file may ask for.

    Raises:
        InputMissingError: The directory has no tokenizer.json.
        IntegrityError: The file is damaged.
    """
    from tokenizers import Tokenizer

    path = _existing(directory)
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(f"{path} can't be loaded: {error}", fix=_DAMAGED) from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _existing(directory: Path) -> Path:
    if describe(directory) is None:
        raise InputMissingError(f"{directory} has no {FILE}", fix="copy it there from the original model")
    return directory / FILE


def opening(by: Tokenizer) -> list[int]:
    """Return the tokens that a tokenizer puts before any text, e.g. <s>: models that know it lean on it."""
    probe = encoding(by, "a", special=True)
    own = probe.special_tokens_mask
    return list(probe.ids[: own.index(0)]) if 0 in own else []


def encode(by: Tokenizer, text: str, *, opened: bool = True) -> list[int]:
    """Return the tokens of a text that a model is to go on from: opened as its tokenizer does, never ended.

    Args:
        by: From `load`.
        text: Any text.
        opened: Put the beginning of a text before it; a chat template writes its own.

    Raises:
        UsageError: The text holds half a surrogate pair: no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text holds half a surrogate pair, {text[error.start]!r}, at character {error.start}"
        raise UsageError(message, fix="write the whole character, in UTF-8") from error
    own: list[int] = encoding(by, text).ids
    return [*opening(by), *own] if opened else own


def encoding(by: Tokenizer, text: str, *, special: bool = False) -> Encoding:
    """Return what the library makes of a text, with the special tokens of the tokenizer's template if asked.

    Raises:
        IntegrityError: The tokenizer has no token for a part of the text, nor one for what is unknown.
    """
    try:
        return by.encode(text, add_special_tokens=special)
    except Exception as error:  # the library raises nothing narrower
        message = f"the model's tokenizer has no tokens for a text that begins {reprlib.repr(text)}: {error}"
        fix = f"name an unknown token in {FILE} (unk_id, unk_token), or take a tokenizer that has every byte"
        raise IntegrityError(message, fix=fix) from error


def configured(directory: Path) -> Any:
    """Load a tokenizer as transformers does, for what its other files say: chat templates, and which tokens end a text.

    Raises:
        InputMissingError: The directory has no tokenizer.json.
        IntegrityError: The file is damaged.
    """
    from transformers import AutoTokenizer

    _existing(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def template_names(directory: Path) -> frozenset[str]:
    """Return the names of a model directory's chat templates; files of their own go before tokenizer_config.json."""
    named = {Path(name).stem for name in template_files(directory)}
    if (directory / "chat_template.jinja").is_file():
        named.add(DEFAULT_TEMPLATE)
    path = directory / "tokenizer_config.json"
    if named or not path.is_file():
        return frozenset(named)
    found = read_object(path).get("chat_template") or []
    return frozenset([DEFAULT_TEMPLATE] if isinstance(found, str) else [each["name"] for each in found])


def template_files(directory: Path) -> list[str]:
    """Return the chat templates with names of a model directory, as paths below it; no link out of it is one."""
    folder = directory / TEMPLATES
    if folder.is_symlink():
        return []
    blobs = directory.resolve().parent.parent / "blobs"  # where the hub's cache keeps what its snapshots link to
    places = {folder.resolve(), blobs}
    found = (path for path in folder.glob("*.jinja") if path.is_file() and path.resolve().parent in places)
    return sorted(f"{TEMPLATES}/{path.name}" for path in found)


def copy(source: Path, dest: Path, names: Iterable[str] = FILES) -> None:
    """Copy a tokenizer's files, as far as a directory has them, and the chat templates with names, to another one."""
    for name in (*names, *template_files(source)):
        if (source / name).is_file():
            (dest / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, dest / name)
