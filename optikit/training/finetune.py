"""Training over a checkpoint: text and perhaps a teacher in, a directory with trained weights out, checked.

The whole model is in memory here, with gradients and moments of what is trained; unlike the walk, training can't go
block by block. Arithmetic is bfloat16 where the processor multiplies that in hardware; what is trained is float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from optikit.algorithms.losses import cross_entropy, divergence
from optikit.algorithms.precision import compute_dtype
from optikit.calibration import calibration_set
from optikit.calibration.source_model import SourceModel
from optikit.calibration.verify import FIX
from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint, keep_tensors, kept_tensors, locate, same_bytes, save_tensors
from optikit.formats.directory import write_model
from optikit.stage import Job
from optikit.training.loop import History, Settings, Task, train, write_log

TRAINED = "trained.safetensors"
"""The weights to be written, in scratch."""
HELD_OUT = 4
"""Windows that are not trained on: the loss on them is told before and after."""
WRITTEN_TOGETHER = 16
"""Texts that the teacher writes at once."""
CURVE = 20
"""Points of the loss curve among the facts."""
LOCAL = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}

Loss = Callable[[Tensor], Tensor]
"""Loss of one window, (1, tokens)."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """What is trained.

    Attributes:
        model: It computes with the parameters.
        parameters: What is trained, by name, float32.
        pruned: By name, elements that stay zero.
        weights: Returns the checkpoint's new tensors, by the checkpoint's names, in its dtypes.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    weights: Callable[[], dict[str, Tensor]]
    pruned: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """Training towards the predictions of another model, the job's input `teacher`.

    Attributes:
        temperature: Softens both predictions.
        prompt: Tokens of each calibration window that the teacher continues itself; 0 takes the text itself.
    """

    temperature: float
    prompt: int


def load(job: Job, directory: Path, dtype: torch.dtype) -> nn.Module:
    """Load a dense model whole; everything in it is frozen and nothing is dropped at random."""
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **LOCAL)
    return loaded.to(job.device).eval().requires_grad_(requires_grad=False)


def whole(job: Job, *, embeddings: bool) -> Student:
    """Return the job's source with all its weights to be trained, those of embedding and head only if asked for."""
    stored = SourceModel(Checkpoint(job.source))
    model = load(job, job.source, torch.float32)
    frozen = () if embeddings else (f"{stored.row.embedding}.", f"{stored.row.head}.")
    chosen = {name: each for name, each in model.named_parameters() if not name.startswith(frozen or "\0")}
    for each in chosen.values():
        each.requires_grad_()
    zeros = {name: mask for name, each in chosen.items() if each.dim() > 1 and (mask := each.detach() == 0).any()}

    def weights() -> dict[str, Tensor]:
        named = {stored.tensor_name(name): each.detach() for name, each in chosen.items()}
        return {name: each.to(stored.checkpoint.entries[name].torch_dtype) for name, each in named.items()}

    return Student(model=model, parameters=chosen, weights=weights, pruned=zeros)


