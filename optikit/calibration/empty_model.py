"""transformers' own model without its weights: blocks are filled from the checkpoint one at a time, and emptied again.

Parameters live on the meta device, buffers (rotary frequencies) are real. The model's own forward is run once, with
every block replaced by a recorder, to learn what it passes to each block: masks and rotary embeddings differ between
the sliding and the full layers of Gemma, and nothing here has to know that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from optikit.calibration.source_model import DOWN, GATE, UP, Linear, SourceModel
from optikit.errors import StageFailedError
from optikit.formats import language_config, stacked
from optikit.models.architectures import Experts
from optikit.models.expected import looks_arithmetic

OLDER = frozenset({"rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"})
"""Keys that transformers' classes read, and write under other names."""


class _EmptyOnMeta(TorchFunctionMode):
    """Make parameters, which modules allocate by `torch.empty`, on the meta device.

    `init_empty_weights` moves them there once they have been allocated; what they were lingers until garbage is
    collected, and of many layers that is as much as the model.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **(kwargs or {}) | where)


class _Recorded(Exception):  # noqa: N818 - not an error: the recorder has seen what it wants
    """Ends the model's forward when its last block is reached."""


@dataclass(frozen=True)
class Call:
    """Arguments that the model passes to a block after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _attention(config: PreTrainedConfig) -> str:
    """Return the attention to compute with: sdpa ignores a soft cap on scores, and not every class has it."""
    model = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - what from_config looks at
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not capped else "eager"  # noqa: SLF001 - it has no other name


def _blocks(model: nn.Module, name: str) -> list[nn.Module]:
    try:
        return list(model.get_submodule(name).children())
    except AttributeError as error:
        message = f"transformers' {type(model).__name__} has no {name}, which the checkpoint has"
        raise StageFailedError(message, fix="save the checkpoint with transformers, under today's names") from error


def _confirm(source: SourceModel, model: nn.Module, blocks: list[nn.Module]) -> None:
    """Hold what was concluded from headers to the model's modules, and what its config says to what its class reads."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears if name.startswith(f"{source.row.blocks}.")}
    odd = min(inside ^ set(source.linears), default="")
    if len(blocks) != source.layers or odd:
        name = type(model).__name__
        message = f"{odd or source.row.blocks} is linear in only one of the checkpoint and transformers' {name}"
        raise StageFailedError(message, fix="add a row for the family")
    _confirm_settings(source, model.config)


def _confirm_settings(source: SourceModel, config: Any) -> None:
    obeyed = {*type(config)().to_dict(), *config.attribute_map, *OLDER}
    unknown = [key for key in source.checkpoint.config() if looks_arithmetic(key) and key not in obeyed]
    if unknown:
        message = f"config.json says {unknown[0]}, and transformers' {type(config).__name__} has no such setting"
        raise StageFailedError(message, fix=f"remove {unknown[0]}, if the model works without it")


@contextmanager
def silenced(experts: nn.Module) -> Iterator[None]:
    """Let the routed experts of a block give zeros: their weights aren't there."""
    experts.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
    try:
        yield
    finally:
        del experts.forward


