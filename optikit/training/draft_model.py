"""Make a draft model of a target: leave out most of its blocks, then train the rest towards what the target predicts.

Paper   Leviathan et al. 2023, arXiv:2211.17192 (drafts); Kim et al. 2023, arXiv:2310.02157 and Zhou et al. 2024,
        arXiv:2310.08461 (DistillSpec): distilled on text that the target generates, a draft is accepted more
Cost    three forward passes of the draft per token and epoch; 16 bytes per trained weight
Differs the target's predictions come from its kept states, so it doesn't run again; both are compared on the part of
        the vocabulary that it writes most; embedding, last norm and head stay the target's

The blocks that agreed best with the target remain, the untrained start among them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from optikit.algorithms import depth
from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.training.loop import History, Settings, Task, train
from optikit.training.self_generated import GeneratedText


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with the texts that the target wrote to them.

    Attributes:
        tokens: Of each, (n,): prompt and text.
        prompts: Tokens of each prompt.
        hidden: Of each, (m, width): the target's states that predicted the m tokens of its text.
    """

    tokens: tuple[Tensor, ...]
    prompts: tuple[int, ...]
    hidden: tuple[Tensor, ...]


def sequences(prompts: Sequence[Sequence[int]], text: GeneratedText) -> Sequences:
    """Put self-generated texts behind their prompts."""
    tokens, lengths, hidden = [], [], []
    for number in sorted(set(text.documents.tolist())):
        mine = text.documents == number
        prompt = torch.tensor(prompts[number])
        tokens.append(torch.cat([prompt, text.tokens[mine][1:]]))
        lengths.append(len(prompt))
        hidden.append(text.hidden[mine][:-1])
    return Sequences(tokens=tuple(tokens), prompts=tuple(lengths), hidden=tuple(hidden))


@torch.inference_mode()
def influences(model: Any, texts: Sequence[Tensor]) -> list[float]:
    """Return the mean block influence of every block on some texts, each (n,)."""
    found: list[float] = []
    tokens = 0
    for text in texts:
        states = model(text[None].to(model.device), output_hidden_states=True, logits_to_keep=1).hidden_states
        # The last entry is behind the final norm: the last block's own output isn't shown, so it counts as kept.
        each = [depth.influence(before, after) for before, after in pairwise(states[:-1])]
        found = each if not found else [a + b for a, b in zip(found, each, strict=True)]
        tokens += len(text)
    return [each / tokens for each in found] + [math.inf]


def shortened(model: Any, blocks: str, kept: Sequence[int]) -> Any:
    """Return a float32 copy of a model with some of its blocks.

    Args:
        model: A transformers decoder.
        blocks: Name of its list of blocks.
        kept: Numbers of those that stay, ascending.
    """
    whole = model.get_submodule(blocks)
    parent, _, name = blocks.rpartition(".")
    try:
        setattr(model.get_submodule(parent), name, nn.ModuleList())
        student = copy.deepcopy(model)
    finally:
        setattr(model.get_submodule(parent), name, whole)
    chosen = nn.ModuleList(copy.deepcopy(whole[index]) for index in kept)
    for index, block in enumerate(chosen):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - which of its modules have one, torch's types don't say
    setattr(student.get_submodule(parent), name, chosen)
    student.config.num_hidden_layers = len(kept)
    kinds = getattr(student.config, "layer_types", None)
    if kinds:
        student.config.layer_types = [kinds[index] for index in kept]
    return student.float()


def train_draft(
    student: Any, blocks: str, data: Sequences, held: Sequences, rows: Tensor, settings: Settings, job: Job
) -> History:
    """Train the blocks of a shortened model in place, on the job's device.

    Args:
        student: From `shortened`.
        blocks: Name of its list of blocks.
        data: To learn from; an item of the settings is a text.
        held: Of other prompts.
        rows: (drafted,) int64: tokens that predictions are compared on.
        settings: How.
        job: See `train`.

    Returns:
        What became of it: losses are KL divergences from the target, in nats per token; the score of a validation is
        the share of held-back tokens that the draft would write, too.

    Raises:
        StageFailedError: Nothing to learn from, or as of `train`.
    """
    if not data.tokens or not held.tokens:
        raise StageFailedError("a draft has nothing to learn from", fix="give more prompts, with longer answers")
    student.to(job.device)
    student.requires_grad_(requires_grad=False)
    chosen = student.get_submodule(blocks).requires_grad_(requires_grad=True)
    reader = _Reader(student, blocks, rows, job.device)
    task = Task(
        parameters=dict(chosen.named_parameters()),
        items=torch.arange(len(data.tokens)),
        step=lambda items: iter([reader.divergence(data, items.tolist())]),
        validate=lambda: {"score": reader.agreement(held, settings.batch)},
    )
    return train(task, settings, job)


class _Reader:
    """Compares what a student predicts with what its target did."""

    def __init__(self, student: Any, blocks: str, rows: Tensor, device: str) -> None:
        self._device = device
        self._body = student.get_submodule(blocks.split(".", maxsplit=1)[0])
        self._head = student.get_output_embeddings().weight.detach()[rows.to(device)]
        self._row_of = torch.full((student.config.vocab_size,), -1)
        self._row_of[rows] = torch.arange(len(rows))

    def _states(self, data: Sequences, batch: Sequence[int]) -> Tensor:
        """Return the student's states (n, width) that predict the texts of a batch, one text after the other."""
        longest = max(len(data.tokens[i]) for i in batch)
        tokens = torch.stack([nn.functional.pad(data.tokens[i], (0, longest - len(data.tokens[i]))) for i in batch])
        hidden = self._body(input_ids=tokens.to(self._device), use_cache=False).last_hidden_state
        spans = ((data.prompts[i] - 1, len(data.tokens[i]) - 1) for i in batch)
        return torch.cat([hidden[row, start:stop] for row, (start, stop) in enumerate(spans)])

    def divergence(self, data: Sequences, batch: Sequence[int]) -> Tensor:
        """Return the mean KL(target || student) of the tokens of a batch."""
        aim = torch.cat([data.hidden[i] for i in batch]).to(self._device).float() @ self._head.T
        found = self._states(data, batch) @ self._head.T
        return nn.functional.kl_div(found.log_softmax(-1), aim.log_softmax(-1), reduction="batchmean", log_target=True)

    @torch.inference_mode()
    def agreement(self, held: Sequences, at_once: int) -> float:
        """Return the share of the target's tokens that the student would write after the same text."""
        right = seen = 0
        for some in torch.split(torch.arange(len(held.tokens)), at_once):
            batch = some.tolist()
            best = (self._states(held, batch) @ self._head.T).argmax(-1).cpu()
            wanted = torch.cat([held.tokens[i][held.prompts[i] :] for i in batch])
            right += int((best == self._row_of[wanted]).sum())
            seen += len(wanted)
        return right / max(1, seen)
