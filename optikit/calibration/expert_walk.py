"""The routed experts of a block, one in memory at a time.

The block's own forward runs up to the experts and waits there. What they are given, with the router's choice, is kept
in a file; each expert in turn is read, changed, and computes its share of the outputs, for the tokens that the router
really sends to it; with those outputs the forward goes on. So peak memory holds one expert, whatever their number.

Routing sends a rare expert few tokens or none, and its statistic would be noise. So by default it is bypassed for
statistics: every expert sees all tokens. All gate and up projections of a block then share one input, and one
statistic; every down projection has its own. With `routed` each expert is judged by its own tokens, and one that has
too few by none: its statistic is that of inputs that are all alike and independent, where every method rounds to
nearest or goes by size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from optikit.algorithms.precision import filled_up
from optikit.calibration import distributed
from optikit.calibration.forward_passes import ForwardPasses
from optikit.calibration.gram import Gram
from optikit.calibration.method import Batch, Group, Method, PreviousOp, Result, Statistic
from optikit.calibration.resume import HiddenStates
from optikit.calibration.source_model import DOWN, GATE, UP, Linears, SourceModel
from optikit.errors import StageFailedError
from optikit.formats import stacked
from optikit.models.architectures import Experts

Seen = Literal["all", "routed"]
"""Which tokens an expert is calibrated on."""
FEWEST_TOKENS = 64
"""Routed tokens below which an expert's statistic counts for nothing."""

Change = tuple[Linears, Callable[[], Result]]


