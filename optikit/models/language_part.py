"""The language model inside a checkpoint: under which names its tensors lie, and what lies there besides.

A model that sees or hears is a language model in a wrapper: config.json has the language model's own settings in
`text_config`, and the checkpoint has its tensors under another prefix, beside towers and projectors. Checkpoints of
base models leave the first part of every name out. Some hold blocks after the last that only drafts use. What isn't
the language model is carried along as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optikit.models import architectures
from optikit.models.architectures import Architecture

PREFIXES = (
    *("model.language_model.model.", "model.language_model.", "language_model.model.", "language_model."),
    *("model.text_model.", "model."),
)
"""What stands for the first part of a language model's names in a wrapper."""
HEADS = ("language_model.", "model.language_model.", "")
"""What stands before its head there."""


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is a wrapper's."""
    return "text_config" in config or bool(architectures.flat_inside(str(config.get("model_type"))))


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what config.json says of the language model: all of it, or its `text_config`.

    How weights are stored, and whether head and embedding are the same, is said outside, where it is said at all.
    """
    inner = config.get("text_config")
    if isinstance(inner, dict):
        outside = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
        return in_text({**architectures.inside(str(inner.get("model_type"))), **inner, **outside})
    flat = architectures.flat_inside(str(config.get("model_type")))
    return in_text({**config, "model_type": flat}) if flat else config


def in_text(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a language model without how images are rotated: in text, all positions of a token are one."""
    found = dict(settings)
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.get(key)
        if isinstance(rope, dict) and "mrope_section" in rope:
            kept = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
            kept |= {name: "default" for name in ("type", "rope_type") if kept.get(name) == "mrope"}
            found[key] = kept
    return found


@dataclass(frozen=True, kw_only=True)
class LanguagePart:
    """Names of a checkpoint's language model.

    Attributes:
        stored: Name in the language model on its own → name in the checkpoint.
        carried: Names of tensors that are no part of it, and that a stage takes over bit by bit.
        prefix: What its own names begin with, and what stands for that in the checkpoint.
        wrapped: The checkpoint is a wrapper's.
    """

    stored: Mapping[str, str]
    carried: frozenset[str] = frozenset()
    prefix: tuple[str, str]
    wrapped: bool = False

    def place(self, name: str) -> str:
        """Return what the checkpoint calls a tensor or module of the blocks."""
        own, there = self.prefix
        return there + name.removeprefix(own)

    def told(self, name: str) -> str:
        """Return what servers and people call a module of the blocks: in a wrapper, with its prefix."""
        return self.place(name) if self.wrapped else name


def find(architecture: Architecture, config: Mapping[str, Any], names: Iterable[str], layers: int) -> LanguagePart:
    """Return which tensors are the language model's.

    Args:
        architecture: Its family.
        config: config.json.
        names: Every tensor of the checkpoint.
        layers: Blocks of the language model.
    """
    all_names = list(names)
    first = architecture.blocks.partition(".")[0] + "."
    part = (_wrapped if is_wrapped(config) else _plain)(architecture, first, all_names)
    drafts = _draft_blocks(architecture, settings_of(config), layers)
    extra = {name for name in part.stored if drafts and name.startswith(drafts)}
    return replace(
        part,
        stored={name: where for name, where in part.stored.items() if name not in extra},
        carried=part.carried | {part.stored[name] for name in extra},
    )


def _plain(architecture: Architecture, first: str, names: list[str]) -> LanguagePart:
    stored = {full: name for name, full in architecture.full_names(names).items()}
    bare = any(full != name and full == first + name for full, name in stored.items())
    return LanguagePart(stored=stored, prefix=(first, "" if bare else first))


def _wrapped(architecture: Architecture, first: str, names: list[str]) -> LanguagePart:
    blocks = architecture.blocks.removeprefix(first)
    prefix = next((p for p in PREFIXES if any(name.startswith(f"{p}{blocks}.") for name in names)), "")
    heads = tuple(f"{place}{architecture.head}." for place in HEADS)
    stored = {}
    for name in names:
        if head := next((each for each in heads if name.startswith(each)), ""):
            stored[f"{architecture.head}.{name.removeprefix(head)}"] = name
        elif prefix and name.startswith(prefix):
            stored[first + name.removeprefix(prefix)] = name
    return LanguagePart(
        stored=stored if prefix else {},
        carried=frozenset(names).difference(stored.values()),
        prefix=(first, prefix),
        wrapped=True,
    )


def _draft_blocks(architecture: Architecture, settings: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Return what names of blocks after the last begin with, as many as config.json has."""
    count = architecture.meant(settings).get(architecture.extra_blocks)
    return tuple(f"{architecture.block(layers + extra)}." for extra in range(count if type(count) is int else 0))


def kinds(names: Iterable[str]) -> dict[str, int]:
    """Return what carried tensors belong to, and how many tensors each has.

    >>> kinds(["model.visual.blocks.0.w", "model.visual.blocks.1.w", "model.layers.61.w", "mtp.norm.weight"])
    {'model.visual': 2, 'model.layers.61': 1, 'mtp': 1}
    """
    return dict(Counter(_kind(name) for name in names))


def _kind(name: str) -> str:
    block = re.match(r"(.*?\blayers\.\d+)\.", name)
    if name.startswith("model.layers.") and block:
        return block[1]
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" else 1])
