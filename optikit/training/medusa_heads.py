"""Train Medusa heads on hidden states that were computed once.

The model isn't needed any more: its hidden states and the tokens that it wrote are all that heads learn from. The heads
that validated best remain, the untrained start among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms.medusa import DECAY, IGNORED, MedusaHeads, accuracy, gradient_norms, losses
from optikit.errors import StageFailedError
from optikit.stage import Job
from optikit.training.loop import History, Settings, Task, train


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What heads learn from.

    Attributes:
        hidden: (n, hidden) of any float dtype.
        targets: (n, heads) int64 of `make_targets`.
        before: (n, heads) int64 of `make_before`; sequential heads need it.
    """

    hidden: Tensor
    targets: Tensor
    before: Tensor | None = None

    def useful(self) -> Tensor:
        """Return the indices of rows that at least one head can learn from."""
        return torch.nonzero((self.targets != IGNORED).any(dim=1)).flatten()


def train_heads(
    heads: MedusaHeads, rows: Rows, validation: Rows, settings: Settings, job: Job, *, decay: float = DECAY
) -> History:
    """Train heads in place, on the job's device.

    Args:
        heads: The heads; what they hold is the start.
        rows: To learn from; an item of the settings is a row.
        validation: Of other documents.
        settings: How.
        job: See `train`.
        decay: λ_k = decay^k.

    Returns:
        What became of it; a validation is the `Accuracy`, and its score the tokens per step.

    Raises:
        StageFailedError: Nothing to learn from, a head without gradient, or as of `train`.
    """
    if not len(rows.useful()) or not len(validation.useful()):
        what = "learn from" if not len(rows.useful()) else "validate on"
        raise StageFailedError(f"heads have nothing to {what}", fix="give more prompts, with longer answers")
    heads.to(job.device)

    def step(items: Tensor) -> Iterator[Tensor]:
        hidden, targets = rows.hidden[items].to(job.device).float(), rows.targets[items].to(job.device)
        before = None if rows.before is None else rows.before[items].to(job.device)
        return losses(heads, hidden, targets, before, decay=decay)

    def gradients(items: Tensor) -> dict[str, float]:
        norms = gradient_norms(heads)
        learning = (heads.to_output_rows(rows.targets[items].to(job.device)) != IGNORED).any(dim=0).tolist()
        idle = [head for head, (norm, has) in enumerate(zip(norms, learning, strict=True)) if has and norm == 0]
        if idle:
            fix = "report this: the heads are not connected to their loss"
            raise StageFailedError(f"head {idle[0]} gets no gradient", fix=fix)
        return {f"gradient_norm_{head}": norm for head, norm in enumerate(norms)}

    def validate() -> dict[str, Any]:
        found = accuracy(heads, validation.hidden, validation.targets, validation.before)
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()}
        return {"score": found.tokens_per_step, **told, "tokens_per_step": found.tokens_per_step}

    task = Task(
        parameters={name: each for name, each in heads.named_parameters() if each.requires_grad},
        items=rows.useful(),
        step=step,
        gradients=gradients,
        validate=validate,
    )
    return train(task, settings, job)
