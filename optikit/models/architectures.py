"""Which module of a model does what, by transformers' `model_type`: one row of architectures.toml, frozen.

A family that isn't listed is refused when planning; adding one means adding a row, not a branch.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

USUAL_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab": "vocab_size",
        "max_positions": "max_position_embeddings",
    }
)
"""Where config.json keeps each figure of `ModelFacts`, for most families."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of a family's blocks.

    Attributes:
        module: transformers' module that holds them stacked, relative to the block.
        name: What their checkpoint names begin with, relative to the block; `.N.` and a linear follow.
        linears: Gate, up and down projection of an expert, as the checkpoint calls them.
        stacked: Where the checkpoint holds all experts in few tensors: that of gate and up, that of down, and where
            there are some those of their biases, in this order, relative to the block.
        across: transformers' module, and what is stacked, has the weights as (in, out).
        either: What is stacked may lie the other way round than in transformers' module.
        interleaved: The outputs of gate and up alternate there; else those of gate come first.
        scaled: The router scales what experts are given, and what they return is added up.
        router: Module that chooses experts, where it scales.
        folds: A scale of what down reads can be divided out of up.
        norm: What all experts of a block read, relative to it: a scale can be divided out of it.
        readers: Modules that read it too and stay dense: routers and gates, as checkpoints call them.
        shared: Linears that read it too: gate and up projection of a shared expert.
        count, chosen, width: Keys of config.json: experts, experts per token, their inner width.
        before: The linear that is called after them, "" where they are the last.
        blocks: Which blocks have them, by keys of config.json: `from` the first, `every` so many-th, `not` those, or
            `only` those.
    """

    module: str
    name: str
    linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, ...] = ()
    across: bool = False
    either: bool = False
    interleaved: bool = False
    scaled: bool = False
    router: str = ""
    folds: bool = True
    norm: str = "post_attention_layernorm"
    readers: tuple[str, ...] = ("mlp.gate",)
    shared: tuple[str, ...] = ()
    count: str
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    before: str = ""
    blocks: Mapping[str, str] = field(default_factory=dict)

    @property
    def biased(self) -> bool:
        """Whether projections of experts have biases."""
        return len(self.stacked) > 2

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of config.json that say how many experts there are, how wide, and where."""
        return (self.count, self.chosen, self.width, *self.blocks.values())

    def linear(self, expert: int, part: int) -> str:
        """Return the name of an expert's gate (0), up (1) or down (2) projection, relative to the block."""
        return f"{self.name}.{expert}.{self.linears[part]}"

    def sparse(self, layers: int, settings: Mapping[str, Any]) -> frozenset[int]:
        """Return the blocks that have experts; the others have one MLP for all tokens.

        The rules are those of the families' own code; a key that config.json lacks says nothing.
        """
        keys = self.blocks
        first, every = settings.get(keys.get("from", "")) or 0, settings.get(keys.get("every", "")) or 1
        none, only = settings.get(keys.get("not", "")) or (), settings.get(keys.get("only", ""))
        if only is not None:
            return frozenset(index for index in only if index < layers)
        return frozenset(i for i in range(first, layers) if i not in none and (i + 1) % every == 0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of decoder-only models.

    Attributes:
        model_type: transformers' `model_type`.
        blocks: Name of the list of decoder blocks; block i is `{blocks}.{i}`.
        groups: Linears of a block that see the same input, in execution order, named relative to the block.
        previous_ops: Per group, the module of the block that can absorb a per-channel scale of that input, or "".
        residual_sources: Per group, the module whose input is the residual stream that the group's output is added to
            as it is, or "".
        embedding: Token embedding.
        norm: Last norm, before the head.
        head: Output head.
        norm_offset: Added to the stored weight of every norm before it multiplies (Gemma: 1).
        transposed: Linear weights are stored (in_features, out_features), as GPT-2's Conv1D does.
        keys: Figure of `ModelFacts` → key of config.json.
        requires: Config values under which this row is true; another value is refused.
        engines: Engines and libraries that know the family.
        windowless: Engines that leave its attention window out.
        free_heads: Loaders read a head's width from config.json; else it is the hidden size over the heads.
        gguf: `general.architecture` of a gguf file that becomes this family, or "".
        gguf_as: `general.architecture` of the gguf file that is written of it, or "".
        gguf_keys: Key of config.json → key of a gguf file, below its architecture's name.
        gguf_means: What llama.cpp computes of such a file, in keys of config.json that the file doesn't have.
        tensors: Name of every tensor → its shape in words; see architectures.toml.
        leftovers: Ends of names of tensors that no model reads.
        settings: Keys of config.json that change what is computed, and are obeyed.
        unread: Keys that sound as if they did and that transformers' class doesn't read.
        when: Values of config.json that choose this row among several of one `model_type`.
        defaults: What config.json means where it doesn't say.
        inside: What a wrapper's `text_config` means besides where it doesn't say.
        aliases: Other name of a key of config.json → its name here.
        fixed: Figures of `ModelFacts` that are the same in all models of the row.
        stored_as: Module → what checkpoints may call it.
        wide: Linears that make the channels that the last linear of a block reads.
        residual_scale: Key of config.json that the outputs of residual branches are multiplied by, or "".
        generic: Made of a checkpoint's headers, see generic.py.
        alone: What a block gets besides hidden states has the batch in it, so that windows go through one by one.
        computed_as: `model_type` of the class that computes it, where it has none of its own: inside a wrapper only.
        flat_in: `model_type` of a wrapper whose config.json may hold its settings beside the wrapper's own, or "".
        experts: Its routed experts, where it is a mixture.
        block_names: Beginning of a module's name inside a block → the same in checkpoints, where they differ.
        cached: What a token leaves in a block's cache, in the words of a shape; "" for keys and values of every head.
        extra_blocks: Key of config.json that counts blocks after the last, which only drafts use, or "".
    """

    model_type: str
    blocks: str = "model.layers"
    groups: tuple[tuple[str, ...], ...]
    previous_ops: tuple[str, ...]
    residual_sources: tuple[str, ...]
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    norm_offset: float = 0.0
    transposed: bool = False
    keys: Mapping[str, str] = field(default_factory=lambda: USUAL_KEYS)
    requires: Mapping[str, Any] = field(default_factory=dict)
    engines: tuple[str, ...] = ()
    windowless: tuple[str, ...] = ()
    free_heads: bool = False
    gguf: str = ""
    gguf_as: str = ""
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    gguf_means: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict, repr=False)
    leftovers: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    residual_scale: str = ""
    alone: bool = False
    generic: bool = False
    computed_as: str = ""
    flat_in: str = ""
    experts: Experts | None = None
    block_names: Mapping[str, str] = field(default_factory=dict)
    cached: str = ""
    extra_blocks: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that a block may have, relative to the block, in execution order."""
        return tuple(name for group in self.groups for name in group)

    @property
    def hybrid(self) -> bool:
        """Whether blocks of different kinds have different linears."""
        return self.generic or any(" layer " in f" {words}" for words in self.tensors.values())

    def meant(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with what it means where it is silent, and with today's names of its keys."""
        named = {key: config[alias] for alias, key in self.aliases.items() if alias in config}
        return {**self.defaults, **named, **config}

    def full_names(self, stored: Collection[str]) -> dict[str, str]:
        """Return the model's name of every tensor of a checkpoint, which may have older ones or lack the first part."""
        today = {f"{other}.weight": f"{module}.weight" for module, other in self.stored_as.items()}
        first, _, rest = self.blocks.partition(".")
        bare = any(name.startswith(f"{rest}.") for name in stored)
        full = {name: today.get(name, name) for name in stored}
        if not bare:
            return full
        return {name: new if new.startswith(f"{self.head}.") else f"{first}.{new}" for name, new in full.items()}

    def chosen_by(self, config: Mapping[str, Any]) -> bool:
        """Return whether config.json has the values of `when`."""
        known = self.meant(config)
        return all(_same(_at(known, path, None), wanted) for path, wanted in self.when.items())

    def unmet(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the keys (dotted within a section) that config.json has otherwise than required, with their values."""
        known = self.meant(config)
        for path, wanted in self.requires.items():
            found = _at(known, path, wanted)
            if not _same(found, wanted):
                yield path, found

    def stored_name(self, inside: str) -> str:
        """Return what checkpoints call a tensor of a block that transformers calls so."""
        there = next((own for own in self.block_names if inside.startswith(own)), "")
        return self.block_names[there] + inside.removeprefix(there) if there else inside

    def module_name(self, inside: str) -> str:
        """Return what transformers calls a tensor of a block that checkpoints call so."""
        own = next((each for each, there in self.block_names.items() if inside.startswith(there)), "")
        return own + inside.removeprefix(self.block_names[own]) if own else inside

    def block(self, index: int) -> str:
        """Return the name of block `index`."""
        return f"{self.blocks}.{index}"

    def names(self, layers: int) -> Iterator[str]:
        """Yield the full name of every linear in `layers` blocks, without experts."""
        for index in range(layers):
            for name in self.linears:
                yield f"{self.blocks}.{index}.{name}"


def _at(config: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """Return the value at a dotted path, or another where the path leads nowhere."""
    found: Any = config
    for part in path.split("."):
        if not isinstance(found, dict) or part not in found:
            return otherwise
        found = found[part]
    return found


def _same(found: Any, wanted: Any) -> bool:
    return bool(found) is wanted if isinstance(wanted, bool) else bool(found == wanted)


_LISTS = ("previous_ops", "residual_sources", "engines", "windowless", "leftovers", "settings", "unread", "wide")
_MAPS = (
    *("gguf_keys", "gguf_means", "requires", "when", "defaults", "inside", "aliases", "fixed", "stored_as"),
    "block_names",
)
_OWN = frozenset({"engines", "flat_in", "gguf", "gguf_as", "inside", "of", "when"})
"""Columns that never come from the row that another is like: engines are proven for each."""


def _row(model_type: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = dict(rows[model_type])
    like = row.pop("like", row.get("of"))
    inherited = {} if like is None else _row(like, rows)
    tensors = {**inherited.get("tensors", {}), **row.get("tensors", {})}
    return {key: value for key, value in inherited.items() if key not in _OWN} | row | {"tensors": tensors}


@cache
def _rows() -> Mapping[str, Architecture]:
    text = resources.files("optikit.models").joinpath("architectures.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)
    found = {}
    for name in rows:
        row = _row(name, rows)
        row["groups"] = tuple(tuple(group) for group in row["groups"])
        row.setdefault("wide", row["groups"][-2])
        row |= {key: tuple(row[key]) for key in _LISTS if key in row}
        row["keys"] = MappingProxyType({**USUAL_KEYS, **row.get("keys", {})})
        row["tensors"] = MappingProxyType(row["tensors"])
        row |= {key: MappingProxyType(row.get(key, {})) for key in _MAPS}
        if "experts" in row:
            row["experts"] = Experts(**row["experts"])
        found[name] = Architecture(model_type=row.pop("of", name), **row)
    return MappingProxyType(found)


def names() -> tuple[str, ...]:
    """Return every supported `model_type`."""
    return tuple(dict.fromkeys(row.model_type for row in _rows().values()))


def rows() -> Mapping[str, Architecture]:
    """Return every row by its name: a `model_type`, or a variant of one."""
    return _rows()


def find(model_type: str, config: Mapping[str, Any] = MappingProxyType({})) -> Architecture | None:
    """Return the architecture of a `model_type`, or None; of several rows the first that its config.json chooses."""
    fitting = [row for row in _rows().values() if row.model_type == model_type]
    return next((row for row in fitting if row.chosen_by(config)), fitting[0] if fitting else None)


def inside(model_type: str) -> Mapping[str, Any]:
    """Return what a wrapper's `text_config` means besides where it doesn't say, by the `model_type` that it names."""
    row = find(model_type)
    return row.inside if row else MappingProxyType({})


def flat_inside(wrapper: str) -> str:
    """Return the `model_type` of the language model whose settings a wrapper's may be, in one level; "" for others."""
    return next((row.model_type for row in _rows().values() if row.flat_in and row.flat_in == wrapper), "")


def context(config: Mapping[str, Any]) -> int | None:
    """Return the longest text that a model of a known family was made for, in tokens, from its config.json."""
    row = find(str(config.get("model_type")), config)
    return None if row is None else int(row.meant(config)[row.keys["max_positions"]])


def known_to(engine: str) -> tuple[str, ...]:
    """Return every `model_type` that an engine or library knows, too."""
    return tuple(dict.fromkeys(row.model_type for row in _rows().values() if engine in row.engines))


def of_gguf(name: str, *, experts: bool = False) -> Architecture | None:
    """Return what a gguf file of that `general.architecture` becomes, a mixture if it has experts, or None."""
    found = [row for row in _rows().values() if row.gguf == name]
    return next((row for row in found if (row.experts is not None) is experts), next(iter(found), None))


def gguf_names() -> tuple[str, ...]:
    """Return every `general.architecture` that is known."""
    return tuple(dict.fromkeys(row.gguf for row in _rows().values() if row.gguf))
