"""What a model writes by itself, in batches, with the states that it wrote from: all that heads and drafts learn from.

Paper   Cai et al. 2024, arXiv:2401.10774, section 2.3.2 (self-distillation): a drafter has to predict the model's text,
        not the author's
Cost    one decoding step per token and batch; 2 bytes per token and unit of width on disk
Differs greedy, because greedy serving is what the drafts are for; where prompts are few, more answers to each are drawn
        at a temperature, so that there is more to learn from; the states are kept while writing, so that no second pass
        over the text is needed

Every batch is written to a file when it is done; a killed run's successor goes on behind the last one. A batch depends
on its prompts, its number and the seed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from optikit.formats.checkpoint import keep_tensors, kept_tensors
from optikit.runtime.decoders.checks import cache_argument

BATCH = 32
"""Most texts written at once."""
ROOM = 8192
"""Most positions of the cache at once, padding included: long prompts are written in smaller batches."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers beside the greedy one are drawn.

    Attributes:
        answers: Texts per prompt. Those of one prompt follow each other, and the first of them is greedy.
        temperature: Of the others.
        seed: With the number of a batch it decides what is drawn.
    """

    answers: int = 1
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """Texts one after the other, each begun by the last token of its prompt.

    Attributes:
        tokens: (n,) int64.
        documents: (n,) int64: number of the text that each token belongs to.
        wanted: (n,) bool: tokens that the model wrote.
        hidden: (n, width): the state, behind the final norm, at each token: what the next one was predicted from. Zero
            at the last token of a text, behind which nothing was predicted. Of width 0 where none were kept.
        answers: Texts per prompt, the first of each greedy.
    """

    tokens: Tensor
    documents: Tensor
    wanted: Tensor
    hidden: Tensor
    answers: int = 1

    @property
    def texts(self) -> int:
        """Texts that were written."""
        return len(set(self.documents.tolist()))

    @property
    def written(self) -> int:
        """Tokens that the model wrote."""
        return int(self.wanted.sum())

    def chosen(self, documents: Tensor) -> GeneratedText:
        """Return some of the texts."""
        kept = torch.isin(self.documents, documents)
        return GeneratedText(
            tokens=self.tokens[kept],
            documents=self.documents[kept],
            wanted=self.wanted[kept],
            hidden=self.hidden[kept],
            answers=self.answers,
        )


def divide(text: GeneratedText, share: float) -> tuple[GeneratedText, GeneratedText]:
    """Return (texts to learn from, texts to validate on).

    Every 1/share-th prompt is held back, at least one, with all its answers; the greedy ones validate.
    """
    documents = torch.tensor(sorted(set(text.documents.tolist())))
    asked = documents // text.answers
    prompts = torch.tensor(sorted(set(asked.tolist())))
    held = torch.isin(asked, prompts[:: max(2, round(1 / share))])
    return text.chosen(documents[~held]), text.chosen(documents[held & (documents % text.answers == 0)])


def write(  # noqa: PLR0913 - how to write, each with a default
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    ends: frozenset[int],
    folder: Path,
    states: bool = True,
    drawing: Drawing = Drawing(),
    most: tuple[int, int] = (BATCH, ROOM),
    observe: Callable[[int, int], None] = lambda _done, _total: None,
    note: Callable[[str], None] = lambda _: None,
) -> GeneratedText:
    """Let a model continue prompts.

    Args:
        model: A transformers decoder.
        prompts: Token ids, each at least one; a prompt with several answers as often.
        new_tokens: Most tokens to write per prompt.
        ends: Tokens that end a text; the one that does is part of it.
        folder: Where finished batches are kept.
        states: Keep what each token was predicted from.
        drawing: How those that aren't greedy are drawn.
        most: Prompts at once, those of similar length together, and positions of the cache at once; a prompt that is
            longer is written alone.
        observe: Told (done, total) prompts.
        note: Told of a batch that is damaged, and therefore written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = []
    done = 0
    for number, indices in enumerate(_batches([len(prompt) + new_tokens for prompt in prompts], *most)):
        observe(done, len(prompts))
        done += len(indices)
        path = folder / f"text-{number:05d}.safetensors"
        part = kept_tensors(path, note)
        if part is None:
            picker = _Picker(drawing, indices, number)
            part = _joined(indices, _continue(model, [prompts[i] for i in indices], new_tokens, ends, picker))
            part["hidden"] = part["hidden"] if states else part["hidden"][:, :0]
            keep_tensors(path, part)
        parts.append(part)
    observe(done, len(prompts))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return GeneratedText(**joined, answers=drawing.answers)


