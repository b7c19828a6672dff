"""Model directories as older versions of transformers read them: the same weights, translated JSON.

Each row says from which version on a translation isn't needed any more, and is a small function on config.json,
tokenizer_config.json or tokenizer.json. Weights are linked, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
CONFIG, TOKENIZER_CONFIG, TOKENIZER = "config.json", "tokenizer_config.json", "tokenizer.json"


def _rope(config: Json, _: Path) -> None:
    # 5.x wrote theta and scaling into one mapping.
    parameters = config.pop("rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
    config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling


def _dtype(config: Json, _: Path) -> None:
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")


def _tokenizer_class(config: Json, _: Path) -> None:
    if config.get("tokenizer_class") in {"TokenizersBackend", None}:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)


def _template(config: Json, source: Path) -> None:
    path = source / "chat_template.jinja"
    if path.is_file() and "chat_template" not in config:
        config["chat_template"] = path.read_text(encoding="utf-8")


def _merges(tokenizer: Json, _: Path) -> None:
    # tokenizers before 0.20 parse a merge as one string.
    merges = tokenizer.get("model", {}).get("merges")
    if merges and isinstance(merges[0], list):
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]


TRANSLATIONS: tuple[tuple[tuple[int, int], str, Callable[[Json, Path], None]], ...] = (
    ((5, 0), CONFIG, _rope),
    ((4, 56), CONFIG, _dtype),
    ((5, 0), TOKENIZER_CONFIG, _tokenizer_class),
    ((4, 52), TOKENIZER_CONFIG, _template),
    ((4, 45), TOKENIZER, _merges),
)
"""First version that reads a directory without it, the file, and what to change in it."""


def spoken(source: Path, dest: Path, version: str) -> Path:
    """Make a directory that transformers of a version reads, from one that any version up to 5.x wrote.

    Args:
        source: Model directory.
        dest: Directory to make; what is translated is written, everything else is a link.
        version: `4.51`.

    Returns:
        `dest`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    dest.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = [translate for first, name, translate in TRANSLATIONS if name == path.name and (major, minor) < first]
        target = dest / path.name
        target.unlink(missing_ok=True)
        if wanted:
            read = json.loads(path.read_text(encoding="utf-8"))
            for translate in wanted:
                translate(read, source)
            target.write_text(json.dumps(read, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif path.is_file():
            target.symlink_to(path.absolute())
    return dest
