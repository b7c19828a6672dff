"""What a calibrated walk takes, by its shapes: the same law for every technique that walks.

Rates are of two cores with bf16 matrix units (Intel Xeon with AMX), measured on SmolLM2-135M over 16,384 and 32,768
tokens; other processors differ by what they multiply per second, and the report tells what it really took.
"""

from __future__ import annotations

from optikit.calibration.budget import PAUSED_MOST, paused_bytes_per_token
from optikit.models.facts import ModelFacts
from optikit.stage import Estimate, directory_bytes

START_S = 10
"""Importing libraries, reading and tokenizing the text."""
FORWARD_S = 1e-11
"""Per weight and token: a block's forward pass."""
GRAM_S = 1.05e-11
"""Per weight and token: the Gram matrix of inputs, or what outputs lack."""
BASE_BYTES = 520_000_000
"""Libraries, and what a batch needs on its way."""
BF16 = 2


def estimate(
    facts: ModelFacts, tokens: int, *, passes: int, grams: int, seconds_per_weight: float, written_bytes: int
) -> Estimate:
    """Estimate a walk.

    Args:
        facts: The model.
        tokens: Calibration tokens.
        passes: Forward passes of each block; 2 where the dense model runs beside.
        grams: Products of inputs with themselves or with what is lacking.
        seconds_per_weight: What the technique does to a weight, whatever the number of tokens.
        written_bytes: Size of the result's weights.
    """
    work = facts.linear_elements * tokens
    block = 4 * facts.walked_elements
    widest = max(facts.hidden, facts.intermediate)
    held = min(PAUSED_MOST, passes * tokens * paused_bytes_per_token(facts.hidden, widest, BF16))
    given = 4 * passes * tokens * facts.hidden if facts.experts else 0  # by the experts that had their turn
    stream = passes * tokens * facts.hidden * BF16
    return Estimate(
        seconds=START_S + work * (passes * FORWARD_S + grams * GRAM_S) + facts.linear_elements * seconds_per_weight,
        peak_bytes=BASE_BYTES + (1 + passes) * block + 4 * widest * widest + held + given,
        disk_bytes=directory_bytes(written_bytes, facts.vocab),
        spare_bytes=held,
        scratch_bytes=written_bytes + 2 * stream,
    )