class EmptyModel:
    """A model whose blocks are empty until they are filled.

    Attributes:
        blocks: The decoder blocks, on the meta device.
        dtype: Dtype of filled weights and of activations.
        device: Where filled blocks live.
        width: Of the hidden states; known after `record`.
    """

    def __init__(self, source: SourceModel, *, dtype: torch.dtype, device: str) -> None:
        config = language_config.read(source.checkpoint.directory)  # the modules are those of the dense model
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_attention(config))
        self._model: nn.Module = model.eval()
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._source = source
        self._row = source.row
        self.dtype = dtype
        self.device = device
        self.width = 0
        self._in_tuple = False
        self.blocks: list[nn.Module] = _blocks(self._model, source.row.blocks)
        if source.row.generic:
            _confirm(source, self._model, self.blocks)
        self._stem = self._model.get_submodule(source.row.blocks.rpartition(".")[0])

    @property
    def model(self) -> nn.Module:
        """The model of transformers; hooks on its modules stay while blocks are filled and emptied."""
        return self._model

    def _fill(self, module: nn.Module, prefix: str, without: str = "") -> None:
        """Read a module's parameters, and the buffers that checkpoints hold (what routers add to scores)."""
        for name, _ in list(module.named_parameters()):
            if without and name.startswith(without):
                continue
            owner, _, leaf = name.rpartition(".")
            value = self._source.read(f"{prefix}{name}").to(self.device, self.dtype)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if self._source.has(f"{prefix}{name}"):
                value = self._source.read(f"{prefix}{name}").to(self.device, buffer.dtype)
                setattr(module.get_submodule(owner), leaf, value)

    def _empty(self, module: nn.Module) -> None:
        """Drop parameters; buffers (scales of embeddings, causal masks) stay, for nothing would fill them again."""
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def fill_block(self, index: int, *, experts: bool = True) -> nn.Module:
        """Read the parameters of a block and return it; without its routed experts where they aren't wanted."""
        block, routed = self.blocks[index], self._row.experts if self._source.is_sparse(index) else None
        self._fill(block, f"{self._row.block(index)}.", f"{routed.module}." if routed else "")
        if routed and experts:
            module, every = block.get_submodule(routed.module), range(self._source.experts)
            for leaf, parts in (("gate_up_proj", (GATE, UP)), ("down_proj", (DOWN,))):
                whole = torch.stack([self._expert(index, each, parts, routed) for each in every])
                setattr(module, leaf, nn.Parameter(whole, requires_grad=False))
                if routed.biased:
                    whole = torch.stack([self._expert(index, each, parts, routed, biases=True) for each in every])
                    setattr(module, f"{leaf}_bias", nn.Parameter(whole, requires_grad=False))
        return block

    def _expert(
        self, index: int, expert: int, parts: tuple[int, ...], routed: Experts, *, biases: bool = False
    ) -> Tensor:
        """Return projections of an expert, or their biases, together as transformers' modules have them."""
        linears = self._source.expert(index, expert, lambda _: False, parts)
        read = self._source.bias if biases else self._source.weight
        each = [tensor.to(self.device, self.dtype) for linear in linears if (tensor := read(linear)) is not None]
        return stacked.weave(routed)(each)

    def empty_block(self, index: int) -> None:
        """Drop the parameters of a block."""
        self._empty(self.blocks[index])

    def traced(self, index: int, hidden: Tensor, call: Call) -> tuple[tuple[str, ...], ...]:
        """Return the linears of a filled block as it calls them, those that see the same input together.

        Args:
            index: Of the block.
            hidden: (windows, tokens, width), any that it gets.
            call: What else it gets.

        Raises:
            StageFailedError: A linear is called twice, or never.
        """
        block, order = self.blocks[index], list[tuple[str, Tensor]]()
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: order.append((name, given[0])))
            for name, module in linears.items()
        ]
        block(hidden.to(self.device), *call.args, **call.kwargs)
        for hook in hooks:
            hook.remove()
        odd = set(linears) ^ {name for name, _ in order}
        if odd or len(order) != len(linears):
            message = f"block {index} of {self._row.model_type} doesn't call each of its linears once"
            raise StageFailedError(message, fix="use rtn, which needs no inputs, or add a row for the family")
        groups: dict[int, list[str]] = {}
        for name, given in order:
            groups.setdefault(id(given), []).append(name)
        return tuple(tuple(names) for names in groups.values())

    def replace(self, block: nn.Module, linears: tuple[Linear, ...], weights: tuple[Tensor, ...]) -> None:
        """Give linears of a filled block new weights, (out_features, in_features) each."""
        for linear, weight in zip(linears, weights, strict=True):
            layout = weight.T.contiguous() if self._row.transposed else weight
            new = nn.Parameter(layout.to(self.device, self.dtype), requires_grad=False)
            block.get_submodule(linear.inside).weight = new

    @contextmanager
    def head_filled(self) -> Iterator[None]:
        """Hold all but the blocks in memory: embeddings, last norm, output head."""
        head = self._model.get_submodule(self._row.head)
        with self.stem_filled():
            if self._source.own_head:
                self._fill(head, f"{self._row.head}.")
            else:
                head.weight = self._model.get_submodule(self._row.embedding).weight
            try:
                yield
            finally:
                self._empty(head)

    @contextmanager
    def stem_filled(self) -> Iterator[None]:
        """Hold what comes before the blocks (embeddings) in memory."""
        stem = self._row.blocks.rpartition(".")[0]
        in_blocks = {id(p) for block in self.blocks for p in block.parameters()}
        filled = []
        for name, module in self._stem.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not any(id(p) in in_blocks for p in own):
                self._fill(module, f"{stem}.{name}.")
                filled.append(module)
        try:
            yield
        finally:
            for module in filled:
                self._empty(module)

    def record(self, window: Tensor) -> list[Call]:
        """Return the arguments that each block gets for one window, (1, tokens) int64.

        Masks and position embeddings of a batch of one broadcast over any batch of equally long windows.
        """
        calls: list[Call] = []

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not calls:
                self._in_tuple = self._returns_tuple(hidden, args, kwargs)
            calls.append(Call(args, kwargs))
            self.width = hidden.shape[-1]
            if len(calls) == len(self.blocks):
                raise _Recorded
            return self._returned(hidden)

        self._run(window, self.blocks, recorder)
        return calls

    def _returns_tuple(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Run the first block, without its experts, to see whether blocks of this class return hidden states alone."""
        block, routed = self.fill_block(0, experts=False), self._row.experts if self._source.is_sparse(0) else None
        with torch.no_grad(), silenced(block.get_submodule(routed.module)) if routed else nullcontext():
            output = type(block).forward(block, hidden, *args, **kwargs)
        self.empty_block(0)
        return isinstance(output, tuple)

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        """Return hidden states as the model expects them from a block."""
        return (hidden,) if self._in_tuple else hidden

    def embedded(self, windows: Tensor, batch: int) -> Iterator[Tensor]:
        """Yield the first block's input on the CPU, (windows, tokens, width), `batch` windows at a time."""
        found: list[Tensor] = []

        def recorder(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(hidden.cpu())
            raise _Recorded

        for part in torch.split(windows, batch):
            self._run(part, self.blocks[:1], recorder)
            yield found.pop()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines that the model rotates queries and keys by.

        Args:
            positions: (tokens,) int64.

        Returns:
            (tokens, channels) float32 twice.
        """
        cos, sin = self._stem.rotary_emb(torch.zeros(1, 1, 1, device=self.device), positions[None].to(self.device))
        return cos[0].cpu(), sin[0].cpu()

    def logits(self, windows: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of the last block's output; gradients flow back into `hidden`.

        Call it while stem and head are filled.

        Args:
            windows: (windows, tokens) int64, what the blocks were given.
            hidden: (windows, tokens, width).

        Returns:
            (windows, tokens, vocabulary).
        """
        for block in self.blocks:
            block.forward = lambda *_, **__: self._returned(hidden)
        try:
            logits: Tensor = self._model(input_ids=windows.to(self.device), use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward
        return logits

    def _run(self, windows: Tensor, blocks: list[nn.Module], recorder: Callable[..., Tensor]) -> None:
        for block in blocks:
            block.forward = recorder
        try:
            self._stem(input_ids=windows.to(self.device), use_cache=False)
        except _Recorded:
            pass
        finally:
            for block in blocks:
                del block.forward