def adapted(job: Job, *, rank: int, alpha: int) -> Student:
    """Return the job's source with a low-rank adapter beside every linear of its blocks, merged when written.

    The frozen weights are held in the compute dtype; merging reads them again as they are stored, so that they are
    rounded once. Weights that are zero stay zero.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    stored = SourceModel(Checkpoint(job.source))
    model = load(job, job.source, compute_dtype(job.device))
    linears = "|".join(map(re.escape, stored.row.linears))
    torch.manual_seed(job.seed)  # for the adapters' random halves
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=rf"{re.escape(stored.row.blocks)}\.\d+\.({linears})",
        fan_in_fan_out=stored.row.transposed,
    )
    inject_adapter_in_model(config, model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    chosen = {name: each for name, each in model.named_parameters() if "lora_" in name}
    for each in chosen.values():
        each.data = each.data.float()

    def weights() -> dict[str, Tensor]:
        merged = {}
        for name, layer in layers.items():
            tensor_name = stored.tensor_name(f"{name}.weight")
            before = stored.checkpoint.read(tensor_name)
            after = before.float() + layer.get_delta_weight("default").detach().cpu()
            merged[tensor_name] = after.masked_fill(before == 0, 0).to(before.dtype)
        return merged

    return Student(model=model, parameters=chosen, weights=weights)


def finetune(job: Job, student: Student, settings: Settings, teaching: Teaching | None = None) -> dict[str, Any]:
    """Train, and write the result to `job.dest`.

    Returns:
        Facts: steps, tokens, loss on held-out windows before and after, the curve, why it stopped early.

    Raises:
        StageFailedError: No calibration text, a bad number at once, or a result that isn't what was promised.
    """
    calibration = job.calibrated()
    torch.set_num_threads(job.threads)
    dtype = compute_dtype(job.device)
    teacher = load(job, job.inputs["teacher"], dtype) if teaching else None
    steps, text = draw(job, settings)
    if teacher is not None and teaching is not None and teaching.prompt:
        text = self_generated_windows(job, teacher, text, teaching.prompt)
    loss = _loss(job, student.model, teacher, teaching.temperature if teaching else 1.0)
    learning, held = text[:-HELD_OUT], text[-HELD_OUT:]
    task = Task(
        parameters=student.parameters,
        items=torch.arange(len(learning)),
        shuffled=False,  # drawing has done it
        step=lambda items: (loss(learning[item][None]) / len(items) for item in items),
        validate=lambda: {"score": -(found := mean_loss(loss, held)), "loss": found},
        pruned=student.pruned,
    )
    history = train(task, replace(settings, budget=("steps", steps)), job)
    written = write(job, student.weights())
    write_log(job.dest, history.rows())
    return {
        "steps": history.steps,
        "tokens": history.steps * settings.batch * calibration.length,
        **held_out(history),
        "losses": curve(history.losses),
        "stopped": history.stopped,
        **written,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def held_out(history: History) -> dict[str, float]:
    """Return the loss on held-out windows before and after."""
    first, last = (round(history.validation[at]["loss"], 4) for at in (0, -1))
    return {"held_out_loss_before": first, "held_out_loss_after": last}


def draw(job: Job, settings: Settings) -> tuple[int, Tensor]:
    """Return windows to train on, in the order in which they are seen, and after them the held-out ones.

    An epoch is `samples` windows of the calibration text; for any other budget, all windows are different ones, drawn
    from all of the text. Those held out are its end.

    Args:
        job: Whose calibration text.
        settings: How much.

    Returns:
        The steps of the budget; (steps · batch + HELD_OUT, tokens) int64.

    Raises:
        StageFailedError: No calibration text, or less than a window of it.
    """
    calibration = job.calibrated()
    steps = settings.steps(calibration.samples, calibration.length)
    wanted = steps * settings.batch
    different = calibration.samples if settings.budget[0] == "epochs" else wanted
    drawn = calibration_set.draw(
        job.source, calibration.text, samples=different + HELD_OUT, length=calibration.length, seed=job.seed
    )
    seeds = (job.seed + 1_000_003 * epoch for epoch in range(math.ceil(wanted / different)))
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    order = torch.cat([torch.randperm(different, generator=each) for each in generators])[:wanted]
    return steps, torch.cat([drawn[order], drawn[different:]])


def self_generated_windows(job: Job, teacher: nn.Module, text: Tensor, prompt: int) -> Tensor:
    """Return windows that begin as those of a text and go on as the teacher would: sampled from its predictions."""
    wanted = text.shape[1] - prompt
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=wanted, min_new_tokens=wanted, pad_token_id=0, use_cache=True
    )
    written = []
    for index, batch in enumerate(torch.split(text, WRITTEN_TOGETHER)):
        kept = job.scratch / f"self-generated-{index:05}.safetensors"
        earlier = kept_tensors(kept, job.note)
        if earlier is None:  # else a killed run came so far
            torch.manual_seed(job.seed * 1_000_003 + index)
            begun = batch[:, :prompt].to(job.device)
            model: Any = teacher
            told = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
            earlier = {"tokens": told.cpu()}
            keep_tensors(kept, earlier)
        written.append(earlier["tokens"])
        job.progress(min((index + 1) * WRITTEN_TOGETHER, len(text)), len(text), "texts by the teacher")
    return torch.cat(written)


def _loss(job: Job, student: nn.Module, teacher: nn.Module | None, temperature: float) -> Loss:
    dtype = compute_dtype(job.device)

    def logits(model: nn.Module, window: Tensor) -> Tensor:
        with torch.autocast(job.device.partition(":")[0], dtype=dtype, enabled=dtype is not torch.float32):
            found: Tensor = model(input_ids=window, use_cache=False).logits
        return found

    def loss(window: Tensor) -> Tensor:
        window = window.to(job.device)
        own = logits(student, window)
        if teacher is None:
            return cross_entropy(own, window)
        with torch.no_grad():
            aim = logits(teacher, window)
        return divergence(own, aim, temperature)

    return loss


def mean_loss(loss: Loss, text: Tensor) -> float:
    """Return the mean loss of windows (n, tokens)."""
    with torch.no_grad():
        return sum(float(loss(window)) for window in torch.split(text, 1)) / len(text)


def curve(losses: Sequence[float]) -> list[float]:
    """Return about `CURVE` of a training's losses, rounded."""
    return [round(value, 4) for value in losses[:: max(1, len(losses) // CURVE)]]


def write(job: Job, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write `job.dest` with new tensors and check it against `job.source`.

    Raises:
        StageFailedError: Naming the tensor that isn't what was promised.
    """
    save_tensors(job.scratch / TRAINED, tensors)
    stored = SourceModel(Checkpoint(job.source))
    entries = {**stored.checkpoint.entries, **locate(job.scratch / TRAINED)}
    write_model(job.source, job.dest, entries, changes={})
    written = Checkpoint(job.dest)
    if set(stored.checkpoint) != set(written):
        odd = min(set(stored.checkpoint) ^ set(written))
        raise StageFailedError(f"{odd} is in only one of source and result", fix=FIX)
    changed = zeros = 0
    for name, entry in stored.checkpoint.entries.items():
        if same_bytes(entry, written.entries[name]):
            continue
        if name not in tensors:
            raise StageFailedError(f"{name} should be untouched and differs from the source", fix=FIX)
        zeros += _zeros_kept(name, stored.checkpoint.read(name), written.read(name))
        changed += 1
    if not changed:
        raise StageFailedError("training changed no weight", fix="raise learning_rate or tokens")
    return {"tensors_changed": changed, "zeros_kept": zeros}


def _zeros_kept(name: str, before: Tensor, after: Tensor) -> int:
    """Return how many weights were zero and are, or raise: shape, dtype and zeros stay, numbers are finite."""
    if before.shape != after.shape or before.dtype != after.dtype:
        raise StageFailedError(f"{name} changed its shape or dtype", fix=FIX)
    if not torch.isfinite(after).all():
        raise StageFailedError(f"{name} became NaN or infinite", fix="lower learning_rate")
    pruned = (before == 0) if before.dim() > 1 else torch.zeros_like(before, dtype=torch.bool)
    if (after[pruned] != 0).any():
        raise StageFailedError(f"{name} lacks zeros that it had", fix=FIX)
    return int(pruned.sum())