class Choice(NamedTuple):
    """What a router says of a batch of tokens.

    Attributes:
        experts: (tokens, chosen) int64.
        weights: (tokens, chosen): what each expert's output is multiplied by.
    """

    experts: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that an expert is chosen for, (n,) int64, and their weights, (n, 1)."""
        token, place = torch.where(self.experts == expert)
        return token, self.weights[token, place, None]


@dataclass
class Stream:
    """What the experts of a block are given by one of the walk's models, and what they give back.

    Attributes:
        hidden: Their inputs, in a file.
        choices: The router's, by batch.
        outputs: By batch (tokens, width) float32: the sum over those experts that had their turn.
    """

    hidden: HiddenStates
    choices: list[Choice]
    outputs: list[Tensor]

    def inputs(self, index: int, device: str) -> Tensor:
        """Return batch `index`, (tokens, width)."""
        return self.hidden.read(index).flatten(0, 1).to(device)


@contextmanager
def chosen(block: nn.Module, experts: Experts) -> Iterator[None]:
    """Let experts that are given inputs which the router has scaled be called as others are.

    Such a module is given every token once for each of its experts, scaled by 0 where it isn't theirs, and the block
    adds up what it returns. Inside this it is given each token as often as it chooses experts, with the choice, and
    weights of 1: choice c of token t in row c · tokens + t.
    """
    if not experts.scaled:
        yield
        return
    router: Any = block.get_submodule(experts.router)
    module, last = block.get_submodule(experts.module), list[Tensor]()

    def choose(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, indices = output[0].topk(router.top_k, dim=-1)
        last[:] = [indices]
        return scores, output[1]

    def tell(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        index = last.pop().T.reshape(-1, 1)
        return args[0], index, torch.ones_like(index, dtype=args[0].dtype)

    handles = [router.register_forward_hook(choose), module.register_forward_pre_hook(tell)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def listen(passes: ForwardPasses, point: str, hidden: HiddenStates, length: int) -> Stream:
    """Let all passes run up to the experts, and keep what those are given.

    Args:
        passes: Passes through a block.
        point: The experts' module.
        hidden: Where to keep their inputs.
        length: Tokens of a window.
    """
    choices: list[Choice] = []
    outputs: list[Tensor] = []

    def given() -> Iterator[Tensor]:
        for tokens, experts, weights in passes.calls(point):
            choices.append(Choice(experts, weights))
            outputs.append(torch.zeros(tokens.shape, device=tokens.device))
            yield tokens.reshape(-1, length, tokens.shape[-1]).cpu()

    hidden.write(given())
    return Stream(hidden, choices, outputs)


@dataclass(kw_only=True)
class ExpertWalk:
    """One walk over a block's experts.

    Attributes:
        source: The model.
        block: Index of the block.
        module: transformers' module of the experts, empty: it knows how gate and up are joined.
        method: The technique, without a correction: what one expert lacks isn't seen in the outputs of all.
        streams: Of the changed model, and of the dense one where it is walked beside.
        seen: Which tokens an expert is calibrated on.
        ignore: Whether a linear (full name) is left as it is.
        dtype: Of products.
        device: Where they are computed.
        joint: Returns what the inputs of all experts are divided by, or None; it is told how to get the mean of x xᵀ.
        facts: Facts about linears of the expert that is worked on, by name.
    """

    source: SourceModel
    block: int
    module: Any
    method: Method[Any]
    streams: Sequence[Stream]
    seen: Seen
    ignore: Callable[[str], bool]
    dtype: torch.dtype
    device: str
    joint: Callable[[Callable[[], Tensor]], Tensor | None]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _weights: dict[int, Tensor] = field(default_factory=dict)
    _biases: dict[int, Tensor] = field(default_factory=dict)
    _shared: Statistic | None = None

    def take(self, linears: Linears, weights: Sequence[Tensor]) -> None:
        """Take in what an expert's weights, (out, in) each, have become."""
        for linear, weight in zip(linears, weights, strict=True):
            self._weights[linear.part] = weight.to(self.device, self.dtype)

    def changes(
        self, previous: Callable[[Linears], PreviousOp | None], finished: Callable[[], None]
    ) -> Iterator[Change]:
        """Yield the changes of every expert; before the next is asked for, the last must be taken in.

        Args:
            previous: Returns what can take a scale off a group's inputs.
            finished: Called after each expert.
        """
        for expert in range(self.source.experts):
            whole = self.source.expert(self.block, expert, lambda _: False)
            dense = {linear.part: self.source.weight(linear).to(self.device) for linear in whole}
            self._weights = {part: weight.to(self.dtype) for part, weight in dense.items()}
            self._biases = {
                linear.part: bias.to(self.device, self.dtype)
                for linear in whole
                if (bias := self.source.bias(linear)) is not None
            }
            kept = dict(self._weights)
            for parts in ((GATE, UP), (DOWN,)):
                linears = self.source.expert(self.block, expert, self.ignore, parts)
                if linears:
                    names, weights = zip(*((each.name, dense[each.part]) for each in linears), strict=True)
                    group = Group(names=names, weights=weights, previous=previous(linears))
                    if parts == (GATE, UP):
                        group = replace(group, scale=self.joint(partial(self._of_all, group)))
                    yield linears, partial(self.method.apply, group, self._statistic(group, expert, parts))
            for stream, each in zip(self.streams, (self._weights, kept), strict=False):
                self._add(stream, expert, each)
            finished()
            self.facts = {}

    def _statistic(self, group: Group, expert: int, parts: tuple[int, ...]) -> Statistic:
        if self.seen == "all" and parts == (GATE, UP):
            if self._shared is None:
                self._shared = self._gathered(group, self._tokens(expert, parts))
            return self._shared
        if self.seen == "all":
            return self._gathered(group, self._tokens(expert, parts))
        tokens = sum(len(choice.of(expert)[0]) for choice in self.streams[0].choices)
        if distributed.count() > 1:
            tokens = int(distributed.total(torch.tensor(tokens)))
        few = tokens < FEWEST_TOKENS
        self.facts |= {name: {"tokens": tokens, "too_few_tokens": few} for name in group.names}
        return self._gathered(group, iter((_alike(group),)) if few else self._tokens(expert, parts))

    def _of_all(self, group: Group) -> Tensor:
        """Return the mean of x xᵀ over what all experts are given, (in, in)."""
        gram = Gram(group)
        for index in range(len(self.streams[0].choices)):
            inputs = self.streams[0].inputs(index, self.device)
            gram.update(Batch(inputs=inputs, dense_inputs=inputs))
        if distributed.count() > 1:
            gram.merge()
        return gram.mean()

    def _gathered(self, group: Group, batches: Iterator[Tensor]) -> Statistic:
        statistic: Statistic = self.method.statistic(group)
        for inputs in batches:
            if not bool(torch.isfinite(inputs).all()):
                message = f"the inputs of {group.names[0]} are not finite"
                raise StageFailedError(message, fix="does the dense model give finite outputs on this text?")
            statistic.update(Batch(inputs=inputs, dense_inputs=inputs))
        if distributed.count() > 1:
            statistic.merge()
        return statistic

    def _tokens(self, expert: int, parts: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield what a group of an expert is given, batch by batch, (tokens, in); no empty batch."""
        stream = self.streams[0]
        for index, choice in enumerate(stream.choices):
            inputs = stream.inputs(index, self.device)
            if self.seen == "routed":
                inputs = inputs[choice.of(expert)[0]]
            if len(inputs):
                yield inputs if parts == (GATE, UP) else self._inner(inputs, self._weights)

    def _inner(self, inputs: Tensor, weights: dict[int, Tensor]) -> Tensor:
        """Return what an expert's down projection is given, (tokens, width)."""
        biases = self._order([self._biases[GATE], self._biases[UP]]) if self._biases else None
        joined = _product(inputs.to(self.dtype), self._order([weights[GATE], weights[UP]]), biases)
        if not hasattr(self.module, "_apply_gate"):  # of llama4's experts
            gate, up = joined.chunk(2, dim=-1)
            return torch.as_tensor(up * self.module.act_fn(gate))
        inner: Tensor = self.module._apply_gate(joined)  # noqa: SLF001 - how a family joins them, in its own words
        return inner

    @property
    def _order(self) -> stacked.Weave:
        """What brings outputs of gate and up into the order in which their family has them."""
        experts = self.source.row.experts
        return stacked.Weave(across=False, interleaved=experts is not None and experts.interleaved)

    def _add(self, stream: Stream, expert: int, weights: dict[int, Tensor]) -> None:
        """Add an expert's outputs for the tokens that it is chosen for."""
        for index, choice in enumerate(stream.choices):
            token, weight = choice.of(expert)
            if len(token):
                inner = self._inner(stream.inputs(index, self.device)[token], weights)
                given = _product(inner, weights[DOWN], self._biases.get(DOWN))
                stream.outputs[index].index_add_(0, token, (given * weight).float())


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a linear gives for any number of tokens, (tokens, out)."""
    return functional.linear(filled_up(inputs), weight, bias)[: len(inputs)]


def _alike(group: Group) -> Tensor:
    """Return inputs, (in, in), that say nothing of one channel that they don't say of every other."""
    return torch.eye(group.width, device=group.weights[0].device)


def hidden_path(directory: Path, which: int) -> Path:
    """Return the file of the inputs of a block's experts, in the changed model (0) or the dense one (1)."""
    return directory / f"experts-{which}.bin"
