"""Make a draft model of a target: leave out most of its blocks, then train the rest towards what the target predicts.

Paper   Leviathan et al. 2023, arXiv:2211.17192 (drafts); Kim et al. 2023, arXiv:2310.02157 and Zhou et al. 2024,
        arXiv:2310.08461 (DistillSpec): distilled on the target's own text a draft is accepted more often
Cost    three forward passes of the draft per token and epoch; 16 bytes per trained weight
Differs the target's predictions come from its kept states, so it doesn't run again; both are compared on the part of
        the vocabulary that it writes most; embedding, last norm and head stay the target's

Rows of an epoch come in an order that the seed and its number decide; a killed run goes on behind its last epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optikit.algorithms import depth
from optikit.errors import StageFailedError
from optikit.training.self_generated import OwnText

Observer = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        epochs: Passes over the texts.
        batch: Texts per step.
        learning_rate: After the warm-up; falls to a tenth along a cosine.
        warmup: Share of all steps.
        seed: Orders the texts.
    """

    epochs: int = 3
    batch: int = 8
    learning_rate: float = 5e-4
    warmup: float = 0.1
    seed: int = 0


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


def sequences(prompts: Sequence[Sequence[int]], text: OwnText) -> Sequences:
    """Put own texts behind their prompts."""
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
        states = model(text[None], output_hidden_states=True, logits_to_keep=1).hidden_states
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


@dataclass
class History:
    """What became of a training.

    Attributes:
        epochs: Epochs done.
        losses: Mean loss of each epoch: KL divergence from the target, nats per token.
        agreement: Share of held-back tokens that the draft would write, too: before training, then after each epoch.
        best: Number of the epoch whose weights were kept, from 1; 0 is the start.
        stopped: Why it ended: `epochs`, or the bad number that it met.
    """

    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    best: int = 0
    stopped: str = ""


def train(
    student: Any,
    blocks: str,
    data: Sequences,
    held: Sequences,
    rows: Tensor,
    settings: Settings,
    *,
    folder: Path,
    observe: Observer = lambda _done, _total: None,
) -> History:
    """Train the blocks of a shortened model in place, and leave those in it that agreed best.

    Args:
        student: From `shortened`.
        blocks: Name of its list of blocks.
        data: To learn from.
        held: Of other prompts.
        rows: (drafted,) int64: tokens that predictions are compared on.
        settings: How.
        folder: Where the last finished epoch waits for a killed run's successor.
        observe: Told (done, total) steps.

    Raises:
        StageFailedError: Nothing to learn from, or a bad number in the first epoch.
    """
    if not data.tokens or not held.tokens:
        raise StageFailedError("a draft has nothing to learn from", fix="give more prompts, with longer answers")
    run = _Run(student, blocks, rows, settings, folder)
    run.restore(held)
    per_epoch = math.ceil(len(data.tokens) / settings.batch)
    try:
        for epoch in range(run.history.epochs, settings.epochs):
            total = 0.0
            for done, batch in enumerate(_batches(len(data.tokens), epoch, settings)):
                step = epoch * per_epoch + done
                observe(step, settings.epochs * per_epoch)
                total += run.step(data, batch, step, settings.epochs * per_epoch)
            run.close_epoch(total / per_epoch, held)
        run.history.stopped = run.history.stopped or "epochs"
    except FloatingPointError as error:
        if not run.history.epochs:
            message = f"training met {error}, before one epoch was over"
            raise StageFailedError(message, fix="lower learning_rate, or look for bad numbers in the model") from error
        run.history.stopped = str(error)
    run.blocks.load_state_dict(run.best)
    return run.history


def _batches(count: int, epoch: int, settings: Settings) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    yield from (order[start : start + settings.batch] for start in range(0, count, settings.batch))


class _Run:
    """One training: the student, its optimizer, and where it stands."""

    def __init__(self, student: Any, blocks: str, rows: Tensor, settings: Settings, folder: Path) -> None:
        self.student = student
        self.blocks = student.get_submodule(blocks)
        self.body = student.get_submodule(blocks.split(".", maxsplit=1)[0])
        self.head = student.get_output_embeddings().weight.detach()[rows]
        self.row_of = torch.full((student.config.vocab_size,), -1)
        self.row_of[rows] = torch.arange(len(rows))
        self.settings = settings
        self.checkpoint = folder / "draft-training.pt"
        student.requires_grad_(requires_grad=False)
        self.blocks.requires_grad_(requires_grad=True)
        self.optimizer = torch.optim.AdamW(self.blocks.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.history = History()
        self.best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.blocks.state_dict().items()}

    def restore(self, held: Sequences) -> None:
        """Go on behind the last finished epoch, or note how well the untrained blocks agree."""
        if not self.checkpoint.is_file():
            self.history.agreement.append(self.agreement(held))
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.blocks.load_state_dict(state["blocks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.history = state["best"], History(**state["history"])

    def states(self, data: Sequences, batch: Sequence[int]) -> Tensor:
        """Return the student's states (n, width) that predict the texts of a batch, one text after the other."""
        longest = max(len(data.tokens[i]) for i in batch)
        tokens = torch.stack([nn.functional.pad(data.tokens[i], (0, longest - len(data.tokens[i]))) for i in batch])
        hidden = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        spans = ((data.prompts[i] - 1, len(data.tokens[i]) - 1) for i in batch)
        return torch.cat([hidden[row, start:stop] for row, (start, stop) in enumerate(spans)])

    def step(self, data: Sequences, batch: Sequence[int], step: int, total: int) -> float:
        """Do one optimizer step and return its loss.

        Raises:
            FloatingPointError: It isn't a number; the weights are as they were.
        """
        warm = max(1, int(self.settings.warmup * total))
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min((step + 1) / warm, cosine)
        aim = torch.cat([data.hidden[i] for i in batch]).float() @ self.head.T
        found = self.states(data, batch) @ self.head.T
        loss = nn.functional.kl_div(found.log_softmax(-1), aim.log_softmax(-1), reduction="batchmean", log_target=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        norm = nn.utils.clip_grad_norm_(self.blocks.parameters(), 1.0)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise FloatingPointError(f"loss {value} at step {step}")
        self.optimizer.step()
        return value

    @torch.inference_mode()
    def agreement(self, held: Sequences) -> float:
        """Return the share of the target's tokens that the student would write after the same text."""
        right = seen = 0
        for start in range(0, len(held.tokens), self.settings.batch):
            batch = range(start, min(start + self.settings.batch, len(held.tokens)))
            best = (self.states(held, batch) @ self.head.T).argmax(-1)
            wanted = torch.cat([held.tokens[i][held.prompts[i] :] for i in batch])
            right += int((best == self.row_of[wanted]).sum())
            seen += len(wanted)
        return right / max(1, seen)

    def close_epoch(self, loss: float, held: Sequences) -> None:
        """Validate, keep the blocks if they are the best so far, and write the checkpoint."""
        self.history.losses.append(loss)
        self.history.agreement.append(self.agreement(held))
        self.history.epochs += 1
        if self.history.agreement[-1] > self.history.agreement[self.history.best]:
            self.best, self.history.best = self._weights(), self.history.epochs
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".part")
        state = {"blocks": self._weights(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        torch.save(state | {"history": asdict(self.history)}, partial)
        partial.replace(self.checkpoint)
