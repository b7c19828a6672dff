"""What a calibrated walk takes, by its shapes: the same law for every technique that walks.

Rates are of two cores with bf16 matrix units (Intel Xeon with AMX), measured on SmolLM2-135M over 16,384 and 32,768
tokens; other processors differ by what they multiply per second, and the report tells what it really took.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from optikit.calibration.budget import BATCH_TOKENS, PAUSED_MOST, paused_bytes_per_token
from optikit.models import architectures
from optikit.models.architectures import Architecture
from optikit.models.facts import ModelFacts
from optikit.stage import Estimate, directory_bytes

START_S = 10
"""Importing libraries, reading and tokenizing the text."""
FORWARD_S = 1e-11
"""Per weight and token: a block's forward pass."""
GRAM_S = 1.05e-11
"""Per weight and token: the Gram matrix of inputs, or what outputs lack."""
BASE_BYTES = 360_000_000
"""Libraries."""
DATA_FREE_BYTES = 495_000_000
"""The same, and some strips in float32."""
BF16, FLOAT = 2, 4


def data_free_peak(facts: ModelFacts, *, element_bytes: int = 1) -> int:
    """Return the peak memory, in bytes, of a walk that holds strips of weights and what one commit takes of results."""
    largest = max((rows * columns for rows, columns in facts.linears.values()), default=0)
    block = facts.linear_elements // max(facts.layers, 1)
    return DATA_FREE_BYTES + element_bytes * max(largest, min(block, 1 << 27))


class Held(NamedTuple):
    """How many matrices of one group of linears are alive at once, float32.

    Attributes:
        squares: (in, in): sums of inputs, what they are factored into.
        stacked: (rows of all linears, in): weights, what they should become, what is tried.
    """

    squares: int
    stacked: int


NORMS = Held(0, 6)
GRAM = Held(3, 6)
"""A Gram matrix, a factor of it, and that one's inverse."""
PAIRED = Held(4, 6)
"""Gram matrices of the tokens that a correction is fitted to and of those held out, what outputs lack on either; then
one that is damped, and its factor."""


def estimate(
    facts: ModelFacts,
    tokens: int,
    *,
    passes: int,
    grams: int,
    seconds_per_weight: float,
    written_bytes: int,
    held: Held,
) -> Estimate:
    """Estimate a walk.

    Args:
        facts: The model.
        tokens: Calibration tokens.
        passes: Forward passes of each block; 2 where the dense model runs beside.
        grams: Products of inputs with themselves or with what is lacking.
        seconds_per_weight: What the technique does to a weight, whatever the number of tokens.
        written_bytes: Size of the result's weights.
        held: Matrices of a group that are alive at once.
    """
    work = facts.linear_elements * tokens
    block = FLOAT * facts.walked_elements
    widest = max(facts.hidden, facts.intermediate)
    paused = min(PAUSED_MOST, passes * tokens * paused_bytes_per_token(facts.hidden, widest, BF16))
    way = FLOAT * min(tokens, BATCH_TOKENS) * (6 * facts.hidden + 3 * facts.intermediate)
    given = FLOAT * passes * tokens * facts.hidden if facts.experts else 0  # by the experts that had their turn
    stream = passes * tokens * facts.hidden * BF16
    return Estimate(
        seconds=START_S + work * (passes * FORWARD_S + grams * GRAM_S) + facts.linear_elements * seconds_per_weight,
        peak_bytes=BASE_BYTES + way + passes * block + _statistic_bytes(facts, held) + paused + given,
        disk_bytes=directory_bytes(written_bytes, facts.vocab),
        spare_bytes=paused,
        scratch_bytes=written_bytes + 2 * stream,
    )


def _statistic_bytes(facts: ModelFacts, held: Held) -> int:
    """Return the memory for the matrices of the group that needs most of it."""
    return max(
        (FLOAT * (held.squares * wide * wide + held.stacked * rows * wide) for rows, wide in _groups(facts)), default=0
    )


def _groups(facts: ModelFacts) -> Iterator[tuple[int, int]]:
    """Yield of the linears of a block that see the same input how many rows they have together, and how wide it is."""
    row = architectures.find(facts.model_type, facts.config)
    groups = list(_shapes(facts, row)) if row else []
    if facts.experts or not groups:  # each expert's linears are changed on their own
        groups += [[shape] for shape in set(facts.linears.values())]
    for shapes in groups:
        yield sum(rows for rows, _ in shapes), shapes[0][1]


def _shapes(facts: ModelFacts, row: Architecture) -> Iterator[list[tuple[int, int]]]:
    """Yield the shapes of each group of the first block, as far as it has such linears."""
    for group in row.groups:
        names = (f"{row.block(0)}.{name}" for name in group)
        if shapes := [facts.linears[name] for name in names if name in facts.linears]:
            yield shapes
