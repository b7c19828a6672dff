"""The final weights' own text, for everything that is trained to guess it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optikit.errors import InputMissingError
from optikit.stages.measure import _text

if TYPE_CHECKING:
    from optikit.algorithms.own_text import OwnText
    from optikit.stages.protocol import Job
    from optikit.stages.speculate._prompts import PromptOptions

FEWEST = 4
"""Prompts to learn from: fewer leave nothing to validate on."""


def written(options: PromptOptions, job: Job, tokens: int) -> tuple[Any, list[list[int]], OwnText]:
    """Return the model of `job.source`, prompts that nothing will be judged on, and what it writes to them.

    Args:
        options: Which prompts, and how.
        job: Where to read, and to keep finished batches.
        tokens: Tokens wanted: so many prompts are used, at most all.

    Raises:
        InputMissingError: Too few prompts that fit the context.
    """
    from optikit.algorithms import own_text
    from optikit.calibration.arithmetic import compute_dtype
    from optikit.calibration.memory import one_arena, return_memory
    from optikit.runtime.text import Talker
    from optikit.runtime.torch_decoder import TorchDecoder

    dtype = str(compute_dtype(job.device)).removeprefix("torch.")
    decoder = TorchDecoder(job.source, dtype=dtype, threads=job.threads)
    talker = Talker(decoder, job.source)
    path = job.inputs["prompts"]
    found = _text.divided(
        path,
        _text.tokenizer(job.source),
        lambda prompt: talker.encode(prompt, chat=options.chat),
        judged=options.judged,
        template=options.template,
        length=options.prompt_tokens,
        seed=job.seed,
        judged_part=options.judged_part,
    )
    room = decoder.max_tokens - options.new_tokens
    fitting = [prompt.tolist() for prompt in found.others if len(prompt) <= room]
    if len(fitting) < FEWEST:
        message = (
            f"{path} has {len(fitting)} prompts of at most {room} tokens beside the {len(found.judged)} that judge; "
            f"{FEWEST} are needed to learn from"
        )
        raise InputMissingError(message, fix="give more prompts, or lower `judged`")

    def observe(done: int, total: int) -> None:
        return_memory()
        job.progress(done, total, "prompt")

    one_arena(bounded=True)  # a cache that grows token by token leaves holes of every size
    used = fitting[: max(FEWEST, -(-tokens // options.new_tokens))]
    text = own_text.write(
        decoder.model,
        used,
        new_tokens=options.new_tokens,
        ends=talker.ends,
        folder=job.scratch / "own-text",
        observe=observe,
    )
    return decoder.model, used, text
