"""What a recipe asks for, as far as its text can be read: a safe repair leaves all of it as it is.

Only what is known counts. A misspelt method asks for nothing yet, and so may become a method; `gptq` may not become
`awq`. A default counts where every key of the stage is known: none of them can be another word for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml
from pydantic_core import PydanticUndefined

from optikit.rules import yaml_edit
from optikit.rules.yaml_hints import options_of
from optikit.stages import VERBS, load, method_key, methods

KEPT = (
    *("bits", "model", "draft", "backend", "scheme", "precision", "weight_format", "pattern"),
    *("quantization_dtype", "speculation"),
)
"""Options that say what the result is: how many bits, of which model, by whom."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one stage asks for: verb, method ("" where it isn't one), options that say what the result is."""

    verb: str
    method: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        options = ", ".join(f"{name}: {value}" for name, value in self.options.items())
        return f"{self.verb} ({', '.join(filter(None, (self.method, options)))})"

    def kept_by(self, other: Asked) -> bool:
        """Return whether another stage does all of this."""
        if self.verb != other.verb or self.method not in ("", other.method):
            return False
        return all(_same(value, other.options.get(name)) for name, value in self.options.items())


def differences(before: str, after: str) -> tuple[str, ...]:
    """Return what a recipe asked for and no longer asks for, a clause each; nothing where it means the same."""
    then, now = yaml_edit.root(before), yaml_edit.root(after)
    if then is None:
        return ()
    if now is None:
        return ("the whole recipe can't be read any more",)
    return (*_named(then, now), *_dropped(tuple(_stages(then)), tuple(_stages(now))))


def _named(then: yaml.MappingNode, now: yaml.MappingNode) -> Iterator[str]:
    for name in ("model", "target"):
        was, is_ = _scalar(then, name), _scalar(now, name)
        if was is not None and not (was == is_ or (name == "target" and _same(was, is_))):
            yield f"{name} {was} becomes {is_}"


def _dropped(then: tuple[Asked, ...], now: tuple[Asked, ...]) -> Iterator[str]:
    """Yield the stages that are asked for no longer: those of one verb must be there in the same order."""
    for verb in VERBS:
        waiting = iter([stage for stage in now if stage.verb == verb])
        for asked in (stage for stage in then if stage.verb == verb):
            if not any(asked.kept_by(stage) for stage in waiting):
                yield f"{asked} is done no longer"


def _stages(root: yaml.MappingNode) -> Iterator[Asked]:
    """Yield what the stages of a text ask for, whatever else is wrong with them."""
    listed = yaml_edit.entry(root, "stages")
    for item in listed.value if isinstance(listed, yaml.SequenceNode) else [listed]:
        if isinstance(item, yaml.MappingNode):
            alone = all(key.value in VERBS for key, _ in item.value)  # else options may stand beside the verb
            for verb, options in item.value:
                if verb.value in VERBS:
                    yield _asked(verb.value, options, item, whole=alone)


def _asked(verb: str, options: yaml.Node, item: yaml.MappingNode, *, whole: bool) -> Asked:
    if not isinstance(options, yaml.MappingNode):
        named = options.value if isinstance(options, yaml.ScalarNode) and options.value in methods(verb) else ""
        return Asked(verb=verb, method=named, options={})
    block = yaml_edit.Block(verb=verb, item=item, options=options)
    method = block.value(method_key(verb))
    if method not in methods(verb):
        return Asked(verb=verb, method="", options=_written(block))
    known = options_of(block) or ()
    defaults = _defaults(verb, str(method)) if whole and set(block.written) <= set(known) else {}
    return Asked(verb=verb, method=str(method), options={**defaults, **_written(block)})


def _written(block: yaml_edit.Block) -> dict[str, str]:
    found = {name: block.value(name) for name in KEPT}
    return {name: value for name, value in found.items() if value is not None}


def _defaults(verb: str, method: str) -> dict[str, str]:
    fields = load(verb, method).Options.model_fields
    found = {name: fields[name].default for name in KEPT if name in fields}
    return {name: str(value) for name, value in found.items() if value not in (None, PydanticUndefined)}


def _scalar(mapping: yaml.MappingNode, name: str) -> str | None:
    value = yaml_edit.entry(mapping, name)
    return str(value.value) if isinstance(value, yaml.ScalarNode) else None


def _same(was: str, is_: str | None) -> bool:
    """Return whether two values as written are one: 4 and "4" and 4.0, W8A8 and w8a8.

    >>> _same("4.0", "4"), _same("W8A8", "w8a8"), _same("4", "8")
    (True, True, False)
    """
    if is_ is None:
        return False
    try:
        return float(was) == float(is_)
    except ValueError:
        return was.lower() == is_.lower()
