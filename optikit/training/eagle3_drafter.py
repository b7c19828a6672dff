"""Train an EAGLE-3 drafter online: the target's states are computed batch by batch, and kept nowhere.

What the target wrote by itself is all the text there is; the loss is over its answers only. Every step runs the target
on some texts, takes what three of its blocks are given and what its head reads, and trains the drafter on that,
unrolled over several steps of its own. Memory is that of a batch, whatever the text; the target runs once per epoch and
text. The drafter that validated best remains, the untrained start among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optikit.algorithms.eagle3 import Batch, Eagle3, loss, right
from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.training.draft_model import Sequences
from optikit.training.loop import History, Settings, Task, train


class Target:
    """A frozen model that shows what some of its blocks are given, and what its head reads.

    Args:
        model: A transformers decoder.
        blocks: Name of its list of blocks.
        layers: Blocks whose inputs are shown.
        rows: (drafted,) int64: rows of its head that predictions are compared on.
        device: Where it and the drafter are.
    """

    def __init__(self, model: Any, blocks: str, layers: Sequence[int], rows: Tensor, device: str) -> None:
        model.to(device).requires_grad_(requires_grad=False)
        self.device = device
        self._body = model.get_submodule(blocks.split(".", maxsplit=1)[0])
        self._blocks = [model.get_submodule(f"{blocks}.{layer}") for layer in layers]
        self._head = model.get_output_embeddings().weight.detach()[rows.to(device)].float()

    @torch.no_grad()
    def batch(self, texts: Sequences, items: Sequence[int], steps: int) -> tuple[Batch, Tensor]:
        """Run the target on some texts.

        Args:
            texts: Prompts and answers.
            items: Which.
            steps: That the drafter is unrolled over.

        Returns:
            What the drafter learns from, and what the target predicts there: see `algorithms.eagle3.loss`.
        """
        longest = max(len(texts.tokens[i]) for i in items)
        tokens = torch.stack([functional.pad(texts.tokens[i], (0, longest - len(texts.tokens[i]))) for i in items])
        tokens = tokens.to(self.device)
        with _inputs(self._blocks) as given:
            # Padding lies behind every text, where causal attention doesn't look.
            last = self._body(input_ids=tokens, use_cache=False).last_hidden_state
        prompts = torch.tensor([texts.prompts[i] for i in items], device=self.device)
        counts = torch.tensor([len(texts.tokens[i]) for i in items], device=self.device) - prompts
        answer = torch.arange(int(counts.max()) + steps, device=self.device)
        places = (prompts[:, None] + answer).clamp(max=longest - 1)
        states = last.gather(1, places[..., None].expand(-1, -1, last.shape[-1]))
        rows = prompts[:, None] - 1 + answer[: len(answer) - steps]
        batch = Batch(tokens=tokens, states=torch.cat(given, dim=-1).float(), rows=rows, counts=counts)
        return batch, functional.linear(states.float(), self._head)


@contextmanager
def _inputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that fills with what blocks are given, in their order, while a model runs."""
    given = [torch.empty(0)] * len(blocks)

    def keep(number: int, _block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given[number] = inputs[0]

    hooks = [block.register_forward_pre_hook(partial(keep, number)) for number, block in enumerate(blocks)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def start(drafter: Eagle3, block: Mapping[str, Tensor], norm: Tensor | None) -> bool:
    """Begin a drafter as the target's last block, which reads the states of the last depth and no token.

    Args:
        drafter: It keeps its random start where its shape is another.
        block: Weights of the block, as Llama names them.
        norm: (hidden,): weight of the target's final norm, if it has one of that kind.

    Returns:
        Whether it has the block's weights.
    """
    hidden = drafter.shape.hidden
    own = drafter.layer.state_dict()
    wider = {f"self_attn.{name}_proj.weight" for name in "qkv"}
    found = {}
    for name, value in own.items():
        given = block.get(name.replace("hidden_norm", "input_layernorm")) if name != "input_layernorm.weight" else value
        if given is None or given.shape != (*value.shape[:-1], hidden if name in wider else value.shape[-1]):
            return False
        zeros = torch.zeros_like(given)
        found[name] = torch.cat([zeros, given], dim=-1).float() if name in wider else given.float()
    drafter.layer.load_state_dict(found)
    depths = drafter.shape.fused // hidden
    with torch.no_grad():
        drafter.fc.weight.copy_(torch.cat([torch.zeros(hidden, hidden)] * (depths - 1) + [torch.eye(hidden)], dim=1))
        if norm is not None and norm.shape == drafter.norm.weight.shape:
            drafter.norm.weight.copy_(norm)
    return True


def train_drafter(
    drafter: Eagle3,
    target: Target,
    texts: Sequences,
    held: Sequences,
    settings: Settings,
    job: Job,
    *,
    steps: int,
) -> History:
    """Train a drafter in place, on the job's device; its output layer and embeddings stay as they are.

    Args:
        drafter: What it holds is the start.
        target: The model that it drafts for.
        texts: To learn from; an item of the settings is a text.
        held: Of other prompts.
        settings: How.
        job: See `train`.
        steps: To unroll.

    Returns:
        What became of it; the score of a validation is the tokens per forward of the target.

    Raises:
        StageFailedError: Nothing to learn from, or as of `train`.
    """
    usable, judging = (
        [i for i, prompt in enumerate(part.prompts) if len(part.tokens[i]) > prompt + 1] for part in (texts, held)
    )
    if not usable or not judging:
        raise StageFailedError("a drafter has nothing to learn from", fix="give more prompts, with longer answers")
    drafter.to(job.device)
    drafter.lm_head.requires_grad_(requires_grad=False)

    def step(items: Tensor) -> Iterator[Tensor]:
        yield loss(drafter, *target.batch(texts, items.tolist(), steps), steps)

    def validate() -> dict[str, Any]:
        seen, kept = torch.zeros(steps), torch.zeros(steps)
        for some in torch.split(torch.tensor(judging), settings.batch):
            batch, _ = target.batch(held, some.tolist(), steps)
            counts, chains = (each.cpu() for each in right(drafter, batch, steps))
            seen, kept = seen + counts, kept + chains
        chain = (kept / seen.clamp(min=1)).tolist()
        return {"score": 1 + sum(chain), "tokens_per_step": 1 + sum(chain), "chain": chain, "positions": int(seen[0])}

    task = Task(
        parameters={name: each for name, each in drafter.named_parameters() if each.requires_grad},
        items=torch.tensor(usable),
        step=step,
        validate=validate,
    )
    return train(task, settings, job)
