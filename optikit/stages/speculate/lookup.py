"""Prompt lookup: draft what followed the last tokens when they last occurred; needs no training and no second model.

Paper   Saxena 2023, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); for what is remembered of
        other texts: He et al. 2023, REST, arXiv:2311.08252
Helps   texts that repeat their prompt, themselves or one another: summaries, edits, code, SQL, structured output
Hurts   free prose gains least; where measuring chose the lengths, a draft that fails costs less than the others bring
Cost    nothing to make; a dictionary entry per token and length of match
Differs where the text itself has no match, n-grams of the model's own answers to other prompts are asked, if that pays;
        lengths of match and draft are tuned by the measured cost of a forward of m tokens on the compiled model, and it
        is switched off where that predicts or shows no gain; a repetition up to the text's end is continued as a loop

The text stays the model's own: every draft token is checked. This stage writes parameters; what they bring is measured
on the compiled model, and chosen there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import Field

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Job, no_objection
from optikit.stages.speculate import _prompts
from optikit.stages.speculate._prompts import PromptOptions
from optikit.targets import Target

SUMMARY = "prompt lookup: speculate that a text repeats itself; lossless, no training"
NEEDS = ANY
WRITES = "speculator"
USES_TARGET = False
LIBRARIES: tuple[str, ...] = ()
ENVIRONMENT = MAIN
inputs = _prompts.inputs
measured = _prompts.measured
fits = no_objection


class Options(PromptOptions):
    """Options of `speculate: {method: lookup}`."""

    longest_match: int = Field(default=3, ge=1, le=8)
    """Tokens that a match has at most; it has at least 2, or this."""
    tokens: int = Field(default=8, ge=1, le=31)
    """Tokens to draft after a longest match; half as many for each token that a match is shorter."""

    def lengths(self) -> dict[int, int]:
        """Return tokens that matched → tokens to draft."""
        shortest = min(2, self.longest_match)
        return {
            match: max(1, self.tokens >> (self.longest_match - match))
            for match in range(self.longest_match, shortest - 1, -1)
        }


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield why this model can't be speculated on, or these prompts not be read."""
    yield from _prompts.check(options, facts)
    if options.tokens >= facts.max_positions:
        message = f"{options.tokens} draft tokens don't fit into the model's context of {facts.max_positions}"
        fix = f"set tokens below {facts.max_positions}"
        yield Problem(code="draft-exceeds-context", message=message, fix=fix, loc=("tokens",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Writing a page of JSON takes no time worth estimating."""
    return Estimate(seconds=0.2, peak_bytes=80_000_000, disk_bytes=1000)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the same model with a lookup beside it."""
    return facts.having("prompt_lookup")


def run(options: Options, job: Job) -> Facts:
    """Write speculator.json: parameters, and how to tell servers of them."""
    from optikit.deploy import support, vllm
    from optikit.runtime.speculation.speculator import SPECULATOR, Speculator

    lengths = options.lengths()
    speculator = Speculator(
        method="lookup", lengths=lengths, min_window=2 if options.exact else 1, acceptor=options.acceptor
    )
    servers = {
        "vllm": {"speculative_config": vllm.vllm("lookup", tokens=options.tokens, longest_match=max(lengths))},
        "transformers": vllm.transformers_arguments("lookup", tokens=options.tokens, longest_match=max(lengths)),
    }
    found = speculator.as_json() | {"servers": servers, "loads_in": support.loads_in("lookup")}
    (job.dest / SPECULATOR).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return {"lengths": speculator.as_json()["lengths"], "loads_in": found["loads_in"]}
