"""Text that the final weights generate, for everything that is trained to guess it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from optikit.errors import InputMissingError
from optikit.evaluation import texts
from optikit.models import tokenizer

if TYPE_CHECKING:
    from optikit.runtime.generate import TextGenerator
    from optikit.stage import Job
    from optikit.stages.speculate._prompts import PromptOptions, WritingOptions
    from optikit.training.self_generated import GeneratedText

FEWEST = 4
"""Prompts to learn from: fewer leave nothing to validate on."""


def written(
    options: WritingOptions, job: Job, tokens: int, *, states: bool = True
) -> tuple[Any, list[list[int]], GeneratedText]:
    """Return the model of `job.source`, prompts that nothing is evaluated on, one per answer, and the answers.

    Args:
        options: Which prompts, and how.
        job: Where to read, and to keep finished batches.
        tokens: Tokens wanted: so many prompts are used, at most all.
        states: Keep the states that each token was predicted from.

    Raises:
        InputMissingError: Too few prompts that fit the context.
    """
    from optikit.algorithms.precision import compute_dtype
    from optikit.process.allocator import one_arena, return_memory
    from optikit.runtime.decoders.transformers import TorchDecoder
    from optikit.runtime.generate import TextGenerator
    from optikit.training import self_generated

    dtype = str(compute_dtype(job.device)).removeprefix("torch.")
    decoder = TorchDecoder(job.source, dtype=dtype, threads=job.threads, device=job.device)
    generator = TextGenerator(decoder, job.source)
    fitting = _fitting(options, job, generator, decoder.max_tokens - options.new_tokens)

    def observe(done: int, total: int) -> None:
        return_memory()
        job.progress(done, total, "prompt")

    begun = time.monotonic()

    one_arena(bounded=True)  # a cache that grows token by token leaves holes of every size
    asked = fitting[: max(FEWEST, -(-tokens // (options.new_tokens * options.answers)))]
    used = [prompt for prompt in asked for _ in range(options.answers)]
    text = self_generated.write(
        decoder.model,
        used,
        new_tokens=options.new_tokens,
        ends=generator.ends,
        folder=job.scratch / "self-generated",
        states=states,
        drawing=self_generated.Drawing(answers=options.answers, temperature=options.temperature, seed=job.seed),
        observe=observe,
        note=job.note,
    )
    rate = text.written / max(1e-3, time.monotonic() - begun)
    job.note(
        f"the model wrote {text.written} tokens in {text.texts} texts to {len(asked)} prompts, {rate:.0f} per second"
    )
    return decoder.model, used, text


def _fitting(options: PromptOptions, job: Job, generator: TextGenerator, room: int) -> list[list[int]]:
    """Return the prompts of at most so many tokens that nothing is evaluated on.

    Raises:
        InputMissingError: Too few.
    """
    path = job.inputs["prompts"]
    found = texts.divided(
        path,
        tokenizer.load(job.source),
        lambda prompt: generator.encode(prompt, chat=options.chat and (options.chat_template or True)),
        eval_prompts=options.eval_prompts,
        template=options.template,
        length=options.prompt_tokens,
        seed=job.seed,
        eval_part=options.eval_part,
    )
    fitting = [prompt.tolist() for prompt in found.others if len(prompt) <= room]
    if len(fitting) < FEWEST:
        message = (
            f"{path} has {len(fitting)} prompts of at most {room} tokens beside the {len(found.judged)} that evaluate; "
            f"{FEWEST} are needed to learn from"
        )
        raise InputMissingError(message, fix="give more prompts, or lower eval_prompts")
    return fitting