def _batches(lengths: Sequence[int], most: int, room: int) -> Iterator[list[int]]:
    """Yield indices of texts to write at once, shortest first: at most `most`, padded at most `room` positions."""
    found: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if found and (len(found) == most or (len(found) + 1) * lengths[index] > room):
            yield found
            found = []
        found.append(index)
    if found:
        yield found


def _joined(numbers: Sequence[int], texts: Sequence[tuple[int, list[int], Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of one batch from (last token of the prompt, text, states) of each."""
    tokens, documents, wanted, hidden = [], [], [], []
    for number, (last, text, states) in zip(numbers, texts, strict=True):
        tokens.append(torch.tensor([last, *text]))
        documents.append(torch.full((len(text) + 1,), number))
        wanted.append(torch.tensor([False] + [True] * len(text)))
        hidden.append(torch.cat([states, torch.zeros(1, states.shape[1], dtype=states.dtype)]))
    return {
        "tokens": torch.cat(tokens),
        "documents": torch.cat(documents),
        "wanted": torch.cat(wanted),
        "hidden": torch.cat(hidden),
    }


class _States:
    """Keeps what the output head read last, for as long as it is open."""

    def __init__(self, model: Any) -> None:
        self.last = torch.empty(0)
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._note)

    def _note(self, _head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.last = inputs[0][:, -1].cpu()

    def close(self) -> None:
        """Listen no longer."""
        self._hook.remove()


class _Picker:
    """Chooses the next token of every row of a batch: the best, or one that is drawn."""

    def __init__(self, drawing: Drawing, texts: Sequence[int], batch: int) -> None:
        self._drawn = torch.tensor([index % drawing.answers != 0 for index in texts])
        self._temperature = drawing.temperature
        self._random = torch.Generator().manual_seed(drawing.seed * 1_000_003 + batch)

    def pick(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return (rows,) tokens, where the logits are, from (rows, vocab) logits of these rows."""
        best = logits.argmax(-1)
        drawn = self._drawn[rows]
        if drawn.any():
            there = drawn.to(logits.device)
            odds = (logits[there].float() / self._temperature).softmax(-1).cpu()
            best[there] = torch.multinomial(odds, 1, generator=self._random).flatten().to(logits.device)
        return best


@torch.inference_mode()
def _continue(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, ends: frozenset[int], picker: _Picker
) -> list[tuple[int, list[int], Tensor]]:
    """Return (last token of the prompt, text, states (len(text), width)) of each prompt."""
    states = _States(model)
    texts: list[list[int]] = [[] for _ in prompts]
    seen: list[list[Tensor]] = [[] for _ in prompts]
    try:
        for rows, tokens, hidden in _steps(model, prompts, new_tokens, ends, (states, picker)):
            for row, token, state in zip(rows, tokens, hidden, strict=True):
                texts[row].append(token)
                seen[row].append(state)
    finally:
        states.close()
    return [(int(prompt[-1]), text, torch.stack(each)) for prompt, text, each in zip(prompts, texts, seen, strict=True)]


def _steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    ways: tuple[_States, _Picker],
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Yield (rows still writing, their next tokens, the states that predicted them), step by step.

    Prompts are padded on the left, where the mask hides it. A row whose text has ended leaves the batch.
    """
    states, picker = ways
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    places = torch.tensor([distinct.index(tuple(prompt)) for prompt in prompts])
    longest = max(map(len, distinct))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in distinct])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ending = torch.tensor(sorted(ends), dtype=torch.int64)
    tokens, mask, positions, ending = (each.to(model.device) for each in (tokens, mask, positions, ending))
    cache = DynamicCache()
    cached = cache_argument(model, cache)
    rows = torch.arange(len(prompts))
    for step in range(new_tokens):
        output = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **cached)
        logits = output.logits[:, -1]
        if step == 0 and len(distinct) < len(prompts):  # a prompt is read once, whatever the number of its answers
            states.last = states.last[places]
            places = places.to(model.device)
            cache.batch_select_indices(places)
            logits, mask, positions = logits[places], mask[places], positions[places]
        best = picker.pick(rows, logits)
        yield rows.tolist(), best.tolist(), states.last
        kept = torch.nonzero(~torch.isin(best, ending)).flatten()
        if not len(kept) or step == new_tokens - 1:
            return
        if len(kept) < len(rows):
            cache.batch_select_indices(kept)
            rows, best, mask, positions = rows[kept.cpu()], best[kept], mask[kept], positions[kept]
        tokens = best[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
